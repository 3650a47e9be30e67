"""emulated-arm64: real ARM programs under qemu-user where its tree is there; what is said where not. Runtimes elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import llmc
from llmc.errors import UserError
from llmc.runtimes.remote import RemoteRuntime
from llmc.runtimes.targets import emulated, emulated_setup
from llmc.runtimes.targets.device import LocalDevice, connect
from llmc.runtimes.targets.emulated import EmulatedDevice
from llmc.runtimes.targets.target import Target

TREE = "LLMC_ARM64_CACHE"  # a cache folder in which `llmc target setup` of emulated-arm64 was run: then ARM code is run here


def test_without_the_emulator_its_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    target = Target("arm", "emulated-arm64", cache=str(tmp_path))
    with pytest.raises(UserError, match="arm: qemu-aarch64-static is not installed here") as e:
        EmulatedDevice(target)
    assert "apt-get install qemu-user-static" in e.value.hint
    with pytest.raises(UserError, match="lacks apt-get, dpkg-deb, aarch64-linux-gnu-gcc, aarch64-linux-gnu-g"):
        emulated_setup.install(target, ["numpy", "llama-cpp-python==0.3.36"])


def test_without_the_tree_the_setup_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(UserError, match="there is no Debian tree with Python for ARM in") as e:
        EmulatedDevice(Target("arm", "emulated-arm64", cache=str(tmp_path)))
    assert e.value.hint == "llmc target setup arm --install"


def test_no_library_of_this_machine_is_offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PYTHONPATH", "PYTHONHOME", "LD_PRELOAD", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "/here")
    env = emulated.environment(tmp_path)
    assert "/here" not in env.values()
    assert env["PYTHONPATH"] == str(tmp_path / "site")


def test_a_runtime_elsewhere_gives_what_it_gives_here(made: SimpleNamespace) -> None:
    """logits_child and RemoteRuntime, on this machine as the device."""
    from llmc.runtimes.llamacpp import LlamaCpp

    here = LlamaCpp(made.gguf, 64, threads=1)
    there = RemoteRuntime(LocalDevice(Target("local-cpu", "local-cpu")), made.gguf, 64, threads=1)
    ids = np.arange(3, 40)
    assert np.array_equal(here.logits(ids, 5), there.logits(ids, 5))
    assert np.array_equal(here.prefill(ids), there.prefill(ids))
    assert np.array_equal(here.decode(7), there.decode(7))
    text = "def f(x):  return 'ü' 🙂"
    assert np.array_equal(here.tokenize(text), there.tokenize(text))
    assert here.detokenize([5, 6, 7]) == there.detokenize([5, 6, 7])
    assert (here.end_tokens, here.vocab_size, here.context, here.name) == (
        there.end_tokens, there.vocab_size, there.context, there.name)
    assert there.describe()["target"]["name"] == "local-cpu"
    with pytest.raises(UserError, match="65 tokens do not fit"):
        there.logits(np.zeros(65, np.int32))
    with pytest.raises(UserError, match=r"ran small\.gguf on local-cpu ended with exit code 0"):
        there.prefill(ids)
    there.close()


def test_eval_on_a_target_measures_the_same_file(made: SimpleNamespace, tmp_path: Path) -> None:
    report = llmc.evaluate(made.gguf, base=made.gguf, target="local-cpu", chunks=2, context=32, threads=1)
    quality = report["quality"]
    assert quality["runtime"]["target"]["address"] == "local-cpu"
    assert not quality["base"]["is_artifact"]
    assert quality["texts"][0]["kld"]["max"] == pytest.approx(0, abs=1e-5)
    assert quality["texts"][0]["top1"]["value"] == 1
    with pytest.raises(UserError, match="there is no target 'pi'"):
        llmc.evaluate(made.gguf, base=made.gguf, target="pi")


@pytest.mark.skipif(not os.environ.get(TREE), reason=f"{TREE} names no folder: llmc target setup takes some minutes")
def test_arm_code_gives_the_same_logits(made: SimpleNamespace, tmp_path: Path) -> None:
    """float32 weights: the arithmetic of both differs by rounding alone (int8 kernels also round activations)."""
    from llmc.runtimes.llamacpp import LlamaCpp

    llmc.export(made.base, format="gguf", out=tmp_path / "f32.gguf", float_type="f32", embedding="f32")
    device = connect(Target("arm", "emulated-arm64", cache=os.environ[TREE]))
    assert device.emulated
    there = RemoteRuntime(device, tmp_path / "f32.gguf", 64, threads=1)
    told = there.describe()
    assert told["target"]["facts"]["machine"] == "aarch64"
    assert {"asimddp", "i8mm"} <= set(told["cpu_features"])
    assert told["build"]["MATMUL_INT8"] == told["build"]["DOTPROD"] == "1"
    ids = np.arange(3, 40)
    ours, theirs = LlamaCpp(tmp_path / "f32.gguf", 64, threads=1).logits(ids), there.logits(ids)
    there.close()
    assert np.abs(ours - theirs).max() < 1e-2 * np.abs(ours).max()
    assert np.array_equal(ours.argmax(1), theirs.argmax(1))
