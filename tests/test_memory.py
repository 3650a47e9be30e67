"""Plans of memory: sums of stated terms that grow with the model, compared with what torch really allocates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizing import problem

import llmc
from llmc.compress import memory as plans
from llmc.compress.heal.memory import _codes
from llmc.compress.memory import Group, Running, Sizes
from llmc.compress.prune.mask_pass import damped, reconstruct, sweep
from llmc.compress.quantize.gptq import compensate, gptq
from llmc.compress.quantize.memory import BOOK, _factors, measuring
from llmc.compress.skeleton import Skeleton
from llmc.compress.teaching import memory as teaching
from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.types import BLOCK_TYPES, AnyType, BlockType, IntegerType
from llmc.memory import PROCESS, Memory, Step
from llmc.rounding.rtn import rtn

widths = st.integers(1, 64).map(lambda n: 32 * n)
groups = st.builds(Group, widths, st.lists(widths, min_size=1, max_size=3).map(tuple))


def allocated(work: Callable[[], Any]) -> int:
    """The largest number of bytes that torch's allocator held at once for what `work` made."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as found:
        work()
    assert found.profiler is not None
    events = found.profiler.kineto_results.events()
    held = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        most = max(most, held)
    return most


# ------------------------------------------------------------------------------------------------------------ the sums


@given(st.lists(st.builds(Step, st.text(), st.dictionaries(st.text(), st.integers(0, 1 << 40), max_size=4),
                          st.integers(0, 1 << 40)), min_size=1, max_size=4))
def test_a_plan_is_the_sum_of_the_terms_of_its_largest_step(steps: list[Step]) -> None:
    plan = Memory(steps).plan()
    shown = {k: v for k, v in plan["memory"].items() if k != "step"}
    assert plan["memory_bytes"] == max(sum(s.terms.values()) + s.once for s in steps)
    assert plan["memory_bytes"] in {sum(shown.values()), *(s.peak for s in steps)}


@settings(max_examples=200, deadline=None)
@given(groups, widths, st.sampled_from([(32, 1, 32), (128, 1, 128), (256, 2, 32)]))
def test_the_matrices_of_a_layer_need_more_if_the_layer_is_larger(g: Group, more: int, factors: tuple[int, int, int]) -> None:
    wider, taller = Group(g.width + more, g.outs), Group(g.width, (*g.outs, more))
    for work in (lambda x: plans.gptq_work(x, *factors), plans.sparsegpt_work, lambda x: plans.rtn_work(x, factors[1])):
        assert 0 < work(g) <= min(work(wider), work(taller))


SIZES = Sizes(layer=1000, resident=1000, weights=9000, groups=(Group(64, (64, 32)), Group(128, (64,))), hidden=64,
              vocabulary=100, layers=4, head=6400, tensor=6400, stored=18000, element=2)


@pytest.mark.parametrize("field", ["layer", "resident", "weights", "hidden", "vocabulary", "layers", "head", "tensor",
                                   "stored"])
def test_no_step_needs_less_if_a_size_grows(field: str) -> None:
    larger = dataclasses.replace(SIZES, **{field: 2 * getattr(SIZES, field)})

    def steps(s: Sizes) -> list[Step]:
        run = Running(s, 128, 2, 64)
        model = teaching.Model(s, 4000, tied=True)
        c: Any = tiny_settings()
        return [plans.reading(s), plans.entering(s, 64), run.tracing(), run.gathering(3), plans.removing(s, 64),
                plans.loading(s), *plans.judging(s, 128, 64, run),
                teaching.distilling(model, model, c, torch.float32, s.weights, 0),
                teaching.healing(model, model, c, torch.float32, 100, 1000),
                teaching.healing_block(model, c, torch.float32, 100, 1000, 64)]

    assert all(a.peak <= b.peak for a, b in zip(steps(SIZES), steps(larger), strict=True))
    assert any(a.peak < b.peak for a, b in zip(steps(SIZES), steps(larger), strict=True))


def tiny_settings(**changed: Any) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(**{"batch": 2, "seq_len": 64, "held_out": 2, "checkpointing": False, "teacher_top_k": None,
                              **changed})


def test_less_is_trained_and_kept_with_the_options_that_save_memory() -> None:
    model = teaching.Model(SIZES, 4000, tied=False)

    def peak(adapters: int = 0, **changed: Any) -> int:
        c = tiny_settings(**changed)
        return teaching.distilling(model, model, c, torch.float32, adapters or 9000, adapters).peak

    assert peak(adapters=100) < peak()
    assert peak(checkpointing=True) < peak()
    assert peak(teacher_top_k=8) < peak()


