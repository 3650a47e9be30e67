"""Every parameter of the decoder layers is quantized, kept by a rule, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from architectures import build
from safetensors.torch import load_file
from tiny import COMMON

import llmc
from llmc.compress.coverage import KEPT, cover
from llmc.compress.skeleton import Skeleton
from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.linears import find_layers

MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def save(folder: Path, config: Any, cls: Any = None) -> Path:
    """A random model of any architecture, with a tokenizer."""
    torch.manual_seed(0)
    (cls or T.AutoModelForCausalLM.from_config)(config).to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer("gpt2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss, whose experts are stacked in one parameter."""
    return save(tmp_path_factory.mktemp("oss") / "oss", T.GptOssConfig(**COMMON, head_dim=16, num_local_experts=4,
                                                                      num_experts_per_tok=2))


def test_stacked_experts_are_quantized_and_can_be_kept(oss: Path, tmp_path: Path) -> None:
    whole = llmc.quantize(oss, dry_run=True, method="rtn")
    assert set(whole["floats"]) == {"biases", "norms and other vectors", "routers of experts"}
    kept = {"method": "rtn", "keep": "mlp.experts"}
    plan = llmc.quantize(oss, dry_run=True, **kept)
    experts = [f"model.layers.*.mlp.experts.*.{name}.weight" for name in ("down_proj", "gate_up_proj")]
    assert plan["floats"][KEPT]["names"] == experts
    assert plan["floats"]["routers of experts"]["weights"] == 2 * 4 * 64
    result = llmc.quantize(oss, out=tmp_path / "q", **kept)
    layers = {n: t for n, t in load_file(oss / "model.safetensors").items() if "layers" in n and t.ndim >= 2}
    linears = sum(t.numel() for n, t in layers.items() if "_proj.weight" in n)
    bits = linears * 4.5 + 16 * sum(t.numel() for n, t in layers.items() if "_proj.weight" not in n)
    for found in (plan, result, json.loads((tmp_path / "q" / "llmc.json").read_text())["passes"][0]):
        if "bits_per_weight" in found:
            assert found["bits_per_weight"] == pytest.approx(bits / sum(t.numel() for t in layers.values()))
        assert found["floats"] == plan["floats"]
    written = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(written[name], layers[name])


def test_a_stacked_tensor_is_kept_whole_or_not_at_all(oss: Path) -> None:
    with pytest.raises(UserError, match="holds 4 experts in one tensor, and 1 of them would stay") as e:
        llmc.quantize(oss, dry_run=True, method="rtn", keep="layers.1.mlp.experts.2.down_proj")
    assert "all of its experts" in e.value.hint


def test_experts_in_a_form_that_is_not_known_are_refused(tmp_path: Path) -> None:
    """JetMoe's experts are no module that transformers marks as experts."""
    moe = save(tmp_path / "moe", T.JetMoeConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, kv_channels=16))
    for command in (lambda: llmc.quantize(moe, method="rtn"), lambda: llmc.prune(moe, method="magnitude")):
        with pytest.raises(UserError, match="is a mixture of experts") as e:
            command()
        assert "%" in e.value.problem


@pytest.mark.parametrize("vision", [1, 4])
def test_of_a_multimodal_model_the_language_model_is_quantized(tmp_path: Path, vision: int) -> None:
    """Also where the vision tower has more layers: it is never taken for the decoder."""
    config = T.Gemma3Config(
        text_config={**COMMON, "head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": vision, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14})
    folder = save(tmp_path / "mm", config, T.Gemma3ForConditionalGeneration)
    assert find_layers(load_torch_model(folder))[0] == "model.language_model.layers"
    llmc.quantize(folder, method="rtn", out=tmp_path / "q")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "q"))
    floats = {n: t for n, t in before.items() if "language_model.model.layers" not in n}
    assert floats  # the vision tower and the rest, with the hub's names
    assert all(torch.equal(after[n], t) for n, t in floats.items())
    assert sum(n.endswith("qweight") for n in after) == sum(n.endswith("_proj.weight") for n in before if n not in floats)
    assert sum(n.endswith("qweight") for n in after) == 14
    assert 0 < tiny.divergence(tmp_path / "q", folder) < 1


