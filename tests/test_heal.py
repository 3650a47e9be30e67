"""Healing: its gradients against autograd's, and what it does to a model."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import kill_9
from tiny import build, corpus, tokenizer
from torch import nn

import llmc
from llmc.compress.heal import blocks, student
from llmc.compress.heal.train import LR_BY_ROOT_KLD, MOST_LR, EndToEnd
from llmc.compress.teaching import loss, models
from llmc.compress.teaching.training import schedule
from llmc.errors import UserError
from llmc.formats import gptq as gptq_format
from llmc.formats import quantized as quantized_folder
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.manifest import hash_folder
from llmc.formats.quantized import Quantized, with_tensors
from llmc.formats.types import BLOCK_TYPES, BlockTensor, BlockType, IntegerType, QuantizedTensor
from llmc.rounding.rtn import rtn

INTEGER_TYPES = [IntegerType(4, 32), IntegerType(4, 64, False), IntegerType(8, 32), IntegerType(8, 32, False)]


def quantized(qtype: IntegerType | BlockType, out: int = 6, n: int = 256) -> Quantized:
    if isinstance(qtype, BlockType):
        return rtn(torch.randn(out, n), qtype)
    groups = n // qtype.group_size
    zeros = None if qtype.symmetric else torch.randint(1, qtype.max_code, (out, groups), dtype=torch.uint8)
    return QuantizedTensor(qtype, torch.randint(0, qtype.max_code + 1, (out, n), dtype=torch.uint8),
                           (torch.rand(out, groups) + 0.1).half(), zeros)


@pytest.mark.parametrize("qtype", [*INTEGER_TYPES, *BLOCK_TYPES.values()], ids=lambda g: g.name)
def test_a_healed_linear_starts_as_what_it_replaces_and_has_autograds_gradients(qtype: IntegerType | BlockType) -> None:
    q = quantized(qtype)
    linear = student.HealedLinear(q, None, torch.float32)
    x = torch.randn(3, 5, 256, requires_grad=True)
    torch.testing.assert_close(linear(x), x @ q.dequantize().t())
    aim = torch.randn(3, 5, 6)
    (linear(x) * aim).sum().backward()
    ours = [x.grad.clone(), *(p.grad.clone() for p in linear.trained().values())]
    x.grad = None
    # the same from the definition of the type, differentiated by autograd
    logs = {kind: torch.zeros_like(p, requires_grad=True) for kind, p in linear.trained().items()}
    if isinstance(q, BlockTensor):
        scale = q.group_scales().view(*q.d.shape, -1) * logs["shift"].exp()[..., None]
        low = q.group_lows().view(*q.d.shape, -1) * logs["shift"].exp()[..., None]
        if "lift" in logs:
            low = low * (logs["lift"] * 2 / max(qtype.levels)).exp()[..., None]
        levels = torch.tensor(qtype.levels)[q.codes.int()].view(*scale.shape, -1)
        weight = (levels * scale[..., None] + low[..., None]).view(q.shape)
    else:
        weight = (q.dequantize().view(*q.scales.shape, -1) * logs["shift"].exp()[..., None]).view(q.shape)
    ((x @ weight.t()) * aim).sum().backward()
    for found, expected in zip(ours, [x.grad, *(p.grad for p in logs.values())], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("qtype", [IntegerType(4, 32), BLOCK_TYPES["q4_1"], BLOCK_TYPES["q4_k"]], ids=lambda g: g.name)
def test_trained_factors_are_values_of_fp16_and_make_the_weight_that_ships(qtype: IntegerType | BlockType) -> None:
    q = quantized(qtype)
    linear = student.HealedLinear(q, None, torch.float32)
    linear(torch.eye(256))  # made once, and again after a change
    with torch.no_grad():
        for p in linear.trained().values():
            p.normal_(0, 0.1)
    factors = linear.factors()
    assert all(torch.equal(f, f.half().float()) for f in factors.values())
    shipped = with_tensors(q, {name: f.half() for name, f in factors.items()})
    torch.testing.assert_close(linear(torch.eye(256)).t(), shipped.dequantize(), rtol=1e-6, atol=1e-6)
    assert not torch.equal(shipped.dequantize(), q.dequantize())


def whole(head: nn.Module, known: torch.Tensor) -> Callable[[slice], loss.Whole]:
    """All that a teacher says at a range of positions."""
    return lambda part: loss.Whole(head(known.reshape(-1, known.shape[-1])[part]).detach())


def test_divergence_in_chunks_is_that_of_whole_logits_and_so_is_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = nn.Linear(16, 50, bias=False), nn.Linear(16, 50, bias=False)
    known = torch.randn(2, 7, 16)
    start = torch.randn(2, 7, 16, requires_grad=True)
    expected = nn.functional.kl_div(torch.log_softmax(ours(start), -1), torch.log_softmax(theirs(known), -1),
                                    reduction="sum", log_target=True) / 14
    gradient, = torch.autograd.grad(expected, start)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 50 * 4 * 3)  # three positions at a time
    monkeypatch.setattr(loss, "CACHE_BYTES", 50 * 4 * 2)  # in twos
    aims = whole(theirs, known)
    found, _ = loss.distil(start * 1, aims, lambda h: ours(h)[0], 50)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(start.grad, gradient)
    nothing, _ = loss.distil(known, aims, lambda h: theirs(h)[0], 50)
    assert float(nothing) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_head_is_the_models_own(family: str, tmp_path: Path) -> None:
    """Gemma 2 caps its logits; whatever an architecture does there must be done."""
    model = load_torch_model(build(family, tmp_path / "m"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        whole = model(ids).logits[0]
        states = models.hidden_states(model, ids)
        with models.head_of(model) as head:
            torch.testing.assert_close(head(states[:, 5:9]), whole[5:9])
        torch.testing.assert_close(model(ids).logits[0], whole)


def test_schedule_warms_up_and_falls() -> None:
    rates = [schedule(i, 100) for i in range(100)]
    assert rates[0] < rates[3] < rates[4] == 1
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert rates[-1] < 0.06


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_runs_layers_again_and_has_the_same_gradients(family: str, tmp_path: Path) -> None:
    ids = torch.arange(20)[None]
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = load_torch_model(build(family, tmp_path / "m"))
        if checkpointing:
            models.checkpoint_layers(model)
        norm = next(iter(student.norm_weights(model).values()))
        linear = next(m for m in model.modules() if student.is_linear(m))
        linear.register_forward_hook(lambda *_args, c=checkpointing: calls.append(c))
        models.hidden_states(model, ids).square().sum().backward()
        gradients.append(norm.grad)
    assert (calls.count(False), calls.count(True)) == (1, 2)
    torch.testing.assert_close(*gradients)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(float base, its RTN model, a text)."""
    base = build("llama", tmp_path / "base")
    llmc.quantize(base, method="rtn", out=tmp_path / "small", threads=2)
    text = tmp_path / "text.txt"
    text.write_text(corpus()[:60_000], encoding="utf-8")
    return base, tmp_path / "small", text


