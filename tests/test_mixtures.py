"""Mixtures of experts: experts as linears compute what transformers computes, and a pass sees each with its own tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
from killing import interrupted, resumed
from mixtures import MIXTURES, STACKED
from safetensors.torch import load_file
from tiny import divergence, write_text
from torch import nn

import llmc
from llmc.cli import run as run_command
from llmc.compress.calibration import Loop, LoopSettings, Workspace
from llmc.compress.coverage import cover
from llmc.compress.expected import expected
from llmc.compress.layer_run import InputStatistics
from llmc.compress.mixture_run import SAMPLE, STRENGTH
from llmc.compress.passes import LayerPass
from llmc.compress.quantize.layer_pass import QuantizePass
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.compress.tracing import states_of
from llmc.export.reference import reference_logits
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.linears import get_weight, set_weight
from llmc.formats.mixture import is_fused, unfuse

IDS = torch.randint(0, 512, (4, 48), generator=torch.Generator().manual_seed(1))
KINDS = sorted(MIXTURES)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the kind that the test asks for."""
    return mixtures.build(request.param, tmp_path_factory.mktemp(request.param) / "m")


def of_kinds(*kinds: str) -> Any:
    return pytest.mark.parametrize("folder", kinds or KINDS, indirect=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("text") / "text.txt"))


# --------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_experts_as_linears_compute_the_same(kind: str) -> None:
    model = mixtures.model(kind)
    stacked = {n for n, m in model.named_modules() if is_fused(m)}
    before = model(IDS).logits
    replaced = unfuse(model, lambda name: ("gate_proj", "up_proj") if name.endswith("gate_up_proj") and kind == "qwen3_moe"
                      else (name.rpartition(".")[2],))
    assert set(replaced) == stacked
    assert len(stacked) >= 1
    assert not [n for n, p in model.named_parameters() if p.ndim == 3 and "conv1d" not in n and ".conv." not in n]
    assert torch.allclose(model(IDS).logits, before, rtol=1e-4, atol=1e-4)


class Watching(LayerPass):
    """Keeps what it is shown, and rounds coarsely if asked."""

    def __init__(self, rounds: bool = False) -> None:
        self.rounds, self.seen = rounds, dict[tuple[int, str], InputStatistics]()

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        self.index, self.expected = index, {n for g in groups for n in g.names}

    def change(self, layer: nn.Module, group: LinearGroup, statistics: InputStatistics | None) -> None:
        assert statistics is not None
        for name in group.names:
            self.seen[self.index, name] = statistics
            linear = layer.get_submodule(name)
            if self.rounds:
                set_weight(linear, (get_weight(linear) * 8).round() / 8)

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        assert {n for i, n in self.seen if i == index} == self.expected
        return {}, {"layer": index}


def run(folder: Path, work: Path, rounds: bool = False) -> tuple[Watching, Loop]:
    """Run a pass over the texts IDS. Returns the pass and the loop, which has the states after the last layer."""
    loop = Loop(Skeleton(Checkpoint.open(folder), "cpu"), IDS, Workspace(work, {}, resume=False), LoopSettings(batch=3))
    watching = Watching(rounds)
    loop.run(watching)
    return watching, loop


@torch.no_grad()
def leaving(model: Any, prefix: str, count: int) -> torch.Tensor:
    """The output of a model's last layer on IDS."""
    caught: list[torch.Tensor] = []
    model.get_submodule(f"{prefix}.{count - 1}").register_forward_hook(lambda _m, _a, out: caught.append(states_of(out)))
    model(IDS, use_cache=False)
    return caught[0]


@of_kinds()
@pytest.mark.usefixtures("_full_precision")
def test_layer_by_layer_is_the_whole_model(folder: Path, tmp_path: Path) -> None:
    """Names in the files, renamed, stacked or one by one; experts that run one after another over all tokens."""
    watching, loop = run(folder, tmp_path / "w")
    skeleton = loop.skeleton
    expected = leaving(load_torch_model(folder), skeleton.layers_name, len(skeleton.layers))
    assert torch.allclose(loop.streams.stores[0].read(0, len(IDS)), expected, rtol=1e-4, atol=1e-4)
    found = cover(skeleton)
    assert not found.unknown
    assert {n for _, n in watching.seen if ".experts." in f".{n}"}
    assert not [p.name for p in found.float_matrices() if ".experts." in p.name and "bias" not in p.name]


