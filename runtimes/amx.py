"""Whether llama.cpp's AMX kernels work in this build.

Compilers drop the stores that set up the tile configuration (it is only read by an intrinsic without a memory operand
they know of), and the first quantized matrix product then dies of a signal: ggml-org/llama.cpp#20824, #26954. Only
running one tells, so a child process does, on a model of a few kilobytes. `python -m llmc.runtimes.amx` is that child.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

from llmc.console import warn
from llmc.runtimes import llamacpp

WIDTH = 64  # the least that the AMX kernels take: two tiles
HOW_TO_FIX = ("CMAKE_ARGS='-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8' "
              "pip install --force-reinstall --no-deps --no-cache-dir llama-cpp-python")


@functools.cache
def broken() -> bool:
    """True where one quantized product through AMX kills the process. Asked once a process, about a second."""
    child = subprocess.run([sys.executable, "-m", __name__], capture_output=True, check=False)
    return child.returncode != 0


@functools.cache
def use_extra_buffers() -> bool:
    """Whether llama.cpp may repack weights for AMX and the like. A build that would crash on it is named once."""
    if llamacpp.build().get("AMX_INT8") != "1" or not broken():
        return True
    warn("llama.cpp's AMX kernels crash in this build (ggml-org/llama.cpp#26954): running without them and without "
         f"repacked weights, which is slower. To cure it: {HOW_TO_FIX}")
    return False


def _write_model(path: Path) -> None:
    """One random-free Llama layer in Q8_0, without a vocabulary."""
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
    """Run eight tokens of the little model through whatever kernels llama.cpp chooses."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.gguf"
        _write_model(path)
        model = llamacpp.LlamaCpp(path, context=WIDTH, threads=1, extra_buffers=True)
        model.logits(np.arange(8, dtype=np.int32))
        model.close()


if __name__ == "__main__":
    main()
