"""The llama.cpp runtime against torch, on files that llmc exported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

import llmc
from llmc import machine
from llmc.compress.teaching.loss import divergence
from llmc.errors import UserError
from llmc.runtimes import amx, llamacpp
from llmc.runtimes.llamacpp import LlamaCpp
from llmc.runtimes.open import open_runtime
from llmc.runtimes.torch_model import TorchModel

IDS = np.arange(3, 80, dtype=np.int32) * 11 % tiny.VOCAB


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny Llama as a folder and as a GGUF in float32, and torch's logits for IDS."""
    work = tmp_path_factory.mktemp("pair")
    folder = tiny.build("llama", work / "base")
    llmc.export(folder, format="gguf", out=work / "f32.gguf", float_type="f32", embedding="f32")
    return SimpleNamespace(folder=folder, gguf=work / "f32.gguf", logits=TorchModel(folder, 128, 1).logits(IDS))


def exact(path: Path, context: int = 128) -> LlamaCpp:
    return LlamaCpp(path, context, 1, flash_attention=False, kv_type="f32")


def test_logits_are_torchs(pair: SimpleNamespace) -> None:
    runtime = exact(pair.gguf)
    np.testing.assert_allclose(runtime.logits(IDS), pair.logits, rtol=1e-3, atol=1e-3)
    # a second sequence sees nothing of the first
    np.testing.assert_allclose(runtime.logits(IDS, start=50), pair.logits[50:], rtol=1e-3, atol=1e-3)
    runtime.close()


@pytest.mark.parametrize(("batch", "rows"), [(7, 1000), (512, 5), (7, 3)])
def test_small_batches_give_the_same_logits(pair: SimpleNamespace, batch: int, rows: int,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "BATCH", batch)
    monkeypatch.setattr(llamacpp, "LOGITS_BYTES", rows * 4 * tiny.VOCAB)
    runtime = exact(pair.gguf)
    np.testing.assert_allclose(runtime.logits(IDS, start=30), pair.logits[30:], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(runtime.prefill(IDS), pair.logits[-1], rtol=1e-3, atol=1e-3)
    runtime.close()


def test_prefill_and_decode_are_the_rows_of_logits(pair: SimpleNamespace) -> None:
    runtime = exact(pair.gguf)
    for _ in range(2):  # prefill empties the cache
        np.testing.assert_allclose(runtime.prefill(IDS[:40]), pair.logits[39], rtol=1e-3, atol=1e-3)
        for i in range(40, 50):
            np.testing.assert_allclose(runtime.decode(int(IDS[i])), pair.logits[i], rtol=1e-3, atol=1e-3)
    runtime.close()


def test_tokenizer_of_the_file_is_the_folders(pair: SimpleNamespace) -> None:
    ours, theirs = TorchModel(pair.folder, 64, 1), exact(pair.gguf)
    text = "def f(x):\n\treturn  x + 12345  # naïve 日本 🙂"
    ids = theirs.tokenize(text)
    assert ids.tolist() == ours.tokenize(text).tolist()
    assert theirs.detokenize(ids.tolist()) == text
    assert theirs.end_tokens == ours.end_tokens == {1}
    assert theirs.metadata["general.architecture"] == "llama"
    theirs.close()


def test_describe_says_what_ran(pair: SimpleNamespace) -> None:
    runtime = LlamaCpp(pair.gguf, 64, threads=2)
    d = runtime.describe()
    runtime.close()
    assert (d["runtime"], d["device"], d["threads"], d["offloaded_layers"], d["kv_type"]) == ("llama.cpp", "cpu", 2, 0, "f16")
    assert d["build"]
    assert d["cpu_features"] == machine.cpu_features()


def test_context_is_kept(pair: SimpleNamespace) -> None:
    runtime = exact(pair.gguf, context=100_000)
    assert runtime.context == tiny.COMMON["max_position_embeddings"]  # no further than it was trained
    with pytest.raises(UserError, match="do not fit"):
        runtime.logits(np.zeros(runtime.context + 1, dtype=np.int32))
    runtime.close()


def test_a_gpu_that_did_no_work_is_an_error(pair: SimpleNamespace) -> None:
    if llamacpp._library().llama_supports_gpu_offload():
        pytest.skip("this llama.cpp can use a GPU")
    with pytest.raises(UserError, match="--device gpu"):
        LlamaCpp(pair.gguf, 64, 1, device="gpu")


def test_a_gpu_computes_what_torch_does(pair: SimpleNamespace, tmp_path: Path) -> None:
    """Wherever a llama.cpp with a GPU backend runs the tests: a software device such as Mesa's lavapipe is enough."""
    if not llamacpp.gpu_devices():
        pytest.skip("this llama.cpp has no GPU")
    runtime = LlamaCpp(pair.gguf, 128, 1, device="gpu", flash_attention=False, kv_type="f32")
    assert runtime.offloaded == runtime.layers
    exactly, computed = (torch.from_numpy(x) for x in (pair.logits, runtime.logits(IDS)))
    runtime.close()
    assert divergence(computed, exactly) / len(IDS) < 1e-4  # Vulkan multiplies in float16
    llmc.quantize(pair.folder, method="rtn", out=tmp_path / "small", threads=2)
    llmc.export(tmp_path / "small", format="gguf", out=tmp_path / "small.gguf")
    found = []
    for device in ("cpu", "gpu"):
        runtime = LlamaCpp(tmp_path / "small.gguf", 128, 1, device=device)
        found.append(torch.from_numpy(runtime.logits(IDS)))
        runtime.close()
    assert divergence(*found) / len(IDS) < 0.01  # llama.cpp's CPU rounds activations to 8 bits, a GPU need not


def test_bad_files(tmp_path: Path) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UserError, match=r"half\.gguf is not a complete GGUF file"):
        open_runtime(half, 64, 1)
    with pytest.raises(UserError, match="there is no file"):
        LlamaCpp(tmp_path / "none.gguf", 64, 1)
    with pytest.raises(UserError, match="neither a model folder nor"):
        open_runtime(tmp_path / "model.bin", 64, 1)


