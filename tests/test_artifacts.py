"""The formats of artifacts: each knows its own paths, and all tell the same of one model."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmc
from llmc.about.verification import verify
from llmc.errors import UserError
from llmc.evals.fit.estimate import is_exported
from llmc.evals.report.store import describe_artifact
from llmc.formats import kv
from llmc.formats.artifact import Artifact
from llmc.formats.artifacts.folder import FolderArtifact
from llmc.formats.artifacts.gguf import GgufArtifact
from llmc.formats.artifacts.onnx import OnnxArtifact
from llmc.formats.artifacts.table import FORMATS, artifact_at, format_of
from llmc.recipes.identity import Hashes, model_digest
from llmc.runtimes.on_device.needs import MODULES
from llmc.runtimes.open import OPENERS, open_runtime, token_ids
from llmc.runtimes.targets.emulated import EmulatedDevice
from llmc.runtimes.targets.python_device import PythonDevice
from llmc.runtimes.targets.ssh import SshDevice
from llmc.runtimes.targets.target import Target
from llmc.sources.resolve import locate


@pytest.fixture(scope="module")
def paths(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in four forms."""
    onnx = tmp_path_factory.mktemp("onnx") / "small-onnx"
    llmc.export(made.gptq, format="onnx", out=onnx)
    return {"base": made.base, "gptq": made.gptq, "gguf": made.gguf, "onnx": onnx}


OWN: dict[str, type[Artifact]] = {"base": FolderArtifact, "gptq": FolderArtifact, "gguf": GgufArtifact, "onnx": OnnxArtifact}


@pytest.mark.parametrize("name", OWN)
def test_each_path_is_of_one_format(paths: dict[str, Path], name: str) -> None:
    path, own = paths[name], OWN[name]
    assert format_of(path) is own
    assert type(artifact_at(path)) is own
    others = [kind for kind in FORMATS if kind not in (own, FolderArtifact)]  # a folder is what the others do not want
    assert not any(kind.recognises(path) for kind in others)
    assert locate(str(path)) == path
    assert is_exported(path) == own.exported


def test_a_name_is_enough_to_recognise_a_file_and_not_to_open_it(tmp_path: Path) -> None:
    gone = tmp_path / "gone.gguf"
    assert format_of(gone) is GgufArtifact
    with pytest.raises(UserError, match="neither a model folder nor"):
        artifact_at(gone)
    with pytest.raises(UserError, match="there is no file"):
        open_runtime(gone, 64, 1)


def test_a_folder_called_like_a_file_is_a_folder(made: SimpleNamespace, tmp_path: Path) -> None:
    assert format_of(Path(shutil.copytree(made.base, tmp_path / "org.gguf"))) is FolderArtifact


ASK: dict[str, Callable[[Path], Any]] = {
    "artifact_at": artifact_at, "inspect": llmc.inspect, "report": describe_artifact,
    "runtime": lambda path: open_runtime(path, 64, 1), "prompt": lambda path: token_ids(path, "a"),
    "recipe": lambda path: model_digest(str(path), Hashes(path.with_name("memo"))),
}


