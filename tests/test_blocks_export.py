"""Folders of block types in GGUF: the stored bytes are what torch computes with, and what the file holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ggml import Stored, assert_same, blocks_folder
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, LlamaFileType
from gguf.quants import dequantize
from gguf_files import checkout, export, logits
from rounding import is_decoder_linear
from safetensors.torch import load_file
from tiny import edit_config, edit_tensors

from llmc.errors import UserError
from llmc.export.gguf import GgufExportConfig, verify
from llmc.export.gguf import export as pipeline
from llmc.export.gguf.plan import Types
from llmc.formats import blocks, quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.gguf import field
from llmc.formats.hf import load_tokenizer
from llmc.formats.packing import unpack
from llmc.formats.quantized import linears
from llmc.formats.types import BLOCK_TYPES

LLAMA = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}
FAMILIES = {
    "llama": LLAMA, "qwen2": LLAMA,
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"},
    "gpt2": {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
}
HEADS = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}


def float_twin(source: Path, out: Path, stored: Stored, types: dict[str, str]) -> Path:
    """The float folder with the weights that gguf's own reader sees in the stored bytes."""
    shutil.copytree(source, out)
    with edit_tensors(out) as tensors:
        conv1d = Checkpoint.open(source).config["model_type"] == "gpt2"
        for linear, data in stored.items():
            w = torch.from_numpy(dequantize(data, Kind[types[linear].upper()]))
            tensors[f"{linear}.weight"] = w.t().contiguous() if conv1d else w
    return out


