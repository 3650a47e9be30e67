"""Architectures with layers of several kinds, with arguments beside hidden states, and with weights that no call uses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import DENSE, MIXED, build
from killing import interrupted
from test_calibration import Recorder, coarse, stream
from tiny import divergence, tokenizer
from transformers.utils import ModelOutput

import llmc
from llmc import precision
from llmc.compress import forward, layer_run, tracing
from llmc.compress.calibration import Loop, LoopSettings, Workspace
from llmc.compress.coverage import cover
from llmc.compress.entering import enter
from llmc.compress.passes import LayerPass
from llmc.compress.quantize.sensitivity import Probe
from llmc.compress.sampling import sample_from_model
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.compress.tracing import states_of, trace_layer
from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.linears import find_layers, get_weight, set_weight

IDS = torch.randint(0, 512, (5, 48), generator=torch.Generator().manual_seed(1))
GEMMA = ("gemma3n_text", "gemma4_text")  # their layers read the tokens, and keys of earlier layers
pytestmark = pytest.mark.usefixtures("_full_precision")


@torch.no_grad()
def last_states(model: Any) -> torch.Tensor:
    """What the last layer of a whole model returns."""
    seen: list[torch.Tensor] = []
    handle = find_layers(model)[1][-1].register_forward_hook(lambda _m, _args, out: seen.append(states_of(out)))
    model(IDS, use_cache=False)
    handle.remove()
    return seen[0]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model of an architecture. Read only."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = build(kind, tmp_path_factory.mktemp(kind) / "m")
        return made[kind]

    return get


@pytest.mark.parametrize("kind", [*DENSE, *MIXED])
def test_layer_by_layer_is_the_whole_model(kind: str, folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "sequences_at_once", lambda *_: 2)  # batches of 2, 2, 1
    ran = forward.run(folder(kind), IDS, "cpu", None, "the model")
    assert distance(ran.states, last_states(load_torch_model(folder(kind))).movedim(ran.axis, 0)) < 5e-6


@pytest.mark.parametrize("kind", [*DENSE, "jamba", "zaya"])
def test_gptq_takes_every_matrix_and_loses_less_than_rounding(kind: str, folder: Any, text: Path, tmp_path: Path) -> None:
    base = folder(kind)
    done = llmc.quantize(base, calibration=str(text), samples=16, seq_len=64, threads=2, out=tmp_path / "gptq")
    llmc.quantize(base, method="rtn", threads=2, out=tmp_path / "rtn")
    assert done["fallbacks"] == 0
    assert done["events"] == 0 or kind in MIXED  # experts that few tokens reach
    entry = json.loads((tmp_path / "gptq" / "llmc.json").read_text())["passes"][0]
    quantized = {f"{layer['layer']}.{name}" for layer in entry["layers"] for name in layer["linears"]}
    skeleton = Skeleton(Checkpoint.open(base), "cpu")
    found = cover(skeleton)
    assert not found.unknown
    kept = {name for why, group in entry["floats"].items() if why.startswith("linears") for name in group["names"]}
    for name in found.linears:
        number, _, path = name.removeprefix(f"{skeleton.layers_name}.").partition(".")
        assert (f"{number}.{path}" in quantized) != (f"{skeleton.layers_name}.*.{path}.weight" in kept), name
    assert divergence(tmp_path / "gptq", base) < divergence(tmp_path / "rtn", base)


def test_sizes_are_those_of_the_largest_layer(folder: Any) -> None:
    """Layers of nemotron_h are a Mamba, an MLP or an attention."""
    skeleton = Skeleton(Checkpoint.open(folder("nemotron_h")), "cpu")
    sizes = [sum(get_weight(m).numel() for m in skeleton.linears(i).values()) for i in range(len(skeleton.layers))]
    assert skeleton.layer_weights == max(sizes) > sizes[2]
    assert skeleton.widths == [64, 128]


def test_layers_that_share_weights_are_refused(folder: Any) -> None:
    with pytest.raises(UserError, match=r"share weights \(model.layers.3.shared_transformer.* is model.layers.1"):
        Skeleton(Checkpoint.open(folder("zamba2")), "cpu")


@pytest.mark.parametrize("kind", [*GEMMA, "mamba", "falcon_h1"])
def test_a_layer_sees_what_the_changed_layers_before_it_make(kind: str, folder: Any, tmp_path: Path) -> None:
    """The loop's last states are those of the whole model with the changed weights, also of the shared keys."""
    recorder, loop, name = stream(folder(kind), tmp_path, LoopSettings(batch=2, reference=5, workers=2))
    model = load_torch_model(folder(kind))
    layers: Any = model.get_submodule(name)
    before = last_states(model)
    for index, group in recorder.groups:
        for linear in (layers[index].get_submodule(n) for n in group.names):
            set_weight(linear, coarse(get_weight(linear)))
    store, reference = loop.streams.stores
    assert distance(store.read(0, 5), last_states(model)) < 5e-6
    assert distance(reference.read(0, 5), before) < 5e-6
    assert distance(before, last_states(model)) > 0.01


