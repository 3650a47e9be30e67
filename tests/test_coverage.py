"""Every parameter of the decoder layers is quantized, kept by a rule, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from safetensors.torch import load_file
from tiny import COMMON

import llmc
from llmc.compress.arguments import LayerArguments, Repeated, TextDependent
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


def test_stacked_experts_are_refused_and_can_be_kept(oss: Path, tmp_path: Path) -> None:
    for command in (lambda: llmc.quantize(oss, method="rtn"), lambda: llmc.quantize(oss, dry_run=True)):
        with pytest.raises(UserError, match=r"a mixture of experts: .*experts\.gate_up_proj.* would not be quantized") as e:
            command()
        assert "--keep 'mlp.experts.gate_up_proj,mlp.experts.down_proj'" in e.value.hint
    kept = {"method": "rtn", "keep": "mlp.experts.gate_up_proj,mlp.experts.down_proj"}
    plan = llmc.quantize(oss, dry_run=True, **kept)
    experts = [f"model.layers.*.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")]
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


@pytest.mark.parametrize("config", [T.Qwen3MoeConfig, T.MixtralConfig, T.GraniteMoeConfig, T.Llama4TextConfig],
                         ids=["qwen3_moe", "mixtral", "granitemoe", "llama4"])
def test_mixtures_of_experts_are_called_that(config: Any, tmp_path: Path, text: Path) -> None:
    moe = save(tmp_path / "moe", config(**COMMON, **MOE, head_dim=16))
    for command in (lambda: llmc.quantize(moe, method="rtn"), lambda: llmc.imatrix(moe, calibration=str(text)),
                    lambda: llmc.prune(moe, method="magnitude", calibration=str(text))):
        with pytest.raises(UserError, match="is a mixture of experts") as e:
            command()
        assert "%" in e.value.problem


@pytest.mark.parametrize("vision", [1, 4])
def test_a_multimodal_model_is_called_that(tmp_path: Path, vision: int) -> None:
    """Also where the vision tower has more layers: it is never taken for the decoder."""
    config = T.Gemma3Config(
        text_config={**COMMON, "head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": vision, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14})
    folder = save(tmp_path / "mm", config, T.Gemma3ForConditionalGeneration)
    assert find_layers(load_torch_model(folder))[0] == "model.language_model.layers"
    with pytest.raises(UserError, match=r"multimodal model \(Gemma3ForConditionalGeneration\)"):
        llmc.quantize(folder, method="rtn")


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


# ---------------------------------------------------------------------------------------------------- arguments


def test_arguments_of_two_runs() -> None:
    table, mask, alibi = torch.rand(1, 4, 2), torch.rand(1, 1, 4, 4), torch.rand(3, 1, 4)
    one = {"rotary": (table, table), "mask": mask, "alibi": alibi, "use_cache": False, "cache": None}
    two = {**one, "mask": torch.cat([mask, mask]), "alibi": torch.cat([alibi, alibi])}
    found = LayerArguments.of_two_runs(one, two)
    assert found.values["rotary"][0] is table
    assert isinstance(found.values["mask"], Repeated)
    for n in (1, 2, 5):
        given = found.of(n)
        assert torch.equal(given["mask"], torch.cat([mask] * n))
        assert torch.equal(given["alibi"], torch.cat([alibi] * n))
        assert given["use_cache"] is False
    for name, value in (("mask", torch.rand(2, 1, 4, 4)), ("alibi", torch.rand(3, 1, 4)), ("cache", {})):
        with pytest.raises(TextDependent, match=name):
            LayerArguments.of_two_runs(one | {name: {} if name == "cache" else one[name]}, two | {name: value})


@pytest.mark.parametrize("config", [
    T.BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4),
    T.XGLMConfig(vocab_size=512, d_model=64, ffn_dim=128, num_layers=2, attention_heads=4, max_position_embeddings=256),
], ids=["bloom", "xglm"])
def test_layers_see_what_they_see_in_the_model(config: Any, tmp_path: Path) -> None:
    """Masks and biases that grow with the batch: the states of the layer loop are those of the whole model."""
    folder = save(tmp_path / "m", config)
    skeleton = Skeleton(Checkpoint.open(folder), "cpu")
    ids = torch.arange(3 * 16).view(3, 16)
    with torch.no_grad():
        arguments, states = skeleton.enter(iter([ids]), 16)
        hidden = torch.cat(list(states))
        for i in range(2):
            with skeleton.layer(i) as layer:
                out = layer(hidden, **arguments[i].of(3))
                hidden = out[0] if isinstance(out, tuple) else out
        model = load_torch_model(folder)
        seen: list[torch.Tensor] = []
        layers = find_layers(model)[1]
        layers[-1].register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        model(ids, use_cache=False)
    assert torch.allclose(hidden, seen[0], atol=1e-5)


def test_layers_that_see_the_tokens_are_refused(tmp_path: Path, text: Path) -> None:
    """Gemma 3n hands each layer embeddings of the tokens."""
    config = T.Gemma3nTextConfig(
        **{**COMMON, "num_hidden_layers": 2}, head_dim=16, vocab_size_per_layer_input=512, hidden_size_per_layer_input=16,
        layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
        laurel_rank=8)
    folder = save(tmp_path / "m", config)
    with pytest.raises(UserError, match=r"layer by layer: its layers are given .*depends on the text") as e:
        llmc.quantize(folder, calibration=str(text), samples=8, seq_len=64, keep="altup")
    assert "--method rtn" in e.value.hint