OPTIONS: dict[str, Any] = {"seq_len": 64, "steps": 32, "batch": 4, "check_every": 16, "held_out": 4, "threads": 2, "lr": 0.01,
                           "sampled": 0}


@torch.no_grad()
def divergence(folder: Path, base: Path) -> float:
    ids = tokenizer()(corpus()[100_000:110_000], return_tensors="pt").input_ids[:, : 8 * 64].view(8, 64)
    p, q = (torch.log_softmax(load_torch_model(f)(ids).logits.double(), -1) for f in (base, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_healing_helps_on_other_text_and_changes_no_code(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, small, text = pair
    result = llmc.heal(small, base, calibration=text, out=tmp_path / "healed", **OPTIONS)
    assert result["kld"]["after"] < 0.95 * result["kld"]["before"]
    assert divergence(tmp_path / "healed", base) < 0.95 * divergence(small, base)
    before, after = Checkpoint.open(small), Checkpoint.open(tmp_path / "healed")
    assert before.names() == after.names()
    moved = 0
    for name in before.names():
        same = torch.equal(before.tensor(name), after.tensor(name))
        assert before.dtype(name) == after.dtype(name) or "norm" in name
        if name.endswith(".scales"):
            moved += not same
        else:
            assert same or "norm" in name, name
    assert moved == len(gptq_format.quantized_linears(before))
    assert (tmp_path / "healed/config.json").read_bytes() == (small / "config.json").read_bytes()
    entry = json.loads((tmp_path / "healed/llmc.json").read_text())["passes"][-1]
    assert entry["name"] == "heal"
    assert [row["step"] for row in entry["curve"]] == [0, 16, 32]
    assert entry["lr"] == OPTIONS["lr"]
    assert llmc.verify(tmp_path / "healed")["problems"] == []
    llmc.export(tmp_path / "healed", format="gguf", out=tmp_path / "healed.gguf")


def test_the_rate_follows_the_divergence_at_the_start(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, text = pair
    rates = {}
    for bits in (4, 8):
        made = llmc.quantize(base, bits=bits, method="rtn", threads=2, out=tmp_path / f"q{bits}")["out"]
        options = OPTIONS | {"lr": None, "steps": 2, "check_every": 2, "out": tmp_path / f"h{bits}"}
        result = llmc.heal(made, base, calibration=text, **options)
        assert result["lr"] == pytest.approx(min(MOST_LR, LR_BY_ROOT_KLD * result["kld"]["before"] ** 0.5))
        rates[bits] = result["lr"]
    assert 0 < rates[8] < rates[4] <= MOST_LR


@pytest.mark.parametrize("qtype", ["q4_1", "q2_k"])
def test_a_folder_of_blocks_heals_too(qtype: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256)
    llmc.quantize(base, method="rtn", type=qtype, out=tmp_path / "small", threads=2)
    text = tmp_path / "text.txt"
    text.write_text(corpus()[:60_000], encoding="utf-8")
    options = {**OPTIONS, "lr": 0.003, "steps": 64}
    result = llmc.heal(tmp_path / "small", base, calibration=text, out=tmp_path / "healed", **options)
    assert result["kld"]["after"] < 0.95 * result["kld"]["before"]
    assert divergence(tmp_path / "healed", base) < 0.95 * divergence(tmp_path / "small", base)
    before, after = (Checkpoint.open(tmp_path / f) for f in ("small", "healed"))
    for name in quantized_folder.linears(before):
        ours, theirs = quantized_folder.read(after, name), quantized_folder.read(before, name)
        same = {field: torch.equal(t, quantized_folder.tensors_of(theirs)[field])
                for field, t in quantized_folder.tensors_of(ours).items()}
        assert same == {field: field not in ("d", "m") for field in same}
    assert llmc.verify(tmp_path / "healed")["problems"] == []
    llmc.export(tmp_path / "healed", format="gguf", out=tmp_path / "healed.gguf")


def test_norms_stay_where_they_are_asked_to(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, small, text = pair
    llmc.heal(small, base, calibration=text, out=tmp_path / "healed", norms=False, checkpointing=True, **OPTIONS)
    before, after = Checkpoint.open(small), Checkpoint.open(tmp_path / "healed")
    assert all(torch.equal(before.tensor(n), after.tensor(n)) for n in before.names() if not n.endswith(".scales"))


def test_resume_after_a_kill_is_bit_identical(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, small, text = pair
    llmc.heal(small, base, calibration=text, out=tmp_path / "whole", **OPTIONS)
    flags = [x for k, v in OPTIONS.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    kill_9(["heal", str(small), "--teacher", str(base), "--calibration", str(text), "-o", str(tmp_path / "killed"), *flags],
           tmp_path, ".killed.unfinished/state.safetensors")
    assert not (tmp_path / "killed").exists()
    llmc.heal(small, base, calibration=text, out=tmp_path / "killed", resume=True, **OPTIONS)
    ours, theirs = hash_folder(tmp_path / "killed"), hash_folder(tmp_path / "whole")
    assert ours == theirs


def test_a_run_that_had_stopped_early_does_not_train_on(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed between its early stop and its folder: the resumed run publishes what had been found."""
    base, small, text = pair
    options = {**OPTIONS, "lr": 0.3, "check_every": 4, "patience": 1}  # so high a rate only makes it worse
    whole = llmc.heal(small, base, calibration=text, out=tmp_path / "whole", **options)
    assert whole["steps"] < OPTIONS["steps"]

    def killed(*_args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("llmc.formats.model_folder.write_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            llmc.heal(small, base, calibration=text, out=tmp_path / "killed", **options)
    again = llmc.heal(small, base, calibration=text, out=tmp_path / "killed", resume=True, **options)
    assert again["curve"] == whole["curve"]
    assert hash_folder(tmp_path / "killed") == hash_folder(tmp_path / "whole")


def test_a_float_model_a_quantized_teacher_and_too_little_text_are_refused(
    pair: tuple[Path, Path, Path], tmp_path: Path,
) -> None:
    base, small, text = pair
    short = tmp_path / "short.txt"
    short.write_text(corpus()[:400])
    for model, teacher, source, words in ((base, base, text, "nothing to heal"), (small, small, text, "is quantized itself"),
                                          (small, base, short, "held out")):
        with pytest.raises(UserError, match=words):
            llmc.heal(model, teacher, calibration=source, out=tmp_path / "x", **OPTIONS)
        assert not (tmp_path / "x").exists()
    other = build("llama", tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(UserError, match="num_hidden_layers"):
        llmc.heal(small, other, calibration=text, out=tmp_path / "x", scope="block", **OPTIONS)
    words = tmp_path / "words"
    shutil.copytree(base, words)
    file = json.loads((words / "tokenizer.json").read_text())
    vocab = file["model"]["vocab"]
    a, b = list(vocab)[100:102]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (words / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match="differ in 2 tokens"):
        llmc.heal(small, words, calibration=text, out=tmp_path / "x", **OPTIONS)


def test_a_model_of_fewer_layers_learns_from_the_whole_base(tmp_path: Path) -> None:
    """What it was quantized from has lost a layer itself: healed against the base, the student comes nearer to the base."""
    base = build("llama", tmp_path / "base", num_hidden_layers=3)
    text = tmp_path / "text.txt"
    text.write_text(corpus()[:60_000], encoding="utf-8")
    llmc.prune(base, method="depth", drop=1, calibration=str(text), samples=8, seq_len=64, threads=2, out=tmp_path / "two")
    llmc.quantize(tmp_path / "two", method="rtn", out=tmp_path / "small", threads=2)
    for teacher in ("base", "two"):
        llmc.heal(tmp_path / "small", tmp_path / teacher, calibration=text, out=tmp_path / f"by-{teacher}",
                  **{**OPTIONS, "lr": 0.03})
    by_base, by_two, before = (divergence(tmp_path / f, base) for f in ("by-base", "by-two", "small"))
    assert by_base < 0.97 * by_two
    assert by_base < 0.95 * before


def test_the_likeliest_tokens_of_the_teacher_are_its_whole_divergence_when_they_are_all() -> None:
    theirs, ours = torch.randn(5, 40) * 3, (torch.randn(5, 40) * 3).requires_grad_()
    whole_loss, _, whole_slope = loss.compare(ours.detach(), loss.Whole(theirs), True)
    every_loss, _, every_slope = loss.compare(ours.detach(), loss.TopK.of(loss.Whole(theirs), 40), True)
    assert float(every_loss) == pytest.approx(float(whole_loss), rel=1e-5)
    torch.testing.assert_close(every_slope, whole_slope)
    # fewer: k + 1 classes, by definition and autograd
    aim = loss.TopK.of(loss.Whole(theirs), 7)
    few_loss, _, few_slope = loss.compare(ours.detach(), aim, True)
    p, q = torch.softmax(theirs, -1), torch.softmax(ours, -1)

    def classes(x: torch.Tensor) -> torch.Tensor:
        top = x.gather(1, aim.ids)
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)
    expected = (classes(p) * (classes(p).log() - classes(q).log())).sum()
    assert float(few_loss) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert few_loss < whole_loss
    torch.testing.assert_close(few_slope, torch.autograd.grad(expected, ours)[0], rtol=1e-4, atol=1e-5)


def test_healing_on_the_teachers_likeliest_tokens(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """All tokens: the same healing as beside the teacher, whether in one batch or in two halves; 32 of 512 help too."""
    base, small, text = pair
    options = {**OPTIONS, "calibration": text, "precision": "fp32"}
    beside = llmc.heal(small, base, out=tmp_path / "beside", **options)
    every = llmc.heal(small, base, out=tmp_path / "every", teacher_top_k=512, **{**options, "batch": 2, "accumulate": 2})
    assert [row["kld"] for row in every["curve"]] == pytest.approx([row["kld"] for row in beside["curve"]], rel=0.02)
    few = llmc.heal(small, base, out=tmp_path / "few", teacher_top_k=32, **options)
    assert few["kld"]["before"] < beside["kld"]["before"]
    assert divergence(tmp_path / "few", base) < 0.97 * divergence(small, base)
    with pytest.raises(UserError, match="512 tokens"):
        llmc.heal(small, base, out=tmp_path / "x", teacher_top_k=513, **options)


@torch.no_grad()
def output_error(folder: Path, base: Path) -> float:
    """Mean relative squared error of the states behind the last layer, on text that healing has not seen."""
    ids = tokenizer()(corpus()[100_000:110_000], return_tensors="pt").input_ids[:, : 8 * 64].view(8, 64)
    ours, theirs = (load_torch_model(f)(ids, output_hidden_states=True).hidden_states[-1] for f in (folder, base))
    return float(((ours - theirs).square().mean(-1) / theirs.square().mean(-1)).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_learn_their_teachers_outputs(family: str, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base")
    llmc.quantize(base, method="rtn", out=tmp_path / "small", threads=2)
    text = tmp_path / "text.txt"
    text.write_text(corpus()[:60_000], encoding="utf-8")
    options = {**OPTIONS, "lr": 0.005}
    result = llmc.heal(tmp_path / "small", base, calibration=text, scope="block", out=tmp_path / "healed", **options)
    assert result["error"]["after"] < 0.95 * result["error"]["before"]
    assert output_error(tmp_path / "healed", base) < 0.95 * output_error(tmp_path / "small", base)
    before, after = (Checkpoint.open(tmp_path / f) for f in ("small", "healed"))
    for name in quantized_folder.linears(before):
        ours, theirs = quantized_folder.read(after, name), quantized_folder.read(before, name)
        assert torch.equal(ours.codes, theirs.codes)
    layers = json.loads((tmp_path / "healed/llmc.json").read_text())["passes"][-1]["layers"]
    assert [x["layer"] for x in layers] == [0, 1]
    assert llmc.verify(tmp_path / "healed")["problems"] == []
    llmc.heal(tmp_path / "small", base, calibration=text, scope="block", out=tmp_path / "again", **options)
    assert hash_folder(tmp_path / "again") == hash_folder(tmp_path / "healed")


def test_blocks_go_on_after_a_kill(pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, small, text = pair
    options = {**OPTIONS, "calibration": text, "scope": "block"}
    llmc.heal(small, base, out=tmp_path / "whole", **options)
    heal_layer = blocks.Blocks._heal

    def killed(self: blocks.Blocks, index: int, layer: nn.Module) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return heal_layer(self, index, layer)

    with monkeypatch.context() as m:
        m.setattr(blocks.Blocks, "_heal", killed)
        with pytest.raises(KeyboardInterrupt):
            llmc.heal(small, base, out=tmp_path / "killed", **options)
    llmc.heal(small, base, out=tmp_path / "killed", resume=True, **options)
    assert hash_folder(tmp_path / "killed") == hash_folder(tmp_path / "whole")


def test_a_model_in_other_axes_is_no_students_teacher_by_blocks(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, small, text = pair
    other = build("llama", tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="its states are not the teacher's"):
        llmc.heal(small, other, calibration=text, scope="block", out=tmp_path / "x", **OPTIONS)


def test_quantize_heals_in_one_command(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, _, text = pair
    options: dict[str, Any] = {"samples": 8, "seq_len": 64, "calibration": str(text), "threads": 2, "heal": 20}

    def killed(*_args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(EndToEnd, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            llmc.quantize(base, out=tmp_path / "one", **options)
    assert not (tmp_path / "one").exists()
    result = llmc.quantize(base, out=tmp_path / "one", resume=True, **options)
    assert result["healed"]["kld"]["after"] <= result["healed"]["kld"]["before"]
    names = [p["name"] for p in json.loads((tmp_path / "one/llmc.json").read_text())["passes"]]
    assert names[-2:] == ["quantize", "heal"]
    assert [p.name for p in tmp_path.glob(".one*")] == []
    assert [t["name"] for t in result["healed"]["texts"]] == ["text.txt", "self"]
    assert sum(t["share"] for t in result["healed"]["texts"]) == pytest.approx(1)
    assert llmc.verify(tmp_path / "one")["problems"] == []
