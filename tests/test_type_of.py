"""--type-of: types of single linears by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
from tiny import build, divergence, write_text

import llmc
from llmc.errors import UserError
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("base") / "m", hidden_size=256, intermediate_size=256)


def types(folder: Path) -> dict[str, str]:
    ckpt = Checkpoint.open(folder)
    return {n: quantized.type_name(ckpt, n) for n in quantized.linears(ckpt)}


@pytest.mark.parametrize("options", [{}, {"type": "q4_k"}, {"preset": "q4_k_m"}], ids=["bits", "type", "preset"])
def test_the_last_pattern_that_fits_counts(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    plain = llmc.quantize(base, method="rtn", out=tmp_path / "plain", **options)
    named = llmc.quantize(base, method="rtn", out=tmp_path / "q", type_of="down_proj=q6_k,layers.1.*_proj=q8_0", **options)
    before, after = types(tmp_path / "plain"), types(tmp_path / "q")
    for name, qtype in after.items():
        expected = "q8_0" if ".layers.1." in name else "q6_k" if "down_proj" in name else before[name]
        assert qtype == {"int4-sym-g32": "q4_0"}.get(expected, expected)
    assert named["bits_per_weight"] > plain["bits_per_weight"]
    assert divergence(tmp_path / "q", base) < divergence(tmp_path / "plain", base)


def test_a_budget_keeps_the_types_that_are_given(base: Path, tmp_path: Path) -> None:
    text = str(write_text(tmp_path / "t.txt"))
    llmc.quantize(base, target_bpw=5.5, type_of="v_proj=q8_0", calibration=text, samples=8, seq_len=64, out=tmp_path / "q")
    found = types(tmp_path / "q")
    assert {t for n, t in found.items() if "v_proj" in n} == {"q8_0"}
    assert len(set(found.values())) > 1


@pytest.mark.parametrize(("given", "message"), [
    ("down_proj", "give NAME=TYPE"), ("down_proj=q7", "give NAME=TYPE"), ("=q6_k", "give NAME=TYPE"),
    ("nothing=q6_k", "no linear of the decoder layers has a name with this part"),
])
def test_what_fits_nothing_is_refused(base: Path, given: str, message: str) -> None:
    with pytest.raises(UserError) as e:
        llmc.quantize(base, dry_run=True, method="rtn", type_of=given)
    assert message in str(e.value)


def test_rows_that_the_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rows of 64 weights do not divide into groups of 256"):
        llmc.quantize(build("llama", tmp_path / "m"), dry_run=True, method="rtn", type_of="q_proj=q6_k")


def test_experts_of_a_layer_have_one_type(tmp_path: Path) -> None:
    folder = mixtures.build("qwen3_moe", tmp_path / "m")
    with pytest.raises(UserError, match=r"experts of .*mlp\.experts\.\*\.down_proj several types"):
        llmc.quantize(folder, dry_run=True, method="rtn", type_of="experts.3.down_proj=q8_0")
    llmc.quantize(folder, method="rtn", type_of="experts.*.down_proj=q8_0", out=tmp_path / "q")
    found = types(tmp_path / "q")
    assert {t for n, t in found.items() if "down_proj" in n} == {"q8_0"}
    assert {t for n, t in found.items() if "gate_proj" in n} == {"q4_0"}
    assert torch.isfinite(torch.tensor(divergence(tmp_path / "q", folder)))
