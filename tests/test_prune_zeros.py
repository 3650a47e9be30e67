"""Zeros of a pruned model: later passes keep them, or refuse, or say that they are lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning import logits, prune, zeros
from quantizing import lost, problem
from tiny import build

import llmc
from llmc.compress.prune.masks import magnitude_mask
from llmc.compress.quantize.assignment import type_called
from llmc.compress.quantize.gptq import damped, gptq
from llmc.errors import UserError
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.types import BLOCK_TYPES, IntegerType
from llmc.rounding.rtn import rtn


@pytest.mark.parametrize("options", [{"method": "gptq"}, {"method": "rtn"}, {"method": "gptq", "type": "q5_0"},
                                     {"method": "gptq", "sym": False}, {"method": "gptq", "transform": "scaling"}])
def test_quantizing_keeps_the_zeros(options: dict[str, Any], tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", dtype=torch.float16)
    prune(base, text, tmp_path / "sparse", method="wanda")
    done = llmc.quantize(tmp_path / "sparse", **options, calibration=str(text), samples=16, seq_len=64, threads=2,
                         out="small")
    made = Checkpoint.open(Path("small"))
    for name, zero in zeros(tmp_path / "sparse").items():
        assert bool((quantized.read(made, name).dequantize()[zero] == 0).all()), name
    assert done["fallbacks"] == 0
    passes = json.loads(Path("small/llmc.json").read_text())["passes"]
    assert [p["name"] for p in passes if p["name"] != "scaling"] == ["prune", "quantize"]
    assert passes[-1]["zeros_kept"]


def test_gptq_with_the_mask_loses_less_than_rounding(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    prune(base, text, tmp_path / "sparse")
    klds = []
    for method in ("gptq", "rtn"):
        llmc.quantize(tmp_path / "sparse", method=method, calibration=str(text), samples=16, seq_len=64, threads=2,
                      out=method)
        p, q = (torch.log_softmax(logits(llmc_model(f)).double(), -1) for f in (tmp_path / "sparse", Path(method)))
        klds.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert klds[0] < klds[1]


def llmc_model(folder: Path) -> Any:
    from llmc.formats.hf import load_torch_model

    return load_torch_model(folder)


def test_healing_keeps_the_zeros(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    prune(base, text, tmp_path / "sparse")
    llmc.quantize(tmp_path / "sparse", method="rtn", out="small", threads=2)
    llmc.heal("small", tmp_path / "sparse", calibration=text, steps=3, batch=2, seq_len=64, held_out=2, sampled=0, threads=2,
              out="healed")
    made, before = Checkpoint.open(Path("healed")), Checkpoint.open(Path("small"))
    changed = 0
    for name, zero in zeros(tmp_path / "sparse").items():
        weight = quantized.read(made, name).dequantize()
        assert bool((weight[zero] == 0).all())
        changed += not torch.equal(weight, quantized.read(before, name).dequantize())
    assert changed


@pytest.mark.parametrize(("options", "message"), [
    ({"type": "q4_1"}, "q4_1 has no code for the value 0"), ({"type": "iq4_nl"}, "iq4_nl"), ({"preset": "q4_1"}, "q4_1"),
    ({"type": "q3_k"}, "iq4_nl"), ({"transform": "rotate"}, "mix its columns")])
def test_what_cannot_keep_zeros_is_refused_or_said(options: dict[str, Any], message: str, tmp_path: Path, text: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    base = build("llama", tmp_path / "base")
    prune(base, text, tmp_path / "sparse", method="magnitude")
    with pytest.raises(UserError, match=message) as e:
        llmc.quantize(tmp_path / "sparse", **options, dry_run=True)
    assert "--lose-zeros" in e.value.hint
    plan = llmc.quantize(tmp_path / "sparse", **options, lose_zeros=True, dry_run=True)
    assert not plan["zeros_kept"]
    assert "not kept" in capsys.readouterr().err


def test_transform_refuses_to_rotate_zeros_away(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    prune(base, text, tmp_path / "sparse", method="magnitude")
    with pytest.raises(UserError, match="mask"):
        llmc.transform(tmp_path / "sparse", rotate="r2", scaling="none")


def test_a_budget_chooses_among_types_that_keep_zeros(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256)
    prune(base, text, tmp_path / "sparse", method="magnitude")
    options = {"target_bpw": 4.6, "method": "rtn", "calibration": str(text), "threads": 2, "dry_run": True}
    kept = llmc.quantize(tmp_path / "sparse", **options)
    assert kept["zeros_kept"]
    assert set(kept["types"]) <= {"q3_k", "q4_0", "q5_0", "q6_k", "q8_0"}
    free = llmc.quantize(tmp_path / "sparse", **options, lose_zeros=True)
    assert not set(free["types"]) <= {"q3_k", "q4_0", "q5_0", "q6_k", "q8_0"}


KEEPING = [IntegerType(4, 32), IntegerType(8, 64), IntegerType(4, 32, False), IntegerType(8, 32, False),
           *(type_called(name) for name, qtype in BLOCK_TYPES.items() if qtype.holds_zero)]


def test_which_types_have_a_code_for_zero() -> None:
    assert {name for name, qtype in BLOCK_TYPES.items() if qtype.holds_zero} == {
        "q4_0", "q5_0", "q8_0", "q3_k", "q6_k", "mxfp4", "tq1_0", "tq2_0"}
    for qtype in KEEPING:
        zero = rtn(torch.zeros(1, 256).index_fill_(1, torch.tensor([3, 40, 100, 200]), 1.7), qtype).dequantize()
        assert int((zero == 0).sum()) == 252


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), qtype=st.sampled_from(KEEPING), share=st.sampled_from([0.3, 0.5, 0.8]),
       drifted=st.booleans())
def test_zeros_stay_and_the_others_make_up_for_it(seed: int, qtype: IntegerType, share: float, drifted: bool) -> None:
    w, h = problem(6, 256, seed)
    w *= magnitude_mask(w, share, None)
    keep = w != 0
    target = w + 0.01 * torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)) if drifted else w
    result = gptq(target, h, qtype, keep=keep)
    assert result.weight is not None
    made, plain = result.weight.dequantize(), rtn(w, qtype).dequantize()
    assert bool((made[~keep] == 0).all())
    assert bool((plain[~keep] == 0).all())
    assert float(result.error.sum()) == pytest.approx(lost(made, target, h), rel=1e-3)
    damped(h, 0.01)  # what GPTQ works on
    assert lost(made, target, h) < lost(plain, target, h)


def test_without_a_mask_gptq_makes_the_same_codes_as_with_one_that_keeps_all() -> None:
    w, h = problem(8, 128)
    everything = torch.ones(8, 128, dtype=torch.bool)
    plain, all_kept = (gptq(w, h.clone(), IntegerType(4, 32), keep=keep) for keep in (None, everything))
    assert plain.weight is not None
    assert all_kept.weight is not None
    assert torch.equal(plain.weight.codes, all_kept.weight.codes)
    assert torch.equal(plain.weight.scales, all_kept.weight.scales)
