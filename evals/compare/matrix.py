"""The matrix of artifacts and targets: speed and memory of each artifact on each device, measured or, on request, estimated.

Emulated speeds are marked and are never on the Pareto front. Measured values are never compared with estimates.
"""

from __future__ import annotations

from pathlib import Path

from llmc.evals.compare.config import CompareConfig
from llmc.evals.compare.schema import Cell, Compared, FirstToken
from llmc.evals.fit import run as fit
from llmc.evals.fit.estimate import bounds, estimate, is_exported, memory, model_of
from llmc.evals.fit.schema import Bounds
from llmc.evals.report.schema import Kld, Report, Speed, Spread
from llmc.evals.report.sections import speeds_of, targets_of, texts_of, tokens_held

PROMPTS = (128, 256, 512, 1024, 2048)  # prompt lengths for estimated times to first token


def matrix(artifacts: list[Compared], config: CompareConfig | None = None) -> list[Cell]:
    """Return one cell for each artifact and target with a result. Targets are in order of appearance.

    config: None means that nothing is estimated.
    """
    asked = config.target if config else ()
    targets = list(dict.fromkeys([*targets_of([a["report"] for a in artifacts]), *asked]))
    cells: list[Cell] = []
    for target in targets:
        lacking = [a for a in artifacts if target not in speeds_of(a["report"])]
        estimated = _estimates(lacking, target, config) if config and target in asked else {}
        for a in artifacts:
            if speed := speeds_of(a["report"]).get(target):
                cells.append(_measured(a, speed, target))
            elif a["name"] in estimated:
                cells.append(estimated[a["name"]])
    for cell in cells:
        cell["front"] = cell["source"] != "emulated" and cell["kld"] is not None and not any(
            _dominates(other, cell) for other in cells)
    return cells


def _dominates(a: Cell, b: Cell) -> bool:
    """Whether `a` has the target and source of `b`, is not slower and not farther from the base, and is better in one."""
    if (a["target"], a["source"]) != (b["target"], b["source"]) or a["kld"] is None or b["kld"] is None:
        return False
    of_a, of_b = (a["decode"]["mid"], -a["kld"]["value"]), (b["decode"]["mid"], -b["kld"]["value"])
    return of_a != of_b and all(x >= y for x, y in zip(of_a, of_b, strict=True))


def held(cell: Cell) -> int:
    """The total memory of a cell, in bytes."""
    m = cell["memory"]
    return m["weights"] + m["kv"] + m["rest"]


def _klds(report: Report) -> list[Kld]:
    """The KL divergence on each text."""
    return [k for t in texts_of(report) if (k := t["kld"])]


def _measured(a: Compared, s: Speed, target: str) -> Cell:
    weights = a["report"]["artifact"]["size"]["file_bytes"]
    each = s["kv"]["bytes_per_token"] or 0 if "kv" in s else 0
    kv, klds = min(each * tokens_held(s), max(0, s["peak_rss"] - weights)), _klds(a["report"])
    return {
        "artifact": a["name"], "target": target, "source": "emulated" if s["target"]["emulated"] else "measured",
        "unstable": bool(s["unstable"]), "decode": _quartiles(s["decode"]), "depth": s["protocol"]["depth"],
        "kld": klds[0] if klds else None, "texts": klds,
        "first_token": [{"tokens": p["tokens"], **_quartiles(p["first_token"])} for p in s["prefill_curve"]],
        "memory": {"weights": weights, "kv": kv, "rest": max(0, s["peak_rss"] - weights - kv)}, "basis": s["protocol"]["cpu"],
        "front": False,
    }


def _quartiles(spread: Spread) -> Bounds:
    """Bounds: the median, minus and plus half of the interquartile range."""
    mid, half = spread["median"], spread["iqr"] / 2
    return bounds(mid - half, mid, mid + half)


def _estimates(artifacts: list[Compared], target: str, config: CompareConfig) -> dict[str, Cell]:
    """Estimated cells by the artifact's name. Artifacts without a file are left out, because their shape is unknown."""
    models = {a["name"]: model_of(path) for a in artifacts if is_exported(path := Path(a["report"]["artifact"]["path"]))}
    if not models:
        return {}
    rates = fit.rates_for(target, [fit.Candidate(n, None, m) for n, m in models.items()], config.targets)
    out: dict[str, Cell] = {}
    for a in artifacts:
        if (model := models.get(a["name"])) is None:
            continue
        curve: list[FirstToken] = [
            {"tokens": n, **first} for n in PROMPTS if (first := estimate(model, rates, prompt=n)["first_token"])]
        ram = int(memory(model, config.context)[1])
        kv, klds = model.kv_bytes(config.context), _klds(a["report"])
        out[a["name"]] = {
            "artifact": a["name"], "target": target, "source": "estimate", "unstable": False, "depth": config.context,
            "decode": estimate(model, rates, depth=config.context)["decode"],
            "kld": klds[0] if klds else None, "texts": klds, "first_token": curve,
            "memory": {"weights": model.file_bytes, "kv": kv, "rest": ram - kv - model.file_bytes}, "basis": rates.basis,
            "front": False,
        }
    return out
