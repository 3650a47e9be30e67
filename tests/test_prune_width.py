"""Pruning by width: the narrower model against the same one cut in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import load, logits, prune
from tiny import FAMILIES, build, edit_tensors

from llmc import families
from llmc.compress.prune import width
from llmc.compress.prune.config import PruneConfig
from llmc.errors import UserError

WIDTHS = [f for f in FAMILIES if not families.FAMILIES[f].unnarrowable]


def sliced(family: str, model: Any, new: Any, ffn: list[list[int]], groups: list[list[int]], hidden: list[int]) -> None:
    """Fill `new` with what stays of `model`, by transformers' own names: written apart from the code that is tested."""
    c = model.config
    head, per = new.config.head_dim, c.num_attention_heads // c.num_key_value_heads
    state, out = model.state_dict(), {}
    for name, t in state.items():
        i = int(name.split(".")[2]) if ".layers." in name else 0
        kv = [g * head + j for g in groups[i] for j in range(head)]
        q = [(g * per + h) * head + j for g in groups[i] for h in range(per) for j in range(head)]
        nq, nkv, inner = c.num_attention_heads * head, c.num_key_value_heads * head, c.intermediate_size
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "qkv_proj": [*q, *(nq + x for x in kv), *(nq + nkv + x for x in kv)],
                "gate_proj": ffn[i], "up_proj": ffn[i], "gate_up_proj": [*ffn[i], *(inner + x for x in ffn[i])],
                "o_proj": hidden, "down_proj": hidden}
        columns = {"o_proj": q, "down_proj": ffn[i]}
        part = name.split(".")[-2]
        if part in rows:
            t = t[rows[part]]
            if name.endswith("weight"):
                t = t[:, columns.get(part, hidden)]
        elif part not in ("q_norm", "k_norm"):
            t = t[..., hidden]
        out[name] = t
    new.load_state_dict(out)
    if family.startswith("gemma"):  # the embedding's own factor stays what it was for the old width
        for module in new.modules():
            if hasattr(module, "embed_scale"):
                module.embed_scale.fill_(c.hidden_size**0.5)


def kept_columns(old: torch.Tensor, new: torch.Tensor) -> list[int]:
    """Which columns of `old` those of `new` are."""
    return [int((old == column[:, None]).all(0).nonzero()) for column in new.t()]


@pytest.mark.parametrize("family", WIDTHS)
def test_width_reloads_with_the_logits_of_the_model_cut_in_memory(family: str, tmp_path: Path, text: Path) -> None:
    base = build(family, tmp_path / "base", num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    done = prune(base, text, tmp_path / "out", method="width", ffn=0.75, heads=0.667, hidden=0.667)
    (entry,) = json.loads((tmp_path / "out/llmc.json").read_text())["passes"]
    pruned, model = load(tmp_path / "out"), load(base)
    c = pruned.config
    assert (c.intermediate_size, c.num_attention_heads, c.num_key_value_heads) == (96, 4, 2)
    assert c.hidden_size == done["shape"]["hidden"] == 64
    expected, channels = type(pruned)(c).eval(), entry["channels"]
    neurons = [kept_columns(old.mlp.down_proj.weight[channels], new.mlp.down_proj.weight)
               for old, new in zip(model.model.layers, pruned.model.layers, strict=True)]
    sliced(family, model, expected, neurons, [x["groups"] for x in entry["layers"]], channels)
    torch.testing.assert_close(logits(pruned), logits(expected), rtol=2e-4, atol=2e-4)


def test_width_keeps_what_is_used(tmp_path: Path, text: Path) -> None:
    """Neurons, groups and channels that nothing comes out of are those that go: the model computes what it did."""
    base = build("llama", tmp_path / "base", num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    with edit_tensors(base) as tensors:
        for i, dead in enumerate((slice(0, 32), slice(64, 96))):
            tensors[f"model.layers.{i}.mlp.up_proj.weight"][dead] = 0
            tensors[f"model.layers.{i}.self_attn.v_proj.weight"][(1 + i) * 16 : (2 + i) * 16] = 0
    done = prune(base, text, tmp_path / "out", method="width", ffn=0.75, heads=0.667)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(base)), rtol=1e-4, atol=1e-4)
    assert done["quality"]["kld"]["value"] < 1e-6
    layers = json.loads((tmp_path / "out/llmc.json").read_text())["passes"][0]["layers"]
    assert [x["groups"] for x in layers] == [[0, 2], [0, 1]]


def test_neurons_come_in_multiples_of_256_where_they_can_and_it_is_said(tmp_path: Path) -> None:
    from tiny import config as tiny_config

    wide = tiny_config("llama", intermediate_size=1536)
    for share, neurons, step in ((0.75, 1280, 256), (0.95, 1472, 32), (0.1, 160, 32)):
        shape, notes = width.narrowed(wide, PruneConfig(method="width", ffn=share))
        assert shape.ffn == neurons
        assert f"multiple of {step}" in notes[0]


def test_head_counts_that_transformers_would_not_load_are_refused_before_any_work(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(UserError, match="64 channels are no multiple of 6 query heads") as e:
        prune(base, text, tmp_path / "out", method="width", heads=0.75)
    assert e.value.hint == "use --heads 0.25 or 0.5 or 1"


def test_width_refuses_families_that_it_does_not_know_by_name(tmp_path: Path, text: Path) -> None:
    base = build("gpt2", tmp_path / "base")
    with pytest.raises(UserError, match="gpt2"):
        prune(base, text, tmp_path / "out", method="width", ffn=0.75)
