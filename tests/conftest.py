"""Fixed thread count and no network for every test; artifacts that are made once and only read."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import tiny
import torch
from light import pytest_addoption, pytest_collection_modifyitems, pytest_ignore_collect  # noqa: F401

import llmc
from llmc import precision
from llmc.compress import layer_run
from llmc.console import set_quiet

pytest.register_assert_rewrite("ggml", "killing")  # helpers that assert for the tests


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Commands leave notes in the working folder: each test has its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _not_quiet() -> None:
    """`--json` and `--quiet` of an earlier test hold for the whole process."""
    set_quiet(False)


@pytest.fixture
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 in float32, also where this machine would take bfloat16."""
    for module in (precision, layer_run):
        monkeypatch.setattr(module, "matmul_precision", lambda: "ieee")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text to calibrate on. Read only."""
    return tiny.write_text(tmp_path_factory.mktemp("text") / "calibration.txt")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny Llama and what llmc makes of it: `.base` (folder), `.gptq` (folder, RTN), `.gguf` (file). Read only."""
    folder = tmp_path_factory.mktemp("made")
    with contextlib.chdir(folder):  # notes of the newest artifact stay out of the checkout
        base = tiny.build("llama", folder / "base", dtype=torch.float16)
        (base / "README.md").write_text("---\nlicense: mit\nbase_model: someone/tiny\n---\n")
        llmc.quantize(base, method="rtn", out=folder / "small")
        llmc.export(folder / "small", format="gguf", out=folder / "small.gguf")
    return SimpleNamespace(base=base, gptq=folder / "small", gguf=folder / "small.gguf")


@pytest.fixture(scope="session")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(float base, its RTN model, a text), to heal. Read only."""
    folder = tmp_path_factory.mktemp("rounded")
    with contextlib.chdir(folder):
        base = tiny.build("llama", folder / "base")
        llmc.quantize(base, method="rtn", out=folder / "small", threads=2)
    return base, folder / "small", tiny.write_text(folder / "text.txt")


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(teacher of 3 layers, student of 2 of them, a text), to distill. Read only."""
    from training import drop_layer

    folder = tmp_path_factory.mktemp("distill")
    teacher = tiny.build("llama", folder / "teacher", num_hidden_layers=3)
    return teacher, drop_layer(teacher, folder / "student", 1), tiny.write_text(folder / "text.txt")


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny float model of a family whose rows every type fits. Read only."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            inner = {"n_inner": 512} if family == "gpt2" else {}
            made[family] = tiny.build(family, tmp_path_factory.mktemp(family) / "m", hidden_size=256, intermediate_size=512,
                                      **inner)
        return made[family]

    return get


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny Llama of 4 bits and what ONNX makes of it: `.q`, `.out` (folders), `.source` (codes), `.report`. Read only."""
    from onnx_files import export
    from rounding import gptq_folder

    from llmc.formats.types import IntegerType

    folder = tmp_path_factory.mktemp("onnx")
    source = gptq_folder(tiny.build("llama", folder / "m"), folder / "q", IntegerType(4, 32))
    (folder / "q" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with contextlib.chdir(folder):
        report = export(folder / "q", accuracy_level="auto")
    return SimpleNamespace(source=source, q=folder / "q", out=folder / "q-onnx", report=report)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny Llama as a folder, as ONNX in float32 and in the builder's own int4, and torch's logits for IDS. Read only."""
    from onnx_files import IDS, convert

    from llmc.runtimes.torch_model import TorchModel

    work = tmp_path_factory.mktemp("converted")
    folder = tiny.build("llama", work / "base")
    return SimpleNamespace(folder=folder, fp32=convert(folder, work / "fp32"), int4=convert(folder, work / "int4", "int4"),
                           logits=TorchModel(folder, 128, 1).logits(IDS))


@pytest.fixture
def to_spoil(converted: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the float32 folder that is `converted`, to spoil."""
    return Path(shutil.copytree(converted.fp32, tmp_path / "copy"))


@pytest.fixture
def two_reports(tmp_path: Path) -> list[Path]:
    """Reports of a base and of a smaller artifact, in files to spoil."""
    from reports import whole, write

    return write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), whole("small", 250_000, 5, 0.2, 30.0, layers=4))