@of_kinds("qwen3_moe", "gpt_oss", "granitemoe", "nemotron_h")
@pytest.mark.usefixtures("_full_precision")
def test_changed_experts_are_seen_by_later_layers(folder: Path, tmp_path: Path) -> None:
    _, loop = run(folder, tmp_path / "w", rounds=True)
    skeleton, model = loop.skeleton, load_torch_model(folder)
    unfuse(model, skeleton.names.leaves)
    for index in range(len(skeleton.layers)):
        for name in skeleton.linears(index):
            if (linear := model.get_submodule(f"{skeleton.layer_name(index)}.{name}")) is not None:
                set_weight(linear, (get_weight(linear) * 8).round() / 8)
    expected = leaving(model, skeleton.layers_name, len(skeleton.layers))
    assert torch.allclose(loop.streams.stores[0].read(0, len(IDS)), expected, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- statistics


@of_kinds("qwen3_moe")
@pytest.mark.usefixtures("_full_precision")
@torch.no_grad()
def test_an_expert_sees_its_tokens_with_their_weights(folder: Path, tmp_path: Path) -> None:
    """Against the whole model: sums over the routed tokens by their weights, and the share of the layer's."""
    watching, _ = run(folder, tmp_path / "w")
    model = load_torch_model(folder)
    caught: list[Any] = []
    layer, moe = model.model.layers[0], model.model.layers[0].mlp.experts
    layer.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    moe.register_forward_pre_hook(lambda _m, args: caught.extend(args))
    model(IDS)
    stream, x, index, weights = caught[0].reshape(-1, 64), *caught[1:4]
    assert len(x) == IDS.numel() <= SAMPLE
    for expert in range(8):
        tokens, slots = torch.where(index == expert)
        by = weights[tokens, slots]
        typical = float(by.square().mean().sqrt())

        def hessian(rows: torch.Tensor, scale: torch.Tensor, every: torch.Tensor, every_scale: torch.Tensor) -> torch.Tensor:
            own, layer = rows * scale[:, None], every * every_scale[:, None]
            return own.t() @ own + STRENGTH * rows.shape[1] / len(every) * layer.t() @ layer

        seen = watching.seen[0, f"mlp.experts.{expert}.gate_proj"]
        assert seen.tokens == len(tokens)
        assert seen is watching.seen[0, f"mlp.experts.{expert}.up_proj"]
        torch.testing.assert_close(seen.hessian, hessian(x[tokens], by, x, torch.full((len(x),), typical)),
                                   rtol=1e-3, atol=1e-3)
        gate, up = nn.functional.linear(x, moe.gate_up_proj[expert]).chunk(2, -1)
        inner = moe.act_fn(gate) * up
        out = inner @ moe.down_proj[expert].t()

        def scaled(rows: torch.Tensor, share: torch.Tensor, out: torch.Tensor = out) -> torch.Tensor:
            norms = torch.maximum(stream[rows].norm(dim=1), (stream[rows] + out[rows] * share[:, None]).norm(dim=1))
            return share / (norms / 8)

        every = torch.arange(len(x))
        expected = hessian(inner[tokens], scaled(tokens, by), inner, scaled(every, torch.full((len(x),), typical)))
        last = watching.seen[0, f"mlp.experts.{expert}.down_proj"]
        torch.testing.assert_close(last.hessian, expected, rtol=1e-3, atol=1e-3 * float(expected.diagonal().mean()))


def test_an_expert_without_tokens_leans_on_its_layer(tmp_path: Path, text: str) -> None:
    """And the report says so: GPTQ rounds it with the statistics of all tokens."""
    folder = mixtures.build("qwen3_moe", tmp_path / "m")
    model = load_torch_model(folder)
    gate = model.model.layers[1].mlp.gate.weight.data
    gate[1], gate[4] = gate[0].clone(), gate[2].clone()
    gate[3] = (gate[0] + gate[2]) / 2  # two others are always larger
    model.save_pretrained(folder)
    llmc.quantize(folder, calibration=text, samples=4, seq_len=32, out=tmp_path / "q")
    entry = json.loads((tmp_path / "q" / "llmc.json").read_text())["passes"][0]
    layer = entry["layers"][1]
    seen = layer["experts"]["mlp.experts"]
    assert seen["tokens"][3] == 0
    assert sum(seen["tokens"]) == 4 * 32 * 2
    assert seen["unseen"] >= 1
    assert any("expert 3 of layer 1 saw 0 tokens, 0.0 per column" in event for event in layer["events"])
    for name in ("gate_proj", "down_proj"):
        record = layer["linears"][f"mlp.experts.3.{name}"]
        assert record["method"] == "gptq"
        assert record["tokens_per_column"] == 0
        assert 0 < record["error"] < 0.05


# ------------------------------------------------------------------------------------------------------ folders


@of_kinds("qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "nemotron_h")
def test_a_quantized_folder_is_read_back_by_every_way(folder: Path, tmp_path: Path, text: str) -> None:
    """The whole model, layer by layer, and expert by expert give the same logits; no expert is left as a float."""
    errors = {}
    for method in ("rtn", "gptq"):
        out = tmp_path / method
        given = {"calibration": text, "samples": 24, "seq_len": 64} if method == "gptq" else {}
        llmc.quantize(folder, method=method, out=out, **given)
        errors[method] = divergence(out, folder)
    assert errors["gptq"] < errors["rtn"]
    stored = load_file(out / "model.safetensors")
    assert not [n for n, t in stored.items() if t.ndim == 3 and "conv1d" not in n]
    model = load_torch_model(out)
    ends = {"embedding": model.get_input_embeddings().weight.data, "head": model.get_output_embeddings().weight.data}
    with torch.no_grad():
        whole = model(IDS[:1]).logits[0]
    parts = torch.from_numpy(reference_logits(Checkpoint.open(out), IDS[0].numpy(), ends))
    assert float((parts - whole).abs().max() / whole.abs().max()) < 1e-5


@of_kinds("qwen3_moe", *STACKED[:2], "gpt_oss")
def test_masks_of_experts_keep_the_form_of_the_folder(folder: Path, tmp_path: Path, text: str) -> None:
    result = llmc.prune(folder, method="sparsegpt", sparsity=0.5, calibration=text, samples=24, seq_len=64,
                        out=tmp_path / "p")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "p"))
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert result["sparsity"] == pytest.approx(0.5, abs=0.01)
    experts = [t for n, t in after.items() if ("expert" in n or "put_linear" in n) and "bias" not in n]
    assert experts
    assert all(float((t == 0).double().mean()) == pytest.approx(0.5, abs=0.02) for t in experts)


