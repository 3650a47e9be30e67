"""Reading ONNX folders: what inspect and verify say, and folders that are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper
from onnx_files import IDS, NOISE, plain_decoder

from llmc.about import inspection
from llmc.about.verification import verify
from llmc.cli import run
from llmc.errors import UserError
from llmc.files import write_json
from llmc.formats.manifest import hash_folder, new_manifest
from llmc.formats.onnx_folder import is_onnx_folder
from llmc.formats.onnx_lint import as_notes, lint
from llmc.runtimes.onnx_model import OnnxModel
from llmc.runtimes.open import open_runtime


def test_inspect(converted: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, bits in ((converted.fp32, 32), (converted.int4, 5)):  # the builder's int4 has float32 scales
        w = inspection.inspect(folder)["weights"]
        assert w["decoder_bits_per_weight"] == bits
        assert w["tied"]  # one matrix serves embedding and head
        assert w["classes"]["embedding"]["parameters"] == tiny.VOCAB * 64
        assert sum(c["bytes"] for c in w["classes"].values()) == w["tensor_bytes"]
        assert w["file_bytes"] == sum((folder / n).stat().st_size for n in ("model.onnx", "model.onnx.data"))
    found = inspection.inspect(converted.int4, tensors=True)
    assert found["matmul_nbits"] == [{"bits": 4, "block_size": 32, "symmetric": True, "accuracy_level": 4, "matrices": 11}]
    assert found["operators"]["GroupQueryAttention"] == 2
    assert found["model"] == {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "context": 256}
    assert {t["parameters"] for t in found["tensors"] if "o_proj" in t["name"]} == {64 * 64}
    assert run(["inspect", str(converted.int4)]) == 0
    page = capsys.readouterr().out
    assert "11 MatMulNBits int4 block 32, accuracy level 4" in page
    assert found["notes"] == as_notes(lint(converted.int4 / "model.onnx"))
    assert any("int8 activations (accuracy_level 4)" in note for note in found["notes"])
    assert all(f"note          {note}\n" in page for note in found["notes"])
    assert run(["inspect", str(converted.int4), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == found["notes"]


def test_verify(to_spoil: Path) -> None:
    assert verify(to_spoil)["problems"] != []  # no manifest
    write_json(to_spoil / "llmc.json", new_manifest("onnx", {"name": "tiny"}, [], outputs=hash_folder(to_spoil)))
    assert verify(to_spoil)["problems"] == []
    with (to_spoil / "model.onnx.data").open("r+b") as f:
        f.write(np.float32(np.nan).tobytes())
    problems = verify(to_spoil)["problems"]
    assert any("model.onnx.data has changed" in p for p in problems)
    assert any("holds NaN" in p for p in problems)


def edit(folder: Path, **values: str) -> None:
    """Change where the graph says that its first external weight lies."""
    proto = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    first = next(t for t in proto.graph.initializer if t.external_data)
    for entry in first.external_data:
        entry.value = values.get(entry.key, entry.value)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/hostname", "..\\outside.bin", "C:\\outside.bin",
                                      "a/../../outside.bin", "link.bin", ""])
def test_weights_outside_the_folder_are_refused(to_spoil: Path, location: str) -> None:
    (to_spoil.parent / "outside.bin").write_bytes(bytes(1 << 16))
    (to_spoil / "link.bin").symlink_to(to_spoil.parent / "outside.bin")
    edit(to_spoil, location=location, offset="0")
    with pytest.raises(UserError, match="not a file inside that folder"):
        open_runtime(to_spoil, 64, 1)
    assert run(["inspect", str(to_spoil)]) == 2
    assert any("not a file inside that folder" in p for p in verify(to_spoil)["problems"])


def test_a_graph_outside_the_folder_is_refused(to_spoil: Path) -> None:
    config = json.loads((to_spoil / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "../fp32/model.onnx"
    (to_spoil / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not a file inside that folder"):
        open_runtime(to_spoil, 64, 1)


def test_a_hub_snapshot_of_links_is_taken(converted: SimpleNamespace, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    shutil.copytree(converted.fp32, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    np.testing.assert_allclose(OnnxModel(snapshot, 128, 1).logits(IDS), converted.logits, **NOISE)


def test_incomplete_folders(to_spoil: Path, tmp_path: Path) -> None:
    data = to_spoil / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=r"model\.onnx\.data is .* bytes long, but tensor"):
        open_runtime(to_spoil, 64, 1)
    data.unlink()
    with pytest.raises(UserError, match=r"keeps its weights in model\.onnx\.data, but .* lacks that file"):
        open_runtime(to_spoil, 64, 1)
    data.write_bytes(whole)
    edit(to_spoil, length="4")
    assert any("its shape needs" in p for p in verify(to_spoil)["problems"])
    (to_spoil / "model.onnx").write_bytes((to_spoil / "model.onnx").read_bytes()[:-9])
    with pytest.raises(UserError, match="not a complete ONNX model"):
        open_runtime(to_spoil, 64, 1)
    (to_spoil / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"has no model\.onnx"):
        open_runtime(to_spoil, 64, 1)
    (to_spoil / "genai_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_runtime(to_spoil, 64, 1)


def test_what_is_no_decoder(converted: SimpleNamespace, to_spoil: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(to_spoil / "model.onnx"), load_external_data=False)
    proto.graph.input.append(helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1, 3]))
    (to_spoil / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=r"is not a decoder .*unknown inputs pixel_values"):
        open_runtime(to_spoil, 64, 1)
    plain = tmp_path / "plain"
    plain_decoder(plain)
    proto = onnx.load(str(plain / "model.onnx"))
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "scores_of_all"
    (plain / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="it lacks logits"):
        open_runtime(plain, 64, 1)
    assert not is_onnx_folder(converted.folder)
    assert is_onnx_folder(converted.fp32)
