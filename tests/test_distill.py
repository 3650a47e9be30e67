"""Distillation from a folder to a folder: what a student learns, keeps, and may not be."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Command, resumed
from safetensors.torch import load_file, save_file
from tiny import build, divergence
from training import DISTILL, flags

import llmc
from llmc.cli import run as command_line
from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.manifest import hash_folder


def test_a_student_learns_what_carries_over_to_other_text(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = trio
    result = llmc.distill(student, teacher, calibration=text, out=tmp_path / "out", **DISTILL)
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
    result = llmc.distill(teacher, teacher, calibration=text, out=tmp_path / "out", **DISTILL | options | {"steps": 2})
    assert result["loss"]["before"] == pytest.approx(0, abs=2e-6)
    assert result["curve"][-1].get("hidden", 0) == pytest.approx(0, abs=1e-9)
    assert result["best_step"] == 0 or result["loss"]["after"] <= 2e-6


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
    result = llmc.distill(pruned, teacher, calibration=text, out=tmp_path / "out", weight_decay=0.1, **DISTILL)
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
        llmc.distill(pruned, teacher, calibration=text, out=tmp_path / "x", lora=4, **DISTILL)


@pytest.mark.parametrize("options", [{"hidden_weight": 0.5}, {"lora": 4, "teacher_top_k": 16}])
def test_resume_after_a_kill_is_bit_identical(
    options: dict[str, Any], trio: tuple[Path, Path, Path], tmp_path: Path,
) -> None:
    teacher, student, text = trio
    options = {**DISTILL, **options}
    command = Command("distill", student, "--teacher", teacher, "--calibration", text, *flags(options))
    whole, again = resumed(partial(llmc.distill, student, teacher, calibration=text, **options), tmp_path,
                           lambda out: command.kill(out, ".killed.unfinished/state.safetensors"))
    assert again["curve"] == whole["curve"]
    with pytest.raises(KeyError):
        again["losses"]


def test_two_processes_learn_what_one_learns_from_twice_the_batches(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, text = trio
    options = {**DISTILL, "batch": 2, "steps": 8, "threads": 1}
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


def test_heads_of_unequal_padding_are_compared_over_the_tokens(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, _, text = trio
    padded = build("llama", tmp_path / "padded", vocab_size=544, seed=1)
    result = llmc.distill(padded, teacher, calibration=text, out=tmp_path / "out", **DISTILL)
    assert result["vocabulary"] == 512
    assert result["loss"]["after"] < result["loss"]["before"]
    before, after = (Checkpoint.open(f).tensor("model.embed_tokens.weight") for f in (padded, tmp_path / "out"))
    assert torch.equal(before[512:], after[512:])
    assert not torch.equal(before[:512], after[:512])
    same = llmc.distill(padded, padded, calibration=text, out=tmp_path / "same", **DISTILL | {"steps": 1})
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
            llmc.distill(model, aim, calibration=text, out=tmp_path / "x", **DISTILL | more)
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
