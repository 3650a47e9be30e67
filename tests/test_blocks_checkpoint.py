"""Folders of block types: the stored bytes are what torch computes with, and what the .gguf file holds."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, LlamaFileType
from gguf.quants import dequantize
from rounding import is_decoder_linear, write_folder
from safetensors.torch import load_file, save_file
from test_block_types import assert_same, ggml_quantize
from test_gguf_converter import checkout
from tiny import build, edit_config

import llmc
from llmc.errors import UserError
from llmc.export.gguf import GgufExportConfig, export_gguf, verify
from llmc.export.gguf import export as pipeline
from llmc.export.gguf.converter import Row, RowIndex
from llmc.export.gguf.plan import Types
from llmc.files import write_json
from llmc.formats import blocks, quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.gguf import field
from llmc.formats.hf import load_tokenizer
from llmc.formats.manifest import hash_folder, manifest_path, new_manifest
from llmc.formats.packing import unpack
from llmc.formats.quantized import linears, parts
from llmc.formats.types import BLOCK_TYPES
from llmc.runtimes.torch_model import TorchModel

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
Stored = dict[str, np.ndarray]  # the bytes of every linear, uint8 [out, bytes of a row]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny float model of a family whose rows every type fits."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            inner = {"n_inner": 512} if family == "gpt2" else {}
            made[family] = build(family, tmp_path_factory.mktemp(family) / "m", hidden_size=256, intermediate_size=512,
                                 **inner)
        return made[family]

    return get


def blocks_folder(source: Path, out: Path, *names: str) -> tuple[Stored, dict[str, str]]:
    """Every decoder linear in llama.cpp's own rounding, on the named types in turn; returns bytes and types."""
    kept = Checkpoint.open(source).names()
    types = dict(zip((n.removesuffix(".weight") for n in kept if is_decoder_linear(n)), cycle(names), strict=False))
    stored: Stored = {}

    def encode(name: str, t: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not is_decoder_linear(name):
            return None
        linear = name.removesuffix(".weight")
        stored[linear] = ggml_quantize(np.ascontiguousarray(t.float().numpy()), BLOCK_TYPES[types[linear]])
        return blocks.encode(unpack(stored[linear], BLOCK_TYPES[types[linear]]))

    write_folder(source, out, encode, blocks.config(types))
    return stored, types


def float_twin(source: Path, out: Path, stored: Stored, types: dict[str, str]) -> Path:
    """The float folder with the weights that gguf's own reader sees in the stored bytes."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    conv1d = Checkpoint.open(source).config["model_type"] == "gpt2"
    for linear, data in stored.items():
        w = torch.from_numpy(dequantize(data, Kind[types[linear].upper()]))
        tensors[f"{linear}.weight"] = w.t().contiguous() if conv1d else w
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def logits(folder: Path) -> np.ndarray:
    model = TorchModel(folder, context=256, threads=1)
    try:
        return model.logits(np.random.default_rng(0).integers(2, 512, 60))
    finally:
        model.close()


def export(folder: Path, **options: Any) -> dict[str, Any]:
    return export_gguf(GgufExportConfig(model=folder, out=folder.with_suffix(".gguf"), threads=1, **options))


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


# --------------------------------------------------------------------------------------- what is stored is what is used


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_type(name, base, tmp_path):
    stored, types = blocks_folder(base("llama"), tmp_path / "q", name)
    ckpt = Checkpoint.open(tmp_path / "q")
    assert linears(ckpt) == list(stored)
    for linear, data in stored.items():
        t = quantized.read(ckpt, linear)
        assert_same(t, unpack(data, BLOCK_TYPES[name]))
        assert np.array_equal(blocks.encode(t)["blocks"].numpy(), data)
        assert quantized.shape(ckpt, linear) == t.shape
        assert quantized.type_name(ckpt, linear) == name
    twin = float_twin(base("llama"), tmp_path / "twin", stored, types)
    assert np.array_equal(logits(tmp_path / "q"), logits(twin))

    report = export(tmp_path / "q")
    check_file("llama", tmp_path / "q.gguf", stored, types)
    assert report["verified"]["code_tensors"] == len(stored) == 14
    assert report["verified"]["code_weights"] == sum(quantized.read(ckpt, x).codes.numel() for x in stored)
    assert report["file_type"] == name.upper()
    number = field(GGUFReader(tmp_path / "q.gguf"), "general.file_type")
    assert LlamaFileType(number).name.removesuffix("_M") == f"MOSTLY_{name.upper()}"
    assert report["logits"]["mean_kld"] < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_types_in_every_layout(family, base, tmp_path):
    """Permuted rows in Llama, biases in Qwen 2, fused linears in Phi-3, transposed float weights in GPT-2."""
    stored, types = blocks_folder(base(family), tmp_path / "q", *BLOCK_TYPES)
    assert len(set(types.values())) == min(len(stored), len(BLOCK_TYPES))
    twin = float_twin(base(family), tmp_path / "twin", stored, types)
    assert np.array_equal(logits(tmp_path / "q"), logits(twin))
    report = export(tmp_path / "q")
    check_file(family, tmp_path / "q.gguf", stored, types)
    assert report["verified"]["code_tensors"] == len(stored)
    assert report["logits"]["mean_kld"] < 0.05


def test_linears_that_were_not_quantized_stay_float(base, tmp_path):
    stored, types = blocks_folder(base("llama"), tmp_path / "q", "q5_k", "q6_k")
    tensors = load_file(tmp_path / "q/model.safetensors")
    back = "model.layers.0.mlp.up_proj"
    del tensors[f"{back}.blocks"], stored[back], types[back]
    tensors[f"{back}.weight"] = load_file(base("llama") / "model.safetensors")[f"{back}.weight"]
    save_file(tensors, tmp_path / "q/model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path / "q", quantization_config=blocks.config(types))
    types = export(tmp_path / "q")["tensor_types"]
    assert types == {"Q5_K": list(types.values()).count("q5_k"), "Q6_K": list(types.values()).count("q6_k"),
                     "F16": 1, "Q8_0": 1, "F32": 5}
    check_file("llama", tmp_path / "q.gguf", stored, types)


def test_a_flipped_bit_in_the_file_is_found(base, tmp_path):
    blocks_folder(base("llama"), tmp_path / "q", *BLOCK_TYPES)
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


# ----------------------------------------------------------------------------------------------- llama.cpp's converter


def by_module(linear: str) -> str:
    return "q4_k" if linear.endswith(("q_proj", "k_proj", "v_proj")) else "iq4_xs" if "mlp" in linear else "q6_k"


def test_blocks_are_found_in_what_llama_cpps_converter_wrote(base, tmp_path):
    names = [n.removesuffix(".weight") for n in Checkpoint.open(base("llama")).names() if is_decoder_linear(n)]
    stored, types = blocks_folder(base("llama"), tmp_path / "q", *map(by_module, names))
    report = export(tmp_path / "q", converter=checkout(tmp_path / "llama.cpp"))
    assert report["tensor_types"] == {"Q4_K": 2, "Q6_K": 2, "IQ4_XS": 6, "Q8_0": 1, "F32": 5}
    fused = next(t for t in GGUFReader(report["path"]).tensors if t.name == "blk.1.attn_qkv.weight")
    expected = [in_the_file("llama", x, stored[x])[1] for x in (f"model.layers.1.self_attn.{y}_proj" for y in "qkv")]
    assert np.array_equal(fused.data, np.concatenate(expected))
    assert set(types.values()) == {"q4_k", "q6_k", "iq4_xs"}


def test_linears_that_are_fused_must_share_a_type(base, tmp_path):
    blocks_folder(base("llama"), tmp_path / "q", "q4_k", "q5_k", "q6_k")
    with pytest.raises(UserError, match=r"blk\.0\.attn_qkv\.weight consists of linears of different types \(q"):
        export(tmp_path / "q", converter=checkout(tmp_path / "llama.cpp"))


def test_equal_rows_are_taken_from_a_linear_of_the_type():
    """A row of zeros, which any linear may hold, does not pull its matrix into another linear's type."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((4, 32)).astype(np.float32) for _ in range(2))
    a[0] = b[0] = 0
    index = RowIndex()
    index.add(0, a, "q4_k")
    index.add(1, b, "q6_k")
    assert index.find("b", b) == [Row(1, i) for i in range(4)]
    assert index.find("a", a) == [Row(0, i) for i in range(4)]
    assert not index.left


# ------------------------------------------------------------------------------------------------ inspect, verify, rest


def sign(folder: Path) -> None:
    """Give a folder the manifest that `llmc quantize` would write."""
    source = {"name": "base", "licence": "mit", "base_model": None, "revision": None, "files": {}}
    write_json(manifest_path(folder), new_manifest("blocks", source, [], outputs=hash_folder(folder)))


def test_inspect_and_verify(base, tmp_path):
    blocks_folder(base("llama"), tmp_path / "q", "q4_k", "iq4_nl")
    sign(tmp_path / "q")
    report = llmc.inspect(tmp_path / "q")
    assert report["format"] == "Hugging Face folder, llmc-blocks"
    assert report["type"] == "iq4_nl + q4_k"
    w = report["weights"]
    assert w["decoder_bits_per_weight"] == 4.5
    assert w["parameters"] == llmc.inspect(base("llama"))["weights"]["parameters"]
    assert w["classes"]["mlp"]["types"] == w["classes"]["attention"]["types"] == ["IQ4_NL", "Q4_K"]
    assert w["classes"]["mlp"]["bytes"] == w["types"]["Q4_K"] + w["types"]["IQ4_NL"] - w["classes"]["attention"]["bytes"]
    assert llmc.verify(tmp_path / "q")["problems"] == []


def test_it_is_not_quantized_again(base, tmp_path):
    blocks_folder(base("llama"), tmp_path / "q", "q4_k")
    with pytest.raises(UserError, match=r"is quantized already \(llmc-blocks\)"):
        llmc.quantize(tmp_path / "q", method="rtn", out=tmp_path / "again")


def test_float_and_gptq_folders_read_as_before(made):
    assert linears(Checkpoint.open(made.base)) == []
    ckpt = Checkpoint.open(made.gptq)
    linear = linears(ckpt)[0]
    assert quantized.is_quantized(ckpt)
    assert quantized.type_name(ckpt, linear) == "int4-sym-g32"
    assert quantized.shape(ckpt, linear) == quantized.read(ckpt, linear).shape
    assert {n for n in ckpt.names() if n.startswith(f"{linear}.")} <= set(parts(linear))


# --------------------------------------------------------------------------------------------------------------- damage

Q = "model.layers.0.self_attn.q_proj"


def edit_quantization(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=config | values)


def edit_types(folder: Path, **values: str | int | None) -> None:
    types = json.loads((folder / "config.json").read_text())["quantization_config"]["types"] | values
    edit_quantization(folder, types={k: v for k, v in types.items() if v is not None})


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.blocks"][5, :2] = torch.tensor([0x00, 0x7C])  # the first block's d


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown type": (lambda f: edit_types(f, **{Q: "q7_k"}), f"gives {Q} the type 'q7_k'"),
    "another type's bytes": (lambda f: edit_types(f, **{Q: "q6_k"}), rf"{Q}\.blocks of .* is U8 \[256, 144\]"),
    "cut rows": (lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.blocks": t[f"{Q}.blocks"][:, :-1].contiguous()})),
                 rf"{Q}\.blocks of .* is U8 \[256, 143\]"),
    "other numbers": (lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.blocks": t[f"{Q}.blocks"].to(torch.int32)})),
                      rf"{Q}\.blocks of .* is I32"),
    "half a file": (truncate, "half a download"),
    "no tensor": (lambda f: edit_tensors(f, lambda t: t.pop(f"{Q}.blocks")),
                  rf"1 linears .* have no tensor, first {Q}\.blocks"),
    "no type": (lambda f: edit_types(f, **{Q: None}), rf"names no type for {Q}\.blocks"),
    "no types": (lambda f: edit_quantization(f, types=None), "no table `types`"),
    "a number": (lambda f: edit_types(f, **{Q: 4}), f"gives {Q} the type 4"),
    "a later version": (lambda f: edit_quantization(f, version=2), "version 2; this llmc reads 'llmc-blocks', version"),
    "infinite factors": (lambda f: edit_tensors(f, infinite), rf"{Q}\.blocks of .* NaN or infinite"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_error(what, base, tmp_path):
    damage, message = DAMAGE[what]
    folder = tmp_path / "q"
    blocks_folder(base("llama"), folder, "q4_k")
    damage(folder)
    sign(folder)
    for use in (export, logits):
        with pytest.raises(UserError, match=message):
            use(folder)
    (problem,) = llmc.verify(folder)["problems"]
    assert re.search(message, problem)
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize(("change", "shape"), [(lambda b: b[:128].contiguous(), r"\[128, 256\]"),
                                               (lambda b: torch.cat([b, b], dim=1), r"\[256, 512\]")])
def test_blocks_of_another_shape_than_the_models(change, shape, base, tmp_path):
    blocks_folder(base("llama"), tmp_path / "q", "q4_k")
    edit_tensors(tmp_path / "q", lambda t: t.update({f"{Q}.blocks": change(t[f"{Q}.blocks"])}))
    with pytest.raises(UserError, match=rf"{Q} of .* has shape {shape}, config\.json says \[256, 256\]"):
        logits(tmp_path / "q")
    with pytest.raises(UserError, match=r"attn_q\.weight"):  # llama.cpp refuses the file
        export(tmp_path / "q")
    assert not list(tmp_path.glob("*.gguf"))


def test_a_missing_part_of_a_gptq_linear_is_named(made, tmp_path):
    folder = Path(shutil.copytree(made.gptq, tmp_path / "q"))
    edit_tensors(folder, lambda t: t.pop(f"{Q}.scales"))
    for use in (export, logits):
        with pytest.raises(UserError, match=rf"{Q}\.scales is missing"):
            use(folder)
