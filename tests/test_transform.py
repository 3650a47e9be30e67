"""`llmc transform` from a folder to a folder: the model computes the same, and nothing grows unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import mixtures
import numpy as np
import pytest
import torch
from killing import Command, resumed
from tiny import COMMON, FAMILIES, build, edit_config, poison, randomized, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
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


# ------------------------------------------------------------------------------------------------------------- experts

WITH_EXPERTS = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")
BESIDE = {"qwen2_moe": 1}  # shared experts in a layer


def kld(folder: Path, base: Path) -> float:
    p, q = (torch.log_softmax(logits(f).double(), -1) for f in (base, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("scaling", "rotate"), [("awq", "none"), ("equalize", "none"), ("smoothquant", "none"),
                                                 ("none", "r1r2"), ("awq", "r1r2")])
@pytest.mark.parametrize("kind", WITH_EXPERTS)
def test_a_mixture_of_experts_computes_the_same(kind: str, scaling: str, rotate: str, tmp_path: Path, text: Path) -> None:
    """The norm before the experts feeds the router, all experts and what runs beside them; every matrix of them changes."""
    folder = mixtures.build(kind, tmp_path / "m")
    result = llmc.transform(folder, scaling=scaling, rotate=rotate, untie=rotate == "r1r2", calibration=text, samples=8,
                            seq_len=64, out=tmp_path / "t", threads=1)
    assert abs(kld(tmp_path / "t", folder)) < 1e-9
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "t")
    assert sorted(before.names()) == sorted(set(after.names()) - ({"lm_head.weight"} - set(before.names())))
    inside = [n for n in before.names() if ".mlp." in n or "block_sparse_moe" in n]
    assert len(inside) == 2 * (1 + 8 * 3 + 4 * BESIDE.get(kind, 0))
    if rotate != "none":
        assert not [n for n in inside if torch.allclose(before.tensor(n).float(), after.tensor(n).float(), rtol=0.1)]
    if scaling != "none":
        for layer in result["passes"][-1]["layers"]:
            places = layer["places"]
            assert len(places) == 2 + 1 + 8 + BESIDE.get(kind, 0)
            assert all(p["after"] <= p["before"] for p in places.values()) or scaling == "smoothquant"
    assert result["left"] == []
    assert llmc.verify(tmp_path / "t")["problems"] == []


@pytest.mark.parametrize("scaling", ["awq", "equalize"])
def test_a_layer_without_experts_among_those_with_them(scaling: str, tmp_path: Path, text: Path) -> None:
    config = AutoConfig.for_model("qwen3_moe", **{**COMMON, **mixtures.MIXTURES["qwen3_moe"], "mlp_only_layers": [0]})
    torch.manual_seed(0)
    randomized(AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    llmc.transform(tmp_path / "m", scaling=scaling, rotate="r1r2", untie=True, calibration=text, samples=8, seq_len=64,
                   out=tmp_path / "t", threads=1)
    assert abs(kld(tmp_path / "t", tmp_path / "m")) < 1e-9


def test_a_limit_of_values_is_refused(tmp_path: Path) -> None:
    folder = mixtures.build("olmoe", tmp_path / "m")
    edit_config(folder, clip_qkv=8.0)
    with pytest.raises(UserError, match="limits its values to 8 \\(clip_qkv\\)"):
        llmc.transform(folder, scaling="equalize", out=tmp_path / "t")


def test_a_mixture_is_quantized_after_a_transform(tmp_path: Path, text: Path) -> None:
    folder = mixtures.build("qwen3_moe", tmp_path / "m")
    result = llmc.quantize(folder, transform="scaling", calibration=text, samples=16, seq_len=64, out=tmp_path / "q",
                           threads=1)
    assert result["transform"]["taken"] == "scaling"
    assert 0 < kld(tmp_path / "q", folder) < 0.2
