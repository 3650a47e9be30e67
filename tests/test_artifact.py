"""Nothing half-written ever shows, and what is written is remembered truly."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmc import files as artifact
from llmc.errors import UserError
from llmc.formats import manifest


def test_staged_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "report.json"
    with artifact.staged_file(target) as tmp:
        tmp.write_text("all of it")
        assert not target.exists()
    assert target.read_text() == "all of it"
    assert [p.name for p in target.parent.iterdir()] == ["report.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_staged_file_leaves_nothing_on_failure_and_keeps_the_old(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "small.gguf"
    target.write_text("old")

    def write() -> None:
        with artifact.staged_file(target) as tmp:
            tmp.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_publish_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    out, work = tmp_path / "small", tmp_path / ".small.work"
    out.mkdir()
    (out / "only_in_the_old").write_text("x")
    work.mkdir()
    (work / "weights").write_text("new")
    artifact.publish_folder(work, out)
    assert [p.name for p in out.iterdir()] == ["weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_publish_folder_that_cannot_remove_the_old_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "small", tmp_path / ".small.work"
    for folder, text in ((out, "old"), (work, "new")):
        folder.mkdir()
        (folder / "weights").write_text(text)
    real = artifact.os.replace

    def fails_on_publishing(src: Path, dst: Path) -> None:
        if Path(src) == work:
            raise OSError("the disk went away")
        real(src, dst)

    monkeypatch.setattr(artifact.os, "replace", fails_on_publishing)
    with pytest.raises(OSError, match="went away"):
        artifact.publish_folder(work, out)
    assert (work / "weights").read_text() == "new"
    kept = [p for p in tmp_path.rglob("weights") if p.read_text() == "old"]
    assert kept, "the older artifact is lost"


def test_hash_folder_sees_every_byte_but_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"\x00" * 3_000_000)
    (tmp_path / "llmc.json").write_text("{}")
    before = manifest.hash_folder(tmp_path)
    assert list(before) == ["sub/a"]
    with (tmp_path / "sub" / "a").open("r+b") as f:
        f.seek(2_999_999)
        f.write(b"\x01")
    assert manifest.hash_folder(tmp_path) != before


def test_check_output_refuses_what_is_not_ours(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    manifest.check_output(theirs)  # empty: free
    (theirs / "thesis.tex").write_text("ten years")
    with pytest.raises(UserError, match="was not made by llmc"):
        manifest.check_output(theirs)
    (theirs / "llmc.json").write_text("{}")
    manifest.check_output(theirs)
    file = tmp_path / "theirs.gguf"
    file.write_text("x")
    with pytest.raises(UserError, match="was not made by llmc"):
        manifest.check_output(file)


def test_check_disk_names_both_sizes(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    artifact.check_disk(tmp_path / "not" / "yet", free // 2, "quantizing")
    with pytest.raises(UserError, match=r"quantizing needs .* GB of disk at its peak and .* free") as e:
        artifact.check_disk(tmp_path / "not" / "yet", free + 10**12, "quantizing")
    assert "-o" in e.value.hint


def test_last_artifact_is_the_newest_made_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no artifact was made in this folder"):
        manifest.last_artifact()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        manifest.note_last(tmp_path / name, "gptq")
    assert manifest.last_artifact() == Path("second")
    (tmp_path / "second").rmdir()
    with pytest.raises(UserError, match="no longer exists"):
        manifest.last_artifact()


def test_damaged_manifest_is_the_users_error(tmp_path: Path) -> None:
    assert manifest.read_manifest(tmp_path) is None
    (tmp_path / "llmc.json").write_text('{"kind": "gp')
    with pytest.raises(UserError, match="not valid JSON"):
        manifest.read_manifest(tmp_path)


def test_json_is_deterministic(tmp_path: Path) -> None:
    artifact.write_json(tmp_path / "a", {"b": 1, "a": "ü"})
    artifact.write_json(tmp_path / "b", json.loads('{"a": "ü", "b": 1}'))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    """Each leaves 400 notes; none is lost to the other's temporary file."""
    code = ("from pathlib import Path\nfrom llmc.formats.manifest import note_last\n"
            "for i in range(400): note_last(Path('x'), 'hf')")
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(p.communicate()[1], p.returncode) for p in processes] == [("", 0)] * 2
    assert [p.name for p in (tmp_path / ".llmc").iterdir()] == ["last.json"]
