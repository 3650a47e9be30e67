"""Types of a GGUF file: embedding and head, tied or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_files import export, stored
from rounding import gptq_folder
from safetensors.torch import load_file
from tiny import build, edit_config, edit_tensors

from llmc.errors import UserError
from llmc.export.gguf import GgufExportConfig
from llmc.formats import quantized
from llmc.formats.types import BLOCK_TYPES, IntegerType


def test_a_tied_model_has_one_matrix_for_both(tmp_path):
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q")
    assert "output.weight" not in stored(report["path"])
    assert report["bytes_by_class"]["head"] == 0
    with pytest.raises(UserError, match="one matrix: it cannot be both F16 and IQ4_NL"):
        export(tmp_path / "q", head="f16")


@pytest.mark.parametrize(("bits", "width", "ends"), [
    (4, 64, ("IQ4_NL", "Q8_0")), (4, 256, ("Q4_K", "Q6_K")), (8, 256, ("Q8_0", "Q8_0"))])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head_go_with_the_decoder(bits, width, ends, tied, tmp_path):
    folder = build("llama", tmp_path / "m", num_hidden_layers=1, hidden_size=width, tie_word_embeddings=tied)
    gptq_folder(folder, tmp_path / "q", IntegerType(bits, 32))
    types = {n: t.tensor_type.name for n, t in stored(export(tmp_path / "q")["path"]).items()}
    if tied:
        assert types["token_embd.weight"] == ends[1]
        assert "output.weight" not in types
    else:
        assert (types["token_embd.weight"], types["output.weight"]) == ends


@pytest.mark.parametrize("bits", [2.6, 4.125, 4.5, 4.6, 5.5, 6.0, 6.5625, 8.5])
def test_an_end_has_no_fewer_bits_than_the_decoder_if_a_type_has_as_many(bits):
    for width in (64, 768):
        head, embedding = (BLOCK_TYPES[t] for t in quantized.ends_beside(bits, width))
        assert width % head.block == 0 == width % embedding.block
        assert min(head.bits_per_weight, embedding.bits_per_weight) >= bits
        assert head.bits_per_weight >= 6.5
        assert embedding.bits_per_weight - max(bits, 4.5) <= (1 if width == 768 else 2.5)


def with_head(folder: Path, head: torch.Tensor) -> Path:
    with edit_tensors(folder) as tensors:
        tensors["lm_head.weight"] = head
    return folder


def test_tied_is_what_is_equal_and_not_what_a_flag_says(tmp_path):
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    with_head(folder, embedding.clone())
    assert "output.weight" not in stored(export(folder)["path"])
    edit_config(folder, tie_word_embeddings=False)  # untied by the flag, and yet the same matrix
    assert "output.weight" not in stored(export(folder)["path"])
    with_head(folder, embedding + 1)
    assert "output.weight" in stored(export(folder)["path"])
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"one matrix, but its lm_head\.weight differs"):
        export(folder)


def test_a_head_that_is_missing_is_named(tmp_path):
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(UserError, match="a separate matrix, but there is none"):
        export(folder)


def test_embedding_and_head_have_types_of_their_own(tmp_path):
    folder = build("mistral", tmp_path / "m", num_hidden_layers=1, hidden_size=256)
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q", embedding="f16", head="q6_k")
    types = {n: t.tensor_type.name for n, t in stored(report["path"]).items()}
    assert types["token_embd.weight"] == "F16"
    assert types["output.weight"] == "Q6_K"
    assert report["bytes_by_class"]["head"] == 512 * 210


def test_q6_k_of_rows_that_do_not_fit_names_the_alternatives(tmp_path):
    with pytest.raises(UserError, match=r"token_embd\.weight has rows of 64 weights and Q6_K needs a multiple of 256") as e:
        export(build("llama", tmp_path / "m", num_hidden_layers=1), embedding="q6_k")
    assert "q8_0" in e.value.hint


def test_wrong_options_are_all_named_at_once():
    with pytest.raises(UserError) as e:
        GgufExportConfig(embedding="q3", head="q9", threads=0)
    assert all(x in e.value.problem for x in ("--embedding 'q3'", "--head 'q9'", "--threads 0"))


def test_an_unknown_architecture_names_the_table_and_the_converter(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))  # without the converter
    with pytest.raises(UserError, match=r"OPTForCausalLM as GGUF.*`llmc models`") as e:
        export(build("opt", tmp_path / "m"))
    assert "`llmc setup converter`" in e.value.hint


@pytest.mark.parametrize(("family", "values", "message"), [
    ("llama", {"hidden_act": "gelu"}, "the activation = 'gelu'"),
    ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar = 64"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
])
def test_what_llama_cpp_does_not_compute_is_refused(family, values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export(build(family, tmp_path / "m", **values))


def test_a_sliding_window_that_llama_cpp_ignores_is_noted(tmp_path):
    report = export(build("mistral", tmp_path / "m", sliding_window=128))
    assert any("sliding window of 128" in note for note in report["notes"])


def test_a_tensor_without_a_place_is_named(tmp_path):
    folder = build("llama", tmp_path / "m")
    with edit_tensors(folder) as tensors:
        tensors["model.extra.weight"] = torch.ones(3)
    with pytest.raises(UserError, match=r"model\.extra\.weight .* has no place"):
        export(folder)


SLIDING_BASE = {"sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0}}


@pytest.mark.parametrize(("name", "values", "words"), [
    ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, r"no_rope_layers = \[1, 1, 0, 1\].*\[1, 1, 1, 0\]"),
    ("exaone4_window", {"num_hidden_layers": 4}, "a sliding window, and .* only in models of 64 layers, not of 4"),
    ("olmo3", {"rope_parameters": SLIDING_BASE}, r"is 5000 in sliding layers|does not know: full_attention"),
    ("apertus", {"hidden_act": "relu2"}, "the activation = 'relu2'"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm = True"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False"),
    ("cohere", {"tie_word_embeddings": False}, "the head differs from the embedding, and .* command-r has one matrix"),
])
def test_what_llama_cpp_does_not_compute_is_named(name, values, words, tmp_path):
    with pytest.raises(UserError, match=words):
        export(build(name, tmp_path / "m", **values))
    assert not (tmp_path / "m.gguf").exists()


def test_zero_biases_stay_where_llama_cpp_wants_biases(tmp_path):
    folder = build("starcoder2", tmp_path / "m", num_hidden_layers=1)
    with edit_tensors(folder) as tensors:
        for name in tensors:
            if name.endswith("proj.bias"):
                tensors[name].zero_()
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32))
    assert "blk.0.attn_q.bias" in stored(export(tmp_path / "q")["path"])


def test_a_tied_head_is_written_twice_where_llama_cpp_has_two_matrices(tmp_path):
    folder = build("olmo2_tied", tmp_path / "m", num_hidden_layers=1)
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32))
    types = {n: t.tensor_type.name for n, t in stored(export(tmp_path / "q", embedding="f16", head="q8_0")["path"]).items()}
    assert (types["token_embd.weight"], types["output.weight"]) == ("F16", "Q8_0")
