"""llama.cpp's converter, from the source archive of the installed llama-cpp-python.

So the converter, the names and types of tensors, and the runtime that reads the file are of one llama.cpp. `llmc setup
converter` unpacks the converter into llmc's cache. This is the only network use, and the code is run only by an export.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any

from llmc.console import say
from llmc.errors import UserError
from llmc.files import cache_folder, publish_folder, read_json, sha256, work_folder, write_json

PACKAGE = "llama-cpp-python"
SETUP = "llmc setup converter"
SCRIPT = "convert_hf_to_gguf.py"
ROOT = "vendor/llama.cpp/"
WANTED = (SCRIPT, "conversion/", "gguf-py/gguf/", "models/templates/", "LICENSE")  # below ROOT; `conversion` reads templates
NOTE = "archive.json"
PART = re.compile(r"(?!\.\.?$)[\w.+-]+")  # a name of a file or folder that is unpacked
LARGEST = 64 << 20  # bytes of all files; llama.cpp of 2026 has 3 MB
PATIENCE = 3600  # seconds for the download


def installed() -> str | None:
    """The version of the installed llama-cpp-python, as an index names it; None if it is not installed."""
    try:
        return metadata.version(PACKAGE).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def find_converter() -> Path | None:
    """The folder of the converter for the installed llama-cpp-python; None if it was not set up."""
    version = installed()
    folder = _place(version) if version else None
    return folder if folder and (folder / NOTE).is_file() else None


def setup_converter(sdist: Path | None = None) -> dict[str, Any]:
    """Unpack the converter of the installed llama-cpp-python into the cache, where `find_converter` finds it.

    sdist: its source archive; None: download it from the package index that pip uses. Returns {'path', 'version', 'new'
    (False: it was there), and of a download 'url', 'algorithm', 'digest'}. Raises UserError.
    """
    if (version := installed()) is None:
        raise UserError(f"{PACKAGE} is not installed, and the converter must fit it", "pip install 'llmc-toolkit[gguf]'")
    if found := find_converter():
        return {"path": str(found), "new": False, **read_json(found / NOTE)}
    with work_folder(_place(version), "set LLMC_CACHE to another folder") as work:
        if sdist is None:
            sdist = work / "archive.tar.gz"
            origin = _download(version, sdist)
        else:
            origin = _given(version, sdist)
        folder = work / "converter"
        folder.mkdir()
        unpack(sdist, version, folder)
        write_json(folder / NOTE, {"package": PACKAGE, "version": version, **origin})
        publish_folder(folder, _place(version))
    return {"path": str(_place(version)), "new": True, "package": PACKAGE, "version": version, **origin}


def _place(version: str) -> Path:
    return cache_folder() / "llama.cpp" / version


def _given(version: str, sdist: Path) -> dict[str, str]:
    if not sdist.is_file():
        raise UserError(f"there is no file {sdist}", f"give the source archive of {PACKAGE} {version}")
    return {"url": str(sdist), "algorithm": "sha256", "digest": sha256(sdist)}


def _download(version: str, out: Path) -> dict[str, str]:
    """Download the source archive as pip would; returns its origin. Raises UserError."""
    say(f"downloading the source of {PACKAGE} {version} from the package index of pip")
    hint = f"get the file {PACKAGE.replace('-', '_')}-{version}.tar.gz and run `{SETUP} --sdist FILE`"
    try:
        done = subprocess.run([sys.executable, "-m", "llmc.sources.fetch_sdist", PACKAGE, version, str(out)],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=PATIENCE,
                              check=False)
    except subprocess.TimeoutExpired as e:
        raise UserError(f"the download of {PACKAGE} {version} did not end in {PATIENCE:,} seconds", hint) from e
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"{PACKAGE} {version} was not downloaded: {lines[-1] if lines else 'pip printed nothing'}", hint)
    origin: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return origin


def unpack(sdist: Path, version: str, folder: Path) -> None:
    """Unpack the files of WANTED from the source archive of `version` into `folder`. Raises UserError.

    The archive may be hostile: only plain files with plain names are written, and not more than LARGEST bytes."""
    wrong = f"give the source archive of {PACKAGE} {version}"
    found: str | None = None
    total = 0
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                root, _, inside = member.name.partition("/")
                if inside == "PKG-INFO":
                    found = _version(archive, member)
                name = inside.removeprefix(ROOT)
                if inside == name or not name.startswith(WANTED) or member.isdir():
                    continue
                total += member.size
                if not member.isreg() or not all(map(PART.fullmatch, (root, *name.split("/")))) or total > LARGEST:
                    raise UserError(f"{sdist} has a file that is not unpacked: {member.name!r}", wrong)
                out = folder / name
                out.parent.mkdir(parents=True, exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None
                out.write_bytes(source.read())
    except (tarfile.TarError, EOFError, OSError) as e:
        raise UserError(f"{sdist} cannot be unpacked: {e}", wrong) from e
    if found != version:
        raise UserError(f"{sdist} is of version {found or 'unknown'}, and {PACKAGE} {version} is installed", wrong)
    if missing := [name for name in WANTED[:3] if not (folder / name).exists()]:
        raise UserError(f"{sdist} has no {ROOT}{missing[0]}", "try a newer llama-cpp-python")


def _version(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    """The version that the archive's metadata name."""
    source = archive.extractfile(member)
    match = source and re.search(rb"^Version: (\S+)", source.read(1 << 20), re.MULTILINE)
    return match[1].decode(errors="replace") if match else None


def converter_architectures(folder: Path) -> frozenset[str]:
    """The text architectures that the converter of a llama.cpp checkout knows. Its code is read and not executed."""
    path = folder / "conversion" / "__init__.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as e:
        raise UserError(f"{folder} has no readable conversion/__init__.py: {e}",
                        "give the folder of a llama.cpp checkout of 2026 or later") from e
    tables = [node.value for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)
              and isinstance(node.target, ast.Name) and node.target.id == "TEXT_MODEL_MAP"]
    if not tables:
        raise UserError(f"{path} has no TEXT_MODEL_MAP", "give the folder of a llama.cpp checkout of 2026 or later")
    return frozenset(ast.literal_eval(tables[0]))
