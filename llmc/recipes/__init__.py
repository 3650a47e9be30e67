"""Recipes: a chain of llmc's commands in one YAML file. Each step is cached by a hash of its inputs, options and code.

    recipe.py   the parsed file, with line numbers            typed.py   steps with the commands' own configs
    commands.py inputs and output of each command (data)      chain.py   inputs of each step, and errors in the chain
    identity.py cache keys of steps                           jobs.py    steps as jobs in the run folder
    plan.py     the jobs to run, their time and size          run.py     runs the jobs   sweep.py   runs many variants
    report.py, page.py   the result of each step, as JSON, Markdown and one HTML page
"""
