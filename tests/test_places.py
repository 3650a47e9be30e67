"""No command writes over what it reads, or over another kind of thing. A place that cannot be written is found early."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from crash import listing
from reports import whole, write

from llmc import files
from llmc.cli import run
from llmc.errors import UserError
from llmc.formats import manifest
from llmc.places import check_place, read_by

MAKERS = {
    "quantize": ["quantize", "MODEL", "--method", "rtn"], "prune": ["prune", "MODEL", "--sparsity", "0.5"],
    "transform": ["transform", "MODEL"], "heal": ["heal", "small", "--teacher", "MODEL"],
    "distill": ["distill", "student", "--teacher", "MODEL"], "imatrix": ["imatrix", "MODEL"],
    "gguf": ["export", "MODEL"], "onnx": ["export", "MODEL", "--format", "onnx"],
    "eval": ["eval", "MODEL", "--text", "text.txt"], "bench": ["bench", "MODEL"],
}
FOLDERS = ("quantize", "prune", "transform", "heal", "distill", "onnx")


@pytest.fixture
def folder(tmp_path: Path, made: SimpleNamespace, text: Path) -> Path:
    """models/base (with a manifest, as every result of llmc has), student, small, text.txt, reports 0.json and 1.json."""
    for source, name in ((made.base, "models/base"), (made.base, "student"), (made.gptq, "small")):
        shutil.copytree(source, tmp_path / name)
        if not (tmp_path / name / "llmc.json").exists():
            files.write_json(tmp_path / name / "llmc.json", manifest.new_manifest("hf", {}, []))
    files.write_json(tmp_path / "models/llmc.json", manifest.new_manifest("hf", {}, []))
    shutil.copy(text, tmp_path / "text.txt")
    write(tmp_path, whole("a", 1000, 1, 0.1, 10.0), whole("b", 250, 5, 0.3, 30.0))
    return tmp_path


def refused(folder: Path, arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with 2 and one clear error, and no file was changed or added."""
    before = {n: (folder / n).read_bytes() for n in listing(folder) if (folder / n).is_file()}
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert match in err, err
    assert "Traceback" not in err
    assert {n: (folder / n).read_bytes() for n in listing(folder) if (folder / n).is_file()} == before


