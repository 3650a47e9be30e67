"""Every family of the table, in the forms of tests/tiny.py, from a folder to a proved file. `make test-models` runs these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import onnx_files
import proofs
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from proofs import proving
from pruning import load, logits, prune, zeros
from quantizing import settings
from rounding import gptq_folder, is_decoder_linear
from tiny import build, divergence, family_of
from transforming import logits as exact_logits

import llmc
from llmc.compress.quantize.run import quantize
from llmc.compress.skeleton import Skeleton
from llmc.errors import UserError
from llmc.export.onnx.builder import known
from llmc.families import FAMILIES
from llmc.families.row import Family
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.types import IntegerType, QuantizedTensor

pytestmark = pytest.mark.models

NAMES = [*tiny.FAMILIES, *(name for name in tiny.MODELS if name not in tiny.FAMILIES)]
MOST_LAYERS = 8  # of a model that is more than exported


def those(keep: Callable[[Family], object], most_layers: int = MOST_LAYERS) -> list[str]:
    """The entries whose row `keep` accepts."""
    return [name for name in NAMES if keep(FAMILIES[family_of(name)])
            and tiny.values_of(name).get("num_hidden_layers", 2) <= most_layers]


def is_mixture(name: str) -> bool:
    return bool(FAMILIES[family_of(name)].experts)


FLOATS = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "shared_expert_gate.weight", "conv.conv.weight")


def rounded(base: Path, out: Path) -> dict[str, QuantizedTensor]:
    """Write a quantized folder, with routers and kernels of convolutions as floats; returns its codes."""
    return gptq_folder(base, out, IntegerType(4, 32), lambda n: is_decoder_linear(n) and not n.endswith(FLOATS))


@pytest.fixture(scope="module", autouse=True)
def _written() -> Iterator[None]:
    yield
    proofs.write()


def kld(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    p, q = (torch.log_softmax(x.double(), -1) for x in (theirs, ours))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", those(lambda f: f.gguf.name, most_layers=64))
def test_gguf(name: str, tmp_path: Path) -> None:
    """Both files pass the exporter's own proofs, and the float one a narrower bound; codes of every linear are carried."""
    with proving(name, "gguf") as figures:
        base = build(name, tmp_path / "m")
        # experts are chosen by F16's last bits where two are nearly equal
        report = gguf_files.export(base, float_type="f32" if is_mixture(name) else "f16")
        figures["kld"] = report["logits"]["mean_kld"]
        assert figures["kld"] <= 1e-4
        assert report["logits"]["top1_agreement"] > 0.98
        source = rounded(base, tmp_path / "q")
        report = gguf_files.export(tmp_path / "q")
        figures["kld_4_bits"] = report["logits"]["mean_kld"]
        assert report["verified"]["code_weights"] == sum(q.codes.numel() for q in source.values())


# facts that say how llama.cpp computes; the others say what it refuses
ABORTS = ("expert_count", "expert_used_count")  # without one of the two llama.cpp ends the process
FACTS = ("interleaved", "temperature", "scalars", "unattended", "offset", "centred", "qkv_by_head")


def without(row: Family, fact: str) -> Family:
    """The row without one fact, or without one of its values."""
    if fact in row.gguf.values:
        left = {name: key for name, key in row.gguf.values.items() if name != fact}
        return replace(row, gguf=replace(row.gguf, values=left))
    owner: Any = row if hasattr(row, fact) else row.gguf
    default = next(f.default if f.default is not MISSING else {} for f in fields(owner) if f.name == fact)
    return replace(row, **{fact: default}) if owner is row else replace(row, gguf=replace(row.gguf, **{fact: default}))


def facts() -> list[tuple[str, str]]:
    """(entry, fact) for all that the rows of tests/tiny.py's MODELS state and the entry uses."""
    found = []
    for name in (n for n in tiny.MODELS if n in tiny.EACH.values() or n == "falcon_grouped"):
        row, config = FAMILIES[family_of(name)], tiny.config(name)
        found += [(name, fact) for fact in FACTS if without(row, fact) != row and (name, fact) != ("falcon", "qkv_by_head")]
        found += [(name, value) for value, key in row.gguf.values.items()
                  if getattr(config, value, None) is not None and key not in ABORTS]
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            found.append((name, "window"))
    return found


