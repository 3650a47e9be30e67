"""Folders of other quantizers: each layout, written here weight by weight from its description, is read as what it means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_files import needs_converter
from rounding import is_decoder_linear, round_to, write_folder
from safetensors.torch import load_file
from tiny import build, change_tensors, edit_config, edit_tensors

import llmc
from llmc.errors import UserError
from llmc.formats import mxfp4, quantized
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.packed import LAYOUTS, layout_of
from llmc.formats.types import IntegerType, QuantizedTensor
from llmc.rounding import lattice

LINEAR = "model.layers.0.mlp.down_proj"
UP = "model.layers.1.mlp.up_proj"


def word(codes: list[int], bits: int) -> int:
    """Codes in the bits of a signed 32-bit word, the first in the lowest."""
    return int(np.array(sum(c << bits * i for i, c in enumerate(codes)), dtype=np.uint32).view(np.int32))


def words(rows: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Integers [n, m] packed along their rows, int32 [n, ceil(m * bits / 32)]. order: which number of a word lies where."""
    per = 32 // bits
    found = []
    for row in rows.tolist():
        padded = row + [0] * (-len(row) % per)
        found.append([word([padded[at + i] for i in order or range(per)], bits) for at in range(0, len(padded), per)])
    return torch.tensor(found, dtype=torch.int32)


