"""`llmc transform` from a folder to a folder: the model computes the same, and nothing grows unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import Command, resumed
from tiny import FAMILIES, build, poison
from transforming import IDS, LEFT_ALONE, load, logits, same

import llmc
from llmc.compress.transform.layer_pass import as_stored
from llmc.errors import UserError
from llmc.export.gguf import GgufExportConfig, export_gguf
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.manifest import hash_folder
from llmc.runtimes.llamacpp import LlamaCpp


@pytest.mark.parametrize("scaling", ["awq", "equalize"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scalings_keep_the_logits_and_never_raise_their_own_error(
    family: str, scaling: str, tmp_path: Path, text: Path,
) -> None:
    folder = build(family, tmp_path / "m")
    result = llmc.transform(folder, scaling=scaling, calibration=text, samples=8, seq_len=64, out=tmp_path / "g", threads=1)
    same(logits(tmp_path / "g"), logits(folder), 1e-5)
    places = [p for layer in result["passes"][0]["layers"] for p in layer["places"].values()]
    assert len(places) == load(folder).config.num_hidden_layers * (3 if family in LEFT_ALONE else 4)
    assert all(p["after"] <= p["before"] for p in places)
    assert any(p["after"] < p["before"] for p in places)
    assert any(LEFT_ALONE.get(family, "-") in line for line in result["left"]) == (family in LEFT_ALONE)
    assert llmc.verify(tmp_path / "g")["problems"] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_folder_keeps_its_logits_and_says_what_that_costs(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = build("mistral", tmp_path / "m", dtype=dtype)
    result = llmc.transform(folder, scaling="equalize", rotate="r1r2", out=tmp_path / "r", threads=1)
    same(logits(tmp_path / "r"), logits(folder), 1e-5)
    assert result["grown_bytes"] > 0
    after = Checkpoint.open(tmp_path / "r")
    wide = [n for n in after.names() if after.dtype(n) == "F32"]
    assert len(wide) == result["widened"]
    assert all("norm" in n for n in set(after.names()) - set(wide))  # a norm that is one everywhere needs no more bits
    assert after.dtype("model.norm.weight") == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]


def test_exact_values_keep_their_type() -> None:
    assert as_stored(torch.tensor([0.5, 3.0]), torch.float16).dtype == torch.float16
    assert as_stored(torch.tensor([0.1, 3.0]), torch.float16).dtype == torch.float32


def test_the_chain_of_passes_and_the_original_are_in_every_manifest(tmp_path: Path, text: Path) -> None:
    folder = build("llama", tmp_path / "m")
    llmc.transform(folder, rotate="r2", calibration=text, samples=4, seq_len=64, out=tmp_path / "t", threads=1)
    llmc.quantize(tmp_path / "t", method="rtn", out=tmp_path / "q", threads=1)
    llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf")
    chain = ["rotate", "scaling", "quantize", "export-gguf"]
    for count, artifact in ((2, "t/llmc.json"), (3, "q/llmc.json"), (4, "q.gguf.llmc.json")):
        manifest = json.loads((tmp_path / artifact).read_text())
        assert [p["name"] for p in manifest["passes"]] == chain[:count]
        assert manifest["source"]["name"] == "m"
        assert manifest["source"]["files"] == {n: h for n, h in hash_folder(folder).items()
                                               if n in manifest["source"]["files"]}
    report = llmc.evaluate(tmp_path / "t", base=folder, out=None, text=str(text), context=64, chunks=2, threads=1)
    assert report["quality"]["texts"][0]["kld"]["value"] < 1e-5
    assert report["quality"]["texts"][0]["calibration_overlap"] > 0.02


def test_gguf_of_a_transformed_model_has_the_same_logits_in_llama_cpp(tmp_path: Path, text: Path) -> None:
    folder = build("llama", tmp_path / "m")
    llmc.transform(folder, rotate="r1r2", untie=True, calibration=text, samples=4, seq_len=64, out=tmp_path / "t", threads=1)
    found = []
    for source in (folder, tmp_path / "t"):
        file = source.with_suffix(".gguf")
        export_gguf(GgufExportConfig(model=source, out=file, threads=1, float_type="f32"))
        runtime = LlamaCpp(file, context=256, threads=1, flash_attention=False, kv_type="f32")
        found.append(runtime.logits(IDS[0].numpy().astype(np.int32)))
        runtime.close()
    assert np.abs(found[0] - found[1]).max() < 1e-4 * np.abs(found[0]).max()


@pytest.mark.parametrize("options", [[], ["--scaling", "none", "--rotate", "r1r2", "--untie"]], ids=["awq", "r1r2"])
def test_resume_after_kill_9_gives_the_same_bytes(options: list[str], tmp_path: Path, text: Path) -> None:
    build("llama", tmp_path / "m", num_hidden_layers=8)
    command = Command("transform", "m", *options, "--calibration", text, "--samples", 8, "--seq-len", 64, "--threads", 1,
                      "--json")
    _, again = resumed(command, Path(), lambda out: command.kill(out, ".killed.unfinished/layers/0001.json"))
    assert json.loads(again.stdout)["out"] == "killed"


def test_bad_input(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    for options, words in (({"scaling": "big"}, "--scaling big"), ({"scaling": "none"}, "nothing to do"),
                           ({"untie": True}, "--untie"), ({"bits": 5}, "--bits 5"), ({"rotate": "r3"}, "--rotate r3")):
        with pytest.raises(UserError, match=words):
            llmc.transform(folder, out=tmp_path / "x", **options)
    llmc.quantize(folder, method="rtn", out=tmp_path / "q", threads=1)
    with pytest.raises(UserError, match="quantized already"):
        llmc.transform(tmp_path / "q", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_tensor_is_found_before_any_layer_is_made(tmp_path: Path) -> None:
    """One that no scaling touches: only a look at every tensor finds it."""
    folder = build("llama", tmp_path / "m")
    poison(folder, "model.norm.weight")
    with pytest.raises(UserError, match=r"model\.norm\.weight .* NaN"):
        llmc.transform(folder, scaling="equalize", out=tmp_path / "x", threads=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_migration_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--alpha 1\.5: must be 0 to 1"):
        llmc.transform(tmp_path, scaling="smoothquant", alpha=1.5)