@pytest.mark.parametrize("name", MAKERS)
def test_the_output_is_the_input(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command(model: str, out: str) -> list[str]:
        return [model if a == "MODEL" else a for a in MAKERS[name]] + ["-o", out]

    (folder / "link").symlink_to(folder / "models/base")
    same = [("models/base", "models/base"), ("models/base", str(folder / "models/base")), ("link", "models/base"),
            ("models/base", "link"), ("models/base", "models/../models/base")]
    for model, out in same:
        refused(folder, command(model, out), "it would be lost", capsys)
    refused(folder, command("models/base", "models"), "it would be lost", capsys)
    if name in FOLDERS:
        refused(folder, command("models/base", "models/base/inside"), "a model does not hold another", capsys)
    if name in ("heal", "distill"):
        student = MAKERS[name][1]
        refused(folder, command("models/base", student), "it would be lost", capsys)


@pytest.mark.parametrize("name", ["quantize", "prune", "imatrix", "eval"])
def test_the_output_is_the_text(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = "--text" if name == "eval" else "--calibration"
    arguments = [a for a in MAKERS[name] if a not in ("--text", "text.txt")]
    refused(folder, [a.replace("MODEL", "models/base") for a in arguments] + [flag, "text.txt", "-o", "text.txt"],
            "it would be lost", capsys)


@pytest.mark.parametrize(("arguments", "match"), [
    (["export", "models/base", "-o", "small"], "small is a folder, and a file is written"),
    (["imatrix", "models/base", "-o", "small"], "small is a folder, and a file is written"),
    (["eval", "models/base", "--text", "text.txt", "-o", "small"], "small is a folder, and a file is written"),
    (["quantize", "models/base", "--method", "rtn", "-o", "0.json"], "0.json is a file, and a folder is written"),
    (["quantize", "models/base", "--method", "rtn", "-o", "student"], "student is a float model, and a quantized"),
    (["prune", "models/base", "--sparsity", "0.5", "-o", "small"], "small is a quantized model, and a float model would"),
    (["export", "models/base", "--format", "onnx", "-o", "small"], "small is a quantized model, and an ONNX folder would"),
    (["export", "models/base", "-o", "0.json"], "0.json exists and was not made by llmc"),
    (["compare", "0.json", "1.json", "--page", "1.json"], "1.json is what is read"),
    (["compare", "0.json", "--page", "1.json"], "1.json is there already and is no page"),
    (["compare", "0.json", "--page", "small"], "small is a folder, and a file is written"),
    (["compare", "0.json", "--markdown", "1.json"], "1.json is there already and is no Markdown"),
    (["compare", "0.json", "--markdown", "compare.html"], "--page and --markdown both name"),
    (["bench", "small", "models/base", "-o", "a.json", "-o", "./a.json"], "two reports would have the same file"),
    (["quantize", "models/base", "--method", "rtn", "-o", "0.json/deep"], "a part of the path is a file"),
    (["quantize", "models/base", "--method", "rtn", "-o", "n" * 300], "the name is too long"),
    (["quantize", "models/base", "--method", "rtn", "-o", "."], "folder"),
    (["quantize", "models/base", "--method", "rtn", "-o", ".."], "folder"),
    (["eval", "models/base", "--text", "text.txt", "-o", os.devnull], "a device or a pipe"),
])
def test_another_kind_is_not_replaced(folder: Path, arguments: list[str], match: str,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    refused(folder, arguments, match, capsys)


def test_ship_keeps_the_report_of_its_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates = {"artifacts": ["small"], "reports": ["0.json"], "targets": {"local-cpu": {"max_size": "1GB"}}}
    (folder / "gates.yaml").write_text(yaml.safe_dump(gates))
    refused(folder, ["ship", "gates.yaml", "-o", "0"], "0.json is what is read", capsys)
    refused(folder, ["ship", "gates.yaml", "-o", "1"], "1.json is there already and is no summary", capsys)


def test_a_run_is_not_put_into_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "chain.yaml").write_text("model: models/base\nsteps: [quantize: {method: rtn}]\n")
    for command in (["run", "chain.yaml"], ["sweep", "chain.yaml", "--vary", "quantize.bits=4,8"]):
        refused(folder, [*command, "-o", "models/base/run"], "a model does not hold another", capsys)
        refused(folder, [*command, "-o", "models/base"], "is not the folder of a recipe run", capsys)


def test_what_configs_read(tmp_path: Path) -> None:
    from llmc.compress.quantize.config import QuantizeConfig

    (tmp_path / "text").write_text("x")
    config = QuantizeConfig(calibration=str(tmp_path / "text"), out=tmp_path)
    assert list(read_by(config)) == [tmp_path / "text"]
    assert list(read_by([f"mine={tmp_path / 'text'}", None, 3, "no such file"])) == [tmp_path / "text"]


def test_temporary_names_are_new_each_time_and_links_are_not_followed(tmp_path: Path) -> None:
    victim, names = tmp_path / "victim", set()
    victim.write_text("precious")
    (tmp_path / "out").symlink_to(victim)
    for old in (".out.partial", ".out.old"):  # names that could be guessed
        (tmp_path / old).symlink_to(victim)
    for _ in range(3):
        with files.staged_file(tmp_path / "out") as tmp:
            names.add(tmp.name)
            tmp.write_text("new")
    assert len(names) == 3
    assert victim.read_text() == "precious"
    assert (tmp_path / "out").read_text() == "new"
    assert not (tmp_path / "out").is_symlink()


def test_a_live_process_keeps_its_unfinished_file(tmp_path: Path) -> None:
    """Two writers of one output at once: each has a file of its own, and the last one stays."""
    with files.staged_file(tmp_path / "out") as first:
        first.write_text("first")
        with files.staged_file(tmp_path / "out") as second:
            second.write_text("second")
    assert (tmp_path / "out").read_text() == "first"
    assert listing(tmp_path) == {"out"}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX rights")
@pytest.mark.parametrize(("number", "match"), [
    (errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota"), (errno.EACCES, "no permission")])
def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, match: str) -> None:
    real = os.open

    def fails(path: str | Path, flags: int, *args: int, **options: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", fails)
    for write_ in (lambda p: check_place(p), lambda p: files.write_json(p, {}), manifest.check_output):
        with pytest.raises(UserError, match=match) as e:
            write_(tmp_path / "out")
        assert str(tmp_path / "out") in e.value.problem
        assert "-o" in e.value.hint
    assert listing(tmp_path) == set()


def test_a_disk_that_fills_up_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "report.json"
    files.write_json(place, {"old": 1})

    def full(self: Path, *args: object, **options: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"the disk is full: .*report\.json"):
        files.write_json(place, {"new": 2})
    assert files.read_json(place) == {"old": 1}
    assert listing(tmp_path) == {"report.json"}


def test_errors_about_other_files_are_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), files.staged_file(tmp_path / "out" / "report.json"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/model.safetensors")


def test_notes_that_cannot_be_kept_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".llmc").write_text("a file where the folder of notes should be")
    manifest.note_last(tmp_path / "small", "gptq")
    assert "warning: no note was kept" in capsys.readouterr().err


def test_a_note_that_is_damaged(tmp_path: Path) -> None:
    manifest.note_last(tmp_path / "small", "gptq")
    (tmp_path / ".llmc/last.json").write_text("[")
    with pytest.raises(UserError, match=r"last\.json is not valid JSON"):
        manifest.last_artifact()


def test_a_link_to_itself_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.symlink_to(out.name)
    check_place(out, [tmp_path / "other"])
    files.write_json(out, {"a": 1})
    assert not out.is_symlink()