def awq(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    assert q.zeros is not None
    return {"qweight": words(q.codes.t(), 4, order), "qzeros": words(q.zeros.t(), 4, order),
            "scales": q.scales.t().contiguous()}


def compressed(q: QuantizedTensor, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    bits = q.type.bits
    parts = {"weight_packed": words(q.codes, bits), "weight_scale": q.scales.to(dtype), "weight_shape": torch.tensor(q.shape)}
    if q.zeros is not None:
        parts["weight_zero_point"] = words(q.zeros.t(), bits).t().contiguous()
    return parts


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def in_compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", **weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


FORMS: dict[str, tuple[IntegerType, Callable[[QuantizedTensor], dict[str, torch.Tensor]], dict[str, Any]]] = {
    "awq": (IntegerType(4, 32, False), awq, AWQ),
    "awq of a row": (IntegerType(4, 64, False), awq, {**AWQ, "group_size": -1, "version": "GEMM"}),
    "int4": (IntegerType(4, 32), compressed, in_compressed()),
    "int4 asym": (IntegerType(4, 64, False), compressed, in_compressed(symmetric=False)),
    "int8": (IntegerType(8, 32), compressed, in_compressed(num_bits=8)),
    "int8 asym": (IntegerType(8, 32, False), compressed, in_compressed(num_bits=8, symmetric=False)),
    "int4 of a row": (IntegerType(4, 64), compressed, in_compressed(strategy="channel")),
}
HELD = {"awq": "Q5_0", "awq of a row": "Q5_0", "int4": "Q4_0", "int4 asym": "Q5_0", "int8": "Q8_0", "int8 asym": "F16",
        "int4 of a row": "Q4_0"}


def packed(form: str, folder: Path, source: Path) -> dict[str, QuantizedTensor]:
    """Write `folder`: the float folder `source` in a form; returns what was stored by linear."""
    qtype, encode, config = FORMS[form]
    stored: dict[str, QuantizedTensor] = {}

    def linear(name: str, w: torch.Tensor) -> dict[str, torch.Tensor] | None:
        if not is_decoder_linear(name):
            return None
        own = IntegerType(qtype.bits, w.shape[1], qtype.symmetric) if form.endswith("row") else qtype
        q = stored[name.removesuffix(".weight")] = round_to(own, w)
        return encode(q)

    write_folder(source, folder, linear, config)
    return stored


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("packed") / "base", dtype=torch.float16)


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_read_and_go_where_a_type_holds_them(form: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "q"
    made = packed(form, folder, base)
    ckpt = Checkpoint.open(folder)
    assert set(quantized.linears(ckpt)) == made.keys()
    model = load_torch_model(folder)
    for linear, q in made.items():
        found = quantized.read(ckpt, linear)
        assert isinstance(found, QuantizedTensor)
        assert found.type == q.type
        assert quantized.shape(ckpt, linear) == q.shape
        assert torch.equal(found.codes, q.codes)
        assert torch.equal(found.scales, q.scales)
        assert found.zeros is q.zeros is None or torch.equal(found.zeros, q.zeros)  # type: ignore[arg-type]
        assert torch.equal(quantized.dequantized(ckpt, linear), q.dequantize())
        assert torch.equal(model.get_submodule(linear).weight, q.dequantize())
    assert list(artifact_at(folder).problems()) == []
    weights = llmc.inspect(folder)["weights"]
    assert weights["parameters"] == llmc.inspect(base)["weights"]["parameters"]

    report = llmc.export(folder, format="gguf", out=tmp_path / "q.gguf")
    tensors = {t.name: t for t in GGUFReader(tmp_path / "q.gguf").tensors}
    t = tensors["blk.0.ffn_down.weight"]
    assert t.tensor_type.name == HELD[form]
    values = dequantize(t.data, t.tensor_type)
    if HELD[form] == "F16":
        assert any("no GGUF type holds int8-asym-g32: the codes of 14 linears" in n for n in report["notes"])
        assert np.array_equal(values, made[LINEAR].dequantize().half().float().numpy())
    else:
        assert np.array_equal(values, made[LINEAR].dequantize().numpy())
        assert report["verified"]["code_tensors"] == 14
    for refused in (lambda: llmc.quantize(folder, out=tmp_path / "x"), lambda: llmc.heal(folder, teacher=str(base))):
        with pytest.raises(UserError, match=r"quantized already|holds codes of"):
            refused()


@pytest.mark.parametrize("form", ["awq", "int4", "int8 asym"])
def test_codes_go_into_matmulnbits(form: str, base: Path, tmp_path: Path) -> None:
    made = packed(form, tmp_path / "q", base)
    report = llmc.export(tmp_path / "q", format="onnx", out=tmp_path / "onnx")
    assert report["forms"][made[LINEAR].type.name] == 10  # q, k and v are one
    assert report["verified"]["code_weights"] >= sum(q.codes.numel() for q in made.values())  # each was read back


def test_scales_that_float16_rounds_are_counted(base: Path, tmp_path: Path) -> None:
    packed("int4", tmp_path / "q", base)
    with edit_tensors(tmp_path / "q") as tensors:
        name = f"{LINEAR}.weight_scale"
        tensors[name] = tensors[name].float() * 1.0001
        exact = tensors[name].clone()
        tensors[f"{UP}.weight_scale"] = tensors[f"{UP}.weight_scale"].bfloat16()  # float16 holds these
    ckpt = Checkpoint.open(tmp_path / "q")
    assert quantized.rounded_scales(ckpt) == [LINEAR]
    q = quantized.read(ckpt, LINEAR)
    assert isinstance(q, QuantizedTensor)
    assert torch.equal(q.scales, exact.half())
    wide = exact.repeat_interleave(32, 1)
    assert torch.equal(quantized.dequantized(ckpt, LINEAR), (q.codes.float() - 8) * wide)
    report = llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf")
    assert any(f"the scales of 1 linears (first {LINEAR}) are rounded" in n for n in report["notes"])


def test_columns_in_another_order(base: Path, tmp_path: Path) -> None:
    packed("int4", tmp_path / "q", base)
    before = quantized.dequantized(Checkpoint.open(tmp_path / "q"), LINEAR)
    with edit_tensors(tmp_path / "q") as tensors:
        tensors[f"{LINEAR}.weight_g_idx"] = torch.arange(128, dtype=torch.int32).flip(0) // 32
        tensors[f"{LINEAR}.weight_scale"] = tensors[f"{LINEAR}.weight_scale"].flip(1).contiguous()
        tensors[f"{UP}.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)  # not used
    ckpt = Checkpoint.open(tmp_path / "q")
    assert torch.equal(quantized.dequantized(ckpt, LINEAR), before)
    quantized.read(ckpt, UP)
    with pytest.raises(UserError, match="permuted g_idx"):
        llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf")


DAMAGE: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "awq without zeros": ("awq", lambda t: t.pop(f"{LINEAR}.qzeros"), f"{LINEAR}.qzeros is missing"),
    "awq with other groups": ("awq", lambda t: t.update({f"{LINEAR}.scales": torch.ones(2, 64).half()}), "group_size"),
    "no shape": ("int4", lambda t: t.pop(f"{LINEAR}.weight_shape"), "weight_shape is missing"),
    "no scales": ("int4", lambda t: t.pop(f"{LINEAR}.weight_scale"), "weight_scale is missing"),
    "another shape": ("int4", lambda t: t.update({f"{LINEAR}.weight_shape": torch.tensor([64, 256])}), "bits a weight|fit"),
    "other zeros": ("int4 asym", lambda t: t.update({f"{LINEAR}.weight_zero_point": torch.zeros(1, 1, dtype=torch.int32)}),
                    "zero points"),
    "infinite scales": ("int4", lambda t: t.update({f"{LINEAR}.weight_scale": torch.full((64, 4), 1e6)}), "float16"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_error(what: str, base: Path, tmp_path: Path) -> None:
    form, damage, message = DAMAGE[what]
    packed(form, tmp_path / "q", base)
    change_tensors(tmp_path / "q", damage)
    with pytest.raises(UserError, match=message):
        quantized.read(Checkpoint.open(tmp_path / "q"), LINEAR)


# ---------------------------------------------------------------------------------------------------------- FP8


def fp8_folder(source: Path, folder: Path, block: tuple[int, int] | None, suffix: str,
               config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Write `folder` with FP8 linears; returns their values. block: weights that share a scale; None: a matrix."""
    values: dict[str, torch.Tensor] = {}
    shutil.copytree(source, folder)
    with edit_tensors(folder) as tensors:
        for name in filter(is_decoder_linear, list(tensors)):
            w = tensors[name].float()
            rows, columns = block or w.shape
            scales = torch.zeros(-(-w.shape[0] // rows), -(-w.shape[1] // columns))
            codes, values[name] = torch.zeros(w.shape, dtype=torch.float8_e4m3fn), torch.zeros(w.shape)
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                    scales[i, j] = w[part].abs().max() / 448
                    codes[part] = (w[part] / scales[i, j]).to(torch.float8_e4m3fn)
                    values[name][part] = codes[part].float() * scales[i, j]
            tensors[name] = codes
            tensors[name + suffix] = scales if block else scales.reshape(())
            tensors[name.replace("weight", "input_scale")] = torch.ones(())
    edit_config(folder, quantization_config=config)
    return values


FP8: dict[str, tuple[tuple[int, int] | None, str, dict[str, Any]]] = {
    "deepseek": ((48, 40), "_scale_inv", {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 40]}),
    "ministral": (None, "_scale_inv", {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "compressed": (None, "_scale", {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {
        "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}}}),
    "rows": ((1, 1000), "_scale", {"quant_method": "fbgemm_fp8"}),
    "blocks": ((32, 32), "_scale", {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {
        "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 32]}}}}),
    "modelopt": (None, "_scale", {"quant_method": "modelopt", "quant_algo": "FP8"}),
}


@pytest.mark.parametrize("form", FP8)
def test_fp8_is_read_as_code_times_scale(form: str, base: Path, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    block, suffix, config = FP8[form]
    values = fp8_folder(base, tmp_path / "fp8", block, suffix, config)
    ckpt = Checkpoint.open(tmp_path / "fp8")
    assert ckpt.quantization is None
    assert set(ckpt.names()) == set(Checkpoint.open(base).names())
    for name, value in values.items():
        assert ckpt.shape(name) == value.shape
        assert torch.equal(ckpt.tensor(name), value)
    said = capsys.readouterr().err
    assert "14 matrices are FP8 with a scale for each" in said
    assert "14 scales of activations" in said
    model = load_torch_model(tmp_path / "fp8")
    assert torch.equal(model.get_submodule(LINEAR).weight, values[f"{LINEAR}.weight"])


def test_fp8_through_the_commands(base: Path, tmp_path: Path) -> None:
    block, suffix, config = FP8["deepseek"]
    values = fp8_folder(base, tmp_path / "fp8", block, suffix, config)
    plan = llmc.quantize(tmp_path / "fp8", method="rtn", dry_run=True)
    assert plan["notes"] == ["14 tensors are stored as F8_E4M3, and what is quantized of them is rounded again"]
    llmc.quantize(tmp_path / "fp8", method="rtn", keep="down_proj", out=tmp_path / "q")
    made = Checkpoint.open(tmp_path / "q")
    assert torch.equal(made.tensor(f"{LINEAR}.weight"), values[f"{LINEAR}.weight"])  # kept: its values, without a scale
    assert not [n for n in made.names() if "scale_inv" in n or "input_scale" in n]
    assert llmc.verify(tmp_path / "q")["problems"] == []
    llmc.export(tmp_path / "fp8", format="gguf", float_type="f32", out=tmp_path / "f.gguf")
    t = next(t for t in GGUFReader(tmp_path / "f.gguf").tensors if t.name == "blk.0.ffn_down.weight")
    assert np.array_equal(t.data, values[f"{LINEAR}.weight"].numpy())
    report = llmc.inspect(tmp_path / "fp8")
    assert report["weights"]["types"]["F8_E4M3"] > 0
    assert list(artifact_at(tmp_path / "fp8").problems()) == []


def test_fp8_that_does_not_fit(base: Path, tmp_path: Path) -> None:
    block, suffix, config = FP8["deepseek"]
    fp8_folder(base, tmp_path / "a", block, suffix, config)
    with edit_tensors(tmp_path / "a") as tensors:
        tensors[f"{LINEAR}.weight_scale_inv"] = torch.ones(3, 7)
    with pytest.raises(UserError, match=r"\[3, 7\], which does not fit \[64, 128\] weights in blocks of \[48, 40\]"):
        Checkpoint.open(tmp_path / "a")
    with edit_tensors(tmp_path / "a") as tensors:
        del tensors[f"{LINEAR}.weight_scale_inv"]
    with pytest.raises(UserError, match=r"says fp8|codes are not weights"):
        Checkpoint.open(tmp_path / "a")


# -------------------------------------------------------------------------------------------------------- MXFP4


def random_mxfp4(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """blocks uint8 [*shape, 16], scales uint8 [*shape]."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 256, (*shape, 16), generator=g, dtype=torch.uint8),
            torch.randint(118, 124, shape, generator=g, dtype=torch.uint8))


def slow(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[n, 16] and [n] -> [n, 32], number by number: sign, two bits of exponent, one of mantissa."""
    found = []
    for row, scale in zip(blocks.tolist(), scales.tolist(), strict=True):
        for byte in row:
            for code in (byte % 16, byte // 16):
                exponent, mantissa = code // 2 % 4, code % 2
                size = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
                found.append((-1 if code >= 8 else 1) * size * 2.0 ** (scale - 127))
    return torch.tensor(found).view(-1, 32)


def test_mxfp4_numbers() -> None:
    blocks, scales = random_mxfp4(40)
    scales[:3] = torch.tensor([0, 1, 254])
    blocks[2] &= 0x11  # 2^127 times more than 1 is infinite in float32
    values = mxfp4.dequantize(blocks[:, None], scales[:, None])
    assert torch.equal(values.float()[3:], slow(blocks, scales)[3:])
    data = mxfp4.pack(blocks[:, None].numpy(), scales[:, None].numpy())
    assert data.shape == (40, 17)
    assert np.array_equal(dequantize(data, Kind.MXFP4)[3:], values.float().numpy()[3:])
    again = mxfp4.unpack(data)
    assert np.array_equal(again[0][:, 0], blocks.numpy())
    assert np.array_equal(again[1][:, 0], scales.numpy())
    found = lattice.type_of(values.float()[3:])
    assert found is not None
    assert found.name == "mxfp4"


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny gpt-oss folder with MXFP4 experts, and the values of the experts by parameter."""
    from tiny import tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("oss") / "m"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=32,
        max_position_embeddings=256, rope_scaling=None, pad_token_id=1, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    values: dict[str, torch.Tensor] = {}
    with edit_tensors(folder) as tensors:
        for i, name in enumerate(n for n in list(tensors) if n.endswith(("experts.gate_up_proj", "experts.down_proj"))):
            experts, width, out = tensors.pop(name).shape
            blocks, scales = random_mxfp4(experts, out, width // 32, seed=i)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            rows = slow(blocks.view(-1, 16), scales.view(-1)).view(experts, out, width)
            values[name] = rows.transpose(1, 2)
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder, values


def test_experts_of_gpt_oss(gpt_oss: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, values = gpt_oss
    ckpt = Checkpoint.open(folder)
    assert len(values) == 4
    for name, value in values.items():
        assert ckpt.shape(name) == value.shape
        assert ckpt.nbytes(name) == value.numel() * 17 // 32
        assert torch.equal(ckpt.tensor(name).float(), value)
    model = load_torch_model(folder)
    for name, value in values.items():
        assert torch.equal(model.get_parameter(name), value)
    assert llmc.inspect(folder)["weights"]["types"]["MXFP4"] == sum(v.numel() for v in values.values()) * 17 // 32
    assert list(artifact_at(folder).problems()) == []


@needs_converter
def test_experts_of_gpt_oss_go_into_gguf_bit_for_bit(gpt_oss: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, values = gpt_oss
    report = llmc.export(folder, format="gguf", out=tmp_path / "m.gguf")
    assert report["tensor_types"]["MXFP4"] == 6  # gate, up and down of two layers
    assert report["logits"]["mean_kld"] < 1e-3
    stored = {t.name: t for t in GGUFReader(tmp_path / "m.gguf").tensors}
    raw = load_file(folder / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts."
        for role, part, rows in (("gate", "gate_up_proj", slice(0, None, 2)), ("up", "gate_up_proj", slice(1, None, 2)),
                                 ("down", "down_proj", slice(None))):
            blocks, scales = (raw[f"{name}{part}_{kind}"][:, rows].numpy() for kind in ("blocks", "scales"))
            expected = np.stack([mxfp4.pack(b, s) for b, s in zip(blocks, scales, strict=True)])
            found = stored[f"blk.{layer}.ffn_{role}_exps.weight"].data
            assert np.array_equal(found.view(np.uint8).reshape(expected.shape), expected)
    assert len(values) == 4


# ------------------------------------------------------------------------------------------------------ by name


@pytest.mark.parametrize(("config", "named"), [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "NF4"), ({"quant_method": "hqq"}, "HQQ"),
    ({"quant_method": "torchao"}, "torchao"), ({"quant_method": "gemma"}, "Gemma's mobile format"),
    ({"quant_method": "awq", "version": "gemv"}, "another order"), ({"quant_method": "nvfp4"}, "NVFP4"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "another format of compressed-tensors"),
    ({"quant_method": "next-year"}, "an unknown form"),
])
def test_what_llmc_does_not_read_is_refused_by_name(config: dict[str, Any], named: str, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "q")
    with edit_tensors(tmp_path / "q") as tensors:
        tensors[f"{LINEAR}.weight"] = tensors[f"{LINEAR}.weight"].to(torch.int8)
    edit_config(tmp_path / "q", quantization_config=config)
    for read in (load_torch_model, lambda m: llmc.export(m, format="gguf")):
        with pytest.raises(UserError, match=named) as e:
            read(tmp_path / "q")
        assert repr(config["quant_method"]) in e.value.problem
        assert "AWQ" in e.value.hint


def test_every_layout_can_be_meant() -> None:
    """A row that an earlier one hides would never be used."""
    examples: dict[str, dict[str, Any]] = {
        row.name: next((c for c in ({"quant_method": row.method}, {"quant_method": row.method, "version": "gemv"},
                                    {"quant_method": row.method, "load_in_4bit": True}, in_compressed(), FP8["compressed"][2],
                                    FP8["modelopt"][2]) if layout_of(c) == row), {}) for row in LAYOUTS}
    assert [name for name, config in examples.items() if not config] == []
    assert json.dumps(examples)
