"""GGUF files for tests: the export on one thread, and what is stored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from llmc.export.gguf import GgufExportConfig, export_gguf
from llmc.runtimes.torch_model import TorchModel
from llmc.sources.llama_cpp import SETUP, find_converter

# with LLMC_NEED_CONVERTER such a test fails where it would be skipped
needs_converter = pytest.mark.skipif(find_converter() is None and not os.environ.get("LLMC_NEED_CONVERTER"),
                                     reason=f"llama.cpp's converter is not set up: `{SETUP}`")


def export(folder: Path, **options: Any) -> dict[str, Any]:
    out = options.pop("out", folder.with_suffix(".gguf"))
    return export_gguf(GgufExportConfig(model=folder, out=out, threads=1, **options))


def stored(path: Path | str) -> dict[str, Any]:
    return {t.name: t for t in GGUFReader(path).tensors}


def logits(folder: Path) -> np.ndarray:
    """[60, vocab] of a folder by torch, for ids that are always the same."""
    model = TorchModel(folder, context=256, threads=1)
    try:
        return model.logits(np.random.default_rng(0).integers(2, 512, 60))
    finally:
        model.close()


def copy(source: Path, out: Path, change: dict[str, Any], split: int = 0, **tensors: np.ndarray) -> Path:
    """A copy of a file with other metadata: {key: value, None leaves it out}. A value may be (value, type, element type)."""
    reader = GGUFReader(source)
    writer = GGUFWriter(str(out), "llama", split_max_tensors=split)
    values = {k: (f.contents(), f.types[0], f.types[-1] if f.types[0] == GGUFValueType.ARRAY else None)
              for k, f in reader.fields.items() if not k.startswith("GGUF.") and k != "general.architecture"}
    for key, value in change.items():
        values[key] = value if isinstance(value, tuple) or value is None else (value, *values[key][1:])
    for key, found in values.items():
        if found is not None:
            writer.add_key_value(key, found[0], found[1], sub_type=found[2])
    for t in reader.tensors:
        writer.add_tensor(t.name, tensors.get(t.name.replace(".", "_"), np.array(t.data)), raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


# A stand-in for convert_hf_to_gguf.py with the same command line: a Llama, the rows of Q and K permuted, and Q, K and V in
# one tensor, which llmc's own writer never makes
SCRIPT = """
import json, sys
from pathlib import Path
import gguf
import numpy as np
from gguf import GGUFWriter
from safetensors.numpy import load_file

folder, flag, out, kind, q8_0 = sys.argv[1:]
assert (flag, kind, q8_0) == ("--outfile", "--outtype", "q8_0")
folder = Path(folder)
c = json.loads((folder / "config.json").read_text())
assert "quantization_config" not in c
w = GGUFWriter(out, "llama")
w.add_block_count(c["num_hidden_layers"])
w.add_context_length(c["max_position_embeddings"])
w.add_embedding_length(c["hidden_size"])
w.add_feed_forward_length(c["intermediate_size"])
w.add_head_count(c["num_attention_heads"])
w.add_head_count_kv(c["num_key_value_heads"])
w.add_layer_norm_rms_eps(c["rms_norm_eps"])
spec = json.loads((folder / "tokenizer.json").read_text())
w.add_tokenizer_model("gpt2")
w.add_tokenizer_pre("gpt-2")
w.add_token_list(sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get))
w.add_token_types([3, 3] + [1] * (len(spec["model"]["vocab"]) - 2))
w.add_token_merges([" ".join(m) for m in spec["model"]["merges"]])

def interleave(x, heads):
    return x.reshape(heads, 2, len(x) // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)

def matrix(name, x):
    kind = gguf.GGMLQuantizationType.F32 if name in FLOAT else gguf.GGMLQuantizationType.Q8_0
    try:
        data = gguf.quants.quantize(x, kind)
    except gguf.QuantError:
        kind = gguf.GGMLQuantizationType.F16
        data = gguf.quants.quantize(x, kind)
    w.add_tensor(name, data, raw_dtype=kind)

FLOAT = []
weights = {k: v.astype(np.float32) for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
CHANGE
for i in range(c["num_hidden_layers"]):
    p = f"model.layers.{i}."
    q, k, v = (weights.pop(p + f"self_attn.{x}_proj.weight") for x in "qkv")
    matrix(f"blk.{i}.attn_qkv.weight", np.concatenate([
        interleave(q, c["num_attention_heads"]), interleave(k, c["num_key_value_heads"]), v]))
    for theirs, ours in {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
                         "mlp.down_proj": "ffn_down"}.items():
        matrix(f"blk.{i}.{ours}.weight", weights.pop(p + theirs + ".weight"))
    for theirs, ours in {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}.items():
        w.add_tensor(f"blk.{i}.{ours}.weight", weights.pop(p + theirs + ".weight"))
matrix("token_embd.weight", weights.pop("model.embed_tokens.weight"))
w.add_tensor("output_norm.weight", weights.pop("model.norm.weight"))
assert not weights
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
"""


def checkout(folder: Path, change: str = "") -> Path:
    """A folder with the stand-in; `change` is Python that it runs on `weights` before it writes."""
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(SCRIPT.replace("CHANGE", change))
    return folder
