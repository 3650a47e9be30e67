"""W8A8 in ONNX: the arithmetic against numpy, what a token's own scale means, and whole models against float ones."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import build

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnx_ir")
import onnx
import onnx_ir as ir
import onnxruntime
from onnx_files import FLOAT_NOISE, exact_int8, export, onnx_logits, saturates

import llmc
from llmc.compress.transform import scaling
from llmc.compress.transform.roles import map_layer
from llmc.errors import UserError
from llmc.export.onnx import w8a8
from llmc.formats import onnx_lint
from llmc.formats.artifacts.table import artifact_at
from llmc.runtimes.torch_model import TorchModel

IDS = np.random.default_rng(1).integers(2, 512, 60)


class Graph:
    """The part of the model builder that w8a8.nodes calls, for a graph of one linear."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}

    def make_node(self, kind: str, inputs: list[str], outputs: list[str], name: str, **attributes: Any) -> None:
        for i in inputs:
            if i.startswith("/model/constants"):
                dtype, value = i.split("/")[-2:]
                constant = ir.tensor(ast.literal_eval(value), dtype=ir.DataType[dtype])
                self.nodes[i] = onnx.helper.make_node("Constant", [], [i], value=ir.serde.serialize_tensor(constant))
        self.nodes.setdefault(name, onnx.helper.make_node(kind, inputs, outputs, name, **attributes))

    def make_value(self, name: str, dtype: ir.DataType, shape: list[Any]) -> None:
        pass


def in_onnx(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x [1, M, K], w [N, K] rounded by rows, in onnxruntime by the exporter's nodes."""
    graph, q = Graph(), w8a8.round_rows(torch.from_numpy(w))
    w8a8.nodes(graph, w8a8.Rounded("mm", "x", "y"), "w", "s", w.shape[1], w.shape[0])
    stored = [onnx.numpy_helper.from_array((q.codes.numpy().astype(np.int16) - 128).astype(np.int8).T.copy(), "w"),
              onnx.numpy_helper.from_array(q.scales[:, 0].numpy(), "s")]
    infos = [[onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [*x.shape[:2], last])]
             for n, last in (("x", w.shape[1]), ("y", w.shape[0]))]
    proto = onnx.helper.make_model(onnx.helper.make_graph(list(graph.nodes.values()), "g", *infos, stored),
                                   opset_imports=[onnx.helper.make_opsetid("", 22)], ir_version=10)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.fixture
def xw() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 7, 96)).astype(np.float32), rng.normal(size=(40, 96)).astype(np.float32)
    x[0, 2] = 0
    x[0, 3] *= 1e4
    x[0, 4, 5] = 300
    w[6] = 0
    w[7] *= 1e-6
    return x, w


@exact_int8
def test_a_linear_is_what_the_definition_says(xw: tuple[np.ndarray, np.ndarray]) -> None:
    x, w = xw
    expected = np.zeros((7, 40))
    for m, token in enumerate(x[0].astype(np.float64)):
        step = max(np.abs(token).max() / 127, 1e-30)
        for n, row in enumerate(w.astype(np.float64)):
            scale = np.abs(row).max() / 127
            codes = np.rint(row / scale) if scale else np.zeros(96)
            expected[m, n] = int(np.rint(token / step) @ codes) * step * scale
    found = in_onnx(x, w)[0]
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    assert np.array_equal(found, w8a8.linear(torch.from_numpy(x[0]), w8a8.round_rows(torch.from_numpy(w))).numpy())
    assert not found[2].any()
    assert not found[:, 6].any()


def test_a_token_has_its_own_scale(xw: tuple[np.ndarray, np.ndarray]) -> None:
    """What one token holds changes nothing of the others, and a power of two passes through it exactly."""
    x, w = xw
    louder = x.copy()
    louder[0, 1] *= 1024
    before, after = in_onnx(x, w)[0], in_onnx(louder, w)[0]
    others = np.arange(7) != 1
    assert np.array_equal(before[others], after[others])
    assert np.array_equal(before[1] * 1024, after[1])


def test_rows_are_rounded_to_nearest() -> None:
    w = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 3, 50)[:, None]
    w[3] = 0
    q = w8a8.round_rows(w)
    assert bool(((w - q.dequantize()).abs() <= 0.5001 * q.scales).all())
    assert int(q.codes.min()) >= 1, "the range is symmetric"
    assert torch.equal(q.codes.amax(1).maximum(256 - q.codes.amin(1).int())[w.abs().amax(1) > 0], torch.tensor([255] * 49))


