"""Transforms: the model computes the same, on every family, whatever the scalings; the search never loses by its measure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import kill_9
from tiny import FAMILIES, build, corpus, poison

import llmc
from llmc.compress.skeleton import get_weight
from llmc.compress.transform import rotations, scaling
from llmc.compress.transform.layer_pass import as_stored
from llmc.compress.transform.roles import map_layer
from llmc.errors import UserError
from llmc.export.gguf import GgufExportConfig, export_gguf
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.manifest import hash_folder
from llmc.formats.types import BLOCK_TYPES, IntegerType
from llmc.rounding.rtn import rtn
from llmc.rounding.search import objective
from llmc.runtimes.llamacpp import LlamaCpp

IDS = torch.randint(2, 512, (2, 48), generator=torch.Generator().manual_seed(3))
ROTATABLE = ("llama", "mistral", "qwen2", "qwen3", "phi3")
LEFT_ALONE = {"gpt2": "gelu_new", "gpt_neox": "gelu"}  # MLPs whose activation does not commute with a scaling


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.txt"
    path.write_text(corpus()[:60_000], encoding="utf-8")
    return path


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return load_torch_model(folder, dtype=dtype)


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return load(folder, dtype)(IDS).logits


def same(ours: torch.Tensor, theirs: torch.Tensor, bound: float) -> None:
    assert float((ours - theirs).abs().max()) < bound * float(theirs.abs().max())


def layers_of(model: Any) -> Any:
    return next(m for n, m in model.named_modules() if n.endswith((".layers", ".h")))


# ---------------------------------------------------------------------------------------------------- one layer, in memory


@pytest.mark.parametrize("family", FAMILIES)
def test_any_positive_scaling_keeps_the_logits(family: str, tmp_path: Path) -> None:
    """In float64, on every place of every layer, for scalings over four orders of magnitude."""
    model = load(build(family, tmp_path / "m"))
    with torch.no_grad():
        expected = model(IDS).logits

    @settings(max_examples=3, deadline=None)
    @given(seed=st.integers(0, 2**32), spread=st.floats(0.1, 4.0))
    def holds(seed: int, spread: float) -> None:
        generator, done = torch.Generator().manual_seed(seed), []
        for layer in layers_of(model):
            found = map_layer(model.config, layer)
            before = get_weight(layer.get_submodule(found.family.out)).clone()
            for place in found.places:
                s = torch.exp(torch.randn(place.channels, generator=generator, dtype=torch.float64).clamp(-3, 3) * spread / 2)
                scaling.apply_scaling(layer, place, s, found.family.offset)
                done.append((layer, place, s, found.family.offset))
            assert not torch.allclose(get_weight(layer.get_submodule(found.family.out)), before, rtol=0.01)
        with torch.no_grad():
            after = model(IDS).logits
        for layer, place, s, offset in done:
            scaling.apply_scaling(layer, place, 1 / s, offset)
        same(after, expected, 1e-6)  # norms work in float32

    holds()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_holds_or_is_named(family: str, tmp_path: Path) -> None:
    model = load(build(family, tmp_path / "m"))
    found = map_layer(model.config, layers_of(model)[0])
    assert len(found.norms) == 2
    assert (found.up is None) == (family in LEFT_ALONE)
    assert [word for word in found.left if LEFT_ALONE.get(family, "-") in word] == list(found.left)


def test_grouped_queries_share_their_values_factor(tmp_path: Path) -> None:
    """4 query heads on 2 value heads of 16: a factor for each of 32 channels, seen by two heads' columns."""
    model = load(build("llama", tmp_path / "m"))
    place = map_layer(model.config, layers_of(model)[0]).value
    assert place.channels == 32
    assert place.columns.view(4, 16)[:, 0].tolist() == [0, 0, 16, 16]
    moments = torch.arange(64.0)
    s = scaling.activation_factors(moments, place)
    mean = torch.stack([moments[:16] + moments[16:32], moments[32:48] + moments[48:]]).flatten().double() / 2
    torch.testing.assert_close(s / s[5], (mean / mean[5]).sqrt())


def test_opts_norms_after_the_sum_are_left(tmp_path: Path) -> None:
    model = load(build("opt", tmp_path / "m", do_layer_norm_before=False))
    found = map_layer(model.config, layers_of(model)[0])
    assert found.norms == ()
    assert all("after the sum" in line for line in found.left)
    gelu = load(build("opt", tmp_path / "g", activation_function="gelu"))
    assert map_layer(gelu.config, layers_of(gelu)[0]).up is None


