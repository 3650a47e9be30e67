"""`--exporter transformers`: a traced graph of standard operators, held against torch, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import build

pytest.importorskip("transformers.exporters", reason="transformers 5.23 has the exporters")
pytest.importorskip("onnxscript", reason="transformers' exporter needs onnxscript: pip install 'llmc-toolkit[trace]'")
pytest.importorskip("onnxruntime_genai")
from onnx_files import FLOAT_NOISE
from rounding import gptq_folder

from llmc.errors import UserError
from llmc.export.onnx import OnnxExportConfig, export_onnx
from llmc.formats.types import IntegerType
from llmc.runtimes.onnx_model import OnnxModel
from llmc.runtimes.torch_model import TorchModel


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_graph_is_torchs_in_standard_operators(family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "m")
    report = export_onnx(OnnxExportConfig(model=folder, out=tmp_path / "x", exporter="transformers", threads=1))
    assert report["exporter"] == "transformers"
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    assert report["cached_logits"]["relative_error"] < FLOAT_NOISE
    assert not any("." in operator for operator in report["operators"])
    ids = np.random.default_rng(0).integers(2, 512, 90)  # longer than the traced text and than Gemma's window
    ours = TorchModel(folder, context=128, threads=1).logits(ids)
    assert np.abs(ours - OnnxModel(tmp_path / "x", 128, 1).logits(ids)).max() < 1e-4


def test_codes_are_written_as_values_only_if_asked(tmp_path: Path) -> None:
    gptq_folder(build("llama", tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    with pytest.raises(UserError, match="is quantized, and --exporter transformers writes float32"):
        export_onnx(OnnxExportConfig(model=tmp_path / "q", out=tmp_path / "x", exporter="transformers"))
    with pytest.raises(UserError, match="--head-bits with --exporter transformers, which writes float32"):
        OnnxExportConfig(exporter="transformers", head_bits=8)