@exact_int8
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "phi3"])
def test_whole_models(family: str, tmp_path: Path) -> None:
    """Biases, joined and cut matrices: every product is torch's, and the logits are near those of the float model."""
    folder = build(family, tmp_path / "m")
    report = export(folder, dtype="w8a8")
    products = report["logits"]["products"]
    assert products["equal"] == products["products"] > 0
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    assert products["input_error"] < FLOAT_NOISE
    ours = TorchModel(folder, context=64, threads=1).logits(IDS)
    error = np.sqrt(np.square(onnx_logits(tmp_path / "m-onnx", IDS) - ours).mean() / np.square(ours).mean())
    assert 0.002 < error < 0.1


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder m of a model with two input channels far larger than the rest, as large models have them."""
    work = tmp_path_factory.mktemp("w8a8")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(build("llama", work / "m"), dtype=torch.float32)
    for layer in model.model.layers:
        found = map_layer(model.config, layer)
        for place in found.norms:
            s = torch.ones(place.channels, dtype=torch.float64)
            s[[3, 17]] = 1 / 40
            scaling.apply_scaling(layer, place, s, found.family.offset)
    model.save_pretrained(work / "m")
    return work / "m"


@exact_int8
def test_smoothing_first_loses_less_and_is_asked_for(outliers: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    llmc.transform(outliers, scaling="smoothquant", calibration=text, samples=4, seq_len=64, out=tmp_path / "s", threads=1)
    exact = TorchModel(outliers, context=64, threads=1).logits(IDS)
    errors, hints = {}, {}
    for name, folder in (("m", outliers), ("s", tmp_path / "s")):
        report = export(folder, dtype="w8a8", out=tmp_path / f"{name}-onnx")
        errors[name] = np.square(onnx_logits(tmp_path / f"{name}-onnx", IDS) - exact).mean() ** 0.5
        hints[name] = [n for n in report["notes"] if "--scaling smoothquant" in n]
    assert errors["s"] < 0.6 * errors["m"]
    assert hints["m"]
    assert not hints["s"]


@exact_int8
def test_the_folder(outliers: Path, tmp_path: Path) -> None:
    """Standard operators for the linears, an input rounded once for all that read it, sizes, and the notes."""
    report = export(outliers, dtype="w8a8", out=tmp_path / "x", head_bits=16)
    assert report["forms"] == {"w8a8": 10, "fp16": 1}
    graph = onnx.load(tmp_path / "x" / "model.onnx", load_external_data=False).graph
    linears = [n for n in graph.node if n.op_type == "MatMulInteger"]
    assert len(linears) == 10
    assert all(n.domain == "" for n in linears)
    assert len({n.input[0] for n in linears}) == sum(n.op_type == "Round" for n in graph.node) == 8  # gate and up share
    assert not any(n.op_type == "MatMulNBits" for n in graph.node)
    assert report["accuracy_reason"] == "no matrix is quantized in blocks"
    weighed = {t.name: t for t in artifact_at(tmp_path / "x").tensors()}
    qkv = weighed["model.layers.0.attn.qkv_proj.MatMul.weight"]
    assert (qkv.type, qkv.kind, qkv.parameters, qkv.nbytes) == ("int8 rows W8A8", "attention", 128 * 64, 128 * (64 + 4))
    assert "saturation" in {f.rule for f in onnx_lint.lint(tmp_path / "x" / "model.onnx")}
    assert llmc.inspect(tmp_path / "x")["type"] == "int8 rows W8A8"


def test_other_products_are_not_kept(outliers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a CPU whose products saturate: here it is the other side that is off by a code in one weight."""
    real = w8a8.linear

    def off(x: torch.Tensor, q: Any) -> torch.Tensor:
        q.codes[0, 0] ^= 1
        return real(x, q)

    monkeypatch.setattr(w8a8, "linear", off)
    with pytest.raises(UserError, match=r"other products than torch at /model/layers\.0") as e:
        export(outliers, dtype="w8a8", out=tmp_path / "x")
    assert "VNNI" in e.value.hint
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(not saturates(), reason="int8 products are exact on this CPU")
def test_a_cpu_that_saturates_refuses_and_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other products than torch at") as e:
        export(build("qwen2", tmp_path / "m"), dtype="w8a8", out=tmp_path / "x")
    assert "VNNI" in e.value.hint
    assert not (tmp_path / "x").exists()
