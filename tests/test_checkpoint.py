"""Bad model folders: each is one clear error, before any weight is used."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import edit_tensors

from llmc.errors import UserError
from llmc.formats.checkpoint import INDEX, Checkpoint


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.build("llama", tmp_path_factory.mktemp("sharded"), max_shard_size="100KB")
    assert (folder / INDEX).is_file()
    return folder


@pytest.fixture
def model(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def edit_index(folder: Path, **where: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= where
    (folder / INDEX).write_text(json.dumps(index))


def test_tensors_are_as_safetensors_reads_them(sharded: Path) -> None:
    ckpt = Checkpoint.open(sharded)
    assert len(ckpt.files) > 1
    expected = {}
    for shard in ckpt.files:
        with safe_open(shard, framework="pt") as f:
            expected |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
    assert set(ckpt.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(ckpt.tensor(name), tensor)
        assert (ckpt.shape(name), ckpt.dtype(name)) == (tuple(tensor.shape), "F32")
        assert ckpt.nbytes(name) == tensor.nbytes


def test_missing_shard_is_named(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        Checkpoint.open(model)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_half_downloaded_shard(model: Path, keep: int) -> None:
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"the download is incomplete|not a complete safetensors file|damaged"):
        Checkpoint.open(model)


@pytest.mark.parametrize("header", [b"\xff" * 32, b"[]", b'{"a": 1}', b'{"a": {"data_offsets": []}}'])
def test_header_of_garbage(model: Path, header: bytes) -> None:
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    with pytest.raises(UserError, match="damaged"):
        Checkpoint.open(model)


OUTSIDE = ("../secret.safetensors", "/etc/passwd", "..", "sub\\x.safetensors", "weights.bin", "")


@pytest.mark.parametrize("where", OUTSIDE)
def test_index_that_points_outside(model: Path, where: str) -> None:
    (model.parent / "secret.safetensors").write_bytes(sorted(model.glob("*.safetensors"))[0].read_bytes())
    edit_index(model, **{"model.norm.weight": where})
    with pytest.raises(UserError, match="points outside the folder"):
        Checkpoint.open(model)


def test_index_that_names_a_tensor_no_shard_has(model: Path) -> None:
    edit_index(model, **{"model.layers.9.weight": sorted(model.glob("*.safetensors"))[0].name})
    with pytest.raises(UserError, match=r"model\.layers\.9\.weight"):
        Checkpoint.open(model)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}", '{"weight_map": {"a": 1, "b": "c"}}'])
def test_damaged_index(model: Path, text: str) -> None:
    (model / INDEX).write_text(text)
    with pytest.raises(UserError, match="damaged"):
        Checkpoint.open(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_only(made: SimpleNamespace, tmp_path: Path, name: str) -> None:
    shutil.copy(made.base / "config.json", tmp_path)
    torch.save({}, tmp_path / name)
    with pytest.raises(UserError, match="only pickle weights") as e:
        Checkpoint.open(tmp_path)
    assert "safetensors" in e.value.hint


def test_no_config_no_weights_no_folder(made: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a model folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    for text, complaint in (("{'model_type': 'llama'}", "not valid JSON"), ("[1]", "no JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=complaint):
            Checkpoint.open(tmp_path)
    shutil.copy(made.base / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_are_named(made: SimpleNamespace, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    folder = Path(shutil.copytree(made.base, tmp_path / "bad"))
    tensors = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    ckpt = Checkpoint.open(folder)
    with pytest.raises(UserError, match=rf"{name} .* NaN or infinity"):
        ckpt.tensor(name)
    ckpt.tensor("model.norm.weight")


def test_large_sums_are_not_taken_for_infinity(made: SimpleNamespace, tmp_path: Path) -> None:
    """The quick check sums a tensor; a sum that overflows must not condemn finite weights."""
    folder = Path(shutil.copytree(made.base, tmp_path / "large"))
    with edit_tensors(folder) as tensors:
        tensors["model.norm.weight"] = torch.full((64,), 3e38)
    assert torch.equal(Checkpoint.open(folder).tensor("model.norm.weight"), tensors["model.norm.weight"])
