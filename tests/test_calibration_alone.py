"""The calibration loop without data: every linear is come to once, nothing runs, and a stopped run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, build
from torch import nn

from llmc.compress.calibration import Loop, LoopSettings, Workspace, settings_for
from llmc.compress.layer_run import InputStatistics
from llmc.compress.passes import LayerPass, LayerWatch
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.linears import get_weight, set_weight


class Doubling(LayerPass):
    """Doubles every linear, and notes what it was shown."""

    def __init__(self, last: int = -1) -> None:
        self.seen: list[tuple[int, str]] = []
        self.last = last

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        self.index, self.expected = index, list(groups)

    def change(self, layer: nn.Module, group: LinearGroup, statistics: InputStatistics | None) -> None:
        assert statistics is None
        assert group == self.expected.pop(0)
        (name,) = group.names
        linear = layer.get_submodule(name)
        assert get_weight(linear).shape[1] == group.in_features
        set_weight(linear, 2 * get_weight(linear))
        self.seen.append((self.index, name))

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        if index == self.last:
            raise KeyboardInterrupt
        assert not self.expected
        return {n: p.data.clone() for n, p in layer.named_parameters()}, {"layer": index}


def opened(folder: Path) -> Skeleton:
    return Skeleton(Checkpoint.open(folder), "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_linear_once_in_the_order_of_the_model(family: str, tmp_path: Path) -> None:
    skeleton = opened(build(family, tmp_path / "model"))
    pass_, work = Doubling(), Workspace(tmp_path / "work", {}, resume=False)
    loop = Loop(skeleton, None, work, settings_for(skeleton, None))
    for layer in skeleton.layers:  # no layer may run
        layer.forward = None  # type: ignore[assignment]
    loop.run(pass_)
    assert pass_.seen == [(i, n) for i in range(len(skeleton.layers)) for n in skeleton.linears(i)]
    assert work.done == len(skeleton.layers)
    assert all(p.is_meta for p in skeleton.model.parameters())
    assert sorted(p.name for p in work.folder.iterdir()) == ["fingerprint.json", "layers", "state.json"]  # no states


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model", num_hidden_layers=4)
    for last in range(4):
        stopped = Workspace(tmp_path / f"stopped-{last}", {}, resume=False)
        with pytest.raises(KeyboardInterrupt):
            Loop(opened(folder), None, stopped, LoopSettings()).run(Doubling(last))
        again, rest = Workspace(stopped.folder, {}, resume=True), Doubling()
        assert again.done == last
        Loop(opened(folder), None, again, LoopSettings()).run(rest)
        assert {i for i, _ in rest.seen} == set(range(last, 4))
        assert [r["layer"] for r in again.records()] == [0, 1, 2, 3]


def test_a_pass_must_have_every_method() -> None:
    class Half(LayerPass):
        def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
            return {}, {}

    for kind in (LayerPass, LayerWatch, Half):
        with pytest.raises(TypeError, match="abstract"):
            kind()