@pytest.mark.parametrize("kind", GEMMA)
def test_a_stopped_run_goes_on_with_what_layers_handed_on(kind: str, folder: Any, tmp_path: Path) -> None:
    settings = LoopSettings(batch=2, reference=3)
    whole, _, _ = stream(folder(kind), tmp_path / "whole", settings)

    def loop(work: Workspace) -> Loop:
        return Loop(Skeleton(Checkpoint.open(folder(kind)), "cpu"), IDS, work, settings)

    for last in (1, 3, 4):  # layer 3 is the first one that reads the keys of another layer
        work = Workspace(tmp_path / f"stopped-{last}", {}, resume=False)
        with interrupted(Recorder, "finish", layer=last):
            loop(work).run(Recorder(), lambda r: "")
        again, recorder = Workspace(work.folder, {}, resume=True), Recorder()
        assert again.done == last
        loop(again).run(recorder, lambda r: "")
        expected = [s for (i, _), s in zip(whole.groups, whole.statistics, strict=True) if i >= last]
        assert len(expected) == len(recorder.statistics)
        for ours, theirs in zip(recorder.statistics, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert not list(work.folder.glob("*.bin"))  # nothing is left when the last layer has run


@pytest.mark.parametrize("pattern", ["given.*.bin", "hidden.carried.*.bin"])
def test_damaged_files_of_a_stopped_run_are_refused(pattern: str, folder: Any, tmp_path: Path) -> None:
    def loop(work: Workspace) -> Loop:
        return Loop(Skeleton(Checkpoint.open(folder("gemma4_text")), "cpu"), IDS, work, LoopSettings(batch=2, reference=3))

    with interrupted(Recorder, "finish", layer=3):
        loop(Workspace(tmp_path, {}, resume=False)).run(Recorder(), lambda r: "")
    file = max(tmp_path.glob(pattern))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"hidden states in .* are damaged"):
        loop(Workspace(tmp_path, {}, resume=True))


def test_the_input_of_a_weight_that_is_used_without_a_call(folder: Any) -> None:
    """Mamba multiplies with dt_proj's weight. Its input is a part of x_proj's output."""
    skeleton = Skeleton(Checkpoint.open(folder("mamba")), "cpu")
    entered = enter(skeleton, iter([IDS[:1]]), IDS.shape[1])
    (states,) = entered.states
    with skeleton.layer(0) as layer:
        trace = trace_layer(layer, states, lambda: entered.layers[0].call(0, 1))
    assert trace.direct == {"mixer.dt_proj"}
    assert [g.names for g in trace.groups] == [("mixer.in_proj",), ("mixer.x_proj",), ("mixer.dt_proj",), ("mixer.out_proj",)]


class Inputs(LayerPass):
    """Keeps the Hessians and changes nothing."""

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def begin(self, index: int, layer: Any, groups: list[LinearGroup]) -> None:
        self.index = index

    def change(self, layer: Any, group: LinearGroup, statistics: Any) -> None:
        self.seen[f"{self.index}.{group.names[0]}"] = statistics.hessian.clone()

    def finish(self, index: int, layer: Any) -> Any:
        return {}, {"layer": index}


def test_statistics_of_a_weight_that_is_used_without_a_call(folder: Any, tmp_path: Path) -> None:
    skeleton, seen = Skeleton(Checkpoint.open(folder("mamba")), "cpu"), Inputs()
    Loop(skeleton, IDS, Workspace(tmp_path, {}, resume=False), LoopSettings(batch=2, workers=2)).run(seen)
    model = load_torch_model(folder("mamba"))
    mixer = find_layers(model)[1][1].mixer
    parts: list[torch.Tensor] = []
    mixer.x_proj.register_forward_hook(lambda _m, _args, out: parts.append(out[..., :32].reshape(-1, 32)))
    with torch.no_grad():
        model(IDS, use_cache=False)
    torch.testing.assert_close(seen.seen["1.mixer.dt_proj"], parts[0].t() @ parts[0], rtol=1e-4, atol=1e-3)


