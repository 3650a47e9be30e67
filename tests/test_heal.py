"""Healing from a folder to a folder: what it changes, how it goes on, what is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import Command, interrupted, resumed
from tiny import build, corpus, divergence, write_text
from training import HEAL, flags

import llmc
from llmc.compress.heal.train import LR_BY_ROOT_KLD, MOST_LR, EndToEnd
from llmc.errors import UserError
from llmc.formats import gptq as gptq_format
from llmc.formats import model_folder
from llmc.formats import quantized as quantized_folder
from llmc.formats.checkpoint import Checkpoint


@pytest.fixture
def made_kept(rounded: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """The base with one kind of linears that stayed floats."""
    llmc.quantize(rounded[0], method="rtn", keep="down_proj", out=tmp_path / "kept", threads=2)
    return tmp_path / "kept"


def test_healing_helps_on_other_text_and_changes_no_code(rounded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, small, text = rounded
    result = llmc.heal(small, base, calibration=text, out=tmp_path / "healed", **HEAL)
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
    assert entry["lr"] == HEAL["lr"]
    assert llmc.verify(tmp_path / "healed")["problems"] == []
    llmc.export(tmp_path / "healed", format="gguf", out=tmp_path / "healed.gguf")


def test_the_rate_follows_the_divergence_at_the_start(rounded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, text = rounded
    rates = {}
    for bits in (4, 8):
        made = llmc.quantize(base, bits=bits, method="rtn", threads=2, out=tmp_path / f"q{bits}")["out"]
        options = HEAL | {"lr": None, "steps": 2, "check_every": 2, "out": tmp_path / f"h{bits}"}
        result = llmc.heal(made, base, calibration=text, **options)
        assert result["lr"] == pytest.approx(min(MOST_LR, LR_BY_ROOT_KLD * result["kld"]["before"] ** 0.5))
        rates[bits] = result["lr"]
    assert 0 < rates[8] < rates[4] <= MOST_LR


@pytest.mark.parametrize("qtype", ["q4_1", "q2_k"])
def test_a_folder_of_blocks_heals_too(qtype: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256)
    llmc.quantize(base, method="rtn", type=qtype, out=tmp_path / "small", threads=2)
    text = write_text(tmp_path / "text.txt")
    options = {**HEAL, "lr": 0.003, "steps": 64}
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


def test_norms_stay_where_they_are_asked_to(rounded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, small, text = rounded
    llmc.heal(small, base, calibration=text, out=tmp_path / "healed", norms=False, checkpointing=True, **HEAL)
    before, after = Checkpoint.open(small), Checkpoint.open(tmp_path / "healed")
    assert all(torch.equal(before.tensor(n), after.tensor(n)) for n in before.names() if not n.endswith(".scales"))


def test_resume_after_a_kill_is_bit_identical(rounded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, small, text = rounded
    command = Command("heal", small, "--teacher", base, "--calibration", text, *flags(HEAL))
    resumed(partial(llmc.heal, small, base, calibration=text, **HEAL), tmp_path,
            lambda out: command.kill(out, ".killed.unfinished/state.safetensors"))


def test_a_run_that_had_stopped_early_does_not_train_on(rounded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Killed between its early stop and its folder: the resumed run publishes what had been found."""
    base, small, text = rounded
    options = {**HEAL, "lr": 0.3, "check_every": 4, "patience": 1}  # so high a rate only makes it worse
    whole, again = resumed(partial(llmc.heal, small, base, calibration=text, **options), tmp_path,
                           interrupted(model_folder, "write_checkpoint"))
    assert whole["steps"] < HEAL["steps"]
    assert again["curve"] == whole["curve"]


