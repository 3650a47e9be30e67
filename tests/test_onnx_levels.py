"""Accuracy levels: measured, chosen by what they lose and gain, and written into the graph."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import build

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnx_ir")
import onnx
from onnx_files import export

from llmc.errors import UserError
from llmc.export.onnx import OnnxExportConfig
from llmc.export.onnx.levels import Levels, Measured, choose


def test_the_level_is_chosen_by_measurement_and_written(exported: SimpleNamespace) -> None:
    report = exported.report
    levels, head_levels = levels_in(exported.out)
    assert (levels, head_levels) == ({report["accuracy_level"]}, {report["head_accuracy_level"]})
    measured = {(m["levels"]["level"], m["levels"]["head"]): m for m in report["accuracy_levels"]}
    assert list(measured) == [(0, 0), (0, 4), (4, 0), (4, 4)]
    assert measured[0, 0]["kld"] == 0
    assert measured[0, 0]["top1_agreement"] == 1
    assert all(m["kld"] > 0 for at, m in measured.items() if 4 in at), "level 4 rounds"
    assert all(m["prefill"] > m["decode"] > 0 for m in measured.values())
    assert "los" in report["accuracy_reason"] or "not faster" in report["accuracy_reason"]


def levels_in(folder: Path) -> tuple[set[int], set[int]]:
    """Accuracy levels of the decoder's MatMulNBits, and of the head's."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    found = {n.output[0]: a.i for n in model.graph.node for a in n.attribute if a.name == "accuracy_level"}
    return {v for k, v in found.items() if k != "logits"}, {v for k, v in found.items() if k == "logits"}


@pytest.mark.parametrize(("options", "measured", "written"), [
    ({"accuracy_level": "0"}, [(0, 0)], (0, 0)),
    ({"accuracy_level": "4"}, [(0, 0), (4, 4)], (4, 4)),
    ({"accuracy_level": "0", "head_accuracy_level": "4"}, [(0, 0), (0, 4)], (0, 4)),
    ({"accuracy_level": "4", "head_accuracy_level": "0"}, [(0, 0), (4, 0)], (4, 0)),
    ({"accuracy_level": "4", "head_accuracy_level": "auto"}, [(0, 0), (4, 0), (4, 4)], None),
    ({"accuracy_level": "auto", "head_accuracy_level": "0"}, [(0, 0), (4, 0)], None),
])
def test_the_head_can_have_a_level_of_its_own(options: dict[str, str], measured: list[tuple[int, int]],
                                              written: tuple[int, int] | None, exported: SimpleNamespace,
                                              tmp_path: Path) -> None:
    report = export(exported.q, out=tmp_path / "x", **options)
    assert [(m["levels"]["level"], m["levels"]["head"]) for m in report["accuracy_levels"]] == measured
    found = report["accuracy_level"], report["head_accuracy_level"]
    assert levels_in(tmp_path / "x") == ({found[0]}, {found[1]})
    assert found == written or (written is None and found in measured)
    assert ("as asked" in report["accuracy_reason"]) == (written is not None)


def test_a_head_without_a_level_of_its_own(exported: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--head-accuracy-level 4: the head is not quantized in blocks"):
        export(exported.q, head_bits=16, head_accuracy_level="4", out=tmp_path / "x")
    with pytest.raises(UserError, match="--head-accuracy-level with --int4 qdq"):
        OnnxExportConfig(int4="qdq", head_accuracy_level="4")
    report = export(exported.q, head_bits=16, accuracy_level="auto", out=tmp_path / "x")
    assert [m["levels"] for m in report["accuracy_levels"]] == [{"level": 0, "head": None}, {"level": 4, "head": None}]
    report = export(build("llama", tmp_path / "m"), dtype="fp16", head_bits=8, accuracy_level="auto")
    assert [m["levels"] for m in report["accuracy_levels"]] == [{"level": 0, "head": 0}, {"level": 0, "head": 4}]


EXACT = Measured(Levels(0, 0), 0.0, 1.0, 100.0, 10.0)


@pytest.mark.parametrize(("kld", "top1", "gain", "level"), [
    (0.001, 0.99, 2.0, 4), (0.5, 0.99, 2.0, 0), (0.001, 0.8, 2.0, 0), (0.001, 0.99, 1.0, 0), (float("nan"), 1.0, 2.0, 0)])
def test_what_decides_the_level(kld: float, top1: float, gain: float, level: int) -> None:
    other = Measured(Levels(4, 4), kld, top1, 100.0 * gain, 10.0 * gain)
    taken, reason = choose([EXACT.levels, other.levels], {m.levels: m for m in (EXACT, other)})
    assert taken.level == level
    assert ("loses too much" in reason) == (not (kld < 0.1 and top1 > 0.9))


def test_the_fastest_that_loses_little_is_taken() -> None:
    head, body, both = (Measured(Levels(*at), kld, 0.99, 100.0, decode)
                        for at, kld, decode in (((0, 4), 0.001, 90.0), ((4, 0), 0.001, 12.0), ((4, 4), 0.02, 120.0)))
    found = {m.levels: m for m in (EXACT, head, body, both)}
    taken, reason = choose(list(found), found)
    assert taken == head.levels
    assert "level 0 with the head at 4 is the fastest with a small loss: prefill 100 against 100" in reason
    assert "level 4 loses too much: a KL divergence of 0.02" in reason
    assert choose([body.levels, both.levels], found)[0] == body.levels, "both loses against level 0, not against the lowest"
