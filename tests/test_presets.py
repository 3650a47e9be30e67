"""`llmc quantize --preset`: llama.cpp's mixes of types, from the table to the exported file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from quantizing import settings
from tiny import build

import llmc
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.quantize.presets import PRESETS, Facts, end_type, linear_type
from llmc.compress.quantize.run import quantize
from llmc.errors import UserError
from llmc.families.names import role_of
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.types import BLOCK_TYPES, IntegerType, QuantizedTensor

# The types that llama-quantize (llama.cpp of llama-cpp-python 0.3.36) gave the tensors of small files, read from its
# output by benchmarks/presets_of_llama_cpp.py --write.
FROZEN: dict[str, Any] = json.loads((Path(__file__).parent / "data/preset_types.json").read_text())
RUNS = [(title, key) for title, found in FROZEN.items() for key in found["types"]]


@pytest.mark.parametrize(("title", "key"), RUNS)
def test_every_type_is_what_llama_quantize_chose(title: str, key: str) -> None:
    model, preset = FROZEN[title]["model"], key.removesuffix(" with imatrix")
    layers, gqa, width = model["layers"], model["gqa"], model.get("width", 256)
    facts = Facts(layers, gqa, model.get("experts", 1), key != preset, seventy=layers == 80 and gqa > 1)
    for role, runs in FROZEN[title]["types"][key].items():
        expected = [kind for n, kind in re.findall(r"(\d+) (\w+)", runs) for _ in range(int(n))]
        if role.endswith(".weight"):
            head = role == "output.weight" or model.get("tied", False)
            assert expected == [end_type(preset, head, width)], role
        else:
            assert expected == [linear_type(preset, role, i, facts, width) for i in range(layers)], role


def test_the_frozen_table_has_every_preset() -> None:
    assert {key.removesuffix(" with imatrix") for _, key in RUNS} == set(PRESETS)


@pytest.mark.parametrize(("name", "role"), [
    ("model.layers.3.self_attn.v_proj", "attn_v"), ("model.layers.3.self_attn.qkv_proj", "attn_qkv"),
    ("transformer.h.0.attn.c_attn", "attn_qkv"), ("transformer.h.0.attn.c_proj", "attn_output"),
    ("transformer.h.0.mlp.c_proj", "ffn_down"), ("transformer.h.0.mlp.c_fc", "ffn_up"),
    ("model.layers.0.mlp.gate_up_proj", "ffn_up"), ("model.layers.0.mlp.gate_proj", "ffn_gate"),
    ("model.layers.0.mlp.up_proj", "ffn_up"), ("model.decoder.layers.0.self_attn.out_proj", "attn_output"),
    ("gpt_neox.layers.0.attention.query_key_value", "attn_qkv"), ("gpt_neox.layers.0.attention.dense", "attn_output"),
    ("gpt_neox.layers.0.mlp.dense_4h_to_h", "ffn_down"), ("model.layers.0.block.odd", "other"),
])
def test_roles_by_name(name: str, role: str) -> None:
    assert role_of(name) == role


def test_a_mix_of_codebooks_ships_with_its_types(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256, num_hidden_layers=1,
                 tie_word_embeddings=False)
    quantize(base, settings(text, tmp_path / "q", preset="iq2_m", method="rtn"))
    assert llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf")["verified"]
    found = types_in(tmp_path / "q.gguf")
    assert (found["token_embd.weight"], found["output.weight"], found["blk.0.attn_q.weight"]) == ("iq3_s", "q5_k", "iq2_s")
    assert (found["blk.0.attn_output.weight"], found["blk.0.ffn_up.weight"]) == ("iq3_s", "iq2_s")


def types_in(file: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name.lower() for t in GGUFReader(file).tensors if len(t.shape) > 1}


@pytest.mark.parametrize(("tied", "method"), [(True, "gptq"), (False, "gptq"), (False, "rtn")])
def test_a_preset_ships_with_its_types_bit_for_bit(tied: bool, method: str, tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256, num_hidden_layers=4,
                 tie_word_embeddings=tied)
    result = quantize(base, settings(text, tmp_path / "q", preset="q4_k_m", method=method))
    assert result["type"] == "q4_k_m"
    facts = Facts(4, 2)
    report = llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf")
    found = types_in(tmp_path / "q.gguf")
    for layer in range(4):
        for role in ("attn_q", "attn_v", "attn_output", "ffn_down", "ffn_up"):
            assert found[f"blk.{layer}.{role}.weight"] == linear_type("q4_k_m", role, layer, facts, 256)
    assert found["token_embd.weight"] == ("q6_k" if tied else "q4_k")
    assert found.get("output.weight") == (None if tied else "q6_k")
    assert report["tensor_types"]["Q6_K"] > 1
    assert llmc.verify(tmp_path / "q")["problems"] == []
    assert llmc.inspect(tmp_path / "q")["type"] == "q4_k + q6_k"
    other = llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "r.gguf", embedding="f16", head="f16")
    assert other["verified"]
    assert types_in(tmp_path / "r.gguf")["token_embd.weight"] == "f16"


def test_integer_types_have_a_place_in_a_mixed_folder(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", num_hidden_layers=8)  # rows of 64 and 128: q4_0, and q4_1 in the first layer
    quantize(base, settings(text, tmp_path / "mixed", preset="q4_0"))
    made = Checkpoint.open(tmp_path / "mixed")
    types = {n: quantized.type_name(made, n) for n in quantized.linears(made)}
    assert {n for n, qtype in types.items() if qtype == "q4_1"} == {"model.layers.0.mlp.down_proj"}
    assert set(types.values()) == {"q4_0", "q4_1"}
    # the codes are those that the folder of plain q4_0 has: up to layer 0's down_proj nothing differs
    quantize(base, settings(text, tmp_path / "plain", type="q4_0"))
    plain = Checkpoint.open(tmp_path / "plain")
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"):
        a, b = (quantized.read(c, f"model.layers.0.{name}") for c in (made, plain))
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.dequantize(), b.dequantize())
    assert llmc.export(tmp_path / "mixed", format="gguf", out=tmp_path / "m.gguf")["verified"]["code_tensors"] == 56


def test_a_preset_of_one_integer_type_is_a_portable_folder(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256, tie_word_embeddings=False)
    quantize(base, settings(text, tmp_path / "q", preset="q8_0", method="rtn"))
    assert (tmp_path / "q/quantize_config.json").is_file()
    quantize(base, settings(text, tmp_path / "p", preset="q4_0", method="rtn"))
    assert (tmp_path / "p/quantize_config.json").is_file()
    llmc.export(tmp_path / "p", format="gguf", out=tmp_path / "p.gguf")
    found = types_in(tmp_path / "p.gguf")
    assert (found["token_embd.weight"], found["output.weight"]) == ("q4_0", "q6_k")
    load_torch_model(tmp_path / "p")


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_codes_as_blocks_are_the_same_weights(bits: int) -> None:
    torch.manual_seed(bits)
    qtype = IntegerType(bits, 64)
    q = QuantizedTensor(qtype, torch.randint(0, 1 << bits, (3, 128), dtype=torch.uint8),
                        (torch.randn(3, 2) * 0.1).half())
    blocks = quantized.as_blocks(q)
    assert torch.equal(blocks.dequantize(), q.dequantize())
    assert blocks.type is BLOCK_TYPES[{4: "q4_0", 8: "q8_0"}[bits]]


def test_rows_that_256_does_not_divide_are_named(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build("llama", tmp_path / "base", hidden_size=64, intermediate_size=256)
    result = quantize(base, settings(text, tmp_path / "q", preset="q2_k", method="rtn"))
    err = capsys.readouterr().err
    assert ("12 of 14 linears have rows that are not a multiple of 256 and get q4_0 instead of what q2_k would give them"
            in err)
    assert result["types"] == {"q4_0": 12, "q3_k": 2}
    assert result["end_types"] == {"embedding": "q8_0"}


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_an_embedding_can_have_any_type(kind: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    report = llmc.export(base, format="gguf", out=tmp_path / "e.gguf", embedding=kind)
    assert types_in(tmp_path / "e.gguf")["token_embd.weight"] == kind
    assert report["verified"]["tensors"] > 8


@pytest.mark.parametrize(("options", "words"), [
    ({"preset": "q9"}, "--preset q9: must be one of q2_k"),
    ({"preset": "q4_k_m", "type": "q4_k"}, "give one of them"),
    ({"preset": "q4_k_m", "bits": 8}, "leave out --bits"),
    ({"preset": "q4_k_m", "fallback": "q8_0"}, "give --type"),
])
def test_bad_presets_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        QuantizeConfig(**options)


def test_a_folder_that_asks_for_an_unknown_type_is_refused(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    quantize(base, settings(text, tmp_path / "q", preset="q4_1", method="rtn"))
    path = tmp_path / "q/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["end_types"]["embedding"] = "q9_z"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="q9_z"):
        llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf")
