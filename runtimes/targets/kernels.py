"""How fast this machine computes with each GGUF weight type: measured in llama.cpp itself, on files of zeros.

Decoding with a small model, or with a type that takes work to unpack, is bound by the cores and not by the memory; how
much work a type takes differs with the instruction sets and with what llama.cpp has for them, so it is measured. The files
are Llama layers of one type without a vocabulary, as large as the models in question; nothing in them is fitted to any.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.console import progress, say

if TYPE_CHECKING:
    import numpy as np

LAYERS, WIDTH, FFN, VOCABULARY = 8, 1024, 4096, 256  # 134 M weights: past the caches that a core has to itself
TINY = 64  # width at which the weights cost nothing: what is left is the layers' own cost
TINY_LAYERS = 30
TOKENS, PROMPT = 24, 256
TYPES = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def kernel_rates(types: set[str], threads: int, cache: Path | None = None) -> dict[str, Any]:
    """{'threads', 'cpu', 'version', 'layer_seconds': [low, mid, high], 'types': {type: {'decode': bytes/s, 'prefill':
    flop/s}}} with [low, mid, high] each: quartiles of tokens. Types that llama.cpp has no name for here are left out.

    cache: a JSON file of earlier measurements of this machine; what it has is not measured again.
    """
    known = _cached(cache, threads)
    wanted = sorted((types & set(TYPES)) - set(known["types"]))
    if not wanted and known["layer_seconds"]:
        return known
    say(f"measuring llama.cpp's kernels: {', '.join(wanted) or 'layers'}, {threads} threads")
    with tempfile.TemporaryDirectory() as folder, progress("kernel", len(wanted) + 1) as p:
        path = Path(folder) / "kernel.gguf"
        if not known["layer_seconds"]:
            write_layers(path, "Q8_0", TINY_LAYERS, TINY, TINY)
            tokens, _ = _time(path, threads, 4 * TOKENS)
            known["layer_seconds"] = [t / TINY_LAYERS for t in _quartiles(tokens)]
        p.step("layers")
        for name in wanted:
            nbytes = write_layers(path, name, LAYERS, WIDTH, FFN)
            tokens, prompt = _time(path, threads, TOKENS)
            overhead = LAYERS * known["layer_seconds"][1]
            weights = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN)
            known["types"][name] = {
                "decode": [nbytes / (t - overhead) for t in reversed(_quartiles(tokens))],
                "prefill": [2 * weights * PROMPT / t for t in reversed(_quartiles(prompt))],
            }
            p.step(name)
    if cache is not None:
        from llmc.artifact import write_json

        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, known)
    return known


def _cached(cache: Path | None, threads: int) -> dict[str, Any]:
    """What was measured before, if it was on this CPU, with this llama.cpp and as many threads."""
    from importlib.metadata import version

    from llmc.runtimes.targets.this_machine import cpu_model

    head = {"threads": threads, "cpu": cpu_model(), "version": version("llama-cpp-python")}
    if cache is not None and cache.is_file():
        found: dict[str, Any] = json.loads(cache.read_text(encoding="utf-8"))
        if {k: found.get(k) for k in head} == head:
            return found
    return {**head, "layer_seconds": None, "types": {}}


def _time(path: Path, threads: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each decoded token, and of each prefill of PROMPT tokens."""
    import numpy as np

    from llmc.runtimes.llamacpp import LlamaCpp

    runtime = LlamaCpp(path, PROMPT + tokens + 8, threads)
    ids = np.arange(PROMPT) % VOCABULARY
    prefills = np.array([_seconds(lambda: runtime.prefill(ids)) for _ in range(4)])[1:]
    runtime.prefill(ids[:4])  # a short context: attention costs next to nothing
    decodes = np.array([_seconds(lambda: runtime.decode(1)) for _ in range(tokens + 4)])[4:]
    runtime.close()
    return decodes, prefills


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _quartiles(values: np.ndarray) -> list[float]:
    import numpy as np

    return [float(x) for x in np.percentile(values, (25, 50, 75))]


def write_layers(path: Path, kind: str, layers: int, width: int, ffn: int) -> int:
    """Write a model of one type whose weights are zeros; their bytes.

    No kernel looks at values, but random ones become infinite or denormal on the way, and those are slow to compute with.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    w = GGUFWriter(path, "llama")
    w.add_block_count(layers)
    w.add_context_length(4096)
    w.add_embedding_length(width)
    w.add_feed_forward_length(ffn)
    w.add_head_count(max(1, width // 64))
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(64)
    w.add_vocab_size(VOCABULARY)
    w.add_tokenizer_model("no_vocab")
    raw = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[raw]
    shapes = {"attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width), "attn_output": (width, width),
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
