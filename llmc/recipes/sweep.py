"""`llmc sweep`: a recipe with every combination of option values. Variants share the steps that are the same.

Files are compared by size, KL divergence from the base and decode speed. A file is on the Pareto front if no other file is
at least as good in every figure that was measured for both, and better in one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import cast

from llmc.console import say
from llmc.errors import UserError
from llmc.evals.report.sections import speeds_of, texts_of
from llmc.files import staged_file, write_json
from llmc.formats.manifest import versions
from llmc.recipes import report
from llmc.recipes.chain import Chain, load
from llmc.recipes.commands import EXPORTED
from llmc.recipes.config import SweepConfig
from llmc.recipes.executors import EXECUTORS
from llmc.recipes.jobs import Job, jobs_of, open_folder
from llmc.recipes.plan import RESUME, RUN, lines, plan, states
from llmc.recipes.recipe import setting
from llmc.recipes.run import used
from llmc.recipes.schema import Measured, Point, RunArtifact, SweepPlan, SweepReport, Variant

MAX_VARIANTS = 256  # more is probably a mistake
KIND = "llmc-sweep-report"


def sweep(recipe: str | Path, config: SweepConfig) -> SweepReport | SweepPlan:
    """Run the jobs of all variants that are not cached, and return the report; with `dry_run` return the plan.

    Raises UserError with the problems of all variants before a weight is read. If a variant fails while it runs, its
    'failed' has the errors, and the others continue.
    """
    settings = dict(setting(s) for s in config.set)
    choices = variations(config.vary)
    chains = _chains(recipe, config, settings, choices)
    name = next(iter(chains.values())).recipe.name
    folder = config.out or Path(name)
    base = next(iter(chains.values())).base
    hashes = open_folder(folder, base)
    jobs = {variant: jobs_of(chain, folder, hashes) for variant, chain in chains.items()}
    unique, owner = _unique(jobs, chains)
    if config.dry_run:
        return {"recipe": name, "folder": str(folder), "variants": list(chains),
                "plan": plan(unique, base, states(unique, hashes))}
    with used(folder):
        state = states(unique, hashes)  # not before: another run may just have finished some
        hashes.save()
        todo = {i: j for i, j in unique.items() if state[i][0] in (RUN, RESUME)}
        say(f"{len(chains)} variants with {sum(map(len, jobs.values()))} steps, {len(unique)} of them different")
        if todo:
            say(lines(plan(unique, base, state)))
        failed = EXECUTORS[config.executor](todo, {i: (jobs[owner[i]], chains[owner[i]]) for i in todo})
        return _publish(name, folder, chains, jobs, failed, list(todo))


def variations(vary: tuple[str, ...]) -> dict[str, list[str]]:
    """Parse the --vary arguments: {'quantize.type': ['q4_0', 'q4_k'], …}."""
    found: dict[str, list[str]] = {}
    for text in vary:
        key, sign, values = text.partition("=")
        listed = [v.strip() for v in values.split(",") if v.strip()]
        if not sign or not listed or not key.strip():
            raise UserError(f"--vary {text}: write it like --vary quantize.type=q4_0,q4_k", "give STEP.OPTION=VALUE,VALUE,…")
        if key.strip() in found:
            raise UserError(f"--vary names {key.strip()} twice", "give all its values in one list")
        found[key.strip()] = listed
    return found


def _chains(recipe: str | Path, config: SweepConfig, settings: dict[str, str],
            choices: dict[str, list[str]]) -> dict[str, Chain]:
    """{variant: chain}; a variant's name is its settings. Raises UserError with the problems of all variants."""
    combinations = list(product(*choices.values()))
    if len(combinations) > MAX_VARIANTS:
        raise UserError(f"{len(combinations)} variants are more than {MAX_VARIANTS}",
                        "vary fewer options, or run several sweeps")
    chains, problems = {}, []
    for values in combinations:
        chosen = dict(zip(choices, values, strict=True))
        variant = " ".join(f"{k}={v}" for k, v in chosen.items())
        try:
            chains[variant] = load(recipe, config.model, settings | chosen)
        except UserError as e:
            problems.append(f"{variant}: {e.problem}")
    if problems:
        raise UserError("\n".join(problems), "nothing was read or run")
    return chains


