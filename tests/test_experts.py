"""A mixture of experts: the file holds all experts, and a token reads those that the router chooses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gguf import GGUFWriter
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from llmc.about.inspection import describe, inspect
from llmc.console import size
from llmc.evals.bench.run import token_bytes
from llmc.evals.fit.advice import _by_decode
from llmc.evals.fit.estimate import estimate, memory, model_of, rates_of_profile
from llmc.evals.fit.run import FitConfig, fit
from llmc.evals.fit.show import fit_lines
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.experts import share, share_of_config, used_of
from llmc.runtimes.targets.profile import read_profile

LAYERS, WIDTH, INNER, VOCABULARY, EXPERTS, USED = 2, 64, 32, 128, 32, 4
ATTENTION, EXPERT, ROUTER, EMBEDDING = 4 * WIDTH * WIDTH, 3 * WIDTH * INNER, WIDTH * EXPERTS, VOCABULARY * WIDTH
READ = LAYERS * (ATTENTION + ROUTER + USED * EXPERT)  # weights of the layers that a token uses
STORED = LAYERS * (ATTENTION + ROUTER + EXPERTS * EXPERT)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3moe in float16 with an untied head; 4 of 32 experts are used."""
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    w = GGUFWriter(path, "qwen3moe")
    w.add_block_count(LAYERS)
    w.add_embedding_length(WIDTH)
    w.add_head_count(4)
    w.add_head_count_kv(4)
    w.add_context_length(512)
    w.add_expert_count(EXPERTS)
    w.add_expert_used_count(USED)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{x}": (WIDTH, WIDTH) for x in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.ffn_gate_inp": (EXPERTS, WIDTH), f"blk.{i}.ffn_down_exps": (EXPERTS, WIDTH, INNER),
                   f"blk.{i}.ffn_gate_exps": (EXPERTS, INNER, WIDTH), f"blk.{i}.ffn_up_exps": (EXPERTS, INNER, WIDTH)}
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", np.zeros(shape, np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_a_token_reads_the_chosen_experts(file: Path) -> None:
    w = artifact_at(file).weigh()
    assert w["token_bytes"] == 2 * (READ + EMBEDDING)  # the head, and not the embedding
    assert w["token_parameters"] == READ + EMBEDDING
    assert w["tensor_bytes"] == 2 * (STORED + 2 * EMBEDDING)
    assert w["parameters"] == STORED + 2 * EMBEDDING
    text = describe(inspect(file))
    assert f"size          {size(w['file_bytes'])}" in text
    assert f"{size(w['token_bytes'])} read per token" in text


def test_estimates_count_the_chosen_experts(file: Path) -> None:
    model = model_of(file)
    assert sum(model.token_bytes.values()) == 2 * (READ + EMBEDDING)
    assert model.prefill_weights == READ
    assert (model.decoder_weights, model.decoder_bytes) == (STORED, 2 * STORED)
    assert sum(model.held_bytes.values()) == 2 * (STORED + EMBEDDING)
    assert memory(model, 128)[0] > 2 * STORED  # all experts are in memory
    result = fit(FitConfig((file,), ("pi5",), min_decode=1.0))
    assert result["targets"][0]["candidates"][0]["token_bytes"] == 2 * (READ + EMBEDDING)
    assert size(2 * (READ + EMBEDDING)) in fit_lines(result)


def test_the_file_that_is_advised_would_decode_as_fast(file: Path) -> None:
    model, rates = model_of(file), rates_of_profile(read_profile("pi5"))
    limit = 1.3 * estimate(model, rates)["decode"]["low"]
    advised = _by_decode(model, rates, {"decode": (limit, False)}, 0)
    assert advised is not None
    held, read = sum(model.held_bytes.values()), sum(model.token_bytes.values())
    smaller = (advised - (model.file_bytes - held)) / held
    cost = model.layers * rates.layer_seconds[2]
    now = 1 / estimate(model, rates)["decode"]["low"] - cost
    assert smaller == pytest.approx((1 / limit - cost) / now, rel=1e-6)
    assert read < held / 4


