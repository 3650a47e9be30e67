"""Distillation: its losses against autograd's, and what it does to a model."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import kill_9
from safetensors.torch import load_file, save_file
from tiny import build, corpus, tokenizer
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import llmc
from llmc.cli import run as command_line
from llmc.compress.distill import adapters, student
from llmc.compress.distill.config import DistillConfig
from llmc.compress.teaching import loss
from llmc.compress.teaching.texts import Texts, gather
from llmc.compress.text import load_answers
from llmc.errors import UserError
from llmc.formats.checkpoint import TOKENIZER_FILES, Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.manifest import hash_folder

OBJECTIVES = st.builds(loss.Objective, st.booleans(), st.floats(0.5, 4), st.sampled_from([0.0, 0.3, 1.0]))


def by_definition(objective: loss.Objective, ours: torch.Tensor, theirs: torch.Tensor, nexts: torch.Tensor) -> torch.Tensor:
    """The sum over rows, in autograd's own operators."""
    t, ce = objective.temperature, objective.ce_weight
    q, p = log_softmax(ours / t, -1), log_softmax(theirs / t, -1)
    between = kl_div(p, q, reduction="sum", log_target=True) if objective.reverse else kl_div(
        q, p, reduction="sum", log_target=True)
    return (1 - ce) * t * t * between + ce * cross_entropy(ours, nexts, reduction="sum")


@settings(deadline=None, max_examples=40)
@given(OBJECTIVES, st.integers(0, 3), st.integers(0, 10_000))
def test_loss_and_gradient_are_those_of_autograd_also_with_rows_of_padding(
    objective: loss.Objective, padding: int, seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    ours = (torch.randn(5, 30 + padding, generator=g) * 3).requires_grad_()
    theirs, nexts = torch.randn(5, 30, generator=g) * 3, torch.randint(30, (5,), generator=g)
    expected = by_definition(objective, ours[:, :30], theirs, nexts)
    slope, = torch.autograd.grad(expected, ours)
    aim = loss.Whole(theirs / objective.temperature)
    found = loss.compare(ours.detach(), aim, True, objective, nexts, 30)
    assert float(found.loss) == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-4)
    assert found.slope is not None
    torch.testing.assert_close(found.slope, slope, rtol=1e-4, atol=1e-5)
    assert float(found.nll) == pytest.approx(float(cross_entropy(ours[:, :30], nexts, reduction="sum").detach()), rel=1e-4)
    # all of the teacher's tokens kept: the same
    every = loss.compare(ours.detach(), loss.TopK.of(aim, 30), True, objective, nexts, 30)
    assert every.slope is not None
    assert float(every.loss) == pytest.approx(float(found.loss), rel=1e-4, abs=1e-4)
    torch.testing.assert_close(every.slope, found.slope, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.booleans(), st.integers(1, 29), st.integers(0, 10_000))
