"""What an artifact will do on a device that it was not measured on: a roofline, with an interval.

A decoded token reads every weight once, in the type it is stored in, and the KV cache up to its place; it can be no faster
than the device reads and unpacks these bytes (Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009). A prompt costs
two floating point operations a weight and token, and attention's share, which grows with the square of its length. Where it
was measured what attention costs to compute, that counts, and not the cache's bytes and the flop rate:

    decode   1 / (sum over types of bytes / rate(type)  +  attention  +  layers * a layer's own cost)   tokens/s
             attention: KV bytes / rate, or layers heads head_dim * measured(depth) where that is more
    prefill  n / (2 n weights / flop rate  +  attention)                                                tokens/s
             attention: n^2 layers heads head_dim * 2 / flop rate, or / 2 * measured for a pair of tokens
    ram      file  +  weights that the CPU has repacked  +  KV cache at the context  +  buffers  +  process       bytes

Rates of this machine are measured in llama.cpp (runtimes/targets/kernels.py); of a device profile they are what published
measurements achieved (runtimes/targets/profile.py). An estimate is never a measurement: it is labelled wherever it goes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from llmc.errors import UserError
from llmc.evals.fit.schema import Bounds, Estimate, LeftOut
from llmc.evals.report.schema import Facts
from llmc.formats import kv
from llmc.formats.artifacts.table import artifact_at, format_of
from llmc.formats.kv import KvShape

if TYPE_CHECKING:
    from llmc.runtimes.targets.profile import Profile

Interval = tuple[float, float, float]
"""Low, middle, high."""

# A published point is one board, cooling and build of many: what is asked of another is given this much room.
BELOW, ABOVE = 0.85, 1.15
# Rates taken over from another device of the kind.
LIKE_BELOW, LIKE_ABOVE = 0.75, 1.25
# Measured here, by other shapes than the artifact's.
HERE_BELOW, HERE_ABOVE = 0.85, 1.15
MICRO_BATCH = 512  # tokens that llama.cpp runs at once
PROCESS = 60_000_000  # bytes of Python, numpy and llama.cpp's libraries, as llmc's own benches hold them
# Types that llama.cpp copies into another order for the CPU, the mapped file staying in memory too: on x86 and ARM alike, and
# on one of them (ggml/src/ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type)
REPACKED = {"Q4_0", "Q4_K", "IQ4_NL"}
REPACKED_SOMEWHERE = {*REPACKED, "Q2_K", "Q5_K", "Q6_K", "Q8_0"}
NO_ATTENTION = "of attention only the cache's bytes are counted: a long context is slower"
OTHER = ""  # the rate of a type that has none of its own


@dataclass(frozen=True)
class Model:
    """What an artifact's speed depends on.

    token_bytes: by stored type, of the weights that a decoded token reads   prefill_weights: that a prompt token meets
    decoder_bytes: of these weights   cache: of the KV cache, Artifact.kv_shape; None where the file does not tell
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

    def kv_bytes(self, tokens: int, type: str = "f16") -> int:
        """K and V of all layers with `tokens` tokens in the cache."""
        return kv.bytes_at(self.cache, tokens, type) if self.cache else 0

    def spans(self, n: int) -> list[tuple[int, int]]:
        """[(layers, tokens that they look back on)] where n came before: all of them, and of sliding layers the window."""
        if self.cache is None:
            return []
        sliding = self.cache["sliding_layers"]
        return [(self.cache["layers"] - sliding, n), (sliding, min(n, self.cache["window"] or n))]

    @property
    def query_width(self) -> float:
        """Dimensions of a layer's query heads together."""
        return self.heads * float(self.cache["head_dim"]) if self.cache else 0.0


@dataclass(frozen=True)
class Attention:
    """Seconds for each layer and dimension of its query heads together.  decode: [(tokens in the cache, of a decoded token)],
    by depth.  prefill: of a pair of tokens."""

    decode: list[tuple[int, Interval]]
    prefill: Interval

    def at(self, depth: int, i: int) -> float:
        """A decoded token's, with the i-th figure of the intervals: straight lines between what was measured, and on."""
        points = [(0, 0.0), *((n, t[i]) for n, t in self.decode)]
        after = next((k for k, (n, _) in enumerate(points) if n >= depth and k), len(points) - 1)
        (n0, t0), (n1, t1) = points[after - 1], points[after]
        return t0 + (t1 - t0) * (depth - n0) / (n1 - n0)


