"""The table of model families: every key leads to the same row, and a row says what transformers' own modules are."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmc.compress.prune import width
from llmc.compress.transform import roles
from llmc.errors import UserError
from llmc.export.gguf import architectures
from llmc.export.onnx import builder
from llmc.families import FAMILIES, by_architecture, by_gguf, by_model_type, nearest
from llmc.families.names import CLASSES, ROLES, classify, role_of
from llmc.families.row import activation_of
from llmc.families.table import ROWS
from llmc.formats.linears import get_weight

WRITTEN = [f for f in FAMILIES if FAMILIES[f].gguf.name]


MAPPED = [f for f in FAMILIES if not (FAMILIES[f].unmapped or FAMILIES[f].experts)]  # every linear of a layer has a role


def model_and_layer(family: str) -> tuple[Any, nn.Module]:
    model = AutoModelForCausalLM.from_config(tiny.config(tiny.EACH[family])).eval()
    return model, next(m for n, m in model.named_modules() if n.endswith((".layers", ".h")))[0]


def test_nothing_heavy_is_imported() -> None:
    code = "import llmc.families, sys; print([m for m in ('torch', 'transformers', 'numpy', 'gguf') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_gives_the_same_row(family: str) -> None:
    model, _ = model_and_layer(family)
    row = by_model_type(model.config.model_type)
    assert row is not None
    assert by_architecture(type(model).__name__) is row
    if not row.unmapped:
        assert roles.family_of(model.config) is row
    if row.gguf.name:
        assert architectures.find_architecture({"architectures": [type(model).__name__]}) is row
        found = by_gguf(row.gguf.name)
        assert found is not None
        assert found.gguf == row.gguf  # of those that llama.cpp does not tell apart, the first


def test_no_key_is_given_twice() -> None:
    assert len(FAMILIES) == len(ROWS) == len({f.architecture for f in ROWS})
    for arch in {f.gguf.name for f in ROWS}:  # what is written alike is written by the same rules
        assert len({repr(f.gguf) for f in ROWS if f.gguf.name == arch}) == 1


@pytest.mark.parametrize("family", MAPPED)
def test_a_row_names_the_modules_of_a_layer(family: str) -> None:
    """All of its linears and norms, each once."""
    (model, layer), row = model_and_layer(family), FAMILIES[family]
    modules = dict(layer.named_modules())
    linears = [n for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)]
    norms = [n for n, m in modules.items() if n and "norm" in type(m).__name__.lower()]
    assert sorted(linears) == sorted(row.linears.values())
    assert sorted(norms) == sorted(row.all_norms)
    assert {row.role_of(f"model.layers.0.{linear}") for linear in linears} == set(row.linears)
    assert row.role_of("lm_head") is None
    model.base_model.get_submodule(row.final_norm)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_row_says_what_norms_do(family: str) -> None:
    (_, layer), row = model_and_layer(family), FAMILIES[family]
    norm, x = layer.get_submodule(row.all_norms[0]), torch.randn(1, 3, 64) + 5
    assert torch.allclose(norm(x), norm(x + 3), atol=1e-4) == row.centred
    norm.weight.zero_()
    zero = norm(x)
    norm.weight.fill_(1.0)
    assert torch.allclose(zero * (1 + row.offset), norm(x) * row.offset, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_row_says_how_the_embedding_reaches_the_layers(family: str) -> None:
    (model, layer), row = model_and_layer(family), FAMILIES[family]
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
    for positions in [p for n, p in model.named_parameters() if "wpe" in n or "embed_positions" in n]:
        positions.zero_()
    model(torch.tensor([[7, 9]]))
    factor = 64**0.5 if row.scaled_embedding else getattr(model.config, "embedding_multiplier", 1.0)
    expected = model.get_input_embeddings().weight[[7, 9]] * factor
    assert torch.allclose(seen[0], expected, rtol=1e-2)
    assert any("rotary" in n for n, _ in model.named_modules()) == row.rotary


@pytest.mark.parametrize("family", MAPPED)
def test_a_row_says_how_linears_are_stored(family: str) -> None:
    (_, layer), row = model_and_layer(family), FAMILIES[family]
    assert all(isinstance(layer.get_submodule(n), Conv1D) == row.transposed for n in row.linears.values())
    names = [n for n in (row.linears.get("ffn_gate"), row.up) if n]
    assert sum(len(get_weight(layer.get_submodule(n))) for n in names) == 128 * (2 if row.gated else 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_role_is_told_from_the_name_as_the_row_has_it(family: str) -> None:
    row = FAMILIES[family]
    for role, linear in row.linears.items():
        name = f"model.layers.0.{linear}"
        assert role_of(name) == role
        assert classify(name) == classify(f"blk.0.{role}.weight") == ("attention" if role.startswith("attn") else "mlp")
    for norm in (*row.all_norms, row.final_norm):
        assert classify(f"model.layers.0.{norm}.weight") == "other"
    assert {classify(n) for n in ("token_embd.weight", "output.weight")} < set(CLASSES)
    assert set(row.linears) <= set(ROLES)


@pytest.mark.parametrize("family", WRITTEN)
def test_llama_cpp_has_a_place_for_every_module_of_a_row(family: str) -> None:
    """By the gguf package's own table, linears by the role that the row gives them."""
    (model, layer), row = model_and_layer(family), FAMILIES[family]
    names = architectures.TensorNames(row, 2)
    prefix = next(n for n, m in model.named_modules() if m is layer).removesuffix("0") + "1"
    for role, linear in row.linears.items():
        assert names.find(f"{prefix}.{linear}.weight") == f"blk.1.{role}.weight"
    found = {names.find(f"{prefix}.{norm}.weight") for norm in row.all_norms}
    assert None not in found
    assert len(found) == len(row.all_norms)