# ------------------------------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("qtype", [IntegerType(4, 32), IntegerType(8, 64, False), BLOCK_TYPES["q4_1"], BLOCK_TYPES["iq4_nl"]], ids=lambda g: g.name)
def test_the_error_is_that_of_the_rounded_weight_on_the_inputs(qtype: Any) -> None:
    """Against the definition, |Q(W s) X/s - W X|^2 with X in hand; and alpha = 0 is plain rounding."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(24, 64, generator=generator), torch.randn(200, 64, generator=generator) * torch.rand(64) * 4
    s = torch.rand(64, generator=generator) + 0.5
    hessian = x.t() @ x
    found = scaling.rounding_error(w, hessian, s, qtype)
    scaled = (w * s).t().contiguous()
    factors = scaling.search_factors(scaled, hessian / s / s[:, None], None, qtype)
    q = factors.values(factors.nearest(scaled)).t()
    assert found == pytest.approx(float(((x / s) @ q.t() - x @ w.t()).square().sum()), rel=1e-3)
    alpha, errors = scaling.search_alpha(w, hessian, s.double(), qtype)
    energy = float(((w @ hessian) * w).sum())
    assert errors[0.0] * energy == pytest.approx(scaling.rounding_error(w, hessian, torch.ones(64), qtype), rel=1e-4)
    assert errors[alpha] == min(errors.values()) <= errors[0.0]


def test_the_search_finds_a_channel_that_matters() -> None:
    """One input channel is 30 times the others: scaling it up makes plain rounding lose far less (AWQ, section 3.1)."""
    torch.manual_seed(0)
    w, size = torch.randn(64, 64) / 8, torch.ones(64)
    size[[7, 40]] = 30
    x = torch.randn(500, 64) * size
    alpha, errors = scaling.search_alpha(w, x.t() @ x, scaling.normalised(size.double()), IntegerType(4, 32))
    assert alpha > 0
    assert errors[alpha] < 0.7 * errors[0.0]


def test_factors_of_nothing_are_one_and_of_dead_channels_finite() -> None:
    assert torch.equal(scaling.normalised(torch.zeros(4, dtype=torch.float64)), torch.ones(4, dtype=torch.float64))
    s = scaling.normalised(torch.tensor([0.0, 1.0, 1e-30, 1e30], dtype=torch.float64))
    assert bool(torch.isfinite(s).all())
    assert float(s.min()) >= 1 / scaling.WIDEST


def test_equalising_gives_equal_ranges(tmp_path: Path) -> None:
    """Nagel et al., section 4.1: afterwards a channel's range is the same on both sides, up to a common factor."""
    model = load(build("llama", tmp_path / "m"))
    layer = layers_of(model)[0]
    place = map_layer(model.config, layer).up
    assert place is not None
    scaling.apply_scaling(layer, place, scaling.equalising_factors(layer, place, 0.0), 0.0)
    ratio = get_weight(layer.mlp.up_proj).abs().amax(1) / get_weight(layer.mlp.down_proj).abs().amax(0)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------------- rotations


@pytest.mark.parametrize("n", [1, 2, 9, 12, 16, 36, 45])
def test_orthogonal(n: int) -> None:
    r = rotations.orthogonal(n, torch.Generator().manual_seed(n))
    torch.testing.assert_close(r @ r.t(), torch.eye(n, dtype=torch.float64))
    if n == 16:
        torch.testing.assert_close(r.abs(), torch.full_like(r, 0.25))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_dim", [None, 12])
def test_r2_keeps_the_logits(family: str, head_dim: int | None, tmp_path: Path) -> None:
    """Heads of 12 too, where no Hadamard matrix of that order is taken."""
    options = {} if head_dim is None else {"head_dim": 12} if family in ("llama", "qwen3", "gemma2") else {
        "hidden_size": 48, "n_embd": 48, "rotary_pct": 0.5, "word_embed_proj_dim": 48}
    folder = build(family, tmp_path / "m", **options)
    llmc.transform(folder, scaling="none", rotate="r2", out=tmp_path / "r", threads=1)
    same(logits(tmp_path / "r"), logits(folder), 1e-5)