@dataclass(frozen=True)
class Rates:
    """What a device does. read: bytes of weights a second, by type (OTHER: the rest).  flops: likewise; empty: unknown.

    layer_seconds: what a layer costs a decoded token beyond its bytes.  attention: what it costs to compute, by how many
    query heads share a key head; empty where that is not known.  basis: where the figures come from.
    """

    target: str
    basis: str
    ram: int
    read: dict[str, Interval]
    flops: dict[str, Interval]
    layer_seconds: Interval
    attention: dict[int, Attention] = field(default_factory=dict)

    def attention_of(self, model: Model) -> Attention | None:
        """That of the nearest number of query heads to a key head."""
        if not self.attention or model.cache is None:
            return None
        shared = model.heads / model.cache["kv_heads"]
        return self.attention[min(self.attention, key=lambda n: abs(n - shared))]


def estimate(model: Model, rates: Rates, depth: int = 0, prompt: int = 512, context: int | None = None) -> Estimate:
    """Decoding after `depth` tokens, prefill of `prompt` tokens, memory at `context` (default: the longer of both)."""
    context = context or max(depth, prompt)
    held = memory(model, context)
    speed = bounds(*(_decode(model, rates, depth, i) for i in range(3)))
    fill = bounds(*(_prefill(model, rates, prompt, i) for i in range(3))) if rates.flops else None
    first = fill and bounds(prompt / fill["high"], prompt / fill["mid"], prompt / fill["low"])
    return {"target": rates.target, "decode": speed, "prefill": fill, "first_token": first, "ram": int(held[1]),
            "memory": bounds(*held), "fits": held[1] <= rates.ram, "basis": rates.basis, "depth": depth, "prompt": prompt,
            "context": context}


def _decode(model: Model, rates: Rates, depth: int, i: int) -> float:
    """Tokens/s with the i-th figure of every interval (costs in the opposite order)."""
    weights = sum(n / rates.read.get(kind, rates.read[OTHER])[i] for kind, n in model.token_bytes.items())
    attention = model.kv_bytes(depth) / rates.read[OTHER][i]
    if computed := rates.attention_of(model):
        layers = sum(n * computed.at(seen, 2 - i) for n, seen in model.spans(depth))
        attention = max(attention, layers * model.query_width)
    return 1.0 / (weights + attention + model.layers * rates.layer_seconds[2 - i])


def _prefill(model: Model, rates: Rates, n: int, i: int) -> float:
    """Tokens/s. The flop rate of a file of several types is that of its types, weighted by the bytes they have."""
    total = sum(model.token_bytes.values())
    per_flop = sum(b / total / rates.flops.get(kind, rates.flops[OTHER])[i] for kind, b in model.token_bytes.items())
    seen = sum(layers * span for layers, span in model.spans(n)) * model.query_width
    computed = rates.attention_of(model)
    per_pair = computed.prefill[2 - i] if computed else 4.0 * per_flop  # two products; each token sees half of the others
    return n / (2.0 * n * model.prefill_weights * per_flop + n * seen / 2 * per_pair)


def memory(model: Model, context: int) -> Interval:
    """Bytes that llama.cpp holds: the file, the KV cache, the logits of a micro-batch (its largest buffer), the process.

    Low: nothing is repacked, as on a GPU, and no Python runs it. High: all is that llama.cpp repacks on any CPU.
    """
    least = float(model.file_bytes + model.kv_bytes(context) + 4 * min(MICRO_BATCH, context) * model.vocabulary)
    some, more = (sum(n for kind, n in model.token_bytes.items() if kind in kinds)
                  for kinds in (REPACKED, REPACKED_SOMEWHERE))
    return least, least + PROCESS + some, least + 1.5 * PROCESS + more


def bounds(low: float, mid: float, high: float) -> Bounds:
    return {"low": low, "mid": mid, "high": high}


# -------------------------------------------------------------------------------------------------------------- devices


def rates_of_profile(profile: Profile, target: str | None = None) -> Rates:
    """The rates that the published points of a device achieved, or those of the device it is like."""
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
    unknown = "" if flops else "; no prefill is published"
    basis = (f"profile {profile.id} ({profile.name}): {points}; they read {share:.0%} of "
             f"{source.bandwidth.value / 1e9:.1f} GB/s{unknown}; {NO_ATTENTION}")
    return Rates(target or profile.id, basis, int(profile.ram.value), read, flops, (0.7 * cost, cost, 1.3 * cost))


