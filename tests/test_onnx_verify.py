"""ONNX folders that read back or compute otherwise are not kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnx_ir")
import onnx
from onnx_files import export

from llmc.errors import UserError


@pytest.mark.parametrize("what", ["codes", "scales", "norm"])
def test_a_file_that_reads_back_differently_is_not_kept(what: str, exported: SimpleNamespace, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.export.onnx import writer

    real = writer.write

    def damaging(model: Any, entries: Any, folder: Path) -> Any:
        own = real(model, entries, folder)
        proto = onnx.load(folder / "model.onnx", load_external_data=False)
        suffix = {"codes": "down_proj.MatMul.weight.codes", "scales": "down_proj.MatMul.weight.scales",
                  "norm": "cos_cache"}[what]
        t = next(t for t in proto.graph.initializer if t.name.endswith(suffix))
        at = next(int(e.value) for e in t.external_data if e.key == "offset")
        data = bytearray((folder / "model.onnx.data").read_bytes())
        data[at] ^= 1
        (folder / "model.onnx.data").write_bytes(data)
        return own

    monkeypatch.setattr(writer, "write", damaging)
    with pytest.raises(UserError, match="does not read back as it was written"):
        export(exported.q, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert not any(tmp_path.glob(".x*"))


def test_wrong_logits_are_not_kept(exported: SimpleNamespace, tmp_path: Path) -> None:
    """The rotary base of config.json is what the builder and torch read: a builder that read another would be seen."""
    shutil.copytree(exported.q, tmp_path / "q")
    from llmc.export.onnx import verify

    real = verify.reference_logits
    with pytest.MonkeyPatch.context() as m:
        m.setattr(verify, "reference_logits", lambda ckpt, ids, *rest: real(ckpt, ids[::-1].copy(), *rest))
        with pytest.raises(UserError, match="ONNX Runtime's logits are not torch's"):
            export(tmp_path / "q")
    assert not (tmp_path / "q-onnx").exists()
