"""Pruning by depth: which layers go, and what computes without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning import load, logits, prune
from tiny import FAMILIES, build, edit_tensors, tokenizer

from llmc.compress.skeleton import Skeleton
from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_reloads_with_the_logits_of_the_model_without_those_layers(family: str, tmp_path: Path, text: Path) -> None:
    """In memory the dropped layers hand their input through, and keep every other layer's number."""
    more: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
    layers = {"num_hidden_layers": 4, **({"n_layer": 4} if family == "gpt2" else {})}
    base = build(family, tmp_path / "base", **layers, **(more if family.startswith("gemma") else {}))
    done = prune(base, text, tmp_path / "out", method="depth", drop=2)
    dropped, model, tuples = done["dropped"], load(base), []
    assert len(set(dropped)) == 2
    listed: Any = model.get_submodule(Skeleton(Checkpoint.open(base), "cpu").layers_name)
    listed[0].register_forward_hook(lambda _m, _args, out: tuples.append(isinstance(out, tuple)))
    logits(model)
    for i in dropped:
        listed[i].forward = lambda states, *_args, **_kwargs: (states,) if tuples[0] else states
    pruned = load(tmp_path / "out")
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-5, atol=1e-5)
    assert pruned.config.num_hidden_layers == 2
    if kinds := getattr(pruned.config, "layer_types", None):
        assert kinds == [k for i, k in enumerate(model.config.layer_types) if i not in dropped]


def quiet_layer(folder: Path, layer: int, share: float) -> None:
    """Make what a layer adds to the stream `share` times as large."""
    with edit_tensors(folder) as tensors:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{name}.weight"] *= share


@pytest.mark.parametrize("by", ["kl", "influence"])
def test_layers_that_do_nothing_go_first(by: str, tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", num_hidden_layers=5)
    quiet_layer(base, 1, 0.02)
    quiet_layer(base, 3, 0.01)
    done = prune(base, text, tmp_path / "out", method="depth", drop=2, by=by)
    assert sorted(done["dropped"]) == [1, 3]
    assert done["quality"]["kld"]["value"] < 0.05
    assert "the loss is small" in done["advice"]


def test_kl_sees_what_influence_cannot(tmp_path: Path, text: Path) -> None:
    """Layer 1 turns the stream further, in directions that the head and every linear are blind to; layer 2 turns it less and
    matters. Influence drops 2, the measured divergence drops 1."""
    base = build("llama", tmp_path / "base", num_hidden_layers=3, tie_word_embeddings=False)
    with edit_tensors(base) as tensors:
        blind = slice(0, 16)
        for name, t in tensors.items():
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight",
                              "lm_head.weight")):
                t[:, blind] = 0
            if name.startswith("model.layers.1.") and name.endswith(("o_proj.weight", "down_proj.weight")):
                t[16:] = 0
                t[blind] *= 0.7
            if name == "model.embed_tokens.weight":
                t[:, blind] = 0
            if name.startswith("model.layers.2.") and name.endswith(("o_proj.weight", "down_proj.weight")):
                t *= 0.3
    done = {by: prune(base, text, tmp_path / by, method="depth", drop=1, by=by) for by in ("kl", "influence")}
    assert done["influence"]["dropped"] == [2]
    assert done["kl"]["dropped"] == [1]
    assert done["kl"]["quality"]["kld"]["value"] < done["influence"]["quality"]["kld"]["value"]


def test_block_influence_is_one_minus_the_mean_cosine(tmp_path: Path, text: Path) -> None:
    base = build("qwen3", tmp_path / "base", num_hidden_layers=3)
    prune(base, text, tmp_path / "out", method="depth", drop=0, by="influence", samples=4, seq_len=32)
    measured = json.loads((tmp_path / "out/llmc.json").read_text())["passes"][0]["layers"]
    from llmc.compress.prune.quality import split
    from llmc.compress.text import load_calibration

    seen, _ = split(load_calibration(str(text), tokenizer(), 4, 32).sequences, 1)
    with torch.no_grad():
        states = load(base).model(seen, output_hidden_states=True).hidden_states
        last: list[torch.Tensor] = []
        model = load(base)
        model.model.layers[2].register_forward_hook(
            lambda _m, _a, out: last.append(out[0] if isinstance(out, tuple) else out))
        model(seen)
    for i, after in enumerate([*states[1:3], last[0]]):  # the last of hidden_states is normed
        expected = 1 - float(torch.cosine_similarity(states[i], after, dim=-1).mean())
        assert measured[i]["influence"] == pytest.approx(expected, rel=0.02, abs=2e-3)  # the loop may run in bf16


def test_layers_that_depend_on_their_number_are_not_renumbered(tmp_path: Path, text: Path) -> None:
    base = build("gpt2", tmp_path / "base", num_hidden_layers=3, n_layer=3, scale_attn_by_inverse_layer_idx=True)
    with edit_tensors(base) as tensors:  # the first layer does nothing, so it goes and the others get new numbers
        for name in tensors:
            if ".h.0." in name and "c_proj" in name:
                tensors[name] *= 0.01
    with pytest.raises(UserError, match="depend on their number"):
        prune(base, text, tmp_path / "out", method="depth", drop=1)
    assert not (tmp_path / "out").exists()


def test_per_layer_lists_are_trimmed_and_rules_of_the_layers_number_spelled_out() -> None:
    from tiny import config as tiny_config

    from llmc.compress.prune.depth import shortened

    kinds = ["sliding_attention", "full_attention"] * 2
    config = tiny_config("gemma2", num_hidden_layers=4, layer_types=kinds)
    raw = {"num_hidden_layers": 4, "layer_types": None, "eos_token_id": [1, 2, 3, 4], "sliding_window_pattern": 2,
           "max_window_layers": 3, "architectures": ["A", "B", "C", "D"], "hidden_size": 64}
    assert shortened(raw, config, [1, 2]) == {
        "num_hidden_layers": 2, "layer_types": [kinds[0], kinds[3]], "eos_token_id": [1, 2, 3, 4], "max_window_layers": 1,
        "architectures": ["A", "B", "C", "D"], "hidden_size": 64}