def test_what_stays_float_is_said_and_recorded(made_kept: Path, rounded: tuple[Path, Path, Path], tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    base, small, text = rounded
    for folder, names in ((made_kept, ["model.layers.*.mlp.down_proj.weight"]), (small, [])):
        capsys.readouterr()
        llmc.heal(folder, base, calibration=text, out=tmp_path / "healed", **{**HEAL, "steps": 1})
        floats = json.loads((tmp_path / "healed/llmc.json").read_text())["passes"][-1]["floats"]
        assert floats["names"] == names
        said = "down_proj.weight are not quantized and are not healed, " in capsys.readouterr().err
        assert said == (floats["share"] > 0.01) == bool(names)


def test_a_float_model_a_quantized_teacher_and_too_little_text_are_refused(
    rounded: tuple[Path, Path, Path], tmp_path: Path,
) -> None:
    base, small, text = rounded
    short = tmp_path / "short.txt"
    short.write_text(corpus()[:400])
    for model, teacher, source, words in ((base, base, text, "nothing to heal"), (small, small, text, "is quantized itself"),
                                          (small, base, short, "held out")):
        with pytest.raises(UserError, match=words):
            llmc.heal(model, teacher, calibration=source, out=tmp_path / "x", **HEAL)
        assert not (tmp_path / "x").exists()
    other = build("llama", tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(UserError, match="num_hidden_layers"):
        llmc.heal(small, other, calibration=text, out=tmp_path / "x", scope="block", **HEAL)
    words = tmp_path / "words"
    shutil.copytree(base, words)
    file = json.loads((words / "tokenizer.json").read_text())
    vocab = file["model"]["vocab"]
    a, b = list(vocab)[100:102]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (words / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match="differ in 2 tokens"):
        llmc.heal(small, words, calibration=text, out=tmp_path / "x", **HEAL)


def test_a_model_of_fewer_layers_learns_from_the_whole_base(tmp_path: Path) -> None:
    """What it was quantized from has lost a layer itself: healed against the base, the student comes nearer to the base."""
    base = build("llama", tmp_path / "base", num_hidden_layers=3)
    text = write_text(tmp_path / "text.txt")
    llmc.prune(base, method="depth", drop=1, calibration=str(text), samples=8, seq_len=64, threads=2, out=tmp_path / "two")
    llmc.quantize(tmp_path / "two", method="rtn", out=tmp_path / "small", threads=2)
    for teacher in ("base", "two"):
        llmc.heal(tmp_path / "small", tmp_path / teacher, calibration=text, out=tmp_path / f"by-{teacher}",
                  **{**HEAL, "lr": 0.03})
    by_base, by_two, before = (divergence(tmp_path / f, base) for f in ("by-base", "by-two", "small"))
    assert by_base < 0.97 * by_two
    assert by_base < 0.95 * before


def test_healing_on_the_teachers_likeliest_tokens(rounded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """All tokens: the same healing as beside the teacher, whether in one batch or in two halves; 32 of 512 help too."""
    base, small, text = rounded
    options = {**HEAL, "calibration": text, "precision": "fp32"}
    beside = llmc.heal(small, base, out=tmp_path / "beside", **options)
    every = llmc.heal(small, base, out=tmp_path / "every", teacher_top_k=512, **{**options, "batch": 2, "accumulate": 2})
    assert [row["kld"] for row in every["curve"]] == pytest.approx([row["kld"] for row in beside["curve"]], rel=0.02)
    few = llmc.heal(small, base, out=tmp_path / "few", teacher_top_k=32, **options)
    assert few["kld"]["before"] < beside["kld"]["before"]
    assert divergence(tmp_path / "few", base) < 0.97 * divergence(small, base)
    with pytest.raises(UserError, match="512 tokens"):
        llmc.heal(small, base, out=tmp_path / "x", teacher_top_k=513, **options)


def test_quantize_heals_in_one_command(rounded: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, text = rounded
    options: dict[str, Any] = {"samples": 8, "seq_len": 64, "calibration": str(text), "threads": 2, "heal": 20}
    with interrupted(EndToEnd, "train"):
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
