"""The tensors of an unfinished run: read back bit for bit, or told to be damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from llmc.compress.calibration import Workspace
from llmc.compress.state_file import load_state, save_state
from llmc.errors import UserError

TENSORS = {"a": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "b": torch.tensor(2.5), "c": torch.zeros(0, 4),
           "d": torch.arange(5)[::2]}


def test_there_and_back(tmp_path: Path) -> None:
    save_state(tmp_path / "s", TENSORS, {"step": "3"})
    tensors, texts = load_state(tmp_path / "s")
    assert texts == {"step": "3"}
    assert tensors.keys() == TENSORS.keys()
    for name, t in TENSORS.items():
        assert tensors[name].dtype == t.dtype
        assert torch.equal(tensors[name], t)
    assert os.listdir(tmp_path) == ["s"]


def test_every_flipped_byte_is_seen(tmp_path: Path) -> None:
    save_state(tmp_path / "s", TENSORS, {"step": "3"})
    good = (tmp_path / "s").read_bytes()
    padding = range(good.rindex(b"}") + 1, good.rindex(b"}") + 1 + (8 - (good.rindex(b"}") + 1) % 8) % 8)
    for at in (i for i in range(len(good)) if i not in padding):
        (tmp_path / "s").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            load_state(tmp_path / "s")
    for damaged in (b"", good[:-1], good + b"x"):
        (tmp_path / "s").write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            load_state(tmp_path / "s")
    (tmp_path / "s").unlink()
    with pytest.raises(UserError, match="there is no file"):
        load_state(tmp_path / "s")


def test_a_large_file_that_is_none_is_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "s").open("wb") as f:
        f.truncate(3 << 30)
    monkeypatch.setattr("llmc.compress.state_file.safe_open", None)
    with pytest.raises(UserError, match="s is damaged: it is not a complete safetensors file"):
        load_state(tmp_path / "s")


@pytest.mark.parametrize("name", ["fingerprint.json", "state.json", "layers/0000.json", "layers/0000.safetensors"])
@pytest.mark.parametrize("how", ["gone", "empty", "edited"])
def test_a_run_goes_on_from_nothing_that_is_damaged(tmp_path: Path, name: str, how: str) -> None:
    work = Workspace(tmp_path / "w", {"bits": 4}, False)
    work.save_layer(0, TENSORS, {"error": 0.25})
    work.commit(1)
    again = Workspace(tmp_path / "w", {"bits": 4}, True)
    assert again.done == 1
    assert again.records() == [{"error": 0.25}]
    file = tmp_path / "w" / name
    whole = file.read_bytes()
    file.unlink()
    if how != "gone":
        edited = whole.replace(b"0.25", b"0.26").replace(b": 4", b": 5").replace(b": 1", b": 2").replace(b"F32", b"I32")
        file.write_bytes(edited if how == "edited" else b"")
    if how == "gone" and name in ("fingerprint.json", "state.json"):  # nothing says that there is something to go on with
        assert Workspace(tmp_path / "w", {"bits": 4}, True).done == 0
        return
    with pytest.raises(UserError, match=r"damaged|not valid JSON|there is no file") as e:
        Workspace(tmp_path / "w", {"bits": 4}, True)
    assert "without --resume" in e.value.hint