def test_fewer_tokens_of_the_teacher_are_classes_and_lose_no_less_than_nothing(reverse: bool, k: int, seed: int) -> None:
    """By definition: the k likeliest and all others as one. Merging classes never adds divergence (log-sum inequality)."""
    g = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(4, 30, generator=g) * 2).requires_grad_(), torch.randn(4, 30, generator=g) * 2
    aim = loss.TopK.of(loss.Whole(theirs), k)

    def classes(x: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(x, -1)
        return torch.cat([p.gather(1, aim.ids), p.scatter(1, aim.ids, 0).sum(-1, keepdim=True)], -1).log()
    q, p = classes(ours), classes(theirs)
    expected = kl_div(p, q, reduction="sum", log_target=True) if reverse else kl_div(q, p, reduction="sum", log_target=True)
    found = loss.compare(ours.detach(), aim, True, loss.Objective(reverse))
    assert found.slope is not None
    assert float(found.loss) == pytest.approx(float(expected.detach()), rel=1e-3, abs=1e-4)
    torch.testing.assert_close(found.slope, torch.autograd.grad(expected, ours)[0], rtol=1e-3, atol=1e-4)
    whole = loss.compare(ours.detach(), loss.Whole(theirs), False, loss.Objective(reverse))
    assert float(found.loss) <= float(whole.loss) + 1e-4


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_reach_the_head_and_skip_what_does_not_count(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_BYTES", 50 * 4 * 3)  # three positions at a time
    head, theirs = nn.Linear(16, 50, bias=False), torch.randn(14, 50)
    states, objective = torch.randn(2, 7, 16, requires_grad=True), loss.Objective(reverse, 2.0, 0.4)
    targets = torch.randint(50, (14,))
    targets[[2, 6, 13]] = -1
    counted = targets >= 0
    expected = by_definition(objective, head(states).view(14, 50)[counted], theirs[counted], targets[counted]) / 11
    wanted = torch.autograd.grad(expected, [states, head.weight])
    found, nll = loss.distil(states, lambda part: loss.Whole(theirs[part] / 2), lambda h: head(h)[0], 50, objective, targets,
                             [head.weight])
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    plain = cross_entropy(head(states).view(14, 50), targets, ignore_index=-1)
    assert float(nll) == pytest.approx(float(plain.detach()), rel=1e-5)
    for mine, other in zip(torch.autograd.grad(found, [states, head.weight]), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


OPTIONS: dict[str, Any] = {"seq_len": 64, "steps": 24, "batch": 4, "check_every": 8, "held_out": 4, "threads": 2,
                           "sampled": 0, "lr": 3e-3, "precision": "fp32"}


def drop_layer(base: Path, out: Path, index: int) -> Path:
    """The model without one decoder layer, as depth pruning leaves it."""
    model = load_torch_model(base)
    del model.model.layers[index]
    model.config.num_hidden_layers -= 1
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            (out / name).write_bytes((base / name).read_bytes())
    return out


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(teacher of 3 layers, student of 2 of them, a text)."""
    folder = tmp_path_factory.mktemp("distill")
    teacher = build("llama", folder / "teacher", num_hidden_layers=3)
    text = folder / "text.txt"
    text.write_text(corpus()[:60_000], encoding="utf-8")
    return teacher, drop_layer(teacher, folder / "student", 1), text


@torch.no_grad()
def divergence(folder: Path, base: Path) -> float:
    ids = tokenizer()(corpus()[100_000:110_000], return_tensors="pt").input_ids[:, : 8 * 64].view(8, 64)
    p, q = (torch.log_softmax(load_torch_model(f)(ids).logits.double(), -1) for f in (base, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_student_learns_what_carries_over_to_other_text(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = trio
    result = llmc.distill(student, teacher, calibration=text, out=tmp_path / "out", **OPTIONS)
    assert result["loss"]["after"] < 0.8 * result["loss"]["before"]
    assert divergence(tmp_path / "out", teacher) < 0.8 * divergence(student, teacher)
    before, after = Checkpoint.open(student), Checkpoint.open(tmp_path / "out")
    assert {n: (before.shape(n), before.dtype(n)) for n in before.names()} == {
        n: (after.shape(n), after.dtype(n)) for n in after.names()}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (student / name).read_bytes()
    entry = json.loads((tmp_path / "out/llmc.json").read_text())["passes"][-1]
    assert entry["name"] == "distill"
    assert [row["step"] for row in entry["curve"]] == [0, 8, 16, 24]
    assert len(entry["losses"]) == 24
    assert llmc.verify(tmp_path / "out")["problems"] == []
    llmc.quantize(tmp_path / "out", method="rtn", out=tmp_path / "small", threads=2)
    llmc.export(tmp_path / "small", format="gguf", out=tmp_path / "small.gguf")
    names = [p["name"] for p in json.loads((tmp_path / "small.gguf.llmc.json").read_text())["passes"]]
    assert names[:2] == ["distill", "quantize"]


@pytest.mark.parametrize("options", [{}, {"loss": "reverse-kl", "temperature": 2.0}, {"hidden_weight": 1.0},
                                     {"teacher_top_k": 512}])
def test_a_student_that_is_the_teacher_has_no_loss_and_stays(
    options: dict[str, Any], trio: tuple[Path, Path, Path], tmp_path: Path,
) -> None:
    teacher, _, text = trio
    result = llmc.distill(teacher, teacher, calibration=text, out=tmp_path / "out", **OPTIONS | options | {"steps": 2})
    assert result["loss"]["before"] == pytest.approx(0, abs=2e-6)
    assert result["curve"][-1].get("hidden", 0) == pytest.approx(0, abs=1e-9)
    assert result["best_step"] == 0 or result["loss"]["after"] <= 2e-6


def test_a_student_that_is_the_teacher_has_no_gradient(trio: tuple[Path, Path, Path]) -> None:
    model = load_torch_model(trio[0])
    ids = torch.arange(40).view(2, 20)
    targets = ids.flatten().roll(-1)
    for objective in (loss.Objective(), loss.Objective(reverse=True, temperature=3.0)):
        mine = student.Student(model, objective, 512, [0, 2], 1.0, (64, 64))
        with torch.no_grad(), student.captured(model, [0, 2]) as theirs:
            logits = model(ids).logits.view(40, 512)
        states = [s.clone() for s in theirs]
        said = logits / objective.temperature
        whole, _, _, hidden = mine(ids, targets, lambda part, said=said: loss.Whole(said[part]), states)
        whole.backward()
        assert float(hidden) == pytest.approx(0, abs=1e-12)
        assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-4
        model.zero_grad()


def test_hidden_states_help_and_their_matrices_are_gone_in_the_end(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = trio
    result = llmc.distill(student, teacher, calibration=text, out=tmp_path / "out", hidden_weight=1.0, **OPTIONS)
    assert result["layer_map"] == [[0, 1], [1, 2]]
    errors = [row["hidden"] for row in result["curve"][1:]]
    assert errors[-1] < errors[0]
    assert set(Checkpoint.open(tmp_path / "out").names()) == set(Checkpoint.open(student).names())
    given = llmc.distill(student, teacher, calibration=text, out=tmp_path / "given", hidden_weight=1.0, layer_map="1:2",
                         **OPTIONS | {"steps": 2})
    assert given["layer_map"] == [[1, 2]]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_layers_are_spread_evenly_and_the_last_meets_the_last(ours: int, theirs: int) -> None:
    pairs = student.map_layers(None, ours, theirs)
    aims = [b for _, b in pairs]
    assert [a for a, _ in pairs] == list(range(ours))
    assert aims == sorted(aims)
    assert aims[-1] == theirs - 1
    assert aims[0] >= 0
    if ours <= theirs:
        steps = {b - a for a, b in itertools.pairwise(aims)}
        assert len(set(aims)) == ours
        assert max(steps, default=1) - min(steps, default=1) <= 1


def test_a_narrower_student_learns_through_a_projection(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, _, text = trio
    narrow = build("llama", tmp_path / "narrow", hidden_size=32, seed=3)
    result = llmc.distill(narrow, teacher, calibration=text, out=tmp_path / "out", hidden_weight=0.5, **OPTIONS)
    assert result["loss"]["after"] < result["loss"]["before"]
    q = student.projection(32, 64, 0).weight
    torch.testing.assert_close(q.t() @ q, torch.eye(32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_adapters_say_what_they_said(family: str, tmp_path: Path) -> None:
    model = load_torch_model(build(family, tmp_path / "m"))
    names, ids = [n for n, _ in model.named_parameters()], torch.arange(20)[None]
    with torch.no_grad():
        start = model(ids).logits
        adapters.add_adapters(model, 4, seed=0)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert 0 < sum(p.numel() for p in trained) < 0.2 * sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(model(ids).logits, start)
        for p in trained:
            p.normal_(0, 0.05)
        adapted = model(ids).logits
        adapters.merge_adapters(model)
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert float((adapted - start).abs().max()) > 0.1
    assert [n for n, _ in model.named_parameters()] == names


def test_adapters_learn_and_leave_the_rest_alone(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = trio
    result = llmc.distill(student, teacher, calibration=text, out=tmp_path / "out", lora=4, **OPTIONS)
    assert result["loss"]["after"] < result["loss"]["before"]
    before, after = Checkpoint.open(student), Checkpoint.open(tmp_path / "out")
    changed = {n for n in before.names() if not torch.equal(before.tensor(n), after.tensor(n))}
    assert changed == {n for n in before.names() if "proj" in n}


def sparse(student: Path, out: Path) -> Path:
    """Half of each linear's weights zero, with the manifest of a pruning pass."""
    tensors = load_file(student / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, t in tensors.items():
        if "proj" in name:
            t.mul_(torch.rand(t.shape, generator=generator) < 0.5)
    out.mkdir()
    for file in student.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    manifest = {"schema": 1, "kind": "hf", "source": {"name": "base", "files": {}, "licence": "mit"},
                "outputs": hash_folder(out),
                "passes": [{"name": "prune", "config": {"method": "magnitude", "sparsity": 0.5}}]}
    (out / "llmc.json").write_text(json.dumps(manifest))
    return out


def test_zeros_of_a_pruned_student_stay(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = trio
    pruned = sparse(student, tmp_path / "pruned")
    result = llmc.distill(pruned, teacher, calibration=text, out=tmp_path / "out", weight_decay=0.1, **OPTIONS)
    assert result["loss"]["after"] < 0.8 * result["loss"]["before"]
    before, after = Checkpoint.open(pruned), Checkpoint.open(tmp_path / "out")
    zeros = 0
    for name in (n for n in before.names() if "proj" in n):
        ours, theirs = after.tensor(name), before.tensor(name)
        assert not ours[theirs == 0].any(), name
        assert not torch.equal(ours, theirs)
        zeros += int((theirs == 0).sum())
    assert result["zeros_kept"] == zeros
    with pytest.raises(UserError, match="an adapter would fill"):
        llmc.distill(pruned, teacher, calibration=text, out=tmp_path / "x", lora=4, **OPTIONS)


def flags(options: dict[str, Any]) -> list[str]:
    return [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]


@pytest.mark.parametrize("options", [{"hidden_weight": 0.5}, {"lora": 4, "teacher_top_k": 16}])
def test_resume_after_a_kill_is_bit_identical(
    options: dict[str, Any], trio: tuple[Path, Path, Path], tmp_path: Path,
) -> None:
    teacher, student, text = trio
    options = {**OPTIONS, **options}
    whole = llmc.distill(student, teacher, calibration=text, out=tmp_path / "whole", **options)
    kill_9(["distill", str(student), "--teacher", str(teacher), "--calibration", str(text), "-o", str(tmp_path / "killed"),
            *flags(options)], tmp_path, ".killed.unfinished/state.safetensors")
    assert not (tmp_path / "killed").exists()
    again = llmc.distill(student, teacher, calibration=text, out=tmp_path / "killed", resume=True, **options)
    assert again["curve"] == whole["curve"]
    assert hash_folder(tmp_path / "killed") == hash_folder(tmp_path / "whole")
    assert not list(tmp_path.glob(".killed*"))
    with pytest.raises(KeyError):
        again["losses"]


def test_two_processes_learn_what_one_learns_from_twice_the_batches(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = trio
    options = {**OPTIONS, "batch": 2, "steps": 8, "threads": 1}
    one = llmc.distill(student, teacher, calibration=text, out=tmp_path / "one", accumulate=2, **options)
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "-m", "llmc", "distill", str(student), "--teacher", str(teacher), "--calibration", str(text),
               "--json", "-o", str(tmp_path / "two"), *flags(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # one process prints
    assert two["processes"] == 2
    assert [r["loss"] for r in two["curve"]] == pytest.approx([r["loss"] for r in one["curve"]], rel=1e-3)
    assert llmc.verify(tmp_path / "two")["problems"] == []


CHATML = ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}<s>assistant\n{% endif %}")


@pytest.mark.parametrize("answers_only", [False, True])
def test_runs_of_any_length_are_judged_by_the_same_sequences(answers_only: bool, tmp_path: Path) -> None:
    files, tok = [], tokenizer()
    tok.chat_template = CHATML
    for name, first, lines in (("one", 0, 40), ("two", 1000, 7)):
        said = [[{"role": "user", "content": f"Count on from {n}."},
                 {"role": "assistant", "content": f"{n + 1}, {n + 2}, {n + 3}"}] for n in range(first, first + lines)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in said))
        files.append(str(tmp_path / f"{name}.jsonl"))

    def gathered(steps: int, sampled: int) -> Texts:
        c = DistillConfig("base", calibration=tuple(files), steps=steps, batch=2, sampled=sampled, seq_len=16, held_out=4)
        return gather(c, tok, lambda n: torch.zeros(n, 16, dtype=torch.int64), answers_only=answers_only)

    short, long = gathered(3, 0), gathered(30, 5)
    assert torch.equal(short.sequences[:4], long.sequences[:4])
    if answers_only:
        assert short.counted is not None
        assert long.counted is not None
        assert torch.equal(short.counted[:4], long.counted[:4])
    judged = {tuple(row.tolist()) for row in long.sequences[:4]}
    assert len(judged) == 4
    assert not judged & {tuple(row.tolist()) for t in (short, long) for row in t.sequences[4:]}
    assert short.sequences.shape[0] == 4 + 3 * 2
    assert sum(o["share"] for o in long.origins) == pytest.approx(1)


def test_only_answers_are_learned_and_sequences_without_any_left_out(tmp_path: Path) -> None:
    tok = tokenizer()
    tok.chat_template = CHATML
    chat = [{"role": "user", "content": "What is it? " + "Well, " * 90}, {"role": "assistant", "content": "A thing."},
            {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No more."}]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for _ in range(20)))
    found = load_answers(str(file), tok, 32)
    assert found.answers is not None
    said = "".join(tok.decode(ids[mask]) for ids, mask in zip(found.sequences, found.answers, strict=True))
    assert set(said.replace("</s>", "|").replace("\n", "").split("|")) == {"A thing.", "No more.", ""}
    assert said.count("thing") > 15
    assert found.answers.any(1).all()
    everything = len(tok(file.read_text()).input_ids) // 32
    assert 0 < found.origin["left_out"] < everything
    tok.chat_template = "{{ messages | length }}"
    with pytest.raises(UserError, match="writes earlier turns anew"):
        load_answers(str(file), tok, 32)
    with pytest.raises(UserError, match="has no answers"):
        load_answers(str(tmp_path / "chat.txt"), tok, 32)


def test_a_student_learns_answers(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, _ = trio
    models = [shutil.copytree(f, tmp_path / f.name) for f in (teacher, student)]
    for model in models:
        (model / "chat_template.jinja").write_text(CHATML)
    lines = corpus()[:60_000].splitlines()
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}]
             for a, b in zip(lines[::2], lines[1::2], strict=False) if a and b]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    result = llmc.distill(models[1], models[0], calibration=file, answers_only=True, ce_weight=0.5, out=tmp_path / "out",
                          **OPTIONS | {"sampled": 8})
    assert result["loss"]["after"] < result["loss"]["before"]
    text = json.loads((tmp_path / "out/llmc.json").read_text())["passes"][-1]["texts"][0]
    assert 0 < text["answer_tokens"] < text["tokens"]


def test_heads_of_unequal_padding_are_compared_over_the_tokens(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, _, text = trio
    padded = build("llama", tmp_path / "padded", vocab_size=544, seed=1)
    result = llmc.distill(padded, teacher, calibration=text, out=tmp_path / "out", **OPTIONS)
    assert result["vocabulary"] == 512
    assert result["loss"]["after"] < result["loss"]["before"]
    before, after = (Checkpoint.open(f).tensor("model.embed_tokens.weight") for f in (padded, tmp_path / "out"))
    assert torch.equal(before[512:], after[512:])
    assert not torch.equal(before[:512], after[:512])
    same = llmc.distill(padded, padded, calibration=text, out=tmp_path / "same", **OPTIONS | {"steps": 1})
    assert same["vocabulary"] == 544


def test_what_cannot_be_distilled_is_refused_before_any_work(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = trio
    other = build("llama", tmp_path / "other", style="llama")
    llmc.quantize(student, method="rtn", out=tmp_path / "small", threads=2)
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (student, other, {}, "differ in .* tokens"), (student, tmp_path / "small", {}, "quantized already"),
        (tmp_path / "small", teacher, {}, "quantized already"), (student, teacher, {"seq_len": 512}, "positions for 256"),
        (student, teacher, {"hidden_weight": 1.0, "layer_map": "0:0,5:1"}, "5:1: the student's layers are 0 to 1"),
        (student, teacher, {"hidden_weight": 1.0, "layer_map": "0:0,0:1"}, "twice"),
    ]
    for model, aim, more, words in cases:
        with pytest.raises(UserError, match=words):
            llmc.distill(model, aim, calibration=text, out=tmp_path / "x", **OPTIONS | more)
        assert not list(tmp_path.glob("*x*"))


def test_every_bad_option_is_named_at_once() -> None:
    bad = {"temperature": 0.0, "ce_weight": 1.5, "loss": "mse", "lora": 0, "layer_map": "first", "clip": -1.0}
    with pytest.raises(UserError) as error:
        llmc.distill("student", "teacher", **bad)
    assert all(f"--{name.replace('_', '-')} {value}" in error.value.problem for name, value in bad.items())


def test_without_peft_the_extra_is_named(
    trio: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, student, _ = trio
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="peft") as error:
        llmc.distill(student, teacher, lora=4, out=tmp_path / "x")
    assert "llmc-toolkit[distill]" in error.value.hint


def test_a_dry_run_plans_and_writes_nothing(
    trio: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    teacher, student, _ = trio
    command = ["distill", str(student), "--teacher", str(teacher), "--seq-len", "64", "--dry-run"]
    assert command_line([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["layers"] == [2, 3]
    assert plan["parameters"] == sum(p.numel() for p in load_torch_model(student).parameters())
    assert command_line([*command, "--lora", "4", "--checkpointing", "--json"]) == 0
    lean = json.loads(capsys.readouterr().out)
    assert lean["memory_bytes"] < plan["memory_bytes"]
    assert lean["trained"] < plan["trained"]
    assert list(tmp_path.iterdir()) == []
    assert command_line(["distill", str(student), "--teacher", "nowhere"]) == 2