def test_a_folder_by_its_config(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": WIDTH,
                              "vocab_size": VOCABULARY, "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH),
               "model.layers.0.mlp.gate.weight": (8, WIDTH),
               "model.layers.0.mlp.shared_experts.up_proj.weight": (INNER, WIDTH)}
    tensors |= {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (INNER, WIDTH) for i in range(8)}
    save_file({k: torch.zeros(v, dtype=torch.bfloat16) for k, v in tensors.items()}, tmp_path / "model.safetensors")
    w = artifact_at(tmp_path).weigh()
    used = EMBEDDING + 8 * WIDTH + INNER * WIDTH + 2 * INNER * WIDTH
    assert (w["token_parameters"], w["token_bytes"]) == (used, 2 * used)
    assert token_bytes(w, {"runtime": "torch", "dtype": "float32"}) == 4 * used  # type: ignore[typeddict-item]


def test_an_onnx_folder_by_its_operator(tmp_path: Path) -> None:
    """QMoE holds 4-bit codes of all experts, two in a byte, and says how many a token uses."""
    arrays = {"table": np.zeros((VOCABULARY, WIDTH), np.float32), "head": np.zeros((WIDTH, VOCABULARY), np.float32),
              "router": np.zeros((WIDTH, 8), np.float32),
              "experts.fc1.qweight": np.zeros((8, INNER, WIDTH // 2), np.uint8),
              "experts.fc1.scales": np.zeros((8, INNER), np.float32),
              "experts.fc2.qweight": np.zeros((8, WIDTH, INNER // 2), np.uint8),
              "experts.fc2.scales": np.zeros((8, WIDTH), np.float32)}
    node = helper.make_node
    nodes = [node("Gather", ["table", "input_ids"], ["x"]), node("MatMul", ["x", "router"], ["chosen"]),
             node("QMoE", ["x", "chosen", "experts.fc1.qweight", "experts.fc1.scales", "", "experts.fc2.qweight",
                           "experts.fc2.scales"], ["y"], domain="com.microsoft", k=2, expert_weight_bits=4),
             node("MatMul", ["y", "head"], ["logits"])]
    graph = helper.make_graph(
        nodes, "moe", [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "n"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "n", VOCABULARY])],
        [numpy_helper.from_array(v, k) for k, v in arrays.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), str(tmp_path / "model.onnx"))
    opened = artifact_at(tmp_path)
    found = {t.name: t for t in opened.tensors()}
    fc1 = found["experts.fc1.qweight"]
    assert (fc1.type, fc1.parameters, fc1.used) == ("int4", 8 * INNER * WIDTH, 0.25)
    assert fc1.nbytes == 8 * (INNER * WIDTH // 2 + 4 * INNER)
    assert {found[n].used for n in ("table", "router", "head")} == {1.0}
    experts = fc1.nbytes + found["experts.fc2.qweight"].nbytes
    # a float head is called 'head', which names no class: it counts as 'other', and the table as the head too
    assert opened.weigh()["token_bytes"] == 4 * (2 * EMBEDDING + WIDTH * 8) + experts // 4


def test_counts_and_names() -> None:
    assert share(32, 4) == 0.125
    assert share([8, 8], [2, 2]) == 0.25
    for experts, used in ((None, None), (0, 0), (8, None), (8, 0), (8, 9), (8, 8), ("8", 2)):
        assert share(experts, used) == 1.0
    for config in ({"num_experts": 8, "num_experts_per_tok": 2}, {"num_local_experts": 8, "num_experts_per_tok": 2},
                   {"n_routed_experts": 64, "num_experts_per_tok": 16}, {"moe_num_experts": 4, "moe_k": 1}):
        assert share_of_config(config) == 0.25, config
    assert share_of_config({"num_hidden_layers": 2}) == 1.0
    for name in ("blk.0.ffn_up_exps.weight", "blk.1.ffn_down_exps.bias", "blk.0.ffn_gate.3.weight",
                 "model.layers.0.block_sparse_moe.experts.5.w1.weight", "model.layers.0.mlp.experts.gate_up_proj",
                 "/model/layers.0/mlp/experts.3/up_proj/MatMul.weight"):
        assert used_of(name, 0.25) == 0.25, name
    for name in ("blk.0.ffn_up_shexp.weight", "blk.0.ffn_gate_inp.weight", "model.layers.0.mlp.shared_experts.up_proj.weight",
                 "blk.0.ffn_up.weight", "model.embed_tokens.weight", "token_embd.weight"):
        assert used_of(name, 0.25) == 1.0, name
    for name in ("per_layer_token_embd.weight", "transformer.wpe.weight", "position_embd.weight"):
        assert used_of(name, 0.25) == 0.0, name
