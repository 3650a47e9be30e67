"""--exporter optimum: standard operators alone, the model's own logits, and what it refuses."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from transformers import __version__ as transformers_version

import llmc
from llmc.cli import run
from llmc.errors import UserError
from llmc.export.onnx import OnnxExportConfig, plain
from llmc.formats.manifest import hash_folder, last_artifact, read_manifest
from llmc.runtimes.torch_model import TorchModel

here = find_spec("optimum") is not None and find_spec("optimum.exporters.onnx") is not None
needs_optimum = pytest.mark.skipif(not here or int(transformers_version[0]) > 4, reason="without the extra 'optimum'")
plain_windowed = plain.windowed
FLOAT_NOISE = 1e-5  # relative, of logits in float32
RNG = np.random.default_rng(0)


def run_onnx(folder: Path, ids: np.ndarray, past: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Every output for ids [batch, n] after `past` (outputs of an earlier run), by onnxruntime alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    caches = {i.name: i for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    assert caches
    feed = {n: (past or {}).get(n.replace("past_key_values", "present"),
                                np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32)) for n, i in caches.items()}
    used = next(iter(feed.values())).shape[2]
    whole = used + ids.shape[1]
    feed |= {"input_ids": ids.astype(np.int64), "attention_mask": np.ones((len(ids), whole), np.int64),
             "position_ids": np.tile(np.arange(used, whole), (len(ids), 1))}
    feed = {i.name: feed[i.name] for i in session.get_inputs()}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.linalg.norm(ours - theirs) < FLOAT_NOISE * np.linalg.norm(ours)


@needs_optimum
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_it_computes_what_torch_computes(family: str, tmp_path: Path) -> None:
    import onnx

    base = tiny.build(family, tmp_path / "base")
    report = llmc.export(base, format="onnx", exporter="optimum", out=tmp_path / "out", threads=1)
    ids = RNG.integers(0, tiny.VOCAB, (2, 61))
    expected = np.stack([TorchModel(base, 128, 1).logits(row) for row in ids])
    assert_close(expected, run_onnx(tmp_path / "out", ids)["logits"])
    first = run_onnx(tmp_path / "out", ids[:, :40])
    assert_close(expected[:, 40:], run_onnx(tmp_path / "out", ids[:, 40:], first)["logits"])

    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert {o.domain for o in model.opset_import} <= {"", "ai.onnx"}
    assert {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"} == {"model.onnx.data"}
    assert report["logits"]["relative_error"] < FLOAT_NOISE
    assert report["cached_logits"]["relative_error"] < FLOAT_NOISE
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    manifest = read_manifest(tmp_path / "out")
    assert manifest["outputs"] == hash_folder(tmp_path / "out")
    assert manifest["passes"][-1]["config"]["exporter"] == "optimum"
    assert last_artifact().resolve() == tmp_path / "out"
    with pytest.raises(UserError, match="exported folder already"):
        llmc.export(format="onnx")


@needs_optimum
@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3"])
def test_a_sliding_window_is_in_the_graph(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note is for graphs without it: the checked text may be shorter than the window."""
    base = tiny.build(family, tmp_path / "base", sliding_window=16)
    assert llmc.export(base, format="onnx", exporter="optimum", out=tmp_path / "out", threads=1)["notes"] == []
    ids = RNG.integers(0, tiny.VOCAB, (1, 61))
    assert_close(TorchModel(base, 128, 1).logits(ids[0])[None], run_onnx(tmp_path / "out", ids)["logits"])
    monkeypatch.setattr(plain, "windowed", lambda work, window: plain_windowed(work, window + 1))
    (note,) = llmc.export(base, format="onnx", exporter="optimum", out=tmp_path / "out", threads=1)["notes"]
    assert "sliding window of 16 tokens is not applied" in note


