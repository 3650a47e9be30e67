"""`llmc fit`: find the candidates that meet the limits on each device, by measurement if there is one, else by estimate.

A value is `measured`, with the interval of its repetitions, or an `estimate`, with its interval. It meets a limit (`yes`),
misses it (`no`), or the limit lies inside its interval (`maybe`). Without a measurement and an estimate it is `unknown`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from llmc.errors import UserError
from llmc.evals.fit.config import FitConfig
from llmc.evals.fit.estimate import Model, Rates, estimate, is_exported, memory, model_of
from llmc.evals.fit.schema import Answer, Fit, FitTarget, Judged, JudgedFigure, Limits, Name
from llmc.evals.interval import Interval, around, meets
from llmc.evals.report.schema import Facts, Report, Speed, Spread
from llmc.evals.report.sections import QualityName, quality_stat, speed_on, texts_of, tokens_held
from llmc.evals.shared_options import parse_bytes, parse_number

if TYPE_CHECKING:
    from llmc.runtimes.targets.target import Target

ORDER: tuple[Answer, ...] = ("no", "unknown", "maybe", "yes")  # from worst to best; a candidate gets its worst answer


@dataclass(frozen=True)
class Figure:
    """A value with its interval. source: 'measured' or 'estimate'. note: how it was measured, and UNSTABLE if it is."""

    interval: Interval
    source: str
    note: str = ""


@dataclass(frozen=True)
class Candidate:
    """An artifact to check. model: None if there is only a report and not the artifact's file."""

    name: str
    report: Report | None
    model: Model | None


def fit(config: FitConfig) -> Fit:
    """Check every candidate on every target. Raises UserError for bad limits, unknown targets and unreadable files."""
    limits = limits_of(config)
    candidates = [candidate(item) for item in config.items]
    targets: list[FitTarget] = []
    for name in config.target or ("local-cpu",):
        rates = LazyRates(partial(rates_for, name, candidates, config.targets))
        judged = [judge(c, name, rates, limits, config) for c in candidates]
        fits = any(c["fits"] == "yes" for c in judged)
        suggestions = [] if fits else advice(candidates, judged, name, rates, limits, config)
        basis = rates.known.basis if rates.known else None
        targets.append({"target": name, "basis": basis, "candidates": judged, "fits": fits, "advice": suggestions})
    return {"context": config.context, "prompt": config.prompt, "limits": {k: v[0] for k, v in limits.items()},
            "targets": targets, "fits": all(t["fits"] for t in targets)}


class LazyRates:
    """Rates that are read, or measured for half a minute, when they are first needed. Until then `known` is None."""

    def __init__(self, make: Callable[[], Rates]) -> None:
        self.make = make
        self.known: Rates | None = None

    def get(self) -> Rates:
        self.known = self.known or self.make()
        return self.known


# ---------------------------------------------------------------------------------------------------------------- limits


def limits_of(config: FitConfig) -> Limits:
    """The limits that the options set. Raises UserError for a size or a share that cannot be parsed."""
    share = parse_number("--min-top1", config.min_top1, "%", "--min-top1 80%") if config.min_top1 else None
    limits: dict[Name, tuple[float | None, bool]] = {
        "decode": (config.min_decode, False), "first_token": (config.max_first_token, True), "kld": (config.max_kld, True),
        "kld_p99": (config.max_kld_p99, True), "kld_p999": (config.max_kld_p999, True),
        "top1": (None if share is None else share / 100, False),
        "ram": (parse_bytes("--max-ram", config.max_ram) if config.max_ram else None, True),
        "size": (parse_bytes("--max-size", config.max_size) if config.max_size else None, True),
    }
    return {k: (v, upper) for k, (v, upper) in limits.items() if v is not None}


def answer(figure: Figure | None, limit: float, most: bool) -> Answer:
    """Whether the value meets the limit. most: the limit is an upper one. An unstable measurement gives `maybe`."""
    if figure is None:
        return "unknown"
    return "maybe" if "UNSTABLE" in figure.note else meets(figure.interval, limit, most)


