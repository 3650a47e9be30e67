"""The speed of this machine with each GGUF weight type, measured in llama.cpp on files of zeros.

Decoding is limited by the cores and not by the memory if the model is small or the type is slow to unpack. The work for a
type depends on the instruction sets and on llama.cpp's kernels, so it is measured. Attention is measured too: after some
hundred tokens a small model spends most of its time on it, far more than on reading the cache. The files are Llama layers of
one type without a vocabulary. Their size is that of typical models; they are not fitted to a model.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.console import progress, say
from llmc.formats.types import BLOCK_TYPES

if TYPE_CHECKING:
    import numpy as np

LAYERS, WIDTH, FFN, VOCABULARY = 8, 1024, 4096, 256  # 134 M weights: larger than the private caches of a core
TINY = 64  # at this width the weights take no time: the rest is the overhead of the layers
TINY_LAYERS = 30
TOKENS, PROMPT = 24, 256
HEAD = 64  # dimensions of a head
SHARED = (1, 4)  # query heads for each key head: if several share one, its keys are unpacked once
DEPTHS = (128, 256, 512, 1024, 2048)  # tokens in the cache for the timing of attention: it is not linear at the start
TYPES = ("F16", "BF16", *(t.gguf_type for t in BLOCK_TYPES.values()))


def kernel_rates(types: set[str], threads: int, cache: Path | None = None) -> dict[str, Any]:
    """Measure, and return {threads, cpu, version, layer_seconds, attention, types}. Measured values are quartiles
    [low, mid, high] over tokens. Types outside of TYPES are left out.

    types: {type: {'decode': bytes/s, 'prefill': flop/s}}. layer_seconds: the overhead of a layer for a token, in seconds.
    attention: {query heads for each key head: {'decode': [[tokens in the cache, seconds for a decoded token], ..],
    'prefill': seconds for each pair of tokens}}, for one layer, divided by the dimensions of all its query heads.
    cache: a JSON file with earlier measurements of this machine, which are not repeated.
    """
    known = _cached(cache, threads)
    wanted = sorted((types & set(TYPES)) - set(known["types"]))
    if not wanted and known["attention"]:
        return known
    say(f"measuring llama.cpp's kernels: {', '.join(wanted) or 'layers'}, {threads} threads")
    with tempfile.TemporaryDirectory() as folder, progress("kernel", len(wanted) + 1) as p:
        path = Path(folder) / "kernel.gguf"
        if not known["attention"]:
            write_layers(path, "Q8_0", TINY_LAYERS, TINY, TINY)
            known["layer_seconds"] = [t / TINY_LAYERS for t in _quartiles(_decodes(path, threads, 4 * TOKENS))]
            known["attention"] = {str(n): _attention(path, threads, n) for n in SHARED}
        p.step("layers")
        for name in wanted:
            nbytes = write_layers(path, name, LAYERS, WIDTH, FFN)
            tokens, prompt = _decodes(path, threads, TOKENS), _prefills(path, threads, PROMPT)
            overhead = LAYERS * known["layer_seconds"][1]
            weights = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN)
            known["types"][name] = {
                "decode": [nbytes / (t - overhead) for t in reversed(_quartiles(tokens))],
                "prefill": [2 * weights * PROMPT / t for t in reversed(_quartiles(prompt))],
            }
            p.step(name)
    if cache is not None:
        from llmc.files import write_note

        write_note(cache, known)
    return known


def _cached(cache: Path | None, threads: int) -> dict[str, Any]:
    """The earlier measurements, if they are of the same CPU, llama.cpp version, code of llmc and number of threads."""
    from importlib.metadata import version

    from llmc.closure import digest
    from llmc.machine import cpu_model

    head = {"threads": threads, "cpu": cpu_model(), "version": version("llama-cpp-python"), "code": digest(__name__)}
    if cache is not None:
        from llmc.files import read_note

        found = read_note(cache)
        if {k: found.get(k) for k in head} == head and "attention" in found:
            return found
    return {**head, "layer_seconds": None, "attention": None, "types": {}}


def _attention(path: Path, threads: int, shared: int) -> dict[str, Any]:
    """The cost of attention (see kernel_rates). In decoding it is the extra time of a token with more tokens in the cache.

    In prefill it is the extra time for each token of a long prompt over a short one: the cost of the weights is the same for
    each token, that of attention grows with the pairs of tokens."""
    write_layers(path, "Q8_0", LAYERS, WIDTH, TINY, shared)
    base = _quartiles(_decodes(path, threads, TOKENS))[1]
    deep = [(n, _quartiles(_decodes(path, threads, TOKENS, n))) for n in DEPTHS]
    long = DEPTHS[-1]
    short = _quartiles(_prefills(path, threads, PROMPT))[1] / PROMPT
    pairs = [(t / long - short) / ((long - PROMPT) / 2) for t in _quartiles(_prefills(path, threads, long))]
    each = LAYERS * WIDTH
    return {"decode": [[n, [max(0.0, t - base) / each for t in ts]] for n, ts in deep],
            "prefill": [max(0.0, t) / each for t in pairs]}


def _decodes(path: Path, threads: int, tokens: int, depth: int = 4) -> np.ndarray:
    """The seconds of each token decoded after `depth` others. With the default depth, attention takes almost no time."""
    import numpy as np

    from llmc.runtimes.amx import use_extra_buffers
    from llmc.runtimes.llamacpp import LlamaCpp

    runtime = LlamaCpp(path, depth + tokens + 8, threads, extra_buffers=use_extra_buffers())
    runtime.prefill(np.arange(depth) % VOCABULARY)
    seconds = np.array([_seconds(lambda: runtime.decode(1)) for _ in range(tokens + 4)])[4:]
    runtime.close()
    return seconds


def _prefills(path: Path, threads: int, tokens: int) -> np.ndarray:
    """The seconds of each prefill of `tokens` tokens."""
    import numpy as np

    from llmc.runtimes.amx import use_extra_buffers
    from llmc.runtimes.llamacpp import LlamaCpp

    runtime = LlamaCpp(path, tokens + 8, threads, extra_buffers=use_extra_buffers())
    ids = np.arange(tokens) % VOCABULARY
    seconds = np.array([_seconds(lambda: runtime.prefill(ids)) for _ in range(4)])[1:]
    runtime.close()
    return seconds


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _quartiles(values: np.ndarray) -> list[float]:
    import numpy as np

    return [float(x) for x in np.percentile(values, (25, 50, 75))]


def write_layers(path: Path, kind: str, layers: int, width: int, ffn: int, shared: int = 1) -> int:
    """Write a model of the GGUF type `kind` with zeros as weights and `shared` query heads for each key head.

    Returns the bytes of its weights. The speed of a kernel does not depend on values, except that random weights lead to
    infinite or denormal numbers, which are slow.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    w = GGUFWriter(path, "llama")
    w.add_block_count(layers)
    w.add_context_length(4096)
    w.add_embedding_length(width)
    w.add_feed_forward_length(ffn)
    heads = max(1, width // HEAD)
    w.add_head_count(heads)
    w.add_head_count_kv(max(1, heads // shared))
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(HEAD)
    w.add_vocab_size(VOCABULARY)
    w.add_tokenizer_model("no_vocab")
    raw = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[raw]
    keys = max(1, heads // shared) * (width // heads)
    shapes = {"attn_q": (width, width), "attn_k": (keys, width), "attn_v": (keys, width), "attn_output": (width, width),
              "ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
    total = 0
    for name, (rows, columns) in {"token_embd": (VOCABULARY, width),
                                  **{f"blk.{i}.{n}": s for i in range(layers) for n, s in shapes.items()}}.items():
        data = np.zeros((rows, columns // block * size), np.uint8)
        total += data.nbytes
        w.add_tensor(f"{name}.weight", data, raw_dtype=raw)
    for name in ("output_norm", *(f"blk.{i}.{n}" for i in range(layers) for n in ("attn_norm", "ffn_norm"))):
        w.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return total
