"""Faults in the layout of a quantized file: its tensors read back right, and only the logits can show them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from gguf_files import export, needs_converter
from rounding import gptq_folder
from tiny import build, edit_tensors

from llmc.errors import UserError
from llmc.export.gguf import converter, verify
from llmc.export.gguf import export as pipeline
from llmc.export.gguf.layers import PREFIX, Layers
from llmc.export.gguf.plan import Plan, reorder
from llmc.export.parity import compare_logits
from llmc.export.reference import reference_logits
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.types import IntegerType
from llmc.runtimes.llamacpp import LlamaCpp

Change = Callable[[Plan], None]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": YARN},
    "qwen2": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                  "norm_topk_prob": True},
}


def rows(name: str, order: Callable[[int], np.ndarray]) -> Change:
    """A fault: the rows of a tensor in another order."""
    def change(plan: Plan) -> None:
        at, e = next((i, e) for i, e in enumerate(plan.entries) if e.name == name)
        if not e.more:
            index = order(int(np.prod(e.shape[:-1])))
            plan.entries[at] = replace(e, source=lambda: reorder(e.source(), index))
            return
        experts, rows = e.shape[:2]  # a source for each expert
        moved = order(experts * rows).reshape(experts, rows)
        sources = [lambda s=e.sources[index[0] // rows], i=index % rows: reorder(s(), i) for index in moved]  # type: ignore
        plan.entries[at] = replace(e, source=sources[0], more=tuple(sources[1:]))
    return change


def values(name: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """A fault: other values in a float tensor."""
    def change(plan: Plan) -> None:
        at, e = next((i, e) for i, e in enumerate(plan.entries) if e.name == name)
        plan.entries[at] = replace(e, source=lambda: new(e.source()))  # type: ignore[arg-type]
    return change


def key(end: str, new: Callable[[Any], Any]) -> Change:
    """A fault: another value in the metadata."""
    def change(plan: Plan) -> None:
        (found,) = [v for k, v in plan.writer.kv_data[0].items() if k.endswith(end)]
        found.value = new(found.value)
    return change


def swapped(first: int, second: int, size: int) -> Callable[[int], np.ndarray]:
    """The order of rows that swaps two blocks of `size` rows."""
    def order(n: int) -> np.ndarray:
        blocks = np.arange(n).reshape(-1, size)
        blocks[[first, second]] = blocks[[second, first]]
        return blocks.reshape(-1)
    return order


def paired(n: int) -> np.ndarray:
    """The order of llama.cpp's rotation in pairs, once more: as if the rows of heads of 32 had been permuted twice."""
    return np.arange(n).reshape(-1, 2, 16).swapaxes(1, 2).reshape(-1)


