"""ONNX export from end to end: every family against torch, codes bit for bit by another reading, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rounding import gptq_folder, is_decoder_linear
from safetensors.torch import load_file, save_file
from tiny import build, edit_config

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("onnx_ir")
import onnx
import onnxruntime

import llmc
from llmc.cli import run
from llmc.errors import UserError
from llmc.export.onnx import OnnxExportConfig, export_onnx, layout
from llmc.export.onnx.levels import Levels, Measured, choose
from llmc.formats.manifest import hash_folder, last_artifact, read_manifest
from llmc.formats.types import IntegerType, QuantizedTensor
from llmc.runtimes.onnx_model import OnnxModel
from llmc.runtimes.torch_model import TorchModel

# largest relative error of the logits at accuracy level 0, both sides in float32
FLOAT_NOISE = 1e-5
# Gemma's builder rounds the factor of the embedding to two decimals; 8.0 is exact for 64, 11.31 for 128 is not
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


def export(folder: Path, **options: Any) -> dict[str, Any]:
    out = options.pop("out", folder.with_name(f"{folder.name}-onnx"))
    return export_onnx(OnnxExportConfig(model=folder, out=out, threads=1, **{"accuracy_level": "0", **options}))


def onnx_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """[n, vocab] by onnxruntime alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    head = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    feed = {"input_ids": ids[None].astype(np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
    feed |= {i.name: np.zeros((1, i.shape[1], 0, head), np.float32) for i in session.get_inputs() if "past" in i.name}
    return np.asarray(session.run(["logits"], feed)[0][0])


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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_torchs_logits(family: str, tmp_path: Path) -> None:
    gptq_folder(build(family, tmp_path / "m"), tmp_path / "q", IntegerType(4, 32))
    report = export(tmp_path / "q")
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    assert report["logits"]["top1_agreement"] == 1.0
    assert report["generated"].startswith("The river's level rose")
    assert report["generated_tokens"] > 0


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2.0, 2.5, 3.0],
            "long_factor": [4.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0], "original_max_position_embeddings": 48}


@pytest.mark.parametrize(("family", "scaling", "context"), [
    ("phi3", LONGROPE, 48), ("llama", {"rope_type": "dynamic", "factor": 4.0}, 256)])
def test_a_rotary_embedding_that_depends_on_the_length(family: str, scaling: dict[str, Any], context: int,
                                                       tmp_path: Path) -> None:
    """It is right as far as nothing depends on the length, and the context ends there."""
    original = {"original_max_position_embeddings": 48} if family == "phi3" else {}
    folder = build(family, tmp_path / "m", rope_parameters={"rope_theta": 10000.0, **scaling}, **original)
    report = export(folder, dtype="fp32")
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    assert any("changes beyond 48 tokens" in n for n in report["notes"]) == (family == "phi3")
    genai = json.loads((tmp_path / "m-onnx" / "genai_config.json").read_text())
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == context
    ids = np.random.default_rng(0).integers(2, 512, context)
    ours = TorchModel(folder, context=256, threads=1).logits(ids)
    theirs = OnnxModel(tmp_path / "m-onnx", 256, 1)
    assert theirs.context == context
    assert np.abs(ours - theirs.logits(ids)).max() < 1e-4


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
        with pytest.raises(UserError, match="its head differs"):
            export(folder)