def left_out(profile: Profile) -> list[LeftOut]:
    """Every published decoding estimated from the other points alone.

    A profile with a single point has nothing to say. The layers' own cost stays as it is, though for some devices a small
    model's point was what told it.
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
    """The interval of every type that has points of its own, and of all points together for the rest."""
    if not points:
        return {}
    kinds: dict[str, list[float]] = {OTHER: [r for _, r in points]}
    for kind, r in points:
        kinds.setdefault(kind, []).append(r)
    return {kind: (below * min(rs), median(rs), above * max(rs)) for kind, rs in kinds.items()}


def rates_here(types: set[str], threads: int, read_bandwidth: float, target: str = "local-cpu",
               cache: Path | None = None) -> Rates:
    """This machine's own, measured: llama.cpp's kernels for the types, and how fast memory is read (bytes/s)."""
    from llmc.machine import memory as memory_of_machine
    from llmc.runtimes.targets.kernels import kernel_rates

    measured = kernel_rates(types, threads, cache)
    if not measured["types"]:
        raise UserError("none of the artifact's weight types can be measured here", "estimates are for .gguf files")

    def roomy(values: list[float], cap: float | None = None) -> Interval:
        low, mid, high = (min(v, cap) if cap else v for v in values)
        return HERE_BELOW * low, mid, HERE_ABOVE * high

    read = {kind: roomy(m["decode"], read_bandwidth) for kind, m in measured["types"].items()}
    flops = {kind: roomy(m["prefill"]) for kind, m in measured["types"].items()}
    lows, mids, highs = zip(*flops.values(), strict=True)
    flops[OTHER] = (min(lows), median(mids), max(highs))
    read[OTHER] = (HERE_BELOW * read_bandwidth, read_bandwidth, HERE_ABOVE * read_bandwidth)
    low, mid, high = measured["layer_seconds"]
    basis = (f"measured here: llama.cpp {measured['version']}'s kernels for {', '.join(sorted(measured['types']))} and "
             f"attention with {threads} threads, memory read at {read_bandwidth / 1e9:.1f} GB/s")
    attention = {int(n): Attention([(depth, roomy(t)) for depth, t in a["decode"]], roomy(a["prefill"]))
                 for n, a in measured["attention"].items()}
    return Rates(target, basis, memory_of_machine(), read, flops, (HERE_BELOW * low, mid, HERE_ABOVE * high), attention)


def rates_of_facts(target: str, facts: Facts) -> Rates:
    """Of a device that was probed and has no profile: what it reads from memory, and its f32 matmul rate.

    Kernels that unpack weights keep below the first and, with integer dot products, often above the second.
    """
    read, flops = float(facts["read_bandwidth"]), facts.get("matmul_flops")
    return Rates(target, f"probed {facts.get('probed', 'there')}: reads {read / 1e9:.1f} GB/s; kernels were not measured; "
                         f"{NO_ATTENTION}",
                 int(facts["memory"]), {OTHER: (0.5 * read, 0.8 * read, read)},
                 {OTHER: (0.5 * flops, flops, 3.0 * flops)} if flops else {}, (0.0, 50e-6, 500e-6))


# ------------------------------------------------------------------------------------------------------------ artifacts


def is_exported(path: Path) -> bool:
    """Whether a path holds an artifact that can be estimated: a .gguf file or an ONNX folder."""
    kind = format_of(path)
    return path.exists() and kind is not None and kind.exported


def model_of(artifact: Path) -> Model:
    """The model of a .gguf file or an ONNX folder, from headers alone."""
    opened = artifact_at(artifact)
    if not opened.exported:
        raise UserError(f"{artifact} is no file that ships: a folder of weights is unpacked by torch when it is run",
                        "export it first, and estimate the .gguf file or the ONNX folder")
    weight, found = opened.weigh(), opened.tensors()
    read: dict[str, int] = {}
    for t in found:
        if weight["tied"] or t.kind != "embedding":
            read[t.type] = read.get(t.type, 0) + t.nbytes
    met = [t for t in found if t.kind in ("attention", "mlp")]
    return Model(name=artifact.name, file_bytes=weight["file_bytes"], token_bytes=read, **opened.shape(),
                 prefill_weights=sum(t.parameters for t in met), cache=opened.kv_shape(),
                 decoder_bytes=sum(t.nbytes for t in met))
