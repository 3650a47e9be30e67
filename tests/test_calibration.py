"""The calibration loop against a whole model in memory, on every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from killing import interrupted
from tiny import FAMILIES, build
from torch import nn
from transformers import AutoModelForCausalLM

from llmc.compress.calibration import Loop, LoopSettings, Workspace
from llmc.compress.entering import enter
from llmc.compress.layer_run import InputStatistics, add_gram, mirror_upper
from llmc.compress.passes import LayerPass
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.compress.tracing import trace_layer
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.linears import get_weight, set_weight

SEQUENCES = torch.randint(0, 512, (5, 48), generator=torch.Generator().manual_seed(1))
EXPECTED_GROUPS = {
    "llama": [3, 1, 2, 1], "mistral": [3, 1, 2, 1], "qwen2": [3, 1, 2, 1], "qwen3": [3, 1, 2, 1], "gemma2": [3, 1, 2, 1],
    "gemma3_text": [3, 1, 2, 1], "phi3": [1, 1, 1, 1], "gpt2": [1, 1, 1, 1], "opt": [3, 1, 1, 1], "gpt_neox": [1, 1, 1, 1],
}
pytestmark = pytest.mark.usefixtures("_full_precision")


def coarse(weight: torch.Tensor) -> torch.Tensor:
    """A change of weights that is easy to repeat."""
    return (weight * 8).round() / 8


class Recorder(LayerPass):
    """A pass that rounds coarsely and keeps what it was shown."""

    def __init__(self) -> None:
        self.groups: list[tuple[int, LinearGroup]] = []
        self.statistics: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        self.index = index

    def change(self, layer: nn.Module, group: LinearGroup, statistics: InputStatistics) -> None:
        assert statistics.tokens == SEQUENCES.numel()
        self.groups.append((self.index, group))
        assert statistics.drift is not None
        assert statistics.drift_hessian is not None
        self.statistics.append((statistics.hessian.clone(), statistics.drift.clone(), statistics.drift_hessian.clone()))
        for name in group.names:
            linear = layer.get_submodule(name)
            set_weight(linear, coarse(get_weight(linear)))

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {}, {"layer": index}


def stream(folder: Path, work: Path, settings: LoopSettings) -> tuple[Recorder, Loop, str]:
    skeleton = Skeleton(Checkpoint.open(folder), "cpu")
    loop = Loop(skeleton, SEQUENCES, Workspace(work, {}, resume=False), settings)
    recorder = Recorder()
    loop.run(recorder, lambda r: "")
    return recorder, loop, skeleton.layers_name


WRITERS = ("o_proj", "down_proj", "c_proj", "out_proj", "dense", "dense_4h_to_h")  # linears that end a child module


@torch.no_grad()
def whole_model(
    folder: Path, layers_name: str, groups: list[tuple[int, LinearGroup]], sequential: bool,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(Hessian, drift) from two whole models in memory, run once more for every group."""
    # transformers 4.57's default attention leaves out Gemma 2's soft cap; the spelled-out one never does
    changed, original = (AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval() for _ in range(2))

    def seen(model: nn.Module, index: int, group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """What the group sees, and the root mean square of the stream that enters its layer or leaves its first linear."""
        layer = model.get_submodule(layers_name)[index]
        caught: list[torch.Tensor] = []
        handles = [module.register_forward_pre_hook(lambda _m, args, kwargs: caught.append((args or [*kwargs.values()])[0]),
                                                    with_kwargs=True)
                   for module in (layer, layer.get_submodule(group.names[0]))]
        made: list[torch.Tensor] = []
        handles.append(layer.get_submodule(group.names[0]).register_forward_hook(lambda _m, _args, out: made.append(out)))
        model(SEQUENCES)
        for handle in handles:
            handle.remove()
        rms = caught[0].square().mean(-1).sqrt()
        if made[0].shape == caught[0].shape:
            rms = torch.maximum(rms, (caught[0] + made[0]).square().mean(-1).sqrt())
        return caught[1].reshape(-1, group.in_features), rms.view(-1, 1)

    def statistics(index: int, group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor]:
        x, rms = seen(changed, index, group)
        unchanged, _ = seen(original, index, group)
        if group.names[0].endswith(WRITERS) and "." in group.names[0]:
            x, unchanged = x / rms, unchanged / rms
        return x.t() @ x, (unchanged - x).t() @ x

    layers = changed.get_submodule(layers_name)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index in range(len(layers)):
        mine = [g for i, g in groups if i == index]
        if not sequential:
            found += [statistics(index, g) for g in mine]
        for group in mine:
            if sequential:
                found.append(statistics(index, group))
            for name in group.names:
                linear = layers[index].get_submodule(name)
                set_weight(linear, coarse(get_weight(linear)))
    return found


@pytest.mark.parametrize("sequential", [True, False], ids=["true-sequential", "one-pass"])
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_those_of_the_whole_model(family: str, sequential: bool, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "model")
    settings = LoopSettings(batch=2, true_sequential=sequential, reference=5, workers=2)
    recorder, _, layers_name = stream(folder, tmp_path / "work", settings)
    first_layer = [g for i, g in recorder.groups if i == 0]
    assert [len(g.names) for g in first_layer] == EXPECTED_GROUPS[family]
    expected = whole_model(folder, layers_name, recorder.groups, sequential)
    for ours, theirs in zip(recorder.statistics, expected, strict=True):
        size = float(theirs[0].diagonal().mean())
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3 * size)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-3 * size)