def test_the_head_has_the_codes_of_a_gguf(tmp_path: Path) -> None:
    """--head-bits 8 and 4 round as GGUF's Q8_0 and Q4_0 do: the same table in both files."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType as Kind

    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    w[3] = 0
    w[4, :40] = 0
    for bits, kind in ((8, Kind.Q8_0), (4, Kind.Q4_0)):
        blocks = quants.quantize(w.numpy(), kind)
        assert np.array_equal(layout.round_to(w, bits).dequantize().numpy(), quants.dequantize(blocks, kind))


@pytest.mark.parametrize(("dtype", "family"), [
    ("fp32", "qwen2"), ("fp16", "llama"), ("int8", "mistral"), ("fp16", "mistral")])
def test_float_models(dtype: str, family: str, tmp_path: Path) -> None:
    folder = build(family, tmp_path / "m")
    report = export(folder, dtype=dtype)
    assert report["logits"]["relative_error"] < FLOAT_NOISE, "against what the file holds"
    assert set(report["forms"]) == {"int8-sym-g32" if dtype == "int8" else dtype}
    ids = np.random.default_rng(1).integers(2, 512, 30)
    ours = TorchModel(folder, context=64, threads=1).logits(ids)
    assert np.abs(onnx_logits(tmp_path / "m-onnx", ids) - ours).max() < {"fp32": 1e-4, "fp16": 0.1, "int8": 0.5}[dtype]


def test_gguf_and_onnx_of_the_same_codes_agree(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from llmc.runtimes.llamacpp import LlamaCpp

    gptq_folder(build("llama", tmp_path / "m", hidden_size=128), tmp_path / "q", IntegerType(8, 64))
    export(tmp_path / "q")
    llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf", threads=1)
    ids = np.random.default_rng(0).integers(2, 512, 60)
    runtime = LlamaCpp(tmp_path / "q.gguf", context=64, threads=1, flash_attention=False, kv_type="f32")
    try:
        theirs = runtime.logits(ids)
    finally:
        runtime.close()
    ours = onnx_logits(tmp_path / "q-onnx", ids)
    # llama.cpp rounds activations to 8 bits where weights are quantized; the weights are the same
    assert np.sqrt(((ours - theirs) ** 2).mean() / (ours**2).mean()) < 0.05


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


# ---------------------------------------------------------------------------------------------------- types, on their own


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


# ------------------------------------------------------------------------------------------------------------ the folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("onnx")
    source = gptq_folder(build("llama", folder / "m"), folder / "q", IntegerType(4, 32))
    (folder / "q" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    report = export(folder / "q", accuracy_level="auto")
    return SimpleNamespace(source=source, q=folder / "q", out=folder / "q-onnx", report=report)


def test_the_folder_is_whole(exported: SimpleNamespace) -> None:
    names = {p.name for p in exported.out.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "chat_template.jinja",
                     "llmc.json"}
    manifest = read_manifest(exported.out)
    assert manifest is not None
    assert manifest["kind"] == "onnx"
    assert manifest["outputs"] == hash_folder(exported.out)
    assert manifest["passes"][-1]["name"] == "export-onnx"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (exported.out / name).read_bytes() == (exported.q / name).read_bytes()
    model = onnx.load(exported.out / "model.onnx", load_external_data=False)
    places = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    assert places == {"model.onnx.data"}


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


def test_it_is_the_newest_artifact(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    report = llmc.export(folder, format="onnx", accuracy_level="0", threads=1)
    assert report["path"] == "m-onnx"
    assert last_artifact() == Path("m-onnx")
    with pytest.raises(UserError, match="is an exported folder already"):
        llmc.export(format="onnx")


def test_every_end_token_is_named(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    export(folder)
    assert json.loads((tmp_path / "m-onnx" / "genai_config.json").read_text())["model"]["eos_token_id"] == [1, 7]


def test_the_chat_template_can_be_dropped_or_replaced(exported: SimpleNamespace, tmp_path: Path) -> None:
    export(exported.q, chat_template="drop", out=tmp_path / "without")
    assert not (tmp_path / "without" / "chat_template.jinja").exists()
    (tmp_path / "other.jinja").write_text("{{ other }}")
    report = export(exported.q, chat_template=str(tmp_path / "other.jinja"), out=tmp_path / "with")
    assert (tmp_path / "with" / "chat_template.jinja").read_text() == "{{ other }}"
    assert report["chat_template_sha256"] != exported.report["chat_template_sha256"]


# ---------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_unknown_families_are_named_with_the_known_ones(family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llmc does not write .* as ONNX; it writes .*LlamaForCausalLM.*Phi3ForCausalLM"):
        export(build(family, tmp_path / "m"))
    assert not (tmp_path / "m-onnx").exists()


def test_options_of_the_other_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--pre belongs to --format gguf, not to onnx"):
        llmc.export(tmp_path, format="onnx", pre="gpt-2")
    with pytest.raises(UserError, match="--head-bits belongs to --format onnx, not to gguf"):
        llmc.export(tmp_path, format="gguf", head_bits=8)


def test_the_command(exported: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(exported.q), "--format", "onnx", "-o", str(tmp_path / "x"), "--threads", "1"]
    assert run([*command, "--accuracy-level", "4", "--head-bits", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["forms"] == {"int4-sym-g32": 11}
    assert (report["accuracy_level"], report["head_accuracy_level"]) == (4, 4)
    assert run([*command, "--accuracy-level", "0", "--head-accuracy-level", "4"]) == 0
    assert "level      0, head 4: as asked; against level 0: prefill" in capsys.readouterr().out
    assert run(command) == 0
    assert "codes bit for bit" in capsys.readouterr().out
    assert run([*command, "--float-type", "f16"]) == 2, "also where the value is the default"
    assert "--float-type belongs to --format gguf" in capsys.readouterr().err


def test_options_that_contradict_the_model_are_refused(exported: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype int8 has no effect"):
        export(exported.q, dtype="int8", out=tmp_path / "x")
    with pytest.raises(UserError, match=r"--accuracy-level '2' .*--head-bits 5"):
        OnnxExportConfig(accuracy_level="2", head_bits=5)


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj holds values beyond float16"):
        export(folder, dtype="fp16")
    assert not (tmp_path / "m-onnx").exists()


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