@of_kinds("granitemoe")
def test_an_interrupted_run_continues_to_the_same_bytes(folder: Path, tmp_path: Path, text: str) -> None:
    def make(out: Path, resume: bool = False) -> Any:
        return llmc.quantize(folder, calibration=text, samples=8, seq_len=64, out=out, resume=resume)

    resumed(make, tmp_path, interrupted(QuantizePass, "finish", layer=1))


@of_kinds("qwen3_moe", "granitemoe")
def test_the_plan_says_what_a_token_reads(folder: Path, tmp_path: Path) -> None:
    """2 of 8 experts; the same as `inspect` says of the folder, which counts its own names."""
    plan = llmc.quantize(folder, method="rtn", dry_run=True)
    llmc.quantize(folder, method="rtn", out=tmp_path / "q")
    weights = llmc.inspect(tmp_path / "q")["weights"]
    assert plan["token_bytes"] == pytest.approx(weights["token_bytes"], rel=0.05)  # but for the order and zeros of GPTQ
    assert plan["token_bytes"] < plan["out_bytes"] * 0.8


# ------------------------------------------------------------------------------------------------- what text gives to experts


@of_kinds()
def test_config_says_how_many_experts_a_token_takes(folder: Path) -> None:
    """The plan's mean needs this number: it is that of the model's own code."""
    skeleton, taken = Skeleton(Checkpoint.open(folder), "cpu"), set[int]()
    model = load_torch_model(folder)
    for module in model.modules():
        if is_fused(module):
            module.register_forward_pre_hook(lambda _m, args: taken.add(args[1].shape[1] if len(args) > 1 else 1))
    model(IDS[:1])
    found = expected(skeleton, 1000)
    assert found is not None
    assert taken == {found["chosen"]}
    assert found["experts"] == 8


@of_kinds("qwen3_moe")
def test_plan_and_run_say_what_experts_see_on_average(folder: Path, tmp_path: Path, text: str,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    few: dict[str, Any] = {"calibration": text, "samples": 4, "seq_len": 32}
    seen = {"tokens": 128, "experts": 8, "chosen": 2, "columns": 64, "tokens_per_expert": 32, "tokens_per_column": 0.5,
            "tokens_for_one": 256}
    assert llmc.quantize(folder, **few, dry_run=True)["experts"] == seen
    assert llmc.imatrix(folder, **few, dry_run=True)["experts"] == seen
    assert llmc.prune(folder, method="wanda", sparsity=0.5, **{**few, "samples": 5}, dry_run=True)["experts"] == seen
    assert llmc.quantize(folder, method="rtn", dry_run=True)["experts"] is None
    assert llmc.quantize(folder, **few, keep="experts", dry_run=True)["experts"] is None
    llmc.quantize(folder, **few, out=tmp_path / "q")
    told = " ".join(capsys.readouterr().err.split())
    assert "128 tokens reach 2 of 8 experts each: on average 32 tokens an expert, 0.5 per column of 64" in told
    assert "1 per column takes 256 tokens: --samples 8" in told
    counted = json.loads((tmp_path / "q" / "llmc.json").read_text())["passes"][0]["layers"][0]["experts"]["mlp.experts"]
    assert sum(counted["tokens"]) / 8 == seen["tokens_per_expert"]
    options = ["--calibration", text, "--samples", "8", "--seq-len", "32", "--dry-run"]
    assert run_command(["quantize", str(folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "256 tokens reach 2 of 8 experts each: on average 64 tokens an expert, 1 per column of 64\n" in printed
