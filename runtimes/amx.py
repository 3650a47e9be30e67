"""A test of llama.cpp's AMX kernels in this build.

Some compilers remove the stores that set up the tile configuration, because only an intrinsic without a visible memory
operand reads it. The first quantized matrix product then kills the process with a signal: ggml-org/llama.cpp#20824, #26954.
Only a run shows this. So a child process, `python -m llmc.runtimes.amx`, runs a model of a few kilobytes.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

from llmc.console import warn
from llmc.runtimes import llamacpp

WIDTH = 64  # the smallest width of the AMX kernels: two tiles
HOW_TO_FIX = ("CMAKE_ARGS='-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8' "
              "pip install --force-reinstall --no-deps --no-cache-dir llama-cpp-python")


@functools.cache
def broken() -> bool:
    """True if a quantized product through AMX kills the process. It takes about a second, once for each process."""
    child = subprocess.run([sys.executable, "-m", __name__], capture_output=True, check=False)
    return child.returncode != 0


@functools.cache
def use_extra_buffers() -> bool:
    """True if llama.cpp may repack weights for AMX and similar kernels. If this build would crash, warn once."""
    if llamacpp.build().get("AMX_INT8") != "1" or not broken():
        return True
    warn("llama.cpp's AMX kernels crash in this build (ggml-org/llama.cpp#26954): running without them and without "
         f"repacked weights, which is slower. To fix it: {HOW_TO_FIX}")
    return False


def _write_model(path: Path) -> None:
    """Write a Llama model of one layer in Q8_0, with fixed weights and no vocabulary."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    w = GGUFWriter(path, "llama")
    w.add_block_count(1)
    w.add_context_length(WIDTH)
    w.add_embedding_length(WIDTH)
    w.add_feed_forward_length(WIDTH)
    w.add_head_count(1)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(WIDTH)
    w.add_vocab_size(WIDTH)
    w.add_tokenizer_model("no_vocab")
    matrix = quantize(np.eye(WIDTH, dtype=np.float32), GGMLQuantizationType.Q8_0)
    for name in ("token_embd", "output", *(f"blk.0.{n}" for n in (
            "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))):
        w.add_tensor(f"{name}.weight", matrix, raw_dtype=GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        w.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main() -> None:
    """Run eight tokens through the small model, with the kernels that llama.cpp chooses."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.gguf"
        _write_model(path)
        model = llamacpp.LlamaCpp(path, context=WIDTH, threads=1, extra_buffers=True)
        model.logits(np.arange(8, dtype=np.int32))
        model.close()


if __name__ == "__main__":
    main()
