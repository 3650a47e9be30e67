"""Suggest what to build if no candidate fits a device. The roofline estimate is solved for the size of the file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from llmc.console import size
from llmc.evals.fit.config import FitConfig
from llmc.evals.fit.estimate import OTHER, Model, Rates, estimate, memory
from llmc.evals.fit.schema import Judged, Limits, Name
from llmc.evals.report.sections import QualityName
from llmc.formats.types import BLOCK_TYPES

LEAST_CONTEXT = 128  # a shorter context, in tokens, is not suggested


def smaller(model: Model, rates: Rates, limits: Limits, context: int) -> Iterator[str]:
    """Suggest the file size that the decode, memory and size limits allow, a type of this size, and a context that fits."""
    allowed = {what: bytes for what, bytes in (
        ("decode", _by_decode(model, rates, limits, context)), ("ram", _by_ram(model, limits, context)),
        ("size", limits["size"][0] if "size" in limits else None)) if bytes is not None and bytes < model.file_bytes}
    if allowed:
        what = min(allowed, key=lambda k: allowed[k])
        yield from _types(model, allowed[what], what)
    if "ram" in limits and memory(model, context)[2] > limits["ram"][0]:
        each = model.kv_bytes(context) / context
        left = limits["ram"][0] - (memory(model, context)[2] - model.kv_bytes(context))
        if each > 0 and left / each >= LEAST_CONTEXT:
            yield f"or keep {model.name} and run it with --context {int(left / each)}"


def _by_decode(model: Model, rates: Rates, limits: Limits, context: int) -> float | None:
    """Largest file, in bytes, whose low estimate meets the decode limit; 0 if even an empty file is too slow."""
    if "decode" not in limits:
        return None
    low = [rates.read.get(kind, rates.read[OTHER])[0] for kind in model.token_bytes]
    total = sum(model.token_bytes.values())
    rate = total / sum(n / r for n, r in zip(model.token_bytes.values(), low, strict=True))
    seconds = 1 / limits["decode"][0] - model.layers * rates.layer_seconds[2] - model.kv_bytes(context) / rates.read[OTHER][0]
    held = sum(model.held_bytes.values())  # a token reads this share of it: total / held
    return max(0.0, seconds * rate) * held / total + (model.file_bytes - held)


def _by_ram(model: Model, limits: Limits, context: int) -> float | None:
    """Largest file, in bytes, that fits into the memory if every weight is held twice (repacked)."""
    if "ram" not in limits:
        return None
    high = memory(model, context)[2]
    return max(0.0, model.file_bytes * (1 - (high - limits["ram"][0]) / (model.file_bytes + sum(model.held_bytes.values()))))


def _types(model: Model, file_bytes: float, what: str) -> Iterator[str]:
    """Suggest the largest quantization type of the decoder that fits into `file_bytes`."""
    why = {"decode": "to meet the decode limit", "ram": "to meet the memory limit", "size": "to meet the size limit"}[what]
    # embedding and lm_head get at most 8 bits, or keep their types if these are smaller
    eight = 34 / 32 * model.vocabulary * model.heads * (model.cache["head_dim"] if model.cache else 128)
    rest = min(model.file_bytes - model.decoder_bytes, eight)
    bits = 8 * (file_bytes - rest) / max(1, model.decoder_weights or model.prefill_weights)
    # mxfp4 and the ternary types are for models trained on them: other types of their size lose less
    fitting = [t for t in BLOCK_TYPES.values() if t.bits_per_weight <= bits and not t.exponent and len(t.levels) > 3]
    if not fitting:
        yield (f"{why}, the file may have at most {size(max(0.0, file_bytes))}. This leaves {max(0.0, bits):.2f} bits per "
               "weight, less than any type has. Prune or distill the model first (`llmc prune`, `llmc distill`), or use a "
               "smaller base")
        return
    best = max(fitting, key=lambda t: (t.bits_per_weight, t.name))
    yield (f"{why}, the file may have at most {size(file_bytes)}: "
           f"`llmc quantize MODEL --target-size {int(file_bytes / 1e6)}MB`, or --type {best.name} "
           f"({best.bits_per_weight:.2f} bits per weight; the limit leaves {bits:.2f})")


def quality(judged: list[Judged], limits: Limits) -> Iterator[str]:
    """Suggest how to meet the quality limits: evaluate candidates without results, else use more bits and heal."""
    names: dict[Name, str] = {"kld": "KL divergence", "kld_p99": "KL divergence of 99 % of the tokens",
                              "kld_p999": "KL divergence of 99.9 % of the tokens", "top1": "top-1 agreement"}
    for name, what in names.items():
        answers = {c["name"]: c["figures"][name]["answer"] for c in judged if name in limits}
        if unknown := [n for n, a in answers.items() if a == "unknown"]:
            yield f"{what} was not measured for {', '.join(unknown)}: `llmc eval ARTIFACT --base BASE -o REPORT`"
        elif answers and "yes" not in answers.values():
            target = f"--target-kld {limits['kld'][0]:g}" if name == "kld" else "--target-size with more bytes"
            yield f"no candidate certainly meets the limit of {what}: `llmc quantize … {target}`, then `llmc heal`"


def devices(candidates: list[Any], judged: list[Judged], target: str, limits: Limits,
            config: FitConfig) -> Iterator[str]:
    """Suggest the slowest device with a profile on which a candidate fits, by the pessimistic end of each estimate.

    Candidates that miss a quality or size limit are left out.
    """
    from llmc.evals.fit.estimate import rates_of_profile
    from llmc.runtimes.targets.profile import profile_ids, read_profile

    good = {c["name"] for c in judged
            if all(f.get("answer", "yes") == "yes" for k, f in c["figures"].items() if k in (*get_args(QualityName), "size"))}
    models = [c.model for c in candidates if c.model and c.name in good]
    rates = [rates_of_profile(read_profile(id)) for id in profile_ids() if id != target]
    for r in sorted(rates, key=lambda r: r.read[OTHER][1]):
        for model in models:
            e = estimate(model, r, config.context, config.prompt, config.context)
            first = e["first_token"]["high"] if e["first_token"] else float("inf")
            if (e["decode"]["low"] >= limits.get("decode", (0.0, False))[0]
                    and e["memory"]["high"] <= min(limits.get("ram", (float("inf"), True))[0], r.ram)
                    and ("first_token" not in limits or first <= limits["first_token"][0])):
                yield f"{model.name} would fit the next device up, {r.target} (estimate)"
                return
