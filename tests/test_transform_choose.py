"""`llmc quantize --transform`: what is measured, what is taken, and what the manifest says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Command, resumed
from tiny import build

import llmc
from llmc import families
from llmc.compress import forward as measure
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.skeleton import Skeleton
from llmc.compress.text import Calibration
from llmc.compress.transform import choose as chooser
from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.linears import get_weight, is_linear, set_weight
from llmc.formats.manifest import hash_folder
from llmc.formats.types import IntegerType
from llmc.rounding.rtn import rtn

IDS = torch.randint(2, 512, (3, 40), generator=torch.Generator().manual_seed(5))


def quantize(base: Path, text: Path, out: Path, **options: Any) -> dict[str, Any]:
    common = {"calibration": str(text), "samples": 16, "seq_len": 64, "threads": 1}
    return llmc.quantize(base, **{**common, "out": out, **options})


def passes(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "llmc.json").read_text())["passes"]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_the_divergence_layer_by_layer_is_that_of_whole_models(family: str, tmp_path: Path) -> None:
    folder, qtype = build(family, tmp_path / "m"), IntegerType(4, 32)
    base = measure.run(folder, IDS, "cpu", None, "base")
    found = measure.kld(base, measure.run(folder, IDS, "cpu", lambda _: qtype, "rounded"))
    whole, rounded = load_torch_model(folder), load_torch_model(folder)
    inside = Skeleton(Checkpoint.open(folder), "cpu").layers_name
    for name, module in rounded.named_modules():
        if name.startswith(inside) and is_linear(module):
            set_weight(module, rtn(get_weight(module), qtype).dequantize())
    with torch.no_grad():
        p, q = (torch.log_softmax(m(IDS).logits.double(), -1) for m in (whole, rounded))
    expected = (p.exp() * (p - q)).sum(-1).mean(-1)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=1e-3, atol=1e-6)
    assert max(measure.kld(base, measure.run(folder, IDS, "cpu", None, "again"))) < 1e-6


def test_held_out_sequences_are_not_searched_on() -> None:
    whole = Calibration(torch.arange(20)[:, None].repeat(1, 4), {"name": "x", "sha256": "0", "samples": 20, "tokens": 80})
    learn, held = chooser.split(whole)
    rows = [c.sequences[:, 0].tolist() for c in (learn, held)]
    assert sorted(rows[0] + rows[1]) == list(range(20))
    assert len(rows[1]) == 2
    assert learn.origin["samples"] == 18
    assert learn.origin["tokens"] == 72
    with pytest.raises(UserError, match="holds out a part of the calibration text"):
        chooser.split(Calibration(whole.sequences[:1], whole.origin))


def test_auto_takes_what_measures_best_and_says_why(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    result = quantize(base, text, tmp_path / "q", transform="auto")
    record = result["transform"]
    assert set(record["measured"]) == set(chooser.CANDIDATES)
    assert record["taken"] == min(record["measured"], key=lambda n: record["measured"][n]["kld"])
    assert record["rotation"] == "r2"  # tied: the stream's would cost bytes
    assert all(f"{m['kld']:.4g}" in record["why"] for m in record["measured"].values())
    chain = passes(tmp_path / "q")
    assert [p["name"] for p in chain] == [*chooser_passes(record["taken"]), "quantize"]
    assert chain[-1]["transform"] == record
    manifest = json.loads((tmp_path / "q/llmc.json").read_text())
    assert manifest["source"]["name"] == "base"
    assert manifest["source"]["files"]["config.json"] == hash_folder(base)["config.json"]
    assert not list(tmp_path.glob(".q*"))
    assert llmc.verify(tmp_path / "q")["problems"] == []


def chooser_passes(taken: str) -> list[str]:
    return {"none": [], "scaling": ["scaling"], "rotate": ["rotate"], "rotate+scaling": ["rotate", "scaling"]}[taken]


@pytest.mark.parametrize(("transform", "rotate"), [("scaling", "none"), ("rotate+scaling", "r2")])
def test_the_quantized_transform_is_the_quantized_folder_of_llmc_transform(
    transform: str, rotate: str, tmp_path: Path, text: Path,
) -> None:
    """One command or two: the same bytes."""
    base = build("qwen2", tmp_path / "base", dtype=torch.bfloat16)
    quantize(base, text, tmp_path / "one", transform=transform)
    llmc.transform(base, rotate=rotate, calibration=str(text), samples=16, seq_len=64, threads=1, out=tmp_path / "scaled")
    quantize(tmp_path / "scaled", text, tmp_path / "two")
    one, two = (hash_folder(tmp_path / n) for n in ("one", "two"))
    assert one == two
    assert [p["name"] for p in passes(tmp_path / "one")] == [p["name"] for p in passes(tmp_path / "two")]
    assert one != hash_folder(Path(quantize(base, text, tmp_path / "none")["out"]))


def test_rotate_takes_the_stream_where_that_is_free(tmp_path: Path, text: Path) -> None:
    base = build("mistral", tmp_path / "base")
    result = quantize(base, text, tmp_path / "q", transform="rotate", type="q4_1", method="rtn")
    assert result["transform"]["rotation"] == "r1r2"
    assert passes(tmp_path / "q")[0]["config"]["rotate"] == "r1r2"
    llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf")


def test_unknown_architectures_and_values_are_refused(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("llama", tmp_path / "base")
    with pytest.raises(UserError, match="--transform bend"):
        quantize(base, text, tmp_path / "q", transform="bend")
    monkeypatch.setattr(families, "FAMILIES", {k: v for k, v in families.FAMILIES.items() if k != "llama"})
    with pytest.raises(UserError, match="architecture 'llama' can be transformed"):
        quantize(base, text, tmp_path / "q", transform="scaling")
    assert not (tmp_path / "q").exists()


def test_a_finished_transform_is_used_again_after_kill_9(tmp_path: Path, text: Path) -> None:
    build("llama", tmp_path / "m", num_hidden_layers=6)
    command = Command("quantize", "m", "--transform", "auto", "--calibration", text, "--samples", 16, "--seq-len", 64,
                      "--threads", 1)
    _, again = resumed(command, Path(), lambda out: command.kill(out, ".killed.unfinished/layers/0001.json", seconds=1200),
                       left=".killed.transformed/figures.json")
    assert "resuming after layer" in again.stderr
    assert "measuring" not in again.stderr
    assert "rounding error" not in again.stderr


def test_config_numbers_name_the_text_where_it_decides() -> None:
    assert "calibration" not in QuantizeConfig(method="rtn").numbers()
    assert "calibration" in QuantizeConfig(method="rtn", transform="scaling").numbers()
