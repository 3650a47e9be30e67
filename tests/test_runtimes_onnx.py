"""The onnxruntime runtime against torch, on folders that onnxruntime-genai's model builder made of tiny models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper
from onnxruntime_genai.models.builder import create_model, parse_extra_options

from llmc.about import inspection
from llmc.about.verification import verify
from llmc.cli import run
from llmc.errors import UserError
from llmc.evals.bench.config import BenchConfig
from llmc.evals.bench.run import bench
from llmc.evals.report.show import speed_lines
from llmc.evals.report.store import read_report
from llmc.export.onnx.lint import as_notes, lint
from llmc.files import write_json
from llmc.formats.manifest import hash_folder, new_manifest
from llmc.formats.onnx_folder import QDQ_LEVEL, is_onnx_folder, open_onnx
from llmc.formats.weigh import weigh
from llmc.runtimes import onnx_model, onnx_session
from llmc.runtimes.onnx_model import PRODUCTS, OnnxModel
from llmc.runtimes.open import open_runtime
from llmc.runtimes.torch_model import TorchModel

IDS = np.arange(3, 103, dtype=np.int32) * 11 % tiny.VOCAB
# the families of tests/tiny.py that the builder knows (of gemma3_text it cannot read transformers 5's rotary parameters)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
SHORT = {"phi3": {"original_max_position_embeddings": 256}}  # no second set of rotary factors for long texts
NOISE = {"rtol": 1e-4, "atol": 1e-4}


def convert(folder: Path, out: Path, precision: str = "fp32") -> Path:
    """What `python -m onnxruntime_genai.models.builder -m FOLDER -o OUT -p PRECISION -e cpu` does."""
    options = parse_extra_options("", str(folder), str(out), precision, "cpu", str(out), [])
    create_model("", str(folder), str(out), precision, "cpu", str(out), **options)
    return out


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny Llama as a folder, as ONNX in float32 and in the builder's own int4, and torch's logits for IDS."""
    work = tmp_path_factory.mktemp("pair")
    folder = tiny.build("llama", work / "base")
    return SimpleNamespace(folder=folder, fp32=convert(folder, work / "fp32"), int4=convert(folder, work / "int4", "int4"),
                           logits=TorchModel(folder, 128, 1).logits(IDS))


@pytest.fixture
def copy(pair: SimpleNamespace, tmp_path: Path) -> Path:
    """A float32 folder to spoil."""
    return shutil.copytree(pair.fp32, tmp_path / "copy")


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


def test_the_cache_is_shared_where_attention_allows_it(pair: SimpleNamespace) -> None:
    shared, apart = OnnxModel(pair.fp32, 64, 1), OnnxModel(pair.fp32, 64, 1, share=False)
    kv = 2 * 2 * 2 * 64 * 16 * 4  # layers, keys and values, heads, tokens, width, bytes
    assert shared.describe()["kv"] == {"shared": True, "bytes": kv, "types": ["float32"]}
    assert apart.describe()["kv"] == {"shared": False, "bytes": 2 * kv, "types": ["float32"]}


def plain_decoder(folder: Path) -> np.ndarray:
    """A decoder of standard operators that takes position_ids: its logits are the running sum of its embedding's rows plus
    the position. Returns the embedding [tiny.VOCAB, 8 -> vocabulary 8]."""
    folder.mkdir()
    table = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    constants = {"table": table, "heads": np.array([1]), "minus": np.array([-1]), "zero": np.array([0]), "axis": np.array(2),
                 "past_end": np.array([1 << 30]), "two": np.array([2]), "one": np.array([1])}
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["x"]),
        node("Unsqueeze", ["x", "heads"], ["new"]),
        node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        node("CumSum", ["present.0.value", "axis"], ["sums"]),
        node("Shape", ["input_ids"], ["length"], start=1),
        node("Mul", ["length", "minus"], ["from"]),
        node("Slice", ["sums", "from", "past_end", "two"], ["last"]),
        node("Squeeze", ["last", "one"], ["scores"]),
        node("Cast", ["position_ids"], ["position"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["position", "two"], ["column"]),
        node("Add", ["scores", "column"], ["logits"]),
    ]
    ids = [helper.make_tensor_value_info(n, TensorProto.INT64, [1, "n"]) for n in ("input_ids", "position_ids")]
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "total"])
    past, present = ([helper.make_tensor_value_info(f"{side}.0.{kv}", TensorProto.FLOAT, [1, 1, f"{side}_n", 8])
                      for kv in ("key", "value")] for side in ("past_key_values", "present"))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "n", 8])
    graph = helper.make_graph(nodes, "plain", [*ids, mask, *past], [logits, *present],
                              [numpy_helper.from_array(v, k) for k, v in constants.items()])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(folder / "model.onnx"))
    return table


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


