"""The onnxruntime runtime against torch, on folders that onnxruntime-genai's model builder made of tiny models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper
from onnx_files import IDS, NOISE, convert, plain_decoder

from llmc.about import inspection
from llmc.cli import run
from llmc.errors import UserError
from llmc.evals.bench.config import BenchConfig
from llmc.evals.bench.run import bench
from llmc.evals.report.schema import Report
from llmc.evals.report.show import speed_lines
from llmc.evals.report.store import read_report
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.genai_config import QDQ_LEVEL
from llmc.formats.onnx_folder import open_onnx
from llmc.runtimes import onnx_model, onnx_session
from llmc.runtimes.onnx_model import PRODUCTS, OnnxModel
from llmc.runtimes.open import open_runtime
from llmc.runtimes.torch_model import TorchModel
from llmc.typed_dicts import differences

# the families of tests/tiny.py that the builder knows (of gemma3_text it cannot read transformers 5's rotary parameters)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
SHORT = {"phi3": {"original_max_position_embeddings": 256}}  # no second set of rotary factors for long texts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [True, False])
def test_logits_are_torchs(family: str, share: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.build(family, tmp_path / "base", **SHORT.get(family, {}))
    expected = TorchModel(folder, 128, 1).logits(IDS)
    monkeypatch.setattr(onnx_model, "BATCH", 37)  # neither the length nor the start is a multiple
    runtime = OnnxModel(convert(folder, tmp_path / "onnx"), 128, 1, share=share)
    assert runtime.describe()["kv"]["shared"] is share
    np.testing.assert_allclose(runtime.logits(IDS), expected, **NOISE)
    np.testing.assert_allclose(runtime.logits(IDS, start=50), expected[50:], **NOISE)
    for _ in range(2):  # prefill empties the cache
        np.testing.assert_allclose(runtime.prefill(IDS[:45]), expected[44], **NOISE)
        for i in range(45, 90):  # past the window of those that have one
            np.testing.assert_allclose(runtime.decode(int(IDS[i])), expected[i], **NOISE)


def test_the_cache_is_shared_where_attention_allows_it(converted: SimpleNamespace) -> None:
    shared, apart = OnnxModel(converted.fp32, 64, 1), OnnxModel(converted.fp32, 64, 1, share=False)
    kv = 2 * 2 * 2 * 64 * 16 * 4  # layers, keys and values, heads, tokens, width, bytes
    assert shared.describe()["kv"] == {"shared": True, "bytes": kv, "types": ["float32"]}
    assert apart.describe()["kv"] == {"shared": False, "bytes": 2 * kv, "types": ["float32"]}


def test_a_decoder_of_plain_operators_with_positions(tmp_path: Path) -> None:
    table = plain_decoder(tmp_path / "plain")
    ids = np.array([3, 1, 4, 1, 5, 2, 6, 5, 3, 5])
    expected = table[ids].cumsum(0) + np.arange(len(ids))[:, None]
    runtime = open_runtime(tmp_path / "plain", 16, 1)
    assert isinstance(runtime, OnnxModel)
    assert not runtime.describe()["kv"]["shared"]
    np.testing.assert_allclose(runtime.logits(ids), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(runtime.prefill(ids[:4]), expected[3], rtol=1e-5, atol=1e-5)
    for i in range(4, 10):
        np.testing.assert_allclose(runtime.decode(int(ids[i])), expected[i], rtol=1e-5, atol=1e-5)


def test_evaluation_and_comparison(converted: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--base", str(converted.folder), "--context", "64", "--chunks", "3", "--threads", "1", "--json"]
    for name in ("fp32", "int4"):
        assert run(["eval", str(getattr(converted, name)), *options, "-o", f"{name}.json"]) == 0
    capsys.readouterr()
    exact, coarse = (read_report(Path(f"{name}.json")) for name in ("fp32", "int4"))
    (figures,) = exact["quality"]["texts"]
    assert abs(figures["kld"]["value"]) < 1e-6
    assert figures["top1"]["value"] == 1
    assert exact["quality"]["tokenizer_agrees"]
    assert exact["artifact"]["kind"] == "onnx"
    assert exact["quality"]["runtime"]["runtime"] == "onnxruntime"
    assert coarse["quality"]["texts"][0]["kld"]["value"] > 1e-3
    assert coarse["quality"]["texts"][0]["protocol"] == figures["protocol"]
    assert run(["compare", "fp32.json", "int4.json"]) == 0
    assert run(["compare", "fp32.json", "int4.json", "--max-kld", "0.000001"]) != 0


def test_greedy_text_is_torchs(converted: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for folder in (converted.folder, converted.fp32):
        assert run(["generate", str(folder), "The import statement", "--max-tokens", "24", "--threads", "1", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["text"] == texts[1]["text"]
    assert texts[1]["tokens"] == 24


def test_tokenizer_and_ends_are_the_models(converted: SimpleNamespace) -> None:
    ours, theirs = OnnxModel(converted.fp32, 64, 1), TorchModel(converted.folder, 64, 1)
    text = "def f(x):\n\treturn  x + 12345  # naïve 日本 🙂"
    assert ours.tokenize(text).tolist() == theirs.tokenize(text).tolist()
    assert ours.detokenize(ours.tokenize(text).tolist()) == text
    assert ours.end_tokens == theirs.end_tokens == {1}
    assert ours.vocab_size == theirs.vocab_size
    assert ours.context == 64
    assert OnnxModel(converted.fp32, 100_000, 1).context == tiny.COMMON["max_position_embeddings"]


def test_bench_says_what_ran(converted: SimpleNamespace) -> None:
    (report,) = bench(BenchConfig((str(converted.int4),), prompt=20, generate=3, warmup=0, threads=1))
    assert differences(json.loads(json.dumps(report)), Report) == []
    speed = report["speeds"]["local-cpu"]
    ran = speed["runtime"]
    assert ran["session"]["intra_op_num_threads"] == ran["threads"] == 1
    assert list(ran["nodes"]) == ["CPUExecutionProvider"]
    assert ran["accuracy_levels"] == [4]
    assert "run by onnxruntime at accuracy level 4" in speed_lines(report)
    nodes = ran["nodes"]["CPUExecutionProvider"]
    assert nodes["MatMulNBits"] == open_onnx(converted.int4).operators()["MatMulNBits"]
    assert nodes["GroupQueryAttention"] == 2
    assert speed["token_bytes"] == artifact_at(converted.int4).weigh()["token_bytes"]
    assert speed["peak_rss"] > 10_000_000


def test_opening_runs_nothing(converted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the execution providers take is found at the first use, so that load time is load time."""
    profiles: list[Path] = []
    real = onnx_session.ran
    monkeypatch.setattr(onnx_session, "ran", lambda profile: profiles.append(profile) or real(profile))
    runtime = OnnxModel(converted.fp32, 128, 1)
    assert not profiles
    np.testing.assert_allclose(runtime.prefill(IDS), converted.logits[-1], **NOISE)
    runtime.decode(3)
    assert runtime.describe()["nodes"] == runtime.nodes
    assert len(profiles) == 1
    assert not profiles[0].parent.exists()