@pytest.mark.parametrize("family", ROTATABLE)
def test_r1_keeps_the_logits(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "m", tie_word_embeddings=False)
    result = llmc.transform(folder, scaling="none", rotate="r1r2", out=tmp_path / "r", threads=1)
    same(logits(tmp_path / "r"), logits(folder), 1e-5)
    assert result["untied_bytes"] == 0
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "r")
    assert sorted(before.names()) == sorted(after.names())
    assert all(before.shape(n) == after.shape(n) for n in before.names())
    assert bool((after.tensor("model.layers.0.input_layernorm.weight") == 1).all())
    embedding = "model.embed_tokens.weight"
    assert not torch.allclose(before.tensor(embedding), after.tensor(embedding), atol=0.1)
    assert before.config == after.config


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(ROTATABLE)))
def test_streams_that_cannot_be_rotated_are_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "m", tie_word_embeddings=False)
    with pytest.raises(UserError, match="norms after attention" if "gemma" in family else "subtracts the mean"):
        llmc.transform(folder, scaling="none", rotate="r1r2", out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_r1_unties_only_when_told_to(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    with pytest.raises(UserError, match=r"costs 34\.8 kB in an 8-bit file") as e:
        llmc.transform(folder, rotate="r1r2", scaling="none", out=tmp_path / "r")
    assert "--untie" in e.value.hint
    result = llmc.transform(folder, rotate="r1r2", scaling="none", untie=True, out=tmp_path / "r", threads=1)
    assert result["untied_bytes"] == 512 * 64 * 34 // 32
    same(logits(tmp_path / "r"), logits(folder), 1e-5)
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config == {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": False}


# ------------------------------------------------------------------------------------------------------------ whole folders


@pytest.mark.parametrize("scaling", ["awq", "equalize"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scalings_keep_the_logits_and_never_raise_their_own_error(family: str, scaling: str, tmp_path: Path, text: Path) -> None:
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
    command = [sys.executable, "-m", "llmc", "transform", "m", *options, "--calibration", str(text), "--samples", "8",
               "--seq-len", "64", "--threads", "1", "--json", "-o"]
    subprocess.run([*command, "whole"], check=True, capture_output=True)
    kill_9([*command[3:], "killed"], tmp_path, ".killed.unfinished/layers/0001.json")
    assert not Path("killed").exists()
    done = subprocess.run([*command, "killed", "--resume"], check=True, capture_output=True)
    assert json.loads(done.stdout)["out"] == "killed"
    assert hash_folder(Path("killed")) == hash_folder(Path("whole"))
    assert not list(Path().glob(".killed*"))


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


def test_plain_rounding_of_a_scalingd_linear_loses_less_on_its_inputs() -> None:
    """The yardstick is not the search's own: rtn with its own scales, and real inputs."""
    torch.manual_seed(1)
    w, x = torch.randn(128, 64) / 8, torch.randn(800, 64) * torch.rand(64).pow(3) * 20
    hessian = x.t() @ x
    s = scaling.normalised(hessian.diagonal().double().sqrt())
    qtype = IntegerType(4, 32)
    scale = (s ** scaling.search_alpha(w, hessian, s, qtype)[0]).float()
    lost = [float(objective((rtn(w * f, qtype).dequantize() / f - w).t(), hessian).sum()) for f in (torch.ones(64), scale)]
    assert lost[1] < 0.95 * lost[0]


# ----------------------------------------------------------------------------------------------------------- SmoothQuant


def test_smoothing_factors_are_those_of_the_paper(tmp_path: Path) -> None:
    model = load(build("llama", tmp_path / "m"))
    layer = layers_of(model)[0]
    places = {p.writer: p for p in map_layer(model.config, layer).places}
    peak = torch.rand(64, dtype=torch.float64) + 0.1
    largest = torch.stack([get_weight(layer.get_submodule(f"self_attn.{n}_proj")).abs().amax(0) for n in "qkv"]).amax(0)
    expected = peak**0.7 / largest**0.3  # eq. 4 of arXiv:2211.10438
    found = scaling.smoothing_factors(peak, layer, places["input_layernorm"], 0.7)
    torch.testing.assert_close(found / found[0], expected / expected[0])
    # heads that share a value head share its channels: the largest of their columns counts
    shared = scaling.smoothing_factors(peak, layer, places["self_attn.v_proj"], 1.0)
    columns = places["self_attn.v_proj"].columns
    together = torch.stack([peak[columns == c].max() for c in range(places["self_attn.v_proj"].channels)])
    torch.testing.assert_close(shared / shared[0], together / together[0])


def int8_logits(folder: Path) -> torch.Tensor:
    """Logits with every linear of the decoder in 8 bits: a scale for each row of weights and each token of inputs."""
    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return (x / scale).round() * scale

    model = load(folder)
    for module in layers_of(model).modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0]), *args[1:]))
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_smoothing_spares_8_bit_inputs_from_large_channels(family: str, tmp_path: Path, text: Path) -> None:
    model = load(build(family, tmp_path / "m"), torch.float32)
    for layer in layers_of(model):  # some channels far larger than the rest, as large models have them
        found = map_layer(model.config, layer)
        for place in found.norms:
            s = torch.ones(place.channels, dtype=torch.float64)
            s[[3, 17]] = 1 / 40
            scaling.apply_scaling(layer, place, s, found.family.offset)
    model.save_pretrained(tmp_path / "m")
    exact = logits(tmp_path / "m")
    result = llmc.transform(tmp_path / "m", scaling="smoothquant", calibration=text, samples=8, seq_len=64, out=tmp_path / "s",
                            threads=1)
    same(logits(tmp_path / "s"), exact, 1e-5)
    before, after = (float((int8_logits(tmp_path / n) - exact).square().mean().sqrt()) for n in ("m", "s"))
    assert after < 0.5 * before
    entry = result["passes"][0]
    assert entry["config"]["alpha"] == 0.5
    assert "bits" not in entry["config"]  # no type is searched
    assert all(p["after"] < 0.5 for layer in entry["layers"] for n, p in layer["places"].items() if "norm" in n)


def test_a_migration_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--alpha 1\.5: must be 0 to 1"):
        llmc.transform(tmp_path, scaling="smoothquant", alpha=1.5)
