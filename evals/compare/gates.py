"""Gates: limits that a candidate must meet on every text and target on which it was measured.

The whole interval of the figure must meet the limit, as in `llmc ship` (see llmc.evals.interval).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from llmc.errors import GateFailedError, UserError
from llmc.evals.compare.config import CompareConfig
from llmc.evals.compare.schema import Compared, GateResult
from llmc.evals.interval import Interval, around, meets
from llmc.evals.report.sections import QualityName, quality_stat, speeds_of, texts_of
from llmc.evals.shared_options import parse_number


@dataclass(frozen=True)
class Gate:
    """A limit on one metric.

    option: name on the command line. attribute: name in CompareConfig. unit: unit of the option's text. factor: converts the
    option's number to the limit. most: an upper limit, otherwise a lower one. measure: how to measure the metric, for the
    error message.
    """

    option: str
    attribute: str
    unit: str
    factor: float
    most: bool
    measure: str


GATES = (
    Gate("--max-ppl-increase", "max_ppl_increase", "%", 0.01, True, "`llmc eval` the first report's artifact too"),
    Gate("--max-kld", "max_kld", "", 1.0, True, "`llmc eval … --base BASE`"),
    Gate("--max-kld-p99", "max_kld_p99", "", 1.0, True, "`llmc eval … --base BASE`"),
    Gate("--max-kld-p999", "max_kld_p999", "", 1.0, True, "`llmc eval … --base BASE`"),
    Gate("--min-top1", "min_top1", "%", 0.01, False, "`llmc eval … --base BASE`"),
    Gate("--min-decode-speedup", "min_decode_speedup", "x", 1.0, False, "`llmc bench` both artifacts"),
)
EXAMPLES = {"--max-ppl-increase": "5%", "--max-kld": "0.1", "--max-kld-p99": "1", "--max-kld-p999": "3",
            "--min-top1": "80%", "--min-decode-speedup": "2x"}


def parse(config: CompareConfig) -> list[tuple[Gate, float]]:
    """The gates that the options set, each with its limit as a fraction, in nats, or as a factor."""
    limits = []
    for gate in GATES:
        written = getattr(config, gate.attribute)
        if written is None:
            continue
        number = parse_number(gate.option, written, gate.unit, f"{gate.option} {EXAMPLES[gate.option]}")
        limits.append((gate, number * gate.factor))
    return limits


def apply(limits: list[tuple[Gate, float]], candidates: list[Compared]) -> list[GateResult]:
    """Check every candidate against every limit. Raises UserError if a candidate has no value for a gate."""
    results: list[GateResult] = []
    for gate, limit in limits:
        for candidate in candidates:
            values = _values(gate, candidate)
            if not values:
                raise UserError(f"{gate.option}: the reports hold no such figure for {candidate['name']}",
                                f"measure it first: {gate.measure}")
            for text, interval, stable in values:
                answer = meets(interval, limit, gate.most) if stable else "maybe"
                low, value, high = interval
                results.append({"gate": gate.option, "artifact": candidate["name"], "text": text, "limit": limit,
                                "value": value, "low": low, "high": high, "answer": answer, "passed": answer == "yes"})
    return results


def _values(gate: Gate, candidate: Compared) -> list[tuple[str | None, Interval, bool]]:
    """Return [(text or target, interval, whether it is stable)] for a gate. It is empty if the metric was not measured."""
    changes, texts = candidate["differences"], texts_of(candidate["report"])
    if gate.attribute == "min_decode_speedup":
        speeds, after = (changes and changes["speeds"]) or {}, speeds_of(candidate["report"])
        return [(t, around(found["decode_speedup"]), not after[t]["unstable"]) for t, found in speeds.items()]
    if gate.attribute == "max_ppl_increase":
        return [(t["text"], around(t["perplexity_ratio"], less=1.0), True) for t in (changes and changes["texts"]) or []]
    metric = cast(QualityName, gate.attribute.partition("_")[2])
    return [(t["protocol"]["text"], around(stat, least=0.0), True) for t in texts if (stat := quality_stat(t, metric))]


def describe(result: GateResult) -> str:
    """A result as text, as in 'small.gguf on wiki: --max-kld 0.1, measured 0.271 (0.25 to 0.292)'."""
    gate = next(g for g in GATES if g.option == result["gate"])
    limit, value, low, high = (f"{v / gate.factor:.4g}{gate.unit}"
                               for v in (result["limit"], result["value"], result["low"], result["high"]))
    where = f" on {result['text']}" if result["text"] else ""
    interval = "" if low == high else f" ({low} to {high})"
    return f"{result['artifact']}{where}: {gate.option} {limit}, measured {value}{interval}"


def verdict(result: GateResult) -> str:
    """'passed', 'MISSED', or 'NOT DECIDED' if the limit lies inside the interval or the speed is unstable."""
    return "passed" if result["passed"] else "NOT DECIDED" if result["answer"] == "maybe" else "MISSED"


def enforce(results: list[GateResult]) -> None:
    """Raise GateFailedError that lists every gate that was not passed. Returns nothing if all gates passed."""
    failed = [r for r in results if not r["passed"]]
    if not failed:
        return
    undecided = sum(r["answer"] == "maybe" for r in failed)
    count = f"{len(failed) - undecided} of {len(results)} gates missed" + (f", {undecided} not decided" if undecided else "")
    hint = "do not ship it, or change the gate on purpose"
    if undecided:
        hint += "; what is not decided needs more text (llmc eval --chunks) or a quieter machine (llmc bench)"
    raise GateFailedError(f"{count}:\n  " + "\n  ".join(f"{verdict(r)}: {describe(r)}" for r in failed), hint)