FAULTS: list[tuple[str, str, Change]] = [
    ("llama", "rows permuted", rows("blk.1.attn_q.weight", paired)),
    ("llama", "a head's order", rows("blk.1.attn_v.weight", swapped(0, 1, 32))),
    ("llama", "two rows", rows("blk.2.ffn_up.weight", swapped(3, 200, 1))),
    ("llama", "rope base", key("rope.freq_base", lambda x: x * 1.5)),
    ("llama", "YaRN's factor", key("rope.scaling.factor", lambda x: x * 1.5)),
    ("llama", "YaRN's length", key("rope.scaling.original_context_length", lambda x: x * 2)),
    ("llama", "norm's epsilon", key("layer_norm_rms_epsilon", lambda x: x * 1e4)),
    ("qwen2", "rows permuted", rows("blk.0.attn_k.weight", paired)),
    ("qwen2", "a bias lost", values("blk.0.attn_q.bias", torch.zeros_like)),
    ("qwen2", "a bias of V lost", values("blk.2.attn_v.bias", torch.zeros_like)),
    ("qwen2", "rope base", key("rope.freq_base", lambda x: x / 2)),
    ("qwen2", "a head's order", rows("blk.1.attn_q.weight", swapped(1, 2, 32))),
    ("gemma3_text", "norm's +1 lost", values("blk.1.attn_norm.weight", lambda x: x - 1)),
    ("gemma3_text", "a norm's +1 lost", values("blk.2.attn_q_norm.weight", lambda x: x - 1)),
    ("gemma3_text", "rope base", key("rope.freq_base", lambda x: x / 10)),
    ("gemma3_text", "window wider", key("attention.sliding_window", lambda x: x * 2)),
    ("gemma3_text", "window dropped", key("attention.sliding_window", lambda x: 256)),
    ("gemma3_text", "layers of the window", key("sliding_window_pattern", lambda x: [x[1], x[0], x[2]])),
    ("qwen3_moe", "experts swapped", rows("blk.1.ffn_gate_exps.weight", swapped(0, 1, 64))),
    ("qwen3_moe", "rows of an expert", rows("blk.0.ffn_down_exps.weight", swapped(0, 1, 32))),
    ("qwen3_moe", "rope base", key("rope.freq_base", lambda x: x / 2)),
    ("qwen3_moe", "router's rows", values("blk.1.ffn_gate_inp.weight", lambda x: x.flip(0))),
    ("qwen3_moe", "a head's order", rows("blk.1.attn_k.weight", swapped(0, 1, 32))),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A 4-bit folder of a family. Read only."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(tiny.FAMILIES, family, tiny.FAMILIES.get(family, {}))
                base = build(family, folder / "m", **SIZES, **FAMILIES[family])
            gptq_folder(base, folder / "q", IntegerType(4, 32), is_linear)
            made[family] = folder / "q"
        return made[family]

    return get


def is_linear(name: str) -> bool:
    return ".layers." in name and name.endswith("_proj.weight")


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """A function: change the plan of every file from now on."""
    def with_fault(change: Change) -> None:
        for module, name in ((pipeline, "plan_file"), (converter, "_plan")):
            def changed(*args: Any, _before: Any = getattr(module, name)) -> Plan:
                plan: Plan = _before(*args)
                change(plan)
                return plan
            monkeypatch.setattr(module, name, changed)
    return with_fault


def marked(family: str) -> Any:
    return pytest.param(family, marks=needs_converter) if family == "qwen3_moe" else family


@pytest.mark.parametrize("family", [marked(f) for f in FAMILIES])
def test_a_right_file_agrees_closely(family: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    logits = export(folders(family), out=tmp_path / "m.gguf")["logits"]
    assert logits["relative_error"] < (0.03 if family == "qwen3_moe" else 0.015), "near ties send a token to other experts"


@pytest.mark.parametrize(("family", "fault", "change"), [
    pytest.param(*f, id=f"{f[0]}: {f[1]}", marks=[needs_converter] if f[0] == "qwen3_moe" else []) for f in FAULTS])
def test_a_fault_is_found(family: str, fault: str, change: Change, folders: Callable[[str], Path], tmp_path: Path,
                          plant: Callable[[Change], None]) -> None:
    plant(change)
    with pytest.raises(UserError, match="logits are not torch's"):
        export(folders(family), out=tmp_path / "m.gguf")
    assert list(tmp_path.glob("*.gguf*")) == []


def test_layer_by_layer_a_fault_stays_where_it_is(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """In a deep model all layers above a fault differ. With llama.cpp's states as inputs only the wrong one does."""
    q = folders("qwen2")
    export(q, out=tmp_path / "m.gguf")
    shutil.copytree(q, tmp_path / "other")
    with edit_tensors(tmp_path / "other") as tensors:
        tensors["model.layers.1.self_attn.v_proj.bias"] *= 4
    ids = np.arange(100) + 5
    runtime = LlamaCpp(tmp_path / "m.gguf", context=128, threads=1, flash_attention=False, kv_type="f32", record=(PREFIX,))
    found, ends = runtime.logits(ids), verify.end_matrices(tmp_path / "m.gguf")
    runtime.close()
    for folder, wrong in ((q, []), (tmp_path / "other", [1])):
        with Layers(runtime.recorded) as layers:
            logits = reference_logits(Checkpoint.open(folder), ids, ends)[:, : found.shape[1]]
        assert layers.comparable
        assert [i for i, e in enumerate(layers.errors) if e > 0.1] == wrong, layers.errors
        assert compare_logits(logits, found)[0] < 0.02
    with Layers({f"{PREFIX}0": [np.zeros(128, np.float32)]}) as layers:
        reference_logits(Checkpoint.open(q), ids, ends)
    assert not layers.comparable