def in_the_file(family: str, linear: str, data: np.ndarray) -> tuple[str, np.ndarray]:
    """The name of a linear's tensor in the file, and its rows in the order that llama.cpp wants."""
    layer, module = linear.removeprefix("model.layers.").removeprefix("transformer.h.").split(".", 1)
    if family == "llama" and module in HEADS:  # rows 2i and 2i + 1 of a head are i and i + d/2 of transformers
        d = len(data) // HEADS[module]
        data = np.stack([data[h * d + i // 2 + i % 2 * (d // 2)] for h in range(HEADS[module]) for i in range(d)])
    return f"blk.{layer}.{FAMILIES[family][module]}.weight", data


def check_file(family: str, file: Path, stored: Stored, types: dict[str, str]) -> None:
    """Every linear's bytes and type are in the file."""
    tensors = {t.name: t for t in GGUFReader(file).tensors}
    for linear, data in stored.items():
        name, expected = in_the_file(family, linear, data)
        assert tensors[name].tensor_type == Kind[types[linear].upper()]
        assert tensors[name].data.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_type(name, wide_base, tmp_path):
    stored, types = blocks_folder(wide_base("llama"), tmp_path / "q", name)
    ckpt = Checkpoint.open(tmp_path / "q")
    assert linears(ckpt) == list(stored)
    for linear, data in stored.items():
        t = quantized.read(ckpt, linear)
        assert_same(t, unpack(data, BLOCK_TYPES[name]))
        assert np.array_equal(blocks.encode(t)["blocks"].numpy(), data)
        assert quantized.shape(ckpt, linear) == t.shape
        assert quantized.type_name(ckpt, linear) == name
    twin = float_twin(wide_base("llama"), tmp_path / "twin", stored, types)
    assert np.array_equal(logits(tmp_path / "q"), logits(twin))

    report = export(tmp_path / "q")
    check_file("llama", tmp_path / "q.gguf", stored, types)
    assert report["verified"]["code_tensors"] == len(stored) == 14
    assert report["verified"]["code_weights"] == sum(quantized.read(ckpt, x).codes.numel() for x in stored)
    assert report["file_type"] == name.upper()
    number = field(GGUFReader(tmp_path / "q.gguf"), "general.file_type")
    assert LlamaFileType(number).name.removesuffix("_MOE") in (f"MOSTLY_{name.upper()}", f"MOSTLY_{name.upper()}_M")
    assert report["logits"]["mean_kld"] < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_types_in_every_layout(family, wide_base, tmp_path):
    """Permuted rows in Llama, biases in Qwen 2, fused linears in Phi-3, transposed float weights in GPT-2."""
    stored, types = blocks_folder(wide_base(family), tmp_path / "q", *BLOCK_TYPES)
    assert len(set(types.values())) == min(len(stored), len(BLOCK_TYPES))
    twin = float_twin(wide_base(family), tmp_path / "twin", stored, types)
    assert np.array_equal(logits(tmp_path / "q"), logits(twin))
    report = export(tmp_path / "q")
    check_file(family, tmp_path / "q.gguf", stored, types)
    assert report["verified"]["code_tensors"] == len(stored)
    assert report["logits"]["mean_kld"] < 0.05


def test_linears_that_were_not_quantized_stay_float(wide_base, tmp_path):
    stored, types = blocks_folder(wide_base("llama"), tmp_path / "q", "q5_k", "q6_k")
    back = "model.layers.0.mlp.up_proj"
    with edit_tensors(tmp_path / "q") as tensors:
        del tensors[f"{back}.blocks"], stored[back], types[back]
        tensors[f"{back}.weight"] = load_file(wide_base("llama") / "model.safetensors")[f"{back}.weight"]
    edit_config(tmp_path / "q", quantization_config=blocks.config(types))
    written = export(tmp_path / "q")["tensor_types"]
    assert written == {"Q5_K": list(types.values()).count("q5_k"), "Q6_K": list(types.values()).count("q6_k") + 1,
                     "F16": 1, "F32": 5}
    check_file("llama", tmp_path / "q.gguf", stored, types)


def test_a_flipped_bit_in_the_file_is_found(wide_base, tmp_path):
    blocks_folder(wide_base("llama"), tmp_path / "q", *BLOCK_TYPES)
    export(tmp_path / "q")
    ckpt = Checkpoint.open(tmp_path / "q")
    config = GgufExportConfig(model=tmp_path / "q")
    entries = pipeline.plan_file(config, ckpt, load_tokenizer(ckpt.folder), Types.choose(config, ckpt)).entries
    file = tmp_path / "q.gguf"
    verify.tensors(file, entries)
    data = bytearray(file.read_bytes())
    for t in GGUFReader(file).tensors:
        if t.name.startswith("blk.0.") and "norm" not in t.name:
            at = t.data_offset + t.n_bytes // 2
            data[at] ^= 8
            file.write_bytes(data)
            with pytest.raises(UserError, match=f"{t.name} has other blocks"):
                verify.tensors(file, entries)
            data[at] ^= 8


def by_module(linear: str) -> str:
    return "q4_k" if linear.endswith(("q_proj", "k_proj", "v_proj")) else "iq4_xs" if "mlp" in linear else "q6_k"


def test_blocks_are_found_in_what_llama_cpps_converter_wrote(wide_base, tmp_path):
    names = [n.removesuffix(".weight") for n in Checkpoint.open(wide_base("llama")).names() if is_decoder_linear(n)]
    stored, types = blocks_folder(wide_base("llama"), tmp_path / "q", *map(by_module, names))
    report = export(tmp_path / "q", converter=checkout(tmp_path / "llama.cpp"))
    assert report["tensor_types"] == {"Q4_K": 2, "Q6_K": 3, "IQ4_XS": 6, "F32": 5}
    fused = next(t for t in GGUFReader(report["path"]).tensors if t.name == "blk.1.attn_qkv.weight")
    expected = [in_the_file("llama", x, stored[x])[1] for x in (f"model.layers.1.self_attn.{y}_proj" for y in "qkv")]
    assert np.array_equal(fused.data, np.concatenate(expected))
    assert set(types.values()) == {"q4_k", "q6_k", "iq4_xs"}


def test_linears_that_are_fused_must_share_a_type(wide_base, tmp_path):
    blocks_folder(wide_base("llama"), tmp_path / "q", "q4_k", "q5_k", "q6_k")
    with pytest.raises(UserError, match=r"blk\.0\.attn_qkv\.weight consists of linears of different types \(q"):
        export(tmp_path / "q", converter=checkout(tmp_path / "llama.cpp"))


def test_a_row_of_zeros_does_not_decide_the_type(wide_base, tmp_path):
    """Any linear may hold such a row: its matrix keeps the type of its other rows."""
    shutil.copytree(wide_base("llama"), tmp_path / "m")
    with edit_tensors(tmp_path / "m") as tensors:
        for name, t in tensors.items():
            if is_decoder_linear(name):
                t[0] = 0
    names = [n.removesuffix(".weight") for n in Checkpoint.open(tmp_path / "m").names() if is_decoder_linear(n)]
    blocks_folder(tmp_path / "m", tmp_path / "q", *map(by_module, names))
    report = export(tmp_path / "q", converter=checkout(tmp_path / "llama.cpp"))
    assert report["tensor_types"] == {"Q4_K": 2, "Q6_K": 3, "IQ4_XS": 6, "F32": 5}