def test_a_partial_reference_gives_the_statistics_of_its_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The recording pass changes weights alike whatever it is shown: four sequences alone can stand for four of five."""
    folder = build("llama", tmp_path / "model")
    part, _, _ = stream(folder, tmp_path / "part", LoopSettings(batch=2, reference=4))
    monkeypatch.setattr("test_calibration.SEQUENCES", SEQUENCES[:4])
    four, _, _ = stream(folder, tmp_path / "four", LoopSettings(batch=2, reference=4))
    for ours, alone in zip(part.statistics, four.statistics, strict=True):
        assert torch.equal(ours[1], alone[1])
        assert torch.equal(ours[2], alone[0])
        assert not torch.equal(ours[0], ours[2])


@pytest.mark.parametrize("reference", [1, 5])  # the second worker has no reference, has one
def test_workers_change_nothing_but_the_order_of_sums(reference: int, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model")
    alone, one, _ = stream(folder, tmp_path / "alone", LoopSettings(batch=1, reference=reference))
    shared, many, _ = stream(folder, tmp_path / "shared", LoopSettings(batch=1, reference=reference, workers=3))
    again, _, _ = stream(folder, tmp_path / "again", LoopSettings(batch=1, reference=reference, workers=3))
    for ours, theirs, twice in zip(shared.statistics, alone.statistics, again.statistics, strict=True):
        for a, b, c in zip(ours, theirs, twice, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(theirs[0].diagonal().mean()))
            assert torch.equal(a, c)
    torch.testing.assert_close(many.streams.stores[0].read(0, 5), one.streams.stores[0].read(0, 5))


def test_no_linear_runs_twice_on_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build("llama", tmp_path / "model")
    counts: dict[int, int] = {}
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 1:  # not the trace, which runs one sequence
            counts[id(self)] = counts.get(id(self), 0) + 1
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    stream(folder, tmp_path / "work", LoopSettings(batch=5, reference=5))
    # once for the reference, once for the stages after it; o_proj feeds three of these
    assert sorted(counts.values()) == sorted([2, 2, 2, 4, 2, 2, 2] * 2)


def test_norms_are_idle_where_the_part_they_feed_is_replaced(tmp_path: Path) -> None:
    expected = {"llama": {"self_attn": ("input_layernorm",), "mlp": ("post_attention_layernorm",)},
                "gemma2": {"mlp": ("pre_feedforward_layernorm",)},  # its attention returns its weights too
                "gpt_neox": {"attention": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}}
    for family, feeders in expected.items():
        skeleton = Skeleton(Checkpoint.open(build(family, tmp_path / family)), "cpu")
        entered = enter(skeleton, iter([SEQUENCES[:1]]), SEQUENCES.shape[1])
        (states,) = entered.states
        with skeleton.layer(0) as layer:
            trace = trace_layer(layer, states, lambda found=entered: found.layers[0].call(0, 1))
        assert {name: ending.feeders for name, ending in trace.endings.items()} == feeders


def test_gram_and_mirror_equal_the_full_product() -> None:
    x = torch.randn(700, 600)
    h = torch.zeros(600, 600)
    add_gram(h, x[:300])
    add_gram(h, x[300:])
    mirror_upper(h)
    torch.testing.assert_close(h, x.t() @ x, rtol=1e-4, atol=1e-2)
    assert torch.equal(h, h.t())


def test_weights_are_freed_and_the_scratch_files_gone(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model")
    _, loop, _ = stream(folder, tmp_path / "work", LoopSettings(reference=5))
    assert all(p.is_meta for p in loop.skeleton.model.parameters())
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == [
        "fingerprint.json", "hidden.a.f32", "hidden.b.f32", "hidden.c.f32", "layers", "reference.a.f32", "reference.b.f32",
        "reference.c.f32", "state.json"]


def test_a_run_stopped_at_any_layer_goes_on_from_durable_states(tmp_path: Path) -> None:
    """The states named by state.json are those that enter the layer it names, whichever layer was interrupted."""
    folder = build("llama", tmp_path / "model", num_hidden_layers=5)
    whole, _, _ = stream(folder, tmp_path / "whole", LoopSettings(batch=2, reference=3))

    for last in range(1, 5):
        work = tmp_path / f"stopped-{last}"
        settings = LoopSettings(batch=2, reference=3)
        with interrupted(Recorder, "finish", layer=last):
            Loop(Skeleton(Checkpoint.open(folder), "cpu"), SEQUENCES, Workspace(work, {}, resume=False), settings).run(
                Recorder(), lambda r: "")
        again = Workspace(work, {}, resume=True)
        assert again.done == last  # nothing finished is lost
        recorder = Recorder()
        Loop(Skeleton(Checkpoint.open(folder), "cpu"), SEQUENCES, again, settings).run(recorder, lambda r: "")
        expected = [s for (i, _), s in zip(whole.groups, whole.statistics, strict=True) if i >= last]
        for ours, theirs in zip(recorder.statistics, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