def judge(c: Candidate, target: str, rates: LazyRates, limits: Limits, config: FitConfig,
          estimates: bool = True) -> Judged:
    """Check one candidate on one target: every metric with a limit. With `estimates`, decode and ram are always included."""
    figures: dict[Name, JudgedFigure] = {}
    always: tuple[Name, ...] = ("decode", "ram") if estimates else ()
    for name in dict.fromkeys([*limits, *always]):
        figure = _FIGURES[name](c, target, rates if estimates else None, config)
        found: JudgedFigure = {}
        if figure is not None:
            low, mid, high = figure.interval
            found = {"low": low, "mid": mid, "high": high, "source": figure.source, "note": figure.note}
        if name in limits:
            limit, most = limits[name]
            found["limit"], found["answer"] = limit, answer(figure, limit, most)
        figures[name] = found
    given = [f["answer"] for f in figures.values() if "answer" in f]
    read = sum(c.model.token_bytes.values()) if c.model else c.report["artifact"]["size"]["token_bytes"] if c.report else None
    return {"name": c.name, "token_bytes": read, "fits": min(given, key=ORDER.index, default="yes"), "figures": figures}


# --------------------------------------------------------------------------------------------------------------- figures


def _measured(s: Spread, section: Speed, note: str) -> Figure:
    values = sorted(s["values"])
    doubt = "; UNSTABLE" if section["unstable"] else ""
    low, high = (values[len(values) // 4], values[-1 - len(values) // 4])
    return Figure((low, s["median"], high), "measured", note + doubt)


def _estimated(c: Candidate, rates: LazyRates | None, config: FitConfig,
               key: Literal["decode", "first_token"]) -> Figure | None:
    if c.model is None or rates is None:
        return None
    found = estimate(c.model, rates.get(), config.context, config.prompt, config.context)[key]
    return None if found is None else Figure((found["low"], found["mid"], found["high"]), "estimate")


def _decode(c: Candidate, target: str, rates: LazyRates | None, config: FitConfig) -> Figure | None:
    """Decode speed in tokens/s, measured at the largest depth that is not more than the context; else an estimate."""
    if (s := speed_on(c.report, target)) is None:
        return _estimated(c, rates, config, "decode")
    curve = s["decode_curve"]
    point = max((p for p in curve if p["depth"] <= config.context), key=lambda p: int(p["depth"]), default=curve[0])
    return _measured(point["decode"], s, f"at depth {point['depth']}")


def _first_token(c: Candidate, target: str, rates: LazyRates | None, config: FitConfig) -> Figure | None:
    """Seconds to the first token, measured with a prompt of exactly `config.prompt` tokens; else an estimate."""
    s = speed_on(c.report, target)
    if s is not None:
        for point in s["prefill_curve"]:
            if point["tokens"] == config.prompt:
                return _measured(point["first_token"], s, f"{config.prompt} tokens")
    return _estimated(c, rates, config, "first_token")


def _ram(c: Candidate, target: str, rates: LazyRates | None, config: FitConfig) -> Figure | None:
    """Bytes of memory: the peak of the bench, plus the rest of the KV cache up to the context; else an estimate."""
    s = speed_on(c.report, target)
    if s is not None:
        more = c.model.kv_bytes(config.context) - c.model.kv_bytes(tokens_held(s)) if c.model else 0
        value = float(s["peak_rss"] + max(0, more))
        note = f"peak, with a KV cache of {config.context} tokens" if more > 0 else "peak"
        return Figure((value, value, value), "measured", note)
    if c.model is None or rates is None:
        return None
    return Figure(memory(c.model, config.context), "estimate")


def _quality(key: QualityName, c: Candidate, target: str, rates: LazyRates | None,
             config: FitConfig) -> Figure | None:
    """The value of the worst text, plus and minus two standard errors."""
    found = [(stat["value"], around(stat, least=0.0), t["protocol"]["text"])
             for t in texts_of(c.report) if (stat := quality_stat(t, key))]
    if not found:
        return None
    _, interval, text = (min if key == "top1" else max)(found, key=lambda f: f[0])
    return Figure(interval, "measured", text)


def _size(c: Candidate, target: str, rates: LazyRates | None, config: FitConfig) -> Figure | None:
    if c.model:
        value = float(c.model.file_bytes)
    elif c.report:
        value = float(c.report["artifact"]["size"]["file_bytes"])
    else:
        return None
    return Figure((value, value, value), "measured", "file")


_FIGURES: dict[Name, Callable[[Candidate, str, LazyRates | None, FitConfig], Figure | None]] = {
    "decode": _decode, "first_token": _first_token, "ram": _ram, "size": _size,
    "kld": partial(_quality, "kld"), "kld_p99": partial(_quality, "kld_p99"), "kld_p999": partial(_quality, "kld_p999"),
    "top1": partial(_quality, "top1"),
}

# ------------------------------------------------------------------------------------------------- candidates and targets


def candidate(item: Path) -> Candidate:
    """The candidate of a report or of an artifact. The model of a report's artifact is read from its file, if that exists.

    Raises UserError if there is no such file.
    """
    from llmc.evals.report.store import read_report

    if item.suffix == ".json":
        report = read_report(item)
        path = Path(report["artifact"]["path"])
        there = path if path.exists() else item.parent / path.name
        return Candidate(report["artifact"]["name"], report, model_of(there) if is_exported(there) else None)
    if not item.exists():
        raise UserError(f"there is no {item}", "give .gguf files, ONNX folders or reports")
    return Candidate(item.name, None, model_of(item))


def rates_for(name: str, candidates: list[Candidate], file: Path | None) -> Rates:
    """The rates of a target or of a device profile. name: of a target in `file`, or the id of a profile.

    The rates of this machine are measured. Those of another target come from its profile, or from its probe. Raises UserError
    if there is neither.
    """
    from llmc.evals.fit.estimate import rates_here, rates_of_facts, rates_of_profile
    from llmc.runtimes.targets.profile import profile_ids, read_profile
    from llmc.runtimes.targets.target import load_targets

    targets = load_targets(file)
    if name not in targets and name in profile_ids():
        return rates_of_profile(read_profile(name))
    if name not in targets:
        raise UserError(f"there is no target or device profile {name!r}",
                        f"targets: {', '.join(targets)}; profiles: {', '.join(profile_ids())}")
    target = targets[name]
    if target.address == "local-cpu":
        types = {kind for c in candidates if c.model for kind in c.model.token_bytes}
        return rates_here(types, **_this_machine(target))
    if target.profile:
        return rates_of_profile(read_profile(target.profile), name)
    if "read_bandwidth" in target.facts:
        return rates_of_facts(name, cast(Facts, target.facts))
    raise UserError(f"target {name} has no profile and was not probed",
                    f"give it a profile ({', '.join(profile_ids())}), or run `llmc target probe {name}`")


def _this_machine(target: Target) -> dict[str, Any]:
    """The arguments threads, read_bandwidth and cache of `rates_here`."""
    from llmc.formats.manifest import NOTES
    from llmc.machine import physical_cores
    from llmc.runtimes.targets.device import connect, probed

    known = target.facts if "read_bandwidth" in target.facts else probed(connect(target))
    return {"threads": physical_cores(), "read_bandwidth": known["read_bandwidth"],
            "cache": Path(NOTES) / "kernel-rates.json"}


# ---------------------------------------------------------------------------------------------------------------- advice


def advice(candidates: list[Candidate], judged: list[Judged], target: str, rates: LazyRates,
           limits: Limits, config: FitConfig) -> list[str]:
    """Suggest what to build if no candidate fits, computed from the smallest candidate with a file."""
    from llmc.evals.fit.advice import devices, quality, smaller

    known = [c.model for c in candidates if c.model]
    if not known:
        return ["without a file nothing can be computed: give the .gguf files too, not only reports"]
    model = min(known, key=lambda m: m.file_bytes)
    return [*smaller(model, rates.get(), limits, config.context), *quality(judged, limits),
            *devices(candidates, judged, target, limits, config)]
