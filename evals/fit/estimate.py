"""Estimate speed and memory of an artifact on a device without a measurement: a roofline, with an interval.

Decoding one token reads every weight once, in its stored type, and the KV cache up to the token. It cannot be faster than
the device reads and unpacks these bytes (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009). A prompt needs two
floating point operations per weight and token. Its attention grows with the square of its length. If the compute time of
attention was measured, it replaces the estimate from the flop rate, and the estimate from the cache's bytes if it is larger:

    decode   1 / (sum over types of bytes / rate(type)  +  attention  +  layers * overhead of a layer)  tokens/s
             attention: KV bytes / rate, or layers heads head_dim * measured(depth) if this is larger
    prefill  n / (2 n weights / flop rate  +  attention)                                                tokens/s
             attention: n^2 layers heads head_dim * 2 / flop rate, or n^2 / 2 layers heads head_dim * measured
    ram      file  +  weights that the CPU repacks  +  KV cache at the context  +  buffers  +  process       bytes

The rates of this machine are measured with llama.cpp (runtimes/targets/kernels.py). The rates of a device profile are those
that published measurements achieved (runtimes/targets/profile.py). An estimate is always labelled as an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from llmc.errors import UserError
from llmc.evals.fit.schema import Bounds, Estimate, LeftOut
from llmc.evals.interval import Interval
from llmc.evals.report.schema import Facts
from llmc.formats import kv
from llmc.formats.artifacts.table import artifact_at, format_of
from llmc.formats.kv import KvShape
from llmc.runtimes.memory import REPACKED, REPACKED_SOMEWHERE

if TYPE_CHECKING:
    from llmc.runtimes.targets.profile import Profile

# Margin for a device profile: boards, cooling and builds differ from those of the published measurements.
BELOW, ABOVE = 0.85, 1.15
# Margin for rates of another, similar device.
LIKE_BELOW, LIKE_ABOVE = 0.75, 1.25
# Margin for rates measured here, because the measured shapes differ from the artifact's.
HERE_BELOW, HERE_ABOVE = 0.85, 1.15
MICRO_BATCH = 512  # tokens that llama.cpp processes at once
PROCESS = 60_000_000  # bytes of Python, numpy and llama.cpp's libraries in a process of `llmc bench`
NO_ATTENTION = "for attention only the bytes of the KV cache are counted: a long context is slower"
OTHER = ""  # key of the rate for all types without a rate of their own


@dataclass(frozen=True)
class Model:
    """The properties of an artifact that decide its speed.

    token_bytes: bytes by stored type of the weights that a decoded token reads. prefill_weights: number of weights that a
    prompt token uses (attention and MLP). Of experts that a router chooses, both count the chosen ones only. cache: shape of
    the KV cache (Artifact.kv_shape), None if the file lacks it. decoder_bytes, decoder_weights: of attention and MLP in the
    file, all experts. read_bytes: as token_bytes, with all experts; empty: token_bytes.
    """

    name: str
    file_bytes: int
    token_bytes: dict[str, int]
    prefill_weights: int
    layers: int
    heads: int
    vocabulary: int
    cache: KvShape | None = None
    decoder_bytes: int = 0
    decoder_weights: int = 0
    read_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def held_bytes(self) -> dict[str, int]:
        """Bytes by stored type of the weights that the runtime holds for matrix products: all experts."""
        return self.read_bytes or self.token_bytes

    def kv_bytes(self, tokens: int, type: str = "f16") -> int:
        """Bytes of K and V of all layers with `tokens` tokens in the cache."""
        return kv.bytes_at(self.cache, tokens, type) if self.cache else 0

    def spans(self, n: int) -> list[tuple[int, int]]:
        """Return [(number of layers, tokens in their KV cache)] after n tokens: full layers, then sliding-window layers."""
        if self.cache is None:
            return []
        sliding = self.cache["sliding_layers"]
        return [(self.cache["layers"] - sliding, n), (sliding, min(n, self.cache["window"] or n))]

    @property
    def query_width(self) -> float:
        """Number of dimensions of all query heads of a layer."""
        return self.heads * float(self.cache["head_dim"]) if self.cache else 0.0


@dataclass(frozen=True)
class Attention:
    """Compute time of attention, in seconds per layer and query dimension (see Model.query_width).

    decode: [(tokens in the cache, seconds per decoded token)], sorted by depth. prefill: seconds per pair of tokens.
    """

    decode: list[tuple[int, Interval]]
    prefill: Interval

    def at(self, depth: int, i: int) -> float:
        """Seconds per decoded token at `depth`, by linear interpolation and extrapolation. i: 0 low, 1 middle, 2 high."""
        points = [(0, 0.0), *((n, t[i]) for n, t in self.decode)]
        after = next((k for k, (n, _) in enumerate(points) if n >= depth and k), len(points) - 1)
        (n0, t0), (n1, t1) = points[after - 1], points[after]
        return t0 + (t1 - t0) * (depth - n0) / (n1 - n0)


@dataclass(frozen=True)
class Rates:
    """The speed of a device. ram: bytes. read: bytes of weights per second, by type (OTHER: all other types).

    flops: floating point operations per second, by type; empty: unknown. layer_seconds: overhead of a layer per decoded
    token, beyond its bytes. attention: compute time by the number of query heads per key head; empty: unknown. basis:
    source of the rates.
    """

    target: str
    basis: str
    ram: int
    read: dict[str, Interval]
    flops: dict[str, Interval]
    layer_seconds: Interval
    attention: dict[int, Attention] = field(default_factory=dict)

    def attention_of(self, model: Model) -> Attention | None:
        """The entry of `attention` with the nearest number of query heads per key head; None if unknown."""
        if not self.attention or model.cache is None:
            return None
        shared = model.heads / model.cache["kv_heads"]
        return self.attention[min(self.attention, key=lambda n: abs(n - shared))]


def estimate(model: Model, rates: Rates, depth: int = 0, prompt: int = 512, context: int | None = None) -> Estimate:
    """Estimate decoding after `depth` tokens, prefill of `prompt` tokens and memory at `context` (default: the longer)."""
    context = context or max(depth, prompt)
    held = memory(model, context)
    speed = bounds(*(_decode(model, rates, depth, i) for i in range(3)))
    fill = bounds(*(_prefill(model, rates, prompt, i) for i in range(3))) if rates.flops else None
    first = fill and bounds(prompt / fill["high"], prompt / fill["mid"], prompt / fill["low"])
    return {"target": rates.target, "decode": speed, "prefill": fill, "first_token": first, "ram": int(held[1]),
            "memory": bounds(*held), "fits": held[1] <= rates.ram, "basis": rates.basis, "depth": depth, "prompt": prompt,
            "context": context}


def _decode(model: Model, rates: Rates, depth: int, i: int) -> float:
    """Tokens/s from the i-th value of every rate (0 low, 1 middle, 2 high) and the opposite value of every cost."""
    weights = sum(n / rates.read.get(kind, rates.read[OTHER])[i] for kind, n in model.token_bytes.items())
    attention = model.kv_bytes(depth) / rates.read[OTHER][i]
    if computed := rates.attention_of(model):
        layers = sum(n * computed.at(seen, 2 - i) for n, seen in model.spans(depth))
        attention = max(attention, layers * model.query_width)
    return 1.0 / (weights + attention + model.layers * rates.layer_seconds[2 - i])


def _prefill(model: Model, rates: Rates, n: int, i: int) -> float:
    """Tokens/s, with i as in `_decode`. With several types, the time of an operation is their mean, weighted by bytes."""
    total = sum(model.token_bytes.values())
    per_flop = sum(b / total / rates.flops.get(kind, rates.flops[OTHER])[i] for kind, b in model.token_bytes.items())
    seen = sum(layers * span for layers, span in model.spans(n)) * model.query_width
    computed = rates.attention_of(model)
    # two products of 2 flops each for a pair of tokens; on average a token attends to half of the tokens
    per_pair = computed.prefill[2 - i] if computed else 4.0 * per_flop
    return n / (2.0 * n * model.prefill_weights * per_flop + n * seen / 2 * per_pair)


def memory(model: Model, context: int) -> Interval:
    """Bytes that llama.cpp holds: the file, the KV cache, the logits of a micro-batch (its largest buffer), the process.

    Low: no weights are repacked (as on a GPU) and there is no Python process. High: all types are repacked that llama.cpp
    repacks on some CPU.
    """
    least = float(model.file_bytes + model.kv_bytes(context) + 4 * min(MICRO_BATCH, context) * model.vocabulary)
    some, more = (sum(n for kind, n in model.held_bytes.items() if kind in kinds)
                  for kinds in (REPACKED, REPACKED_SOMEWHERE))
    return least, least + PROCESS + some, least + 1.5 * PROCESS + more


def bounds(low: float, mid: float, high: float) -> Bounds:
    return {"low": low, "mid": mid, "high": high}


# -------------------------------------------------------------------------------------------------------------- devices


def rates_of_profile(profile: Profile, target: str | None = None) -> Rates:
    """The rates that the published points of a device achieved. Without points: the scaled rates of the device in `like`."""
    from llmc.runtimes.targets.profile import read_profile

    source, scale, below, above = profile, 1.0, BELOW, ABOVE
    if not profile.measured and profile.like:
        source = read_profile(profile.like)
        scale = profile.bandwidth.value / source.bandwidth.value
        below, above = LIKE_BELOW, LIKE_ABOVE
    read = _by_type([(m.type, r * scale) for m, r in source.achieved()], below, above)
    flops = _by_type([(m.type, r) for m, r in source.matmul()], below, above)
    layer = profile.layer_seconds or source.layer_seconds
    cost = layer.value if layer else 0.0
    whose = "" if source is profile else f" of {source.name}"
    points = f"{len(source.measured)} published measurements{whose}"
    share = median(r for _, r in source.achieved()) / source.bandwidth.value
    unknown = "" if flops else "; no prefill speed is published"
    basis = (f"profile {profile.id} ({profile.name}): {points}; they read {share:.0%} of "
             f"{source.bandwidth.value / 1e9:.1f} GB/s{unknown}; {NO_ATTENTION}")
    return Rates(target or profile.id, basis, int(profile.ram.value), read, flops, (0.7 * cost, cost, 1.3 * cost))


def left_out(profile: Profile) -> list[LeftOut]:
    """Estimate every published decode speed from the other points of the profile (leave-one-out).

    A profile with a single point gives an empty list. `layer_seconds` is not changed, although for some devices it comes from
    the point of a small model.
    """
    out: list[LeftOut] = []
    for m, _ in profile.achieved():
        others = tuple(o for o in profile.measured if o is not m)
        rest = replace(profile, measured=others)
        if m.decode is None or m.token_bytes is None or not rest.achieved():
            continue
        model = Model(m.model, m.token_bytes, {m.type: m.token_bytes}, 1, m.layers, 1, 1)
        got = estimate(model, rates_of_profile(rest))["decode"]
        out.append({"point": f"{m.model} {m.type}", "measured": m.decode, "decode": got,
                    "error": got["mid"] / m.decode - 1, "inside": got["low"] <= m.decode <= got["high"]})
    return out


def _by_type(points: list[tuple[str, float]], below: float, above: float) -> dict[str, Interval]:
    """The interval of every type from its own points; OTHER from all points. below, above: margins (factors)."""
    if not points:
        return {}
    kinds: dict[str, list[float]] = {OTHER: [r for _, r in points]}
    for kind, r in points:
        kinds.setdefault(kind, []).append(r)
    return {kind: (below * min(rs), median(rs), above * max(rs)) for kind, rs in kinds.items()}


def rates_here(types: set[str], threads: int, read_bandwidth: float, target: str = "local-cpu",
               cache: Path | None = None) -> Rates:
    """The rates of this machine, measured with llama.cpp's kernels for `types`. read_bandwidth: of the memory, bytes/s.

    cache: file for the measured rates. Raises UserError if none of the types can be measured.
    """
    from llmc.machine import memory as memory_of_machine
    from llmc.runtimes.targets.kernels import kernel_rates

    measured = kernel_rates(types, threads, cache)
    if not measured["types"]:
        raise UserError("none of the artifact's weight types can be measured here", "estimates are for .gguf files")

    def with_margin(values: list[float], cap: float | None = None) -> Interval:
        low, mid, high = (min(v, cap) if cap else v for v in values)
        return HERE_BELOW * low, mid, HERE_ABOVE * high

    read = {kind: with_margin(m["decode"], read_bandwidth) for kind, m in measured["types"].items()}
    flops = {kind: with_margin(m["prefill"]) for kind, m in measured["types"].items()}
    lows, mids, highs = zip(*flops.values(), strict=True)
    flops[OTHER] = (min(lows), median(mids), max(highs))
    read[OTHER] = (HERE_BELOW * read_bandwidth, read_bandwidth, HERE_ABOVE * read_bandwidth)
    low, mid, high = measured["layer_seconds"]
    basis = (f"measured here: llama.cpp {measured['version']}'s kernels for {', '.join(sorted(measured['types']))} and "
             f"attention with {threads} threads, memory read at {read_bandwidth / 1e9:.1f} GB/s")
    attention = {int(n): Attention([(depth, with_margin(t)) for depth, t in a["decode"]], with_margin(a["prefill"]))
                 for n, a in measured["attention"].items()}
    return Rates(target, basis, memory_of_machine(), read, flops, (HERE_BELOW * low, mid, HERE_ABOVE * high), attention)


def rates_of_facts(target: str, facts: Facts) -> Rates:
    """The rates of a probed device without a profile, from its memory bandwidth and its float32 matmul rate.

    Kernels that unpack weights read more slowly than the bandwidth. With integer dot products they often compute faster than
    the float32 rate.
    """
    read, flops = float(facts["read_bandwidth"]), facts.get("matmul_flops")
    return Rates(target, f"probed {facts.get('probed', 'there')}: reads {read / 1e9:.1f} GB/s; kernels were not measured; "
                         f"{NO_ATTENTION}",
                 int(facts["memory"]), {OTHER: (0.5 * read, 0.8 * read, read)},
                 {OTHER: (0.5 * flops, flops, 3.0 * flops)} if flops else {}, (0.0, 50e-6, 500e-6))


# ------------------------------------------------------------------------------------------------------------ artifacts


def is_exported(path: Path) -> bool:
    """Whether a path is an artifact that can be estimated: a .gguf file or an ONNX folder."""
    kind = format_of(path)
    return path.exists() and kind is not None and kind.exported


def model_of(artifact: Path) -> Model:
    """The model of a .gguf file or an ONNX folder, read from headers only. Raises UserError for a checkpoint folder."""
    opened = artifact_at(artifact)
    if not opened.exported:
        raise UserError(f"{artifact} is a checkpoint folder, not an exported file: torch unpacks its weights when it runs",
                        "export it first, and estimate the .gguf file or the ONNX folder")
    weight, found = opened.weigh(), opened.tensors()
    token: dict[str, int] = {}
    held: dict[str, int] = {}
    for t in found:
        if t.used and (weight["tied"] or t.kind != "embedding"):
            token[t.type] = token.get(t.type, 0) + t.token_bytes
            held[t.type] = held.get(t.type, 0) + t.nbytes
    decoder = [t for t in found if t.kind in ("attention", "mlp")]
    return Model(name=artifact.name, file_bytes=weight["file_bytes"], token_bytes=token, **opened.shape(),
                 prefill_weights=sum(t.token_parameters for t in decoder), cache=opened.kv_shape(),
                 decoder_bytes=sum(t.nbytes for t in decoder), decoder_weights=sum(t.parameters for t in decoder),
                 read_bytes=held)