def test_what_a_row_promises_is_tested_against_torch() -> None:
    import test_export_onnx
    import test_gguf_export

    assert set(FAMILIES) == set(tiny.EACH)
    assert set(WRITTEN) <= set(test_gguf_export.FAMILIES) | {tiny.family_of(name) for name in tiny.MODELS}
    proved = set(test_export_onnx.FAMILIES) | {tiny.family_of(name) for name in tiny.MODELS}
    assert proved >= {f for f in FAMILIES if FAMILIES[f].architecture in builder.known()}


def config(family: str) -> Any:
    return SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type=family))


def onnx(name: str) -> Any:
    pytest.importorskip("onnxruntime_genai")
    return builder.name_of({"architectures": [name]})


@pytest.mark.parametrize(("find", "name", "known", "near"), [
    (lambda n: roles.family_of(config(n)), "qwen4", "llmc models", "nearest to it: qwen3, qwen2"),
    (lambda n: width.family_of(config(n)), "qwen4", "llmc models", "nearest to it: qwen3, qwen2"),
    (lambda n: architectures.find_architecture({"architectures": [n]}), "MistrelForCausalLM", "llmc models",
     "nearest to it: MistralForCausalLM"),
    (onnx, "MixtralForCausalLM", "Phi3ForCausalLM", "nearest to it: MistralForCausalLM"),
    (lambda n: roles.family_of(config(n)), "wonder", "llmc models", ""),
])
def test_an_unknown_family_is_named_with_what_is_known(find: Callable[[str], Any], name: str, known: str, near: str) -> None:
    with pytest.raises(UserError) as e:
        find(name)
    assert name in e.value.problem
    assert all(x in str(e.value) for x in (known, near))
    assert ("nearest" in str(e.value)) == bool(near)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "cohere"])
def test_a_family_that_cannot_be_narrowed_says_why(family: str) -> None:
    with pytest.raises(UserError, match=f"'{family}': its LayerNorm"):
        width.family_of(config(family))


def test_nearest_compares_what_tells_names_apart() -> None:
    assert nearest("gpt_neo", FAMILIES) == "; nearest to it: gpt_neox, gpt2"
    assert nearest("OPTForCausalLM", ["LlamaForCausalLM", "Qwen2ForCausalLM"]) == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_activation_is_found_in_every_config(family: str) -> None:
    known = ("silu", "gelu_pytorch_tanh", "gelu_new", "relu", "gelu", "relu2", "xielu")
    assert activation_of(tiny.config(tiny.EACH[family])) in (known if family != "lfm2" else ("",))
