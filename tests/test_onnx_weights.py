"""Weights in ONNX: codes bit for bit by another reading, tables, and the forms that onnxruntime holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rounding import gptq_folder, is_decoder_linear
from safetensors.torch import load_file, save_file
from tiny import build, edit_config, edit_tensors

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnx_ir")
import onnx
from onnx_files import FLOAT_NOISE, export, onnx_logits

import llmc
from llmc.errors import UserError
from llmc.export.onnx import OnnxExportConfig, layout
from llmc.export.onnx.weights import Source, Weights
from llmc.formats import packing
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.types import BLOCK_TYPES, IntegerType, QuantizedTensor
from llmc.runtimes.torch_model import TorchModel


def matrices(folder: Path) -> dict[str, np.ndarray]:
    """Values [N, K] of every quantized matrix by its node, by the definitions of the operators and onnx's own reading."""
    model = onnx.load(folder / "model.onnx")
    stored = {t.name: t for t in model.graph.initializer}
    found = {}
    for n in model.graph.node:
        a = {x.name: onnx.helper.get_attribute_value(x) for x in n.attribute}
        if n.op_type == "MatMulNBits":
            bits, block, width = a["bits"], a["block_size"], a["K"] // a["block_size"]
            zero = np.full((a["N"], width), 1 << (bits - 1), np.float32)

            def integers(name: str, count: int, bits: int = bits, rows: int = a["N"]) -> np.ndarray:
                raw = onnx.numpy_helper.to_array(stored[name]).reshape(rows, -1)
                return np.array([[(int(r[i * bits // 8]) >> (i * bits % 8)) & ((1 << bits) - 1) for i in range(count)]
                                 for r in raw], np.float32)

            if len(n.input) > 3:
                zero = integers(n.input[3], width)
            codes = integers(n.input[1], a["K"]).reshape(a["N"], width, block)
            scales = onnx.numpy_helper.to_array(stored[n.input[2]]).reshape(a["N"], width, 1)
            found[n.name] = ((codes - zero[..., None]) * scales).reshape(a["N"], -1)
        elif n.op_type == "DequantizeLinear" and a["axis"] == 0:
            q, s, *z = (onnx.numpy_helper.to_array(stored[i]).astype(np.float32) for i in n.input)
            wide = [np.repeat(x, a["block_size"], 0) for x in (s, *z)]
            found[n.name.removesuffix("/DequantizeLinear")] = ((q - (wide[1] if z else 0)) * wide[0]).T
    return found


def node_values(source: dict[str, QuantizedTensor], layer: int, name: str) -> np.ndarray:
    """The checkpoint's values for one of llama's nodes."""
    prefix = f"model.layers.{layer}."
    linears = ([f"self_attn.{x}_proj" for x in "qkv"] if name == "attn/qkv_proj"
               else [name.replace("attn/", "self_attn.").replace("/", ".")])
    return np.concatenate([source[prefix + x].dequantize().numpy() for x in linears])


@pytest.mark.parametrize("int4", ["nbits", "qdq"])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [
    (4, 32, True), (4, 64, False), (4, 128, True), (8, 32, False), (8, 64, True), (8, 128, False), (4, 32, False)])
def test_codes_are_carried_bit_for_bit(bits: int, group_size: int, symmetric: bool, int4: str, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", hidden_size=128)
    source = gptq_folder(folder, tmp_path / "q", IntegerType(bits, group_size, symmetric))
    report = export(tmp_path / "q", int4=int4)
    assert report["verified"]["code_weights"] == sum(q.codes.numel() for q in source.values())
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    found = matrices(tmp_path / "q-onnx")
    for layer in range(2):
        for name in ("attn/qkv_proj", "attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"):
            expected = node_values(source, layer, name)
            assert np.array_equal(found[f"/model/layers.{layer}/{name}/MatMul"], expected)
    kinds = {n.op_type for n in onnx.load(tmp_path / "q-onnx" / "model.onnx", load_external_data=False).graph.node}
    assert ("MatMulNBits" in kinds) == (int4 == "nbits")


def test_qdq_gives_the_same_logits(tmp_path: Path) -> None:
    gptq_folder(build("mistral", tmp_path / "m"), tmp_path / "q", IntegerType(4, 32, False))
    ids = np.random.default_rng(0).integers(2, 512, 40)
    for int4 in ("nbits", "qdq"):
        export(tmp_path / "q", int4=int4, out=tmp_path / int4)
    ours = TorchModel(tmp_path / "q", context=64, threads=1).logits(ids)
    a, b = (onnx_logits(tmp_path / int4, ids) for int4 in ("nbits", "qdq"))
    assert np.abs(a - b).max() < FLOAT_NOISE * np.abs(a).max()
    assert np.corrcoef(a.ravel(), ours.ravel())[0, 1] > 0.999, "torch has the tables in float: only near"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_bits", [4, 8, 16])
def test_tables(tied: bool, head_bits: int, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", tie_word_embeddings=tied)
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q", head_bits=head_bits)
    assert report["tied"] == tied
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    tables = report["forms"][f"int{head_bits}-sym-g32" if head_bits < 16 else "fp16"]
    assert tables == (1 if tied else 2) + (8 if head_bits == 4 else 0) + (2 if head_bits == 4 else 0)


@pytest.mark.parametrize(("tied", "bits", "forms"), [
    (True, 4, {"int4-sym-g32": 10, "int8-sym-g32": 1}), (False, 4, {"int4-sym-g32": 11, "int8-sym-g32": 1}),
    (False, 8, {"int8-sym-g32": 12})])
def test_the_ends_go_with_the_decoder(tied: bool, bits: int, forms: dict[str, int], tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", tie_word_embeddings=tied)
    gptq_folder(folder, tmp_path / "q", IntegerType(bits, 32))
    report = export(tmp_path / "q")
    assert report["forms"] == forms
    assert report["logits"]["relative_error"] < FLOAT_NOISE


def test_qdq_has_no_lookup_of_4_bits(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", tie_word_embeddings=False)
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q", int4="qdq")
    assert report["forms"]["int8-sym-g32"] == 2
    with pytest.raises(UserError, match="--head-bits 4 with --int4 qdq"):
        export(tmp_path / "q", int4="qdq", head_bits=4)


@pytest.mark.parametrize("says_tied", [True, False])
def test_a_head_that_repeats_the_embedding_is_stored_once(says_tied: bool, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, tie_word_embeddings=says_tied)
    report = export(folder)
    assert report["tied"]
    assert report["forms"] == {"fp16": 11}
    if says_tied:
        save_file({**tensors, "lm_head.weight": embedding + 1}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"its lm_head\.weight differs"):
            export(folder)


@pytest.mark.parametrize(("head_bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
def test_the_head_has_the_codes_of_a_gguf(head_bits: int, kind: str, tmp_path: Path) -> None:
    """--head-bits 4 and 8 round as the export to GGUF rounds its Q4_0 and Q8_0: the same table in both files."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType as Kind

    from llmc.export.gguf import blocks

    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 64)[:, None]
    w[3] = 0
    w[4, :40] = 0
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"lm_head.weight": w}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    config = OnnxExportConfig(model=folder, out=tmp_path / "out", head_bits=head_bits)
    sources = {"lm_head": Source((64, 96), lambda: w)}
    weights = Weights(config, Checkpoint.open(folder), "lm_head", "lm_head", sources)
    q = weights.source("lm_head")
    data = blocks.encode_float("output.weight", w, Kind[kind])
    assert np.array_equal(q.dequantize().numpy(), quants.dequantize(data, Kind[kind]))
    assert np.array_equal(q.codes.numpy(), packing.unpack(data, BLOCK_TYPES[kind.lower()]).codes.numpy())
    plain = quants.dequantize(quants.quantize(w.numpy(), Kind[kind]), Kind[kind])
    searched, rounded = (np.square(x - w.numpy()).sum() for x in (q.dequantize().numpy(), plain))
    assert searched < rounded if head_bits == 4 else searched == rounded


def test_mixed_types_of_one_layer_are_not_joined(tmp_path: Path) -> None:
    """Only some linears quantized: Q, K and V are joined where they can be and apart where not."""
    folder = build("llama", tmp_path / "m")
    gptq_folder(folder, tmp_path / "q", IntegerType(4, 32),
                chosen=lambda n: is_decoder_linear(n) and "layers.1.self_attn.v" not in n)
    report = export(tmp_path / "q")
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    nodes = {n.name: n.op_type for n in onnx.load(tmp_path / "q-onnx" / "model.onnx", load_external_data=False).graph.node}
    assert nodes["/model/layers.0/attn/qkv_proj/MatMul"] == "MatMulNBits"
    assert nodes["/model/layers.1/attn/q_proj/MatMul"] == "MatMulNBits"
    assert nodes["/model/layers.1/attn/v_proj/MatMul"] == "MatMul"


@pytest.mark.parametrize("qtype", ["q4_0", "q8_0"])
def test_blocks_that_onnx_holds(qtype: str, tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", dtype=torch.float16)
    llmc.quantize(folder, type=qtype, method="rtn", out=tmp_path / "b")
    report = export(tmp_path / "b")
    assert report["verified"]["code_matrices"] == 10
    assert report["logits"]["relative_error"] < FLOAT_NOISE


def test_blocks_that_onnx_does_not_hold_are_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", dtype=torch.float16)
    llmc.quantize(folder, type="q5_0", method="rtn", out=tmp_path / "b")
    with pytest.raises(UserError, match=r"14 linears in q5_0 .*its nearest types: q8_0") as e:
        export(tmp_path / "b")
    assert "llmc quantize MODEL --bits 8" in e.value.hint
    assert not (tmp_path / "b-onnx").exists()


def test_a_scale_is_repeated_for_blocks_that_onnx_runtime_likes() -> None:
    assert layout.held_as(IntegerType(4, 256)) == IntegerType(4, 128)
    assert layout.held_as(IntegerType(4, 96, False)) == IntegerType(4, 32, False)
    assert layout.held_as(IntegerType(8, 8)) is None
    q = QuantizedTensor(IntegerType(4, 96, False), torch.randint(0, 16, (3, 192), dtype=torch.uint8),
                        torch.rand(3, 2).half(), torch.randint(0, 16, (3, 2), dtype=torch.uint8))
    held = layout.exact(q)
    assert held is not None
    assert torch.equal(held.dequantize(), q.dequantize())


def test_q4_1_is_held_where_its_minimum_is_a_whole_number_of_steps() -> None:
    from llmc.formats.types import BLOCK_TYPES, BlockTensor

    codes = torch.randint(0, 16, (2, 64), dtype=torch.uint8)
    d = torch.tensor([[0.5, 0.25], [1.0, 0.0]]).half()
    whole = BlockTensor(BLOCK_TYPES["q4_1"], codes, d, torch.tensor([[-1.5, 0.0], [-15.0, 0.0]]).half())
    held = layout.exact(whole)
    assert held is not None
    assert torch.equal(held.dequantize(), whole.dequantize())
    for m in (-1.6, 0.5, -8.0):  # between steps, above zero, more than 15 steps
        assert layout.exact(BlockTensor(BLOCK_TYPES["q4_1"], codes, d, torch.full((2, 2), m).half())) is None


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    with edit_tensors(folder) as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    with pytest.raises(UserError, match=r"up_proj holds values beyond float16"):
        export(folder, dtype="fp16")
    assert not (tmp_path / "m-onnx").exists()
