"""Architectures of llama.cpp's converter, and text models of multimodal ones, from a folder to a proved file.

`make test-models` runs these too, and writes what was proved for `llmc models`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import converted
import gguf_files
import proofs
import pytest
from gguf_files import needs_converter

import llmc

pytestmark = [pytest.mark.models, needs_converter, pytest.mark.usefixtures("quick_converter")]
quick_converter = converted.quick_converter


@pytest.fixture(scope="module", autouse=True)
def _written() -> Iterator[None]:
    yield
    proofs.write()


@pytest.mark.parametrize("name", converted.MODELS)
def test_gguf(name: str, tmp_path: Path) -> None:
    """Both files pass the exporter's proofs, and the float one a narrower bound; the codes are carried."""
    with proofs.converting(converted.MODELS[name][0]) as figures:
        base = converted.build(name, tmp_path / "m")
        report = gguf_files.export(base)
        figures["kld"] = report["logits"]["mean_kld"]
        assert figures["kld"] <= 1e-4
        llmc.quantize(base, method="rtn", out=tmp_path / "q", threads=1)
        report = gguf_files.export(tmp_path / "q")
        figures["kld_4_bits"] = report["logits"]["mean_kld"]
        assert report["verified"]["code_weights"] > report["parameters"] / 10
