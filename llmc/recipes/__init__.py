"""Recipes: a chain of llmc's commands in one YAML file, every step cached by what it was made from.

    recipe.py   the file as written, with its lines           typed.py   steps with the commands' own configs
    commands.py which command takes and gives what (data)     chain.py   what each step works on; illegal chains
    identity.py hashes of what decides a step                 jobs.py    steps as units of work in the run folder
    plan.py     what will be run, how long, how large         run.py     running it   sweep.py   many variants of it
    report.py, page.py   what each step did, as JSON, Markdown and one HTML page
"""
