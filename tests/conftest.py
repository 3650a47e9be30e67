"""Fixed thread count and no network for every test."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Commands leave notes in the working folder: each test has its own."""
    monkeypatch.chdir(tmp_path)