@needs_optimum
def test_the_token_ids_of_chats_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.build("llama", tmp_path / "base")
    (base / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    report = llmc.export(base, format="onnx", exporter="optimum", out=tmp_path / "out", threads=1)
    assert report["token_ids"]["chat_tokens"]["default"] > 30
    assert report["token_ids"]["around_added_tokens"]["compared"] == 2
    # a token that transformers knows from tokenizer_config.json alone: other readers of tokenizer.json do not
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"300": {"content": "user: Hello", "special": True}}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the package tokenizers gives other token ids for a prompt of the chat template"):
        llmc.export(base, format="onnx", exporter="optimum", out=tmp_path / "out", threads=1)


@needs_optimum
def test_a_quantized_model_only_where_that_is_asked_for(
        made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["export", str(made.gptq), "--format", "onnx", "--exporter", "optimum", "-o", str(tmp_path / "out")]
    assert run(options) == 2
    assert "--dequantize" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run([*options, "--dequantize"]) == 0
    printed = capsys.readouterr()
    assert "float32" in printed.err
    assert "all of ONNX's standard" in printed.out
    ids = RNG.integers(0, tiny.VOCAB, (1, 50))
    assert_close(TorchModel(made.gptq, 64, 1).logits(ids[0]), run_onnx(tmp_path / "out", ids)["logits"][0])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    *before, last = read_manifest(tmp_path / "out")["passes"]
    assert before == read_manifest(made.gptq)["passes"]
    assert last["name"] == "export-onnx"
    assert last["dequantized"] is True


@needs_optimum
def test_what_a_trace_would_get_wrong_is_refused(tmp_path: Path) -> None:
    from llmc.export.onnx import plain, tracers, writer

    base = tiny.build("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for changes, said in (({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, r"\(dynamic\)"),
                          ({"model_type": "mpt2"}, "does not support the architecture 'mpt2'")):
        tiny.edit_config(base, **{**config, **changes})
        with pytest.raises(UserError, match=said):
            llmc.export(base, format="onnx", exporter="optimum", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tiny.edit_config(base, **{**config, "rope_scaling": None})
    model = TorchModel(base, 64, 1).model
    tracers.trace("optimum", model, tmp_path / "traced")
    own = writer.write(plain.ir.load(tmp_path / "traced" / "model.onnx"), {}, tmp_path)
    assert plain.read_back(tmp_path, own, model)["matrices"] == 15
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    with pytest.raises(UserError, match=r"does not hold the values of model.layers.1.mlp.up_proj.weight"):
        plain.read_back(tmp_path, own, model)
    data = (tmp_path / "model.onnx.data").read_bytes()
    (tmp_path / "model.onnx.data").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match="differs from the traced tensor"):
        plain.read_back(tmp_path, own, model)


def test_operators_that_are_not_of_the_standard_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    plain = pytest.importorskip("llmc.export.onnx.plain")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
    for domain, op in (("", "Relu"), ("com.microsoft", "Gelu")):
        graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], domain=domain)], "g", [x], [y])
        opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
        onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "model.onnx")
        if not domain:
            assert plain.standard_operators(tmp_path) == {"opset": 18, "operators": {"Relu": 1}}
    with pytest.raises(UserError, match=re.escape("com.microsoft.Gelu")):
        plain.standard_operators(tmp_path)


@pytest.mark.skipif(here, reason="optimum-onnx is installed")
def test_without_optimum_the_extra_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(UserError, match="optimum-onnx, which is not installed") as e:
        llmc.export(made.base, format="onnx", exporter="optimum", out=tmp_path / "out")
    assert "llmc-toolkit[optimum]" in str(e.value)
    assert "transformers 4.57" in str(e.value)


@pytest.mark.parametrize("options", [{"int4": "qdq"}, {"dtype": "fp16"}, {"accuracy_level": "4"}, {"head_bits": 8}])
def test_options_of_the_other_exporter_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="with --exporter optimum"):
        OnnxExportConfig(exporter="optimum", **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--dequantize with --exporter builder"):
        OnnxExportConfig(dequantize=True)
