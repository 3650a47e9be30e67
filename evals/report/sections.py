"""Functions that read the sections of a report. Each of them accepts None for a missing report, if its type allows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from llmc.evals.report.schema import Base, Budget, BudgetText, Quality, Report, Speed, Stat, Task, Text

QualityName = Literal["kld", "kld_p99", "kld_p999", "top1"]
"""A metric of a text: the mean KL divergence, the one that 99 or 99.9 % of the tokens do not exceed, and top-1 agreement."""


def quality_of(report: Report | None) -> Quality | None:
    """The quality section; None if the artifact was not evaluated."""
    return report.get("quality") if report else None


def base_of(report: Report | None) -> Base | None:
    """The base of the evaluation; None if there was no base."""
    quality = quality_of(report)
    return quality["base"] if quality else None


def texts_of(report: Report | None) -> list[Text]:
    """The evaluated texts, in order; empty if there are none."""
    quality = quality_of(report)
    return quality["texts"] if quality else []


def quality_stat(text: Text, name: QualityName) -> Stat | None:
    """A metric of a text. None if there was no base, or if the report is of a version without it."""
    if name in ("kld", "top1"):
        return text[name]
    tails = text["kld"].get("tails") if text["kld"] else None
    return tails and tails["p99" if name == "kld_p99" else "p999"]


def tasks_of(report: Report | None) -> dict[str, Task]:
    """The evaluated tasks, by name."""
    quality = quality_of(report)
    return {t["protocol"]["task"]: t for t in quality.get("tasks", [])} if quality else {}


def speeds_of(report: Report | None) -> dict[str, Speed]:
    """The speed sections by target, in the order of measurement; empty if there are none."""
    return report.get("speeds", {}) if report else {}


def speed_on(report: Report | None, target: str) -> Speed | None:
    """The speed section of a target; None if there is none, or if the target is emulated."""
    found = speeds_of(report).get(target)
    return None if found is None or found["target"]["emulated"] else found


def targets_of(reports: Iterable[Report | None]) -> list[str]:
    """Every target with a speed section in any of the reports, in order of appearance."""
    return list(dict.fromkeys(target for r in reports for target in speeds_of(r)))


def kv_type(report: Report) -> str | None:
    """The type of the KV cache with which a report was measured. All sections of a report have the same type."""
    quality = quality_of(report)
    sections = [*([quality] if quality else []), *speeds_of(report).values()]
    return next((s["kv"]["type"] for s in sections if "kv" in s), None)


def tokens_held(speed: Speed) -> int:
    """The largest number of tokens in the KV cache during a bench."""
    lengths = [p["tokens"] for p in speed["prefill_curve"]] + [p["depth"] for p in speed["decode_curve"]]
    return max(lengths) + speed["protocol"]["generate"]


def budget_of(report: Report) -> Budget | None:
    """The prediction of the budget that chose the artifact's types, and the measurement. None if there was no budget.

    A later pass `heal` changes the KL divergence but not the size.
    """
    names = [p.get("name") for p in report["artifact"]["passes"]]
    plans = [p["plan"] for p in report["artifact"]["passes"] if p.get("plan")]
    if not plans:
        return None
    plan = plans[-1]
    predicted = float(plan["predicted_kld"])
    measured: list[BudgetText] = [
        {"text": t["protocol"]["text"], "kld": k["value"], "se": k["se"],
         "ratio": k["value"] / predicted if predicted > 0 else None} for t in texts_of(report) if (k := t["kld"])]
    return {"target": plan["target"], "planned_bytes": plan["file_bytes"],
            "file_bytes": report["artifact"]["size"]["file_bytes"] if "export-gguf" in names else None,
            "predicted_kld": predicted, "peer": plan.get("peer"), "healed": "heal" in names, "measured": measured}