# ------------------------------------------------------------------------------------------- compared with the allocator


TYPES: list[AnyType] = [IntegerType(4, 32), IntegerType(4, 128), BLOCK_TYPES["q4_k"], BLOCK_TYPES["q6_k"],
                        BLOCK_TYPES["iq3_xxs"], BLOCK_TYPES["iq2_s"]]


@pytest.mark.parametrize(("out", "width"), [(64, 256), (768, 256), (64, 512)])
@pytest.mark.parametrize("qtype", TYPES, ids=lambda t: t.name)
def test_gptq_allocates_what_its_plan_says(qtype: AnyType, out: int, width: int) -> None:
    weight, hessian = problem(out, width)
    drift = hessian.clone()

    def work() -> None:
        sums = [hessian.clone(), hessian.clone(), drift.clone()]
        target = compensate(torch.cat([weight]), sums[1], sums[2])
        del sums[1:]
        assert target is not None
        gptq(torch.cat([target]), sums[0], qtype)

    planned = plans.gptq_work(Group(width, (out,)), *_factors(qtype, width))
    book = BOOK if isinstance(qtype, BlockType) and qtype.codebook else 0
    assert 0.75 * planned < allocated(work) < 1.1 * planned + book


@pytest.mark.parametrize(("out", "width"), [(64, 256), (768, 256)])
def test_rounding_to_nearest_allocates_what_its_plan_says(out: int, width: int) -> None:
    weight, _ = problem(out, width)
    planned = plans.rtn_work(Group(width, (out,)), 1)
    assert 0.6 * planned < allocated(lambda: rtn(weight, IntegerType(4, 32)).dequantize()) < 1.1 * planned


def test_sparsegpt_allocates_what_its_plan_says() -> None:
    weight, hessian = problem(512, 256)

    def work() -> None:
        own = hessian.clone()
        target = weight.clone()
        factor = damped(own, 0.01, by_use=False).factor
        assert factor is not None
        goal = target.t().contiguous()
        w = goal.clone()
        reconstruct(w, goal, sweep(w, factor, 0.5, None), own)

    planned = plans.sparsegpt_work(Group(256, (512,)))
    assert 0.7 * planned < allocated(work) < 1.1 * planned


@pytest.mark.parametrize("shape", [{}, {"intermediate_size": 512}, {"hidden_size": 128, "num_hidden_layers": 1}])
def test_a_layer_runs_in_the_activations_of_its_plan(shape: dict[str, int], tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path / "m", **shape)
    sizes, model = Sizes.of(Skeleton(Checkpoint.open(folder), "cpu")), load_torch_model(folder)
    given: list[tuple[Any, Any]] = []
    layer = model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _m, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(torch.zeros(1, 256, dtype=torch.int64), use_cache=False)
        handle.remove()
        args, kwargs = given[0]
        found = allocated(lambda: layer(*args, **kwargs))
    assert 0.6 * found < 256 * sizes.per_token < 2 * found


def test_codes_and_factors_of_a_healed_linear(tmp_path: Path) -> None:
    from llmc.compress.heal.student import HealedLinear

    for qtype in (IntegerType(4, 32), IntegerType(8, 32), BLOCK_TYPES["q4_k"], BLOCK_TYPES["q8_0"], BLOCK_TYPES["q3_k"]):
        made = HealedLinear(rtn(problem(16, 256)[0], qtype), None, torch.float32)
        held = sum(t.numel() * t.element_size() for t in (*made.buffers(), *made.parameters()))
        assert _codes((16, 256), qtype) == (held, sum(p.numel() for p in made.trained().values()))


# ------------------------------------------------------------------------------------------------- plans of the commands


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("folders")
    text = tiny.write_text(at / "text.txt")
    base = tiny.build("llama", at / "base", dtype=torch.float16)
    llmc.quantize(base, method="rtn", out=at / "quantized")
    return {"base": base, "text": text, "quantized": at / "quantized"}


