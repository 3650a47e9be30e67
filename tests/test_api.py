"""The Python API: the commands' names, options and defaults, and nothing heavy at import."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import llmc
from llmc.cli import app
from llmc.compress.distill.config import DistillConfig
from llmc.compress.heal.config import HealConfig
from llmc.compress.imatrix.config import ImatrixConfig
from llmc.compress.prune.config import PruneConfig
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.transform.config import TransformConfig
from llmc.errors import UserError
from llmc.evals.bench.config import BenchConfig
from llmc.evals.compare.config import CompareConfig
from llmc.evals.fit.config import FitConfig
from llmc.evals.quality.config import EvalConfig
from llmc.export.gguf.config import GgufExportConfig
from llmc.export.onnx.config import OnnxExportConfig
from llmc.recipes.config import RunConfig, SweepConfig
from llmc.runtimes.config import GenerateConfig

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# command: its config, and what the function takes by itself: the positional arguments, and options of the same name
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "quantize": (QuantizeConfig, {}),
    "imatrix": (ImatrixConfig, {}),
    "prune": (PruneConfig, {}),
    "transform": (TransformConfig, {}),
    "heal": (HealConfig, {"teacher": None}),
    "distill": (DistillConfig, {"teacher": None}),
    "export": (GgufExportConfig, {"format": "gguf", **{f.name: f.default for f in fields(OnnxExportConfig)}}),
    "eval": (EvalConfig, {"out": None}),
    "bench": (BenchConfig, {"out": ()}),
    "compare": (CompareConfig, {}),
    "fit": (FitConfig, {"validate": False, "profiles": False}),
    "generate": (GenerateConfig, {}),
    "run": (RunConfig, {}),
    "sweep": (SweepConfig, {}),
}
RENAMED = {"output": "out", "outputs": "out"}
ONLY_PRINTED = {"json", "markdown", "help"}  # how the command shows its result


def options(command: str) -> dict[str, Any]:
    """The command's options by the name a Python caller would write: --group-size 32 is group_size=32."""
    found = {}
    for param in COMMANDS[command].params:
        long = [o.removeprefix("--").replace("-", "_") for o in param.opts if o.startswith("--")]
        if long and long[0] not in ONLY_PRINTED:
            found[long[0]] = param.default
    return found


def plain(value: Any) -> Any:
    """Without the difference between what typer and Python call nothing."""
    if value in ((), [], None):
        return None
    if isinstance(value, tuple) and all(isinstance(v, int) for v in value):
        return ",".join(map(str, value))  # as it is typed
    return str(value) if isinstance(value, Path) else tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("command", sorted(CONFIGS))
def test_same_options_same_defaults(command: str) -> None:
    config, own = CONFIGS[command]
    arguments = {p.name for p in COMMANDS[command].params if not any(o.startswith("-") for o in p.opts)}
    taken = {RENAMED.get(f.name, f.name): None if f.default is MISSING else f.default for f in fields(config)} | own
    api = {name: plain(value) for name, value in taken.items() if name not in arguments}
    assert {name: plain(value) for name, value in options(command).items()} == api


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_small_commands_too(command: str) -> None:
    assert set(options(command)) == ({"tensors"} if command == "inspect" else set())


def test_every_name_is_there() -> None:
    for name in llmc.__all__:
        assert callable(getattr(llmc, name)) or name == "__version__"
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        llmc.quantise  # noqa: B018


def test_import_is_light() -> None:
    code = (
        "import sys, llmc\n"
        "llmc.quantize, llmc.export, llmc.evaluate, llmc.bench, llmc.compare, llmc.inspect, llmc.verify, llmc.generate\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'gguf', 'typer') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "code",
    [
        "import llmc; llmc.export",
        "import llmc.export.gguf.config; import llmc",
        "import llmc; from llmc.formats.gptq import pack",
        "import llmc; llmc.export; from llmc.export.gguf import export_gguf",
        "from llmc import export; import llmc",
    ],
)
def test_export_is_both_function_and_package_whatever_is_imported_first(code: str) -> None:
    code += """
from llmc.errors import UserError
import llmc.export.gguf
assert llmc.export.gguf.export_gguf
try:
    llmc.export("model", format="papyrus")
except UserError as e:
    print(e.problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "format 'papyrus' is not known\n"


def test_bad_options(made: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="--bits 5"):
        llmc.quantize(made.base, bits=5)
    with pytest.raises(TypeError, match="bit"):
        llmc.quantize(made.base, bit=4)
    with pytest.raises(UserError, match="format 'papyrus' is not known"):
        llmc.export(made.gptq, format="papyrus")


def test_the_main_job(made: SimpleNamespace, tmp_path: Path) -> None:
    """Quantize (by command in `made`), evaluate base and file, bench both, compare: paths as text or as Path."""
    base, small = str(tmp_path / "base.json"), tmp_path / "small.json"
    quick = {"context": 32, "chunks": 3, "threads": 1}
    llmc.evaluate(made.base, base=made.base, out=base, **quick)
    report = llmc.evaluate(str(made.gguf), base=str(made.base), out=small, **quick)
    assert json.loads(small.read_text())["artifact"]["sha256"] == report["artifact"]["sha256"]
    llmc.bench(made.base, made.gguf, out=[base, small], prompt=8, generate=4, warmup=1, threads=1)
    result = llmc.compare(base, small, max_kld="100", page=tmp_path / "page.html")
    assert [a["name"] for a in result["artifacts"]] == ["base", "small.gguf"]
    assert result["passed"]
    assert not llmc.compare(base, small, max_kld="0", page=tmp_path / "page.html")["passed"]
    assert "<html" in (tmp_path / "page.html").read_text()


def test_generate(made: SimpleNamespace) -> None:
    one = llmc.generate(made.gguf, "The with statement", max_tokens=4, threads=1, chat=False)
    two = llmc.generate(str(made.gguf), "The with statement", max_tokens=4, threads=1, chat=False)
    assert one["text"] == two["text"]