def test_of_lists_of_one_length_the_text_model_has_the_layers() -> None:
    config = T.Gemma3Config(
        text_config={**COMMON, "head_dim": 16, "num_hidden_layers": 3},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        model = T.Gemma3ForConditionalGeneration(config)
    assert find_layers(model)[0] == "model.language_model.layers"


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_dense_families_have_nothing_that_is_not_understood(family: str, tmp_path: Path) -> None:
    skeleton = Skeleton(Checkpoint.open(tiny.build(family, tmp_path / "m")), "cpu")
    found = cover(skeleton)
    assert not found.unknown
    assert set(found.floats) <= {"biases", "norms and other vectors"}
    assert not list(found.float_matrices())
    assert len(found.linears) == sum(len(skeleton.linears(i)) for i in range(len(skeleton.layers)))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_kept_linears_stay_as_they_are(tmp_path: Path, text: Path, method: str) -> None:
    base = tiny.build("llama", tmp_path / "m")
    out = tmp_path / "q"
    llmc.quantize(base, method=method, keep="v_proj,o_proj", out=out, calibration=str(text), samples=8, seq_len=64)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    for i in range(2):
        name = f"model.layers.{i}.self_attn.v_proj.weight"
        assert torch.equal(after[name], before[name])
        assert f"model.layers.{i}.self_attn.q_proj.qweight" in after
    blocks = json.loads((out / "config.json").read_text())["quantization_config"]["modules_in_block_to_quantize"]
    assert blocks == [["self_attn.q_proj"], ["self_attn.k_proj"], ["mlp.gate_proj"], ["mlp.up_proj"], ["mlp.down_proj"]]
    assert load_torch_model(out)(torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()


def test_kept_linears_of_one_layer(tmp_path: Path) -> None:
    base = tiny.build("llama", tmp_path / "m")
    llmc.quantize(base, method="rtn", keep="layers.0.*v_proj", out=tmp_path / "q")
    quantization = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert quantization["dynamic"] == {r"-:^model\.layers\.0\.self_attn\.v_proj$": {}}
    assert "modules_in_block_to_quantize" not in quantization


def test_a_pattern_that_fits_nothing_and_one_that_fits_all(tmp_path: Path) -> None:
    base = tiny.build("llama", tmp_path / "m")
    with pytest.raises(UserError, match="--keep expert: no parameter") as e:
        llmc.quantize(base, method="rtn", keep="expert")
    assert "model.layers.0.self_attn.q_proj.weight" in e.value.hint
    with pytest.raises(UserError, match="no linear of the decoder layers"):
        llmc.quantize(base, method="rtn", keep="*")
    with pytest.raises(UserError, match="--keep goes without --transform"):
        llmc.quantize(base, keep="v_proj", transform="auto")


def test_rows_that_zero_points_do_not_fill_are_refused_before_work(tmp_path: Path) -> None:
    base = tiny.build("llama", tmp_path / "m", intermediate_size=132)
    # the columns of down_proj are the rows of up_proj: with a type for both the columns are the first complaint
    with pytest.raises(UserError, match="no multiple of 8"):
        llmc.quantize(base, method="rtn", keep="down_proj", out=tmp_path / "q")
    assert not (tmp_path / "q").exists()
    llmc.quantize(base, method="rtn", keep="down_proj", bits=8, out=tmp_path / "q")  # 132 is a multiple of 4


def test_few_linears_that_no_type_holds_stay_floats(tmp_path: Path) -> None:
    """4 rows for the two small projections of Qwen 3.5's linear attention: a GPTQ checkpoint packs 8. q4_1 holds them."""
    base = build("qwen3_5_text", tmp_path / "m")
    plan = llmc.quantize(base, method="rtn", dry_run=True)
    why = "linears whose number of rows is no multiple of 8 (a GPTQ checkpoint packs 8 into a word)"
    names = [f"model.layers.*.linear_attn.in_proj_{x}.weight" for x in "ab"]
    assert plan["floats"][why] == {"tensors": 6, "weights": 6 * 4 * 64, "names": names}
    llmc.quantize(base, method="rtn", out=tmp_path / "q")
    assert load_torch_model(tmp_path / "q")(torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()
    assert why not in llmc.quantize(base, method="rtn", type="q4_1", dry_run=True)["floats"]


def test_gates_that_are_no_linears_are_counted(tmp_path: Path) -> None:
    plan = llmc.quantize(build("recurrent_gemma", tmp_path / "m"), method="rtn", dry_run=True)
    assert plan["floats"]["block-diagonal matrices"]["weights"] == 2 * 2 * 4 * 16 * 16


@pytest.fixture(scope="module", params=["bert", "bart", "t5"])
def no_decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, and two encoders with a decoder."""
    folder = tmp_path_factory.mktemp(request.param) / "m"
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    wide = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128,
            "decoder_attention_heads": 4, "decoder_ffn_dim": 128}
    t5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    cls, config = {"bert": (T.BertForMaskedLM, T.BertConfig(vocab_size=512, **size)),
                   "bart": (T.BartForConditionalGeneration, T.BartConfig(vocab_size=512, **wide)),
                   "t5": (T.T5ForConditionalGeneration, T.T5Config(vocab_size=512, **t5))}[request.param]
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)
    tiny.tokenizer("gpt2").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", [
    lambda m, text, out: llmc.quantize(m, method="rtn", out=out),
    lambda m, text, out: llmc.quantize(m, calibration=text, out=out),
    lambda m, text, out: llmc.prune(m, method="magnitude", calibration=text, out=out),
    lambda m, text, out: llmc.transform(m, scaling="equalize", out=out),
    lambda m, text, out: llmc.heal(m, teacher=str(m), calibration=(text,), out=out),
    lambda m, text, out: llmc.distill(m, teacher=str(m), calibration=(text,), out=out),
    lambda m, text, out: llmc.imatrix(m, calibration=text, out=out),
    lambda m, text, out: llmc.export(m, format="gguf", out=out), lambda m, text, out: llmc.export(m, format="onnx", out=out),
    lambda m, text, out: llmc.evaluate(m, text=text, out=out), lambda m, text, out: llmc.bench(m, out=out),
], ids=["rtn", "gptq", "prune", "transform", "heal", "distill", "imatrix", "gguf", "onnx", "eval", "bench"])
def test_what_is_no_decoder_is_refused_by_every_command(no_decoder: Path, command: Any, text: Path, tmp_path: Path) -> None:
    before = set(no_decoder.parent.iterdir())
    with pytest.raises(UserError):
        command(no_decoder, str(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert set(no_decoder.parent.iterdir()) == before