SHORT = {"samples": 8, "seq_len": 64}
TRAINING = {"seq_len": 64, "sampled": 0}
Run = Callable[[dict[str, Path], dict[str, Any]], Any]
COMMANDS: dict[str, Run] = {
    "quantize": lambda f, o: llmc.quantize(f["base"], calibration=f["text"], **SHORT, **o),
    "quantize rtn": lambda f, o: llmc.quantize(f["base"], method="rtn", **o),
    "prune": lambda f, o: llmc.prune(f["base"], calibration=f["text"], **SHORT, **o),
    "prune depth": lambda f, o: llmc.prune(f["base"], method="depth", drop=1, calibration=f["text"], **SHORT, **o),
    "transform": lambda f, o: llmc.transform(f["base"], calibration=f["text"], **SHORT, **o),
    "imatrix": lambda f, o: llmc.imatrix(f["base"], calibration=f["text"], **SHORT, **o),
    "heal": lambda f, o: llmc.heal(f["quantized"], f["base"], calibration=f["text"], **TRAINING, **o),
    "heal block": lambda f, o: llmc.heal(f["quantized"], f["base"], calibration=f["text"], scope="block", **TRAINING, **o),
    "distill": lambda f, o: llmc.distill(f["base"], f["base"], calibration=f["text"], **TRAINING, **o),
    "export gguf": lambda f, o: llmc.export(f["quantized"], **o),
    "export onnx": lambda f, o: llmc.export(f["quantized"], format="onnx", **o),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_plans_its_memory_and_refuses_what_does_not_fit(
    command: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, out = COMMANDS[command], tmp_path / "out"
    plan = run(folders, {"out": out, "dry_run": True})
    terms = {k: v for k, v in plan["memory"].items() if k != "step"}
    assert plan["memory_bytes"] == sum(terms.values())
    assert PROCESS in terms
    monkeypatch.setattr("llmc.machine.free_memory", lambda: 0)
    with pytest.raises(UserError, match="of memory and 0 B is free"):
        run(folders, {"out": out})
    assert list(tmp_path.iterdir()) == []


def test_eval_plans_its_memory_and_refuses_what_does_not_fit(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    import json

    from llmc.cli import run

    quantized, base, text = (str(folders[name]) for name in ("quantized", "base", "text"))
    command = ["eval", quantized, "--base", base, "--text", text, "--context", "64"]
    assert run([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory_bytes"] == sum(v for k, v in plan["memory"].items() if k != "step")
    weights = 4 * sum(p.numel() for p in load_torch_model(folders["base"]).parameters())
    assert plan["memory"]["weights in float32 of base"] == plan["memory"]["weights in float32 of quantized"] == weights
    monkeypatch.setattr("llmc.machine.free_memory", lambda: 0)
    assert run(command) == 2
    assert "of memory and 0 B is free" in capsys.readouterr().err


def test_text_of_the_model_itself_is_a_step_of_every_command_that_samples_it(
    folders: dict[str, Path], tmp_path: Path,
) -> None:
    base = tiny.build("llama", tmp_path / "m", vocab_size=40_000)  # the logits of 32 sequences are what is largest
    options: dict[str, Any] = {"seq_len": 64, "out": tmp_path / "out", "dry_run": True}
    found = [llmc.quantize(base, samples=32, **options), llmc.prune(base, samples=32, **options),
             llmc.transform(base, samples=32, **options), llmc.imatrix(base, samples=32, **options)]
    assert {p["memory"]["step"] for p in found} >= {"sampling text from the model"}
    for p in found:
        assert p["memory"]["logits"] >= 32 * 16 * 40_000 or p["memory"]["step"] != "sampling text from the model"


def test_pages_that_are_read_once_do_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory((Step("loading", {PROCESS: 500, "weights": 1000}, once=700),
                     Step("running", {PROCESS: 500, "work": 1100})))
    assert memory.plan()["memory_bytes"] == 2200
    monkeypatch.setattr("llmc.machine.free_memory", lambda: 1100)
    memory.check("it")
    monkeypatch.setattr("llmc.machine.free_memory", lambda: 1099)
    with pytest.raises(UserError, match=r"it \(running\) needs about"):
        memory.check("it")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="it reads /proc")
def test_files_are_mapped_while_a_model_is_loaded_and_not_afterwards(made: Any) -> None:
    """So they are a term of `loading` alone: not of what runs the whole model later."""
    model = load_torch_model(made.base)
    assert str(made.base) not in Path("/proc/self/maps").read_text()
    skeleton = Skeleton(Checkpoint.open(made.base), "cpu")
    s = Sizes.of(skeleton)
    assert plans.loading(s).once == s.stored > 0
    assert [plans.removing(s, 64).once, measuring(skeleton, 4, 64).once] == [0, 0]
    assert sum(p.numel() for p in model.parameters()) == s.weights