def test_a_watched_value_is_what_the_graph_computes(converted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "BATCH", 37)
    source = open_onnx(converted.fp32)
    node = next(n for n in source.proto.graph.node if n.name == "/model/layers.1/mlp/down_proj/MatMul")
    given = OnnxModel(source.edit(watched=(node.input[0], node.output[0])), 128, 1).values(IDS)
    weight = source.array(next(t for t in source.proto.graph.initializer if t.name == node.input[1]))
    np.testing.assert_allclose(given[node.output[0]], given[node.input[0]] @ weight, **NOISE)
    np.testing.assert_allclose(given["logits"], converted.logits, **NOISE)
    assert source.proto.graph.output == open_onnx(converted.fp32).proto.graph.output


def test_levels_can_be_tried_without_writing_them(converted: SimpleNamespace) -> None:
    source = open_onnx(converted.int4)
    written, same, exact, mixed = (OnnxModel(s, 128, 1) for s in (
        source, source.edit(level=4), source.edit(level=0), source.edit(level=0, head_level=4)))
    assert [m.describe()["accuracy_levels"] for m in (written, same, exact, mixed)] == [[4], [4], [0], [0, 4]]
    logits = [m.logits(IDS) for m in (written, same, exact, mixed)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > np.abs(logits[3] - logits[2]).max() > 0


def test_standard_operators_run_at_the_level_that_the_folder_asks_for(to_spoil: Path) -> None:
    """DequantizeLinear and MatMul are fused when the graph is loaded, by default with inputs rounded to int8."""
    proto = onnx.load(str(to_spoil / "model.onnx"))
    weight = next(t for t in proto.graph.initializer if "down_proj" in t.name)
    w = numpy_helper.to_array(weight)  # [128, 64]: rows are columns of the matrix
    scale = np.abs(w.reshape(4, 32, 64)).max(1) / 7
    codes = np.rint(w.reshape(4, 32, 64) / scale[:, None]).astype(np.int8).reshape(128, 64)
    name = "layers.0.mlp.down_proj.qweight"
    proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT4, codes.shape, codes.flatten()))
    proto.graph.initializer.append(numpy_helper.from_array(scale, "q.scales"))
    weight.CopyFrom(numpy_helper.from_array((codes.reshape(4, 32, 64) * scale[:, None]).reshape(128, 64), weight.name))
    onnx.save(proto, str(to_spoil / "model.onnx"))
    exact = OnnxModel(to_spoil, 128, 1)
    assert exact.describe()["accuracy_levels"] == []
    node = next(n for n in proto.graph.node if weight.name in n.input)
    at = list(proto.graph.node).index(node)
    node.input[1] = "w.dequantized"
    dequantize = helper.make_node("DequantizeLinear", [name, "q.scales"], ["w.dequantized"], axis=0, block_size=32)
    proto.graph.node.insert(at, dequantize)
    onnx.save(proto, str(to_spoil / "model.onnx"))
    coarse = OnnxModel(to_spoil, 128, 1)
    assert coarse.describe()["accuracy_levels"] == [4]
    config = json.loads((to_spoil / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"][QDQ_LEVEL] = "0"
    (to_spoil / "genai_config.json").write_text(json.dumps(config))
    asked = OnnxModel(to_spoil, 128, 1)
    assert asked.describe()["accuracy_levels"] == [0]
    np.testing.assert_allclose(asked.logits(IDS), exact.logits(IDS), **NOISE)
    assert np.abs(coarse.logits(IDS) - exact.logits(IDS)).max() > 1e-3
    assert "int4 block 32 QDQ" in inspection.inspect(to_spoil)["type"]


def test_a_gpu_that_did_no_work_is_an_error(converted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--device gpu: the installed onnxruntime has only .*CPUExecutionProvider"):
        OnnxModel(converted.fp32, 64, 1, device="gpu")
    # a provider that is in this build and takes no node of ours
    monkeypatch.setattr(onnx_session, "GPUS", {"AzureExecutionProvider": "cpu"})
    with pytest.raises(UserError, match=r"no node of .* ran on AzureExecutionProvider, all on CPUExecutionProvider"):
        OnnxModel(converted.fp32, 64, 1, device="gpu").prefill(IDS)
    # one that took the small change and left the matrix products
    products = open_onnx(converted.fp32).operators()
    left = {op: n for op, n in products.items() if op in PRODUCTS}
    for nodes, ours in (({"Cast": 3}, sum(left.values())), (left, 0)):
        cpu = left if ours else {"Gather": 1}
        monkeypatch.setattr(onnx_session, "ran", lambda profile, n=nodes, c=cpu: {"AzureExecutionProvider": n,
                                                                                   "CPUExecutionProvider": c})
        model = OnnxModel(converted.fp32, 64, 1, device="gpu")
        if ours:
            with pytest.raises(UserError, match=rf"{ours} of the {ours} matrix products of .* ran on CPUExecutionProvider"):
                model.prefill(IDS)
        else:
            assert model.nodes["AzureExecutionProvider"] == left


def test_tokens_that_do_not_fit(converted: SimpleNamespace) -> None:
    runtime = OnnxModel(converted.fp32, 32, 1)
    with pytest.raises(UserError, match="do not fit"):
        runtime.logits(np.zeros(33, np.int32))
    with pytest.raises(UserError, match=f"token {tiny.VOCAB} is not in the vocabulary"):
        runtime.prefill(np.array([3, tiny.VOCAB]))


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_without_the_packages_the_extra_is_named(converted: SimpleNamespace, module: str,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.formats import onnx_folder

    onnx_folder._load.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as e:
        OnnxModel(converted.fp32, 64, 1)
    assert e.value.hint == "pip install 'llmc-toolkit[onnx]'"
