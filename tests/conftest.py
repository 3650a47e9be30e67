"""Fixed thread count and no network for every test."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import tiny
import torch

import llmc


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Commands leave notes in the working folder: each test has its own."""
    monkeypatch.chdir(tmp_path)


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
