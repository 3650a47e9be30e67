"""Architectures of llama.cpp's converter, and text models of multimodal ones, from a folder to a proved file.

`make test-models` runs these too, and writes what was proved for `llmc models`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import converted
import gguf_files
import numpy as np
import proofs
import pytest
import tiny
import torch
from gguf_files import needs_converter

import llmc
from llmc.errors import UserError
from llmc.export.gguf import launcher, verify
from llmc.export.gguf.arithmetic import Kinds, LikeLlamaCpp
from llmc.export.gguf.routing import scoring
from llmc.export.text_model import text_model
from llmc.formats.checkpoint import Checkpoint

quick_converter = converted.quick_converter


@pytest.fixture(scope="module", autouse=True)
def _written() -> Iterator[None]:
    yield
    proofs.write()


@pytest.mark.models
@needs_converter
@pytest.mark.usefixtures("quick_converter")
@pytest.mark.parametrize("name", converted.MODELS)
def test_gguf(name: str, tmp_path: Path) -> None:
    """Both files pass the exporter's proofs, and the float one a narrower bound; the codes are carried."""
    with proofs.converting(converted.MODELS[name][0]) as figures:
        base = converted.build(name, tmp_path / "m")
        report = gguf_files.export(base)
        figures["kld"] = report["logits"]["mean_kld"]
        assert figures["kld"] <= 1e-4
        llmc.quantize(base, method="rtn", out=tmp_path / "q", threads=1)
        report = gguf_files.export(tmp_path / "q")
        figures["kld_4_bits"] = report["logits"]["mean_kld"]
        assert report["verified"]["code_weights"] > report["parameters"] / 10


# {what llama.cpp computes in another way, or lacks: (entry, values, what the error says)}
OTHERWISE = {
    "sigmoid taken for softmax": ("dots1", {"scoring_func": "softmax"}, "logits are not torch's"),
}


@needs_converter
@pytest.mark.usefixtures("quick_converter")
def test_a_ramp_that_llama_cpp_rounds_is_named_and_compared_as_llama_cpp_computes_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.edit_config(converted.build("gpt_oss", tmp_path / "m"), rope_parameters={**tiny.YARN, "truncate": False})
    llmc.quantize(tmp_path / "m", method="rtn", out=tmp_path / "q", threads=1)
    for folder in ("m", "q"):
        report = gguf_files.export(tmp_path / folder)
        assert any("truncate = false: YaRN's ramp goes from dimension" in note for note in report["notes"])
        assert report["logits"]["mean_kld"] < 1e-4
    monkeypatch.setattr(verify, "as_computed", lambda config: config)
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match="logits are not torch's"):
        gguf_files.export(tmp_path / "m", out=tmp_path / "again" / "m.gguf")


@needs_converter
@pytest.mark.usefixtures("quick_converter")
@pytest.mark.parametrize("what", OTHERWISE)
def test_what_llama_cpp_computes_in_another_way_is_refused_as_floats_and_quantized(what: str, tmp_path: Path) -> None:
    name, values, error = OTHERWISE[what]
    tiny.edit_config(converted.build(name, tmp_path / "m"), **values)
    llmc.quantize(tmp_path / "m", method="rtn", out=tmp_path / "q", threads=1)
    for folder in ("m", "q"):
        with pytest.raises(UserError, match=error):
            gguf_files.export(tmp_path / folder)
    assert not list(tmp_path.glob("*.gguf"))


@needs_converter
@pytest.mark.usefixtures("quick_converter")
def test_an_architecture_that_llama_cpp_lacks_is_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llama\.cpp does not have the architecture OPTForCausalLM"):
        gguf_files.export(tiny.build("opt", tmp_path / "m"))


@needs_converter
@pytest.mark.usefixtures("quick_converter")
def test_the_vocabulary_is_written_where_the_converter_does_not_read_it(tmp_path: Path) -> None:
    report = gguf_files.export(converted.build("glm4_moe", tmp_path / "m"))
    assert any("does not read this tokenizer (KeyError" in note for note in report["notes"])
    assert report["token_ids"]["text_tokens"] > 100


def test_how_scores_are_made_is_found_in_transformers_code() -> None:
    found = {name: scoring(converted.config(name)) for name in ("deepseek_v2", "deepseek_v3", "gpt_oss", "bloom")}
    assert found == {"deepseek_v2": "softmax", "deepseek_v3": "sigmoid", "gpt_oss": "", "bloom": ""}


def test_rows_of_a_part_of_a_head_are_reordered() -> None:
    rows = torch.arange(16)[:, None]  # 2 heads of 8 rows, of which 4 are rotated: 0 with 2, 1 with 3
    assert launcher._permuting(0.5)(rows, 2, None)[:, 0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]


def test_config_json_in_the_words_of_the_converter() -> None:
    read = launcher.complete({"mamba_d_state": 16, "hidden_size": 64, "num_attention_heads": 4}, {
        "layers_block_type": ["linear_attention", "mlp", "full_attention"], "num_experts_per_tok": 2, "n_routed_experts": 8,
        "rope_parameters": {"partial_rotary_factor": 0.5}})
    assert read["layers_block_type"] == ["mamba", "mlp", "attention"]
    assert read["hybrid_override_pattern"] == "M-*"
    assert "num_experts_per_tok" not in read
    assert "n_routed_experts" not in read
    assert read["attn_rotary_emb"] == 8
    assert launcher.spell({"architectures": ["MptForCausalLM", "Other"]}, ["MPTForCausalLM"])["architectures"] == [
        "MPTForCausalLM", "Other"]


def test_near_ties_of_experts_fall_as_in_llama_cpp_and_others_do_not() -> None:
    scores = torch.tensor([[0.5, 0.501, 0.1, 0.9], [0.5, 0.8, 0.1, 0.9]])
    theirs = np.array([[3, 0, 1, 2], [3, 0, 1, 2]], np.int32)  # the second token would lose 0.3 of 0.8
    with LikeLlamaCpp(Kinds(), lambda rows, _kind: rows, [theirs]) as mode:
        values, indices = torch.topk(scores, 2)
        again = scores.topk(2).indices
    assert indices.tolist() == [[3, 0], [3, 1]]
    assert values[0].tolist() == pytest.approx([0.9, 0.5])
    assert mode.rerouted == 1
    assert again.tolist() == [[3, 1], [3, 1]], "there was one layer with experts"


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
def test_the_text_model_in_a_multimodal_checkpoint(name: str, tmp_path: Path) -> None:
    """Stored as language_model.model.… or model.text_model.…; also of quantized linears."""
    llmc.quantize(converted.build(name, tmp_path / "m"), method="rtn", out=tmp_path / "q", threads=1)
    whole = Checkpoint.open(tmp_path / "q")
    text = text_model(whole)
    assert text is not None
    assert text.config["architectures"] == ["LlamaForCausalLM"]
    assert not [n for n in text.names() if not n.startswith(("model.", "lm_head."))]
    assert not [n for n in text.names() if "vision" in n or "projector" in n]
    part = next(n for n in whole.names() if n.endswith("layers.1.mlp.down_proj.qweight"))
    assert torch.equal(text.tensor("model.layers.1.mlp.down_proj.qweight"), whole.tensor(part))
    assert text_model(Checkpoint.open(tiny.build("llama", tmp_path / "n"))) is None