def _unique(jobs: dict[str, dict[str, Job]], chains: dict[str, Chain]) -> tuple[dict[str, Job], dict[str, str]]:
    """({name: job}, {name: first variant with it}) of the different jobs. Names, also of inputs, are folder names."""
    found: dict[str, Job] = {}
    owner: dict[str, str] = {}
    for variant, own in jobs.items():
        for job in own.values():
            label = job.folder.name
            if label not in found:
                renamed = tuple(own[i].folder.name if i in own else i for i in job.inputs)
                teacher = own[job.teacher].folder.name if job.teacher in own else job.teacher
                found[label] = replace(job, id=label, inputs=renamed, teacher=teacher)
                owner[label] = variant
    return found, owner


def _publish(name: str, folder: Path, chains: dict[str, Chain], jobs: dict[str, dict[str, Job]],
             failed: dict[str, str], ran: list[str]) -> SweepReport:
    """Write the report and the pages of a sweep. Figures come from the variants without failures."""
    variants: list[Variant] = []
    artifacts: list[Measured] = []
    for variant, chain in chains.items():
        own = jobs[variant]
        broken = {failed[j.folder.name] for j in own.values() if j.folder.name in failed}
        entry: Variant = {"variant": variant, "failed": sorted(broken), "steps": [j.folder.name for j in own.values()]}
        if not broken:
            made = report.build(chain, own, folder)
            entry["gates"], entry["passed"], entry["seconds"] = made["gates"], made["passed"], made["seconds"]
            artifacts += [_measured(a, variant) for a in made["artifacts"] if a["kind"] in EXPORTED]
        variants.append(entry)
    shared: dict[str, Point] = {}
    for a in artifacts:  # a file that several variants share, as the base's export, is one point
        shared.setdefault(a["path"], {**a, "variants": [], "front": False})["variants"].append(a["variant"])
    points = list(shared.values())
    for p in points:
        p["variant"] = p["variant"] if len(p["variants"]) < len(chains) or len(chains) == 1 else "every variant"
        p["front"] = on_front(p, points)
    result: SweepReport = {
        "schema": report.SCHEMA, "kind": KIND, "recipe": name, "folder": str(folder), "variants": variants,
        "artifacts": points, "passed": all(v.get("passed", False) for v in variants), "versions": versions()}
    from llmc.recipes.sweep_page import markdown, page

    for suffix, text in ((".html", page(result)), (".md", markdown(result))):
        with staged_file(folder / f"{name}-sweep{suffix}") as tmp:
            tmp.write_text(text, encoding="utf-8")
    write_json(folder / f"{name}-sweep.json", result)
    return cast(SweepReport, {**json.loads(json.dumps(result)), "ran": ran})


def _measured(artifact: RunArtifact, variant: str) -> Measured:
    """A file's bytes, KL divergence on the first text, and decode speed on the first real target (None: unknown)."""
    report = artifact.get("report")
    text = next(iter(texts_of(report)), None)
    speed = next((s for s in speeds_of(report).values() if not s["target"]["emulated"]), None)
    return {"name": artifact["name"], "variant": variant, "kind": artifact["kind"], "path": artifact["path"],
            "from": artifact["from"], "bytes": artifact["bytes"], "text": text and text["protocol"]["text"],
            "perplexity": text and text["perplexity"], "kld": text and text["kld"],
            "decode": speed and speed["decode"]["median"], "unstable": bool(speed and speed["unstable"])}


def objectives(point: Measured) -> tuple[float | None, float | None, float | None]:
    """(bytes, divergence, minus tokens/s): less is better."""
    return (point["bytes"], point["kld"] and point["kld"]["value"], None if point["decode"] is None else -point["decode"])


def on_front(point: Measured, points: Sequence[Measured]) -> bool:
    """Whether no other file beats it in the figures measured for both. False if its size or KL divergence is unknown."""
    own = objectives(point)
    if own[0] is None or own[1] is None:
        return False
    for other in points:
        others = objectives(other)
        pairs = [(a, b) for a, b in zip(own, others, strict=True) if a is not None and b is not None]
        if others[1] is not None and all(b <= a for a, b in pairs) and any(b < a for a, b in pairs):
            return False
    return True