def test_a_weight_whose_use_is_not_understood_is_rounded_and_named(
    folder: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "PRODUCTS", ())
    done = llmc.quantize(folder("mamba"), calibration=str(text), samples=16, seq_len=32, threads=2, out=tmp_path / "q")
    assert done["fallbacks"] == done["events"] == 3  # in each layer
    layers = json.loads((tmp_path / "q" / "llmc.json").read_text())["passes"][0]["layers"]
    for layer in layers:
        assert layer["linears"]["mixer.dt_proj"]["method"] == "rtn"
        assert layer["events"] == ["mixer.dt_proj: not seen on the calibration text, so changed without statistics"]


@pytest.mark.parametrize("kind", ["bamba", "rwkv", "mamba"])
def test_layers_of_any_kind_can_be_removed(kind: str, folder: Any, text: Path, tmp_path: Path) -> None:
    """Bamba's config.json has a list of the numbers of its attention layers."""
    for by in ("kl", "influence"):
        done = llmc.prune(folder(kind), method="depth", drop=1, by=by, calibration=str(text), samples=12, seq_len=32,
                          out=tmp_path / by)
        assert done["proof"] == 0.0


@pytest.mark.parametrize(("kind", "given"), [("gemma4_text", "0 (per_layer_input, shared_kv_states)"),
                                             ("zaya", "1 (prev_router_hidden_states)")])
def test_layers_that_depend_on_others_cannot_be_removed(
    kind: str, given: str, folder: Any, text: Path, tmp_path: Path,
) -> None:
    for by in ("kl", "influence"):
        with pytest.raises(UserError, match=rf"can be removed: .* model.layers.{re.escape(given)}"):
            llmc.prune(folder(kind), method="depth", drop=1, by=by, calibration=str(text), samples=12, seq_len=32,
                       out=tmp_path / by)


@pytest.mark.parametrize("kind", ["gemma4_text", "zaya", "bamba"])
def test_a_model_runs_on_from_recorded_layers(kind: str, folder: Any) -> None:
    """Also where later layers read what the recorded ones put into a container."""
    model = load_torch_model(folder(kind))
    probe = Probe(model, find_layers(model)[0], IDS[:1])
    assert all(abs(probe.divergence(first)) < 1e-9 for first in range(probe.count + 1))


class Forgetful(torch.nn.Module):
    """A model whose cache cannot be used."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return ModelOutput(logits=self.model(input_ids=input_ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["bloom", "mamba", "mamba2", "rwkv", "openai-gpt", "recurrent_gemma"])
def test_text_is_sampled_with_whatever_cache_there_is(kind: str, folder: Any) -> None:
    model = load_torch_model(folder(kind))
    found = sample_from_model(model, tokenizer(), 2, 12, seed=0, batch=2)
    assert torch.equal(found, sample_from_model(Forgetful(model), tokenizer(), 2, 12, seed=0, batch=2))


@pytest.fixture
def _bf16(_full_precision: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (precision, layer_run):
        monkeypatch.setattr(module, "matmul_precision", lambda: "bf16")


@pytest.mark.usefixtures("_bf16")
@pytest.mark.parametrize("kind", [*GEMMA, "mamba"])
def test_kept_values_have_the_type_that_the_layer_sees(kind: str, folder: Any, tmp_path: Path) -> None:
    """Keys that are made under autocast are read by another layer, there and in the float32 run that traces it."""
    _, loop, _ = stream(folder(kind), tmp_path, LoopSettings(batch=2, reference=2))
    _, reference = loop.streams.stores
    assert distance(reference.read(0, 2), last_states(load_torch_model(folder(kind))).narrow(reference.axis, 0, 2)) < 0.1


@pytest.mark.usefixtures("_bf16")
def test_code_that_does_not_mix_with_bf16_runs_in_float32(folder: Any, tmp_path: Path, capsys: Any) -> None:
    """DBRX adds up its experts with index_add_, which wants one type."""
    layer_run._say_slow.cache_clear()
    _, loop, _ = stream(folder("dbrx"), tmp_path, LoopSettings(batch=2, reference=4))
    assert "layers of the kind DbrxBlock run in float32" in capsys.readouterr().err
    reference = loop.streams.stores[1]
    assert distance(reference.read(0, 4), last_states(load_torch_model(folder("dbrx")))[:4]) < 0.1


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text", "mamba", "openai-gpt"])
def test_blocks_are_healed(kind: str, folder: Any, text: Path, tmp_path: Path) -> None:
    llmc.quantize(folder(kind), method="rtn", threads=2, out=tmp_path / "q")
    done = llmc.heal(tmp_path / "q", teacher=str(folder(kind)), scope="block", calibration=(str(text),), steps=4, seq_len=32,
                     batch=2, threads=2, out=tmp_path / "healed")
    assert done["error"]["after"] <= done["error"]["before"]
