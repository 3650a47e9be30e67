"""Artifacts by targets: what each does on each device, measured where it was, else estimated where that was asked for.

Emulated speeds are shown as such and stand in no front; measured and estimated figures are never set against each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.evals.compare.config import CompareConfig
from llmc.evals.fit import run as fit
from llmc.evals.fit.estimate import estimate, is_exported, memory, model_of
from llmc.evals.report.store import speeds_of, targets_of

PROMPTS = (128, 256, 512, 1024, 2048)  # lengths at which an estimated time to first token is drawn


def matrix(artifacts: list[dict[str, Any]], config: CompareConfig | None = None) -> list[dict[str, Any]]:
    """One cell for each artifact and target with a figure, targets in order of appearance; without a config no estimates:

    {'artifact', 'target', 'source': measured | emulated | estimate, 'unstable', 'decode': {low, mid, high}, 'depth', 'kld',
    'texts', 'first_token': [{'tokens', low, mid, high}], 'memory': {'weights', 'kv', 'rest'} in bytes, 'front', 'basis'}

    texts: the divergence on each; kld: on the first, None where none was measured. front: no other of the same source and
    target is as fast and as near the base.
    """
    asked = config.target if config else ()
    targets = list(dict.fromkeys([*targets_of([a["report"] for a in artifacts]), *asked]))
    cells = []
    for target in targets:
        lacking = [a for a in artifacts if target not in speeds_of(a["report"])]
        estimated = _estimates(lacking, target, config) if config and target in asked else {}
        for a in artifacts:
            if target in speeds_of(a["report"]):
                cells.append(_measured(a, target))
            elif a["name"] in estimated:
                cells.append(estimated[a["name"]])
    for cell in cells:
        cell["front"] = cell["source"] != "emulated" and cell["kld"] is not None and not any(
            _beats(other, cell) for other in cells)
    return cells


def _beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether `a` is as fast and as near the base as `b`, and not its equal: on one device, by one kind of figure."""
    if (a["target"], a["source"]) != (b["target"], b["source"]) or a["kld"] is None:
        return False
    mine, theirs = (a["decode"]["mid"], -a["kld"]["value"]), (b["decode"]["mid"], -b["kld"]["value"])
    return mine != theirs and all(x >= y for x, y in zip(mine, theirs, strict=True))


def _quality(report: dict[str, Any]) -> dict[str, Any]:
    """'kld' and 'texts' of a cell."""
    texts = [t["kld"] for t in report.get("quality", {}).get("texts", []) if t["kld"]]
    return {"kld": texts[0] if texts else None, "texts": texts}


def _measured(a: dict[str, Any], target: str) -> dict[str, Any]:
    s = speeds_of(a["report"])[target]
    lengths = [p["tokens"] for p in s["prefill_curve"]] + [p["depth"] for p in s["decode_curve"]]
    held = max(lengths) + s["protocol"]["generate"]
    weights = a["report"]["artifact"]["size"]["file_bytes"]
    each = s.get("kv", {}).get("bytes_per_token") or 0
    kv = min(each * held, max(0, s["peak_rss"] - weights))
    return {
        "artifact": a["name"], "target": target, "source": "emulated" if s["target"]["emulated"] else "measured",
        "unstable": bool(s["unstable"]), "decode": _quartiles(s["decode"]), "depth": s["protocol"]["depth"],
        **_quality(a["report"]),
        "first_token": [{"tokens": p["tokens"], **_quartiles(p["first_token"])} for p in s["prefill_curve"]],
        "memory": {"weights": weights, "kv": kv, "rest": max(0, s["peak_rss"] - weights - kv)}, "basis": s["protocol"]["cpu"],
    }


def _quartiles(spread: dict[str, Any]) -> dict[str, float]:
    """low and high: the median less and plus half the interquartile range."""
    mid, half = spread["median"], spread["iqr"] / 2
    return {"low": mid - half, "mid": mid, "high": mid + half}


def _estimates(artifacts: list[dict[str, Any]], target: str, config: CompareConfig) -> dict[str, dict[str, Any]]:
    """By the artifact's name, of those whose file is there to tell its shape."""
    models = {a["name"]: model_of(path) for a in artifacts if is_exported(path := Path(a["report"]["artifact"]["path"]))}
    if not models:
        return {}
    rates = fit.rates_for(target, [fit.Candidate(n, None, m) for n, m in models.items()], config.targets)
    out = {}
    for a in artifacts:
        if (model := models.get(a["name"])) is None:
            continue
        curve = [{"tokens": n, **first} for n in PROMPTS if (first := estimate(model, rates, prompt=n)["first_token"])]
        ram = int(memory(model, config.context)[1])
        kv = model.kv_bytes(config.context)
        out[a["name"]] = {
            "artifact": a["name"], "target": target, "source": "estimate", "unstable": False, "depth": config.context,
            "decode": estimate(model, rates, depth=config.context)["decode"], **_quality(a["report"]), "first_token": curve,
            "memory": {"weights": model.file_bytes, "kv": kv, "rest": ram - kv - model.file_bytes}, "basis": rates.basis,
        }
    return out
