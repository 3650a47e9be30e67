"""`llmc quantize --type`: every GGUF weight type from a float folder to a file in llama.cpp."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from killing import interrupted, resumed
from quantizing import settings
from tiny import build, divergence

import llmc
from llmc.compress.quantize.assignment import Assignment
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.quantize.layer_pass import QuantizePass
from llmc.compress.quantize.run import quantize
from llmc.errors import UserError
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.types import BLOCK_TYPES, IntegerType

WIDE = {"hidden_size": 256, "intermediate_size": 512}


def test_the_types_of_a_large_mixture_are_counted_in_a_moment() -> None:
    """18,000 linears are those of 48 layers of 128 experts. Asked of each linear, all of them were compared again."""
    types = Assignment("q4_0", {f"model.layers.0.mlp.experts.{i}.up_proj": IntegerType(4, 32) for i in range(18_000)})
    start = time.process_time()
    assert types.counts() == {types.stored("model.layers.0.mlp.experts.0.up_proj"): 18_000}
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_type_gptq_beats_rtn_and_ships_bit_for_bit(name: str, tmp_path: Path, text: Path) -> None:
    slow = {} if BLOCK_TYPES[name].codebook is None else {"num_hidden_layers": 1}
    base = build("llama", tmp_path / "base", **WIDE, **slow)
    for method in ("gptq", "rtn"):
        result = quantize(base, settings(text, tmp_path / method, method=method, type=name, samples=160))
        assert result["type"] == name
        assert result["bits_per_weight"] == pytest.approx(BLOCK_TYPES[name].bits_per_weight)
    assert divergence(tmp_path / "gptq", base) < divergence(tmp_path / "rtn", base)
    report = llmc.export(tmp_path / "gptq", format="gguf", out=tmp_path / "small.gguf")
    weights = sum(q.codes.numel() for q in (quantized.read(Checkpoint.open(tmp_path / "gptq"), n)
                                            for n in quantized.linears(Checkpoint.open(tmp_path / "gptq"))))
    assert report["verified"]["code_weights"] == weights
    assert llmc.verify(tmp_path / "gptq")["problems"] == []
    assert llmc.inspect(tmp_path / "small.gguf")


def test_q4_0_is_the_portable_type_of_four_bits(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    named = quantize(base, settings(text, tmp_path / "a", type="q4_0"))
    bits = quantize(base, settings(text, tmp_path / "b"))
    assert named["weights_sha256"] == bits["weights_sha256"]
    assert (tmp_path / "a/quantize_config.json").is_file()


def test_rows_that_a_type_cannot_hold_take_another_and_that_is_said(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    base = build("llama", tmp_path / "base", hidden_size=64, intermediate_size=256)
    quantize(base, settings(text, tmp_path / "q", type="q4_k"))
    assert "12 of 14 linears have rows that are not a multiple of 256 and get q5_0 instead of q4_k" in capsys.readouterr().err
    types = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]["types"]
    assert sorted(set(types.values())) == ["q4_k", "q5_0"]
    assert all((qtype == "q4_k") == name.endswith("down_proj") for name, qtype in types.items())
    entry = json.loads((tmp_path / "q/llmc.json").read_text())["passes"][-1]
    assert entry["fallback_types"]["model.layers.0.mlp.up_proj"] == "q5_0"
    quantize(base, settings(text, tmp_path / "r", type="q4_k", fallback="q8_0", method="rtn"))
    assert llmc.export(tmp_path / "r", format="gguf", out=tmp_path / "r.gguf")["verified"]


def test_codebooks_fall_back_and_are_refused_where_a_format_cannot_hold_them(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=64, intermediate_size=256, num_hidden_layers=1)
    quantize(base, settings(text, tmp_path / "q", type="iq3_xxs", method="rtn"))
    types = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]["types"]
    assert {n.rpartition(".")[2]: t for n, t in types.items()}["down_proj"] == "iq3_xxs"
    assert sorted(set(types.values())) == ["iq3_xxs", "iq4_nl"]
    assert llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf")["verified"]
    with pytest.raises(UserError, match="iq3_xxs"):
        llmc.export(tmp_path / "q", format="onnx", out=tmp_path / "onnx")


def test_a_type_goes_on_after_an_interruption(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", **WIDE)
    whole, again = resumed(lambda **more: quantize(base, settings(text, **more, type="q3_k")), tmp_path,
                           interrupted(QuantizePass, "begin", layer=1))
    assert again["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.parametrize(("options", "words"), [
    ({"type": "q4_z"}, "--type q4_z: must be one of q4_0"),
    ({"type": "q4_k", "bits": 8}, "leave out --bits"),
    ({"type": "q4_k", "fallback": "q3_k"}, "blocks of 32"),
    ({"fallback": "q4_0"}, "give --type"),
])
def test_bad_types_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        QuantizeConfig(**options)  # type: ignore[arg-type]