@pytest.mark.parametrize("ask", ASK)
def test_what_is_of_no_format_is_refused_in_one_way(ask: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt is neither a model folder nor a \.gguf file"):
        ASK[ask](tmp_path / "notes.txt")
    assert any("neither a model folder" in p for p in verify(tmp_path / "notes.txt")["problems"])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_is_whole(kind: type[Artifact]) -> None:
    assert not inspect.isabstract(kind)
    for name in ("format", "label", "plural", "packages", "kv_default", "exported", "can_start"):
        assert hasattr(kind, name), name
    assert kind.format in OPENERS
    assert kind.packages.keys() <= MODULES.keys()


def test_formats_and_openers_are_in_step() -> None:
    assert [kind.format for kind in FORMATS] == list(OPENERS)
    assert FORMATS[-1] is FolderArtifact, "it takes every folder that no other wants"


def test_all_tell_the_same_of_one_model(paths: dict[str, Path]) -> None:
    opened = {name: artifact_at(path) for name, path in paths.items()}
    for a in opened.values():
        assert a.shape() == {"layers": 2, "heads": 4, "vocabulary": 512}
        assert a.kv_shape() == {"layers": 2, "kv_heads": 2, "head_dim": 16, "window": None, "sliding_layers": 0}
        assert a.facts()["model"] == {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "context": 256}
        assert a.facts()["tokenizer"]["vocabulary"] == 512
        assert list(a.problems()) == []
        w = a.weigh()
        assert w["tied"]
        assert sum(t.nbytes for t in a.tensors()) == w["tensor_bytes"] <= w["file_bytes"]
        assert w["file_bytes"] == sum(p.stat().st_size for p in a.weight_files())
        assert set(a.weight_files()) <= set(a.deciding_files()) <= set(a.files())
        assert set(a.deciding_files()) <= set(a.source_files()) <= set(a.files())
    parameters = {name: {k: c["parameters"] for k, c in a.weigh()["classes"].items() if k in ("attention", "mlp")}
                  for name, a in opened.items()}
    assert all(found == parameters["base"] for found in parameters.values())
    assert len({a.sha256() for a in opened.values()}) == 4
    assert [a.starts_quantized() for a in opened.values()] == [False, True, False, False]
    assert opened["gguf"].tokenizer_folder is None
    assert [opened[name].tokenizer_folder for name in ("gptq", "onnx")] == [paths["gptq"], paths["onnx"]]


@pytest.mark.parametrize("name", OWN)
def test_inspect_and_reports_say_what_the_artifact_says(paths: dict[str, Path], name: str) -> None:
    path = paths[name]
    a, inspected, report = artifact_at(path), llmc.inspect(path), describe_artifact(path)
    assert inspected["weights"] == report["size"] == a.weigh()
    assert inspected["kv"] == report["kv"] == kv.described(a.kv_shape())
    assert report["sha256"] == a.sha256()
    assert {k: inspected[k] for k in a.facts() if k != "licence"} == {k: v for k, v in a.facts().items() if k != "licence"}
    assert verify(path)["problems"] == [] or name == "base"


def test_every_runtime_makes_the_same_ids_of_a_text(paths: dict[str, Path]) -> None:
    found = [token_ids(path, "the river rose").tolist() for path in paths.values()]
    assert found == [found[0]] * 4


def test_an_exported_folder_is_no_start(paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an ONNX folder, which is made by export and cannot be the base"):
        model_digest(str(paths["onnx"]), Hashes(tmp_path / "memo"))


class Bare(PythonDevice):
    """A device with numpy alone, on which files have other names."""

    def _copy(self, artifact: Path) -> str:
        return f"/cache/{len(self._packages)}"

    def has(self) -> dict[str, Any]:
        return {"python": "3.11", "executable": "python3", "packages": {**dict.fromkeys(MODULES), "numpy": "2.0"}}

    def _agent(self) -> Any:
        raise AssertionError("nothing is run")

    def _install_hint(self, executable: str, absent: list[str]) -> str:
        return " ".join(absent)

    def close(self) -> None:
        pass


def test_a_device_needs_the_packages_of_what_was_placed_there(paths: dict[str, Path]) -> None:
    device = Bare(Target("pi", "ssh://pi"))
    for name, lacking in (("gguf", "llama-cpp-python"), ("onnx", "onnxruntime onnx tokenizers")):
        job = {"artifact": device.place(paths[name])}
        with pytest.raises(UserError) as e:
            device.start("llmc.runtimes.on_device.bench", job)
        assert e.value.hint == lacking
    with pytest.raises(UserError, match=r"base is a model folder for torch; pi runs \.gguf files and ONNX folders"):
        device.place(paths["base"])
    assert not inspect.isabstract(SshDevice)
    assert not inspect.isabstract(EmulatedDevice)