@pytest.mark.parametrize(("name", "fact"), facts())
def test_a_row_that_lacks_a_fact_makes_no_file(name: str, fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fact changes what llama.cpp computes, and the exporter's proof finds that."""
    family = family_of(name)
    monkeypatch.setitem(FAMILIES, family, without(FAMILIES[family], fact))
    with pytest.raises(UserError):
        gguf_files.export(build(name, tmp_path / "m"))
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_codes_of_every_expert_are_in_its_place(family: str, tmp_path: Path) -> None:
    llmc.quantize(build(family, tmp_path / "m"), method="rtn", out=tmp_path / "q", threads=1)
    ckpt = Checkpoint.open(tmp_path / "q")
    tensors = gguf_files.stored(gguf_files.export(tmp_path / "q")["path"])
    parts = {"gate": ("w1", "gate_proj"), "up": ("w3", "up_proj"), "down": ("w2", "down_proj")}
    experts = {linear: quantized.read(ckpt, linear) for linear in quantized.linears(ckpt) if ".experts." in linear}
    assert len(experts) == 2 * 3 * tiny.values_of(family)["num_local_experts" if family == "mixtral" else "num_experts"]
    for linear, q in experts.items():
        layer, expert, last = linear.split(".")[2], int(linear.split(".")[-2]), linear.split(".")[-1]
        part = next(p for p, names in parts.items() if last in names)
        t = tensors[f"blk.{layer}.ffn_{part}_exps.weight"]
        assert np.array_equal(dequantize(t.data, Kind.Q4_0)[expert], q.dequantize().numpy())


@pytest.mark.parametrize("name", those(lambda f: True))
def test_quantize(name: str, tmp_path: Path, text: Path) -> None:
    with proving(name, "quantize") as figures:
        base = build(name, tmp_path / "base")
        for method in ("gptq", "rtn"):
            done = quantize(base, settings(text, tmp_path / method, method=method))
            assert done["fallbacks"] == 0
            figures[method] = divergence(tmp_path / method, base)
        assert figures["gptq"] < figures["rtn"]


@pytest.mark.parametrize("name", those(lambda f: not f.unmapped))
def test_transform(name: str, tmp_path: Path, text: Path) -> None:
    """Scaled and rotated as far as the row allows."""
    row = FAMILIES[family_of(name)]
    with proving(name, "transform") as figures:
        base, rotate = build(name, tmp_path / "base", tie_word_embeddings=False), "r2" if row.unrotatable else "r1r2"
        llmc.transform(base, scaling="awq", rotate=rotate, calibration=text, samples=8, seq_len=64, out=tmp_path / "t",
                       threads=1)
        figures["kld"] = abs(kld(exact_logits(tmp_path / "t"), exact_logits(base)))
        assert figures["kld"] < 1e-6
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "t")
    readers = [n for n in before.names() if n.endswith(f".{row.out}.weight")]
    assert len(readers) == tiny.values_of(name)["num_hidden_layers"]
    assert not any(torch.allclose(before.tensor(n), after.tensor(n), rtol=0.1) for n in readers)
    if row.unrotatable:
        with pytest.raises(UserError, match="cannot rotate the residual stream"):
            llmc.transform(base, scaling="none", rotate="r1r2", out=tmp_path / "r", threads=1)


@pytest.mark.parametrize("name", those(lambda f: f.unmapped))
def test_layers_that_no_row_describes_are_not_transformed(name: str, tmp_path: Path) -> None:
    base = build(name, tmp_path / "base")
    with pytest.raises(UserError, match=FAMILIES[family_of(name)].unmapped):
        llmc.transform(base, scaling="equalize", out=tmp_path / "t", threads=1)


@pytest.mark.parametrize("name", those(lambda f: True))
def test_masks(name: str, tmp_path: Path, text: Path) -> None:
    with proving(name, "masks") as figures:
        base = build(name, tmp_path / "base")
        done = prune(base, text, tmp_path / "out", method="wanda", pattern="2:4")
        found = zeros(tmp_path / "out")
        assert all(int(z.view(len(z), -1, 4).sum(-1).min()) == 2 for z in found.values())
        assert done["sparsity"] == pytest.approx(0.5, abs=1e-3)
        figures["sparsity"] = done["sparsity"]


@pytest.mark.parametrize("name", those(lambda f: True))
def test_depth(name: str, tmp_path: Path, text: Path) -> None:
    """The pruned folder computes what the whole model does when that layer hands its input through."""
    with proving(name, "depth") as figures:
        base = build(name, tmp_path / "base")
        dropped = prune(base, text, tmp_path / "out", method="depth", drop=1)["dropped"]
        model, tuples = load(base), list[bool]()
        listed: Any = model.get_submodule(Skeleton(Checkpoint.open(base), "cpu").layers_name)
        listed[0].register_forward_hook(lambda _m, _args, out: tuples.append(isinstance(out, tuple)))
        logits(model)
        for i in dropped:
            listed[i].forward = lambda states, *_args, **_kwargs: (states,) if tuples[0] else states
        ours, theirs = logits(load(tmp_path / "out")), logits(model)
        figures["difference"] = float((ours - theirs).abs().max() / theirs.abs().max())
        assert figures["difference"] < 1e-5


@pytest.mark.parametrize("name", those(lambda f: not f.unnarrowable))
def test_width(name: str, tmp_path: Path, text: Path) -> None:
    """test_prune_width.py compares with models that are cut by hand; here: it loads, is narrower and computes numbers."""
    with proving(name, "width") as figures:
        base = build(name, tmp_path / "base", hidden_size=96, num_key_value_heads=2)
        done = prune(base, text, tmp_path / "out", method="width", ffn=0.5, heads=0.5, hidden=0.667)
        found = load(tmp_path / "out")
        assert (found.config.hidden_size, found.config.num_attention_heads, found.config.intermediate_size) == (64, 2, 64)
        assert bool(logits(found).isfinite().all())
        figures["kld"] = done["quality"]["kld"]["value"]


# llama3's rotation for Granite; and Nemotron rotates too few dimensions here: test_export_onnx_architectures.py has larger
# heads
NO_ONNX = {"granite_bias": "RoPE style is not currently supported",
           **dict.fromkeys(("nemotron", "nemotron_bias"), "does not run the graph")}


@pytest.mark.parametrize("name", those(lambda f: f.architecture in known()))
def test_onnx(name: str, tmp_path: Path) -> None:
    # ONNX Runtime rotates at least 16 dimensions of a head: with 4 heads and partial rotation a width of 64 has too few
    wide = build(name, tmp_path / "m", hidden_size=128)
    gptq_folder(wide, tmp_path / "q", IntegerType(4, 32))
    if name in NO_ONNX:
        with pytest.raises(UserError, match=NO_ONNX[name]):
            onnx_files.export(tmp_path / "q")
        return
    with proving(name, "onnx") as figures:
        report = onnx_files.export(tmp_path / "q")
        figures["relative_error"] = report["logits"]["relative_error"]
        assert figures["relative_error"] < onnx_files.FLOAT_NOISE