def test_without_the_package_the_extra_is_named(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError) as e:
        LlamaCpp(pair.gguf, 64, 1)
    assert e.value.hint == "pip install 'llmc-toolkit[gguf]'"


def test_llama_cpp_itself_says_nothing(pair: SimpleNamespace) -> None:
    code = f"from pathlib import Path; from llmc.runtimes.open import open_runtime as o; o(Path({str(pair.gguf)!r}), 64, 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if not line.startswith("warning: llama.cpp's AMX")] == []


def test_the_probe_of_amx_asks_about_amx_only(tmp_path: Path) -> None:
    """Its model runs where no kernels but llama.cpp's plain ones are used: a crash is the other kernels' doing."""
    amx._write_model(tmp_path / "probe.gguf")
    runtime = LlamaCpp(tmp_path / "probe.gguf", 64, 1, extra_buffers=False)
    assert np.isfinite(runtime.logits(np.arange(8, dtype=np.int32))).all()
    runtime.close()


def test_a_crashing_probe_turns_repacking_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    died = subprocess.CompletedProcess([], -11)
    monkeypatch.setattr(amx.subprocess, "run", lambda *_, **__: died)
    monkeypatch.setattr(llamacpp, "build", lambda: {"AMX_INT8": "1"})
    amx.broken.cache_clear()
    amx.use_extra_buffers.cache_clear()
    try:
        assert amx.use_extra_buffers() is False
        assert "AMX kernels crash" in capsys.readouterr().err
    finally:
        amx.broken.cache_clear()
        amx.use_extra_buffers.cache_clear()


def test_gpus_are_those_that_llama_cpp_can_use() -> None:
    found = llamacpp.gpu_devices()
    assert bool(found) == bool(llamacpp._library().llama_supports_gpu_offload())
    assert all(d["name"] and d["backend"].startswith("llama.cpp ") for d in found)
