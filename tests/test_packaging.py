"""The wheel holds every module, under the names that the code imports."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAPPED = PROJECT["tool"]["setuptools"]["package-dir"]


def contents() -> set[str]:
    """Every file of the packages by its path in the wheel: compress/text.py is llmc/compress/text.py."""
    return {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in MAPPED.items() for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that what an earlier build left in the checkout takes no part."""
    copy, dist = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for folder in MAPPED.values():
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w"]
    subprocess.run([*pip, str(dist), str(copy)], check=True)
    (built,) = dist.iterdir()
    return built


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert contents() <= names
    assert "llmc/py.typed" in names
    outside = {n for n in names if not n.startswith(("llmc/", "llmc_toolkit-"))}
    assert not outside, "nothing is installed beside the package"


def test_the_unpacked_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import llmc, llmc.formats.gptq, llmc.runtimes.base; print(llmc.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == tmp_path / "llmc"


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (info,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    text = archive.read(info).decode()
    for key, value in {"Name": "llmc-toolkit", "License-Expression": "Apache-2.0", "Requires-Python": ">=3.11",
                       "License-File": "LICENSE"}.items():
        assert f"\n{key}: {value}\n" in text
    assert {"gguf", "onnx", "optimum", "demo", "dev", "all"} <= set(PROJECT["project"]["optional-dependencies"])
    assert "llmc = llmc.cli:main" in archive.read(info.replace("METADATA", "entry_points.txt")).decode()


def pins(file: str) -> dict[str, str]:
    lines = [x for x in (ROOT / file).read_text().splitlines() if x and not x.startswith("#")]
    assert [x for x in lines if x.count("==") != 1] == []
    return {name.lower().replace("_", "-"): version for name, version in (x.split("==") for x in lines)}


@pytest.mark.parametrize(("file", "extra"), [("constraints.txt", "dev"), ("constraints.txt", "distill"),
                                               ("constraints-optimum.txt", "optimum")])
def test_every_pin_is_exact_and_every_dependency_is_pinned(file: str, extra: str) -> None:
    pinned = pins(file)
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = PROJECT["project"]["dependencies"] + extras["gguf"] + extras["dev"] + extras[extra]
    names = {x.split(">")[0].lower().replace("_", "-") for x in wanted if not x.startswith("llmc-toolkit")}
    assert names <= pinned.keys()


def test_the_extra_optimum_changes_no_other_pin() -> None:
    new, old = pins("constraints.txt"), pins("constraints-optimum.txt")
    assert {n for n in old if old[n] != new.get(n)} == {
        "huggingface-hub", "optimum", "optimum-onnx", "tokenizers", "transformers"}


# what is imported under another name than it is installed by (datasets is asked for by --calibration hf:NAME, pip by
# `llmc setup converter` in a child; conversion is a package of llama.cpp's converter)
IMPORTS = {"yaml": "pyyaml", "llama_cpp": "llama-cpp-python", "google": "protobuf", "datasets": "",
           "pip": "", "conversion": "",
           "tokenizers": "transformers", "optimum": "optimum-onnx"}


def test_no_import_is_owed_to_somebody_elses_dependency() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    declared = {x.split(">")[0].lower() for x in [*PROJECT["project"]["dependencies"], *extras["gguf"], *extras["onnx"],
                                                  *extras["optimum"], *extras["distill"], *extras["ray"]]}
    imported: set[str] = set()
    for folder in MAPPED.values():
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported.add(node.module.split(".")[0])
    outside = imported - set(sys.stdlib_module_names) - {"llmc"}
    assert {IMPORTS.get(name, name).replace("_", "-") for name in outside} - {""} <= declared
