"""llama.cpp's converter comes from the source archive of the installed llama-cpp-python, and from nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from llmc.about import doctor
from llmc.cli import run
from llmc.errors import UserError
from llmc.sources import llama_cpp
from llmc.sources.llama_cpp import find_converter, setup_converter, unpack

VERSION = llama_cpp.installed() or "0"
ROOT = f"llama_cpp_python-{VERSION}"
FILES = {"PKG-INFO": f"Metadata-Version: 2.4\nName: llama-cpp-python\nVersion: {VERSION}\n",
         "pyproject.toml": "[build-system]\nrequires = ['nothing-that-exists']\nbuild-backend = 'nothing'\n",
         "setup.py": "raise SystemExit('built')\n",
         "vendor/llama.cpp/convert_hf_to_gguf.py": "print('convert')\n",
         "vendor/llama.cpp/conversion/__init__.py": "", "vendor/llama.cpp/gguf-py/gguf/__init__.py": "",
         "vendor/llama.cpp/gguf-py/tests/test.py": "", "vendor/llama.cpp/src/llama.cpp": "int x;"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def archive(path: Path, files: dict[str, str] = FILES, *odd: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as out:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{ROOT}/{name}")
            member.size = len(text)
            out.addfile(member, io.BytesIO(text.encode()))
        for member in odd:
            out.addfile(member)
    return path


def index(folder: Path, fragment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package index in a folder: pip's configuration of this test names it, and it alone."""
    page = folder / "simple" / "llama-cpp-python"
    page.mkdir(parents=True)
    file = archive(page / f"{ROOT}.tar.gz")
    fragment = fragment.replace("RIGHT", hashlib.sha256(file.read_bytes()).hexdigest())
    (page / "index.html").write_text(f'<a href="{file.name}{fragment}">{file.name}</a>')
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", (folder / "simple").as_uri())
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)


def test_from_the_index_that_pip_uses(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    index(tmp_path, "#sha256=RIGHT", monkeypatch)
    assert find_converter() is None
    assert any(m["install"] == "llmc setup converter" for m in doctor.examine()["missing"])
    assert run(["setup", "converter", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    folder = cache / "llama.cpp" / VERSION
    assert (done["path"], done["new"], done["algorithm"]) == (str(folder), True, "sha256")
    assert find_converter() == folder
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "convert_hf_to_gguf.py", "conversion/__init__.py", "gguf-py/gguf/__init__.py", "archive.json"}
    assert not any("converter" in m["what"] for m in doctor.examine()["missing"])
    assert setup_converter()["new"] is False
    assert [p.name for p in folder.parent.iterdir()] == [VERSION]


@pytest.mark.parametrize(("fragment", "problem"), [
    (f"#sha256={'0' * 64}", "another sha256 than the package index gives"), ("", "gives no sha256"),
    ("#md5=00000000000000000000000000000000", "gives no sha256")])
def test_a_hash_that_proves_nothing(tmp_path: Path, cache: Path, fragment: str, problem: str,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    index(tmp_path, fragment, monkeypatch)
    with pytest.raises(UserError, match=problem) as e:
        setup_converter()
    assert "--sdist" in e.value.hint
    assert not list(cache.rglob("*.py*"))


def test_an_index_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index(tmp_path, "#sha256=RIGHT", monkeypatch)
    monkeypatch.setattr(llama_cpp, "installed", lambda: "99.0")
    with pytest.raises(UserError, match=r"no source archive of llama-cpp-python 99\.0"):
        setup_converter()


def test_a_given_archive(tmp_path: Path, cache: Path) -> None:
    done = setup_converter(archive(tmp_path / "a.tar.gz"))
    assert done["new"]
    assert find_converter() == cache / "llama.cpp" / VERSION
    (cache / "llama.cpp" / VERSION / "archive.json").unlink()
    with pytest.raises(UserError, match="there is no file"):
        setup_converter(tmp_path / "none.tar.gz")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    found = tarfile.TarInfo(f"{ROOT}/vendor/llama.cpp/{name}")
    found.type, found.linkname, found.size = kind, link, size
    return found


@pytest.mark.parametrize("odd", [
    member("conversion/../../../../../../evil.py"), member("conversion/link", tarfile.SYMTYPE, "/etc/passwd"),
    member("conversion/hard", tarfile.LNKTYPE, f"{ROOT}/PKG-INFO"), member("conversion/pipe", tarfile.FIFOTYPE),
    member("conversion/a b;c.py"), member("conversion/device", tarfile.CHRTYPE)])
def test_a_hostile_archive(tmp_path: Path, odd: tarfile.TarInfo) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="has a file that is not unpacked"):
        unpack(archive(tmp_path / "a.tar.gz", FILES, odd), VERSION, tmp_path / "out")
    assert not list(tmp_path.rglob("evil.py"))
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_symlink()]


def test_other_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for files, problem in (({**FILES, "PKG-INFO": "Version: 0.1\n"}, r"is of version 0\.1"),
                           ({"PKG-INFO": FILES["PKG-INFO"]}, r"has no vendor/llama\.cpp/convert_hf_to_gguf\.py")):
        with pytest.raises(UserError, match=problem):
            unpack(archive(tmp_path / "a.tar.gz", files), VERSION, tmp_path / str(len(files)))
    (tmp_path / "a.tar.gz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(tmp_path / "a.tar.gz", VERSION, tmp_path / "out")
    monkeypatch.setattr(llama_cpp, "LARGEST", 10)
    with pytest.raises(UserError, match="has a file that is not unpacked"):
        unpack(archive(tmp_path / "a.tar.gz"), VERSION, tmp_path / "out")


def test_without_llama_cpp_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "installed", lambda: None)
    assert find_converter() is None
    with pytest.raises(UserError, match="is not installed"):
        setup_converter()