def test_evaluation_and_comparison(pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--base", str(pair.folder), "--context", "64", "--chunks", "3", "--threads", "1", "--json"]
    for name in ("fp32", "int4"):
        assert run(["eval", str(getattr(pair, name)), *options, "-o", f"{name}.json"]) == 0
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


def test_greedy_text_is_torchs(pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for folder in (pair.folder, pair.fp32):
        assert run(["generate", str(folder), "The import statement", "--max-tokens", "24", "--threads", "1", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["text"] == texts[1]["text"]
    assert texts[1]["tokens"] == 24


def test_tokenizer_and_ends_are_the_models(pair: SimpleNamespace) -> None:
    ours, theirs = OnnxModel(pair.fp32, 64, 1), TorchModel(pair.folder, 64, 1)
    text = "def f(x):\n\treturn  x + 12345  # naïve 日本 🙂"
    assert ours.tokenize(text).tolist() == theirs.tokenize(text).tolist()
    assert ours.detokenize(ours.tokenize(text).tolist()) == text
    assert ours.end_tokens == theirs.end_tokens == {1}
    assert ours.vocab_size == theirs.vocab_size
    assert ours.context == 64
    assert OnnxModel(pair.fp32, 100_000, 1).context == tiny.COMMON["max_position_embeddings"]


def test_bench_says_what_ran(pair: SimpleNamespace) -> None:
    (report,) = bench(BenchConfig((str(pair.int4),), prompt=20, generate=3, warmup=0, threads=1))
    speed = report["speeds"]["local-cpu"]
    ran = speed["runtime"]
    assert ran["session"]["intra_op_num_threads"] == ran["threads"] == 1
    assert list(ran["nodes"]) == ["CPUExecutionProvider"]
    assert ran["accuracy_levels"] == [4]
    assert "run by onnxruntime at accuracy level 4" in speed_lines(report)
    nodes = ran["nodes"]["CPUExecutionProvider"]
    assert nodes["MatMulNBits"] == open_onnx(pair.int4).operators()["MatMulNBits"]
    assert nodes["GroupQueryAttention"] == 2
    assert speed["token_bytes"] == weigh(pair.int4)["token_bytes"]
    assert speed["peak_rss"] > 10_000_000


def test_opening_runs_nothing(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the execution providers take is found at the first use, so that load time is load time."""
    profiles: list[Path] = []
    real = onnx_session.ran
    monkeypatch.setattr(onnx_session, "ran", lambda profile: profiles.append(profile) or real(profile))
    runtime = OnnxModel(pair.fp32, 128, 1)
    assert not profiles
    np.testing.assert_allclose(runtime.prefill(IDS), pair.logits[-1], **NOISE)
    runtime.decode(3)
    assert runtime.describe()["nodes"] == runtime.nodes
    assert len(profiles) == 1
    assert not profiles[0].parent.exists()


def test_a_watched_value_is_what_the_graph_computes(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "BATCH", 37)
    source = open_onnx(pair.fp32)
    node = next(n for n in source.proto.graph.node if n.name == "/model/layers.1/mlp/down_proj/MatMul")
    given = OnnxModel(source.edit(watched=(node.input[0], node.output[0])), 128, 1).values(IDS)
    weight = source.array(next(t for t in source.proto.graph.initializer if t.name == node.input[1]))
    np.testing.assert_allclose(given[node.output[0]], given[node.input[0]] @ weight, **NOISE)
    np.testing.assert_allclose(given["logits"], pair.logits, **NOISE)
    assert source.proto.graph.output == open_onnx(pair.fp32).proto.graph.output


def test_levels_can_be_tried_without_writing_them(pair: SimpleNamespace) -> None:
    source = open_onnx(pair.int4)
    written, same, exact, mixed = (OnnxModel(s, 128, 1) for s in (
        source, source.edit(level=4), source.edit(level=0), source.edit(level=0, head_level=4)))
    assert [m.describe()["accuracy_levels"] for m in (written, same, exact, mixed)] == [[4], [4], [0], [0, 4]]
    logits = [m.logits(IDS) for m in (written, same, exact, mixed)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > np.abs(logits[3] - logits[2]).max() > 0


def test_standard_operators_run_at_the_level_that_the_folder_asks_for(copy: Path) -> None:
    """DequantizeLinear and MatMul are fused when the graph is loaded, by default with inputs rounded to int8."""
    proto = onnx.load(str(copy / "model.onnx"))
    weight = next(t for t in proto.graph.initializer if "down_proj" in t.name)
    w = numpy_helper.to_array(weight)  # [128, 64]: rows are columns of the matrix
    scale = np.abs(w.reshape(4, 32, 64)).max(1) / 7
    codes = np.rint(w.reshape(4, 32, 64) / scale[:, None]).astype(np.int8).reshape(128, 64)
    name = "layers.0.mlp.down_proj.qweight"
    proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT4, codes.shape, codes.flatten()))
    proto.graph.initializer.append(numpy_helper.from_array(scale, "q.scales"))
    weight.CopyFrom(numpy_helper.from_array((codes.reshape(4, 32, 64) * scale[:, None]).reshape(128, 64), weight.name))
    onnx.save(proto, str(copy / "model.onnx"))
    exact = OnnxModel(copy, 128, 1)
    assert exact.describe()["accuracy_levels"] == []
    node = next(n for n in proto.graph.node if weight.name in n.input)
    at = list(proto.graph.node).index(node)
    node.input[1] = "w.dequantized"
    dequantize = helper.make_node("DequantizeLinear", [name, "q.scales"], ["w.dequantized"], axis=0, block_size=32)
    proto.graph.node.insert(at, dequantize)
    onnx.save(proto, str(copy / "model.onnx"))
    coarse = OnnxModel(copy, 128, 1)
    assert coarse.describe()["accuracy_levels"] == [4]
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"][QDQ_LEVEL] = "0"
    (copy / "genai_config.json").write_text(json.dumps(config))
    asked = OnnxModel(copy, 128, 1)
    assert asked.describe()["accuracy_levels"] == [0]
    np.testing.assert_allclose(asked.logits(IDS), exact.logits(IDS), **NOISE)
    assert np.abs(coarse.logits(IDS) - exact.logits(IDS)).max() > 1e-3
    assert "int4 block 32 QDQ" in inspection.inspect(copy)["type"]


def test_a_gpu_that_did_no_work_is_an_error(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--device gpu: the installed onnxruntime has only .*CPUExecutionProvider"):
        OnnxModel(pair.fp32, 64, 1, device="gpu")
    # a provider that is in this build and takes no node of ours
    monkeypatch.setattr(onnx_session, "GPUS", {"AzureExecutionProvider": "cpu"})
    with pytest.raises(UserError, match=r"no node of .* ran on AzureExecutionProvider, all on CPUExecutionProvider"):
        OnnxModel(pair.fp32, 64, 1, device="gpu").prefill(IDS)
    # one that took the small change and left the matrix products
    products = open_onnx(pair.fp32).operators()
    left = {op: n for op, n in products.items() if op in PRODUCTS}
    for nodes, ours in (({"Cast": 3}, sum(left.values())), (left, 0)):
        cpu = left if ours else {"Gather": 1}
        monkeypatch.setattr(onnx_session, "ran", lambda profile, n=nodes, c=cpu: {"AzureExecutionProvider": n,
                                                                                   "CPUExecutionProvider": c})
        model = OnnxModel(pair.fp32, 64, 1, device="gpu")
        if ours:
            with pytest.raises(UserError, match=rf"{ours} of the {ours} matrix products of .* ran on CPUExecutionProvider"):
                model.prefill(IDS)
        else:
            assert model.nodes["AzureExecutionProvider"] == left


def test_inspect(pair: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, bits in ((pair.fp32, 32), (pair.int4, 5)):  # the builder's int4 has float32 scales
        w = inspection.inspect(folder)["weights"]
        assert w["decoder_bits_per_weight"] == bits
        assert w["tied"]  # one matrix serves embedding and head
        assert w["classes"]["embedding"]["parameters"] == tiny.VOCAB * 64
        assert sum(c["bytes"] for c in w["classes"].values()) == w["tensor_bytes"]
        assert w["file_bytes"] == sum((folder / n).stat().st_size for n in ("model.onnx", "model.onnx.data"))
    found = inspection.inspect(pair.int4, tensors=True)
    assert found["matmul_nbits"] == [{"bits": 4, "block_size": 32, "symmetric": True, "accuracy_level": 4, "matrices": 11}]
    assert found["operators"]["GroupQueryAttention"] == 2
    assert found["model"] == {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "context": 256}
    assert {t["parameters"] for t in found["tensors"] if "o_proj" in t["name"]} == {64 * 64}
    assert run(["inspect", str(pair.int4)]) == 0
    page = capsys.readouterr().out
    assert "11 MatMulNBits int4 block 32, accuracy level 4" in page
    assert found["notes"] == as_notes(lint(pair.int4 / "model.onnx"))
    assert any("int8 activations (accuracy_level 4)" in note for note in found["notes"])
    assert all(f"note          {note}\n" in page for note in found["notes"])
    assert run(["inspect", str(pair.int4), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == found["notes"]


def test_verify(copy: Path) -> None:
    assert verify(copy)["problems"] != []  # no manifest
    write_json(copy / "llmc.json", new_manifest("onnx", {"name": "tiny"}, [], outputs=hash_folder(copy)))
    assert verify(copy)["problems"] == []
    with (copy / "model.onnx.data").open("r+b") as f:
        f.write(np.float32(np.nan).tobytes())
    problems = verify(copy)["problems"]
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
def test_weights_outside_the_folder_are_refused(copy: Path, location: str) -> None:
    (copy.parent / "outside.bin").write_bytes(bytes(1 << 16))
    (copy / "link.bin").symlink_to(copy.parent / "outside.bin")
    edit(copy, location=location, offset="0")
    with pytest.raises(UserError, match="not a file of that folder: refused"):
        open_runtime(copy, 64, 1)
    assert run(["inspect", str(copy)]) == 2
    assert any("refused" in p for p in verify(copy)["problems"])


def test_a_graph_outside_the_folder_is_refused(copy: Path) -> None:
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = "../fp32/model.onnx"
    (copy / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="refused"):
        open_runtime(copy, 64, 1)


def test_a_hub_snapshot_of_links_is_taken(pair: SimpleNamespace, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    shutil.copytree(pair.fp32, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    np.testing.assert_allclose(OnnxModel(snapshot, 128, 1).logits(IDS), pair.logits, **NOISE)


def test_incomplete_folders(copy: Path, tmp_path: Path) -> None:
    data = copy / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=r"model\.onnx\.data is .* bytes long, and tensor"):
        open_runtime(copy, 64, 1)
    data.unlink()
    with pytest.raises(UserError, match=r"keeps its weights in model\.onnx\.data, and .* lacks that file"):
        open_runtime(copy, 64, 1)
    data.write_bytes(whole)
    edit(copy, length="4")
    assert any("its shape needs" in p for p in verify(copy)["problems"])
    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes()[:-9])
    with pytest.raises(UserError, match="not a complete ONNX model"):
        open_runtime(copy, 64, 1)
    (copy / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"has no model\.onnx"):
        open_runtime(copy, 64, 1)
    (copy / "genai_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_runtime(copy, 64, 1)


def test_what_is_no_decoder(pair: SimpleNamespace, copy: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(copy / "model.onnx"), load_external_data=False)
    proto.graph.input.append(helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1, 3]))
    (copy / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=r"is not a decoder .*unknown inputs pixel_values"):
        open_runtime(copy, 64, 1)
    plain = tmp_path / "plain"
    plain_decoder(plain)
    proto = onnx.load(str(plain / "model.onnx"))
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "scores_of_all"
    (plain / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="it lacks logits"):
        open_runtime(plain, 64, 1)
    assert not is_onnx_folder(pair.folder)
    assert is_onnx_folder(pair.fp32)


def test_tokens_that_do_not_fit(pair: SimpleNamespace) -> None:
    runtime = OnnxModel(pair.fp32, 32, 1)
    with pytest.raises(UserError, match="do not fit"):
        runtime.logits(np.zeros(33, np.int32))
    with pytest.raises(UserError, match=f"token {tiny.VOCAB} is not in the vocabulary"):
        runtime.prefill(np.array([3, tiny.VOCAB]))


@pytest.mark.parametrize("module", ["onnx", "onnxruntime"])
def test_without_the_packages_the_extra_is_named(pair: SimpleNamespace, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.formats import onnx_folder

    onnx_folder._load.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as e:
        OnnxModel(pair.fp32, 64, 1)
    assert e.value.hint == "pip install 'llmc-toolkit[onnx]'"
