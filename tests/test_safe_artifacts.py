"""What llmc writes names no code and holds no pickles; chat templates cannot loop, recurse or explode."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from gguf_files import copy

import llmc
from llmc.compress.text import load_calibration
from llmc.errors import UserError
from llmc.formats import template_limits
from llmc.formats.hf import load_tokenizer
from llmc.formats.template_limits import render_within_limits

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py")
TRAIN: dict[str, Any] = {"calibration": "text.txt", "steps": 1, "batch": 1, "held_out": 2, "sampled": 0, "seq_len": 32,
                         "threads": 1}


@pytest.fixture
def with_code(made: SimpleNamespace, tmp_path: Path) -> Path:
    """A model folder with `auto_map`, Python files and pickles."""
    folder = Path(shutil.copytree(made.base, tmp_path / "m"))
    for name, value in (("config.json", {"AutoConfig": "configuration_x.XConfig"}),
                        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_x.X", None]})):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {"auto_map": value}))
    for name in ("configuration_x.py", "tokenization_x.py"):
        (folder / name).write_text("raise SystemExit('code of the model ran')\n")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save({"a": torch.zeros(1)}, folder / name)
    tiny.write_text(Path("text.txt"), 20_000)
    return folder


@pytest.mark.parametrize("command", [
    lambda m: llmc.quantize(m, method="rtn", out="out", threads=1),
    lambda m: llmc.prune(m, method="magnitude", sparsity=0.5, out="out", seq_len=64, threads=1),
    lambda m: llmc.transform(m, scaling="none", rotate="r2", out="out", threads=1),
    lambda m: llmc.distill(m, teacher=m, out="out", **TRAIN),
    lambda m: llmc.export(m, format="onnx", out="out", threads=1),
], ids=["quantize", "prune", "transform", "distill", "onnx"])
def test_no_code_and_no_pickles_in_what_is_written(command: Callable[[Path], Any], with_code: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    command(with_code)
    files = [p for p in Path("out").rglob("*") if p.is_file()]
    assert [p.name for p in files if p.suffix in PICKLES] == []
    assert [p.name for p in files if p.suffix == ".json" and p.name != "llmc.json" and "auto_map" in p.read_text()] == []
    said = capsys.readouterr().err
    assert "tokenizer_config.json of" in said
    assert "names code of the model (['tokenization_x.X', None])" in said
    assert llmc.verify("out")["problems"] == []


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
EXPLODE = "{% set ns = namespace(t='x' * 1000) %}{% for a in range(40) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}"
RECURSE = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"
LONG = "{% for a in range(5000) %}{{ 'x' * 1000 }}{% endfor %}"
FAULTS = [(LOOP, r"stopped after 0\.5 seconds"), (EXPLODE, "needs more than|stopped after"),
          (RECURSE, "calls itself without end"), (LONG, "made 5,000,000 characters"),
          ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big")]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("template", "problem"), FAULTS)
def test_templates_are_stopped(made: SimpleNamespace, tmp_path: Path, template: str, problem: str) -> None:
    folder = Path(shutil.copytree(made.base, tmp_path / "m"))
    (folder / "chat_template.jinja").write_text(template)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    start = time.monotonic()
    with pytest.raises(UserError, match=problem):
        load_calibration(str(rows), load_tokenizer(folder), 1, 8)
    with pytest.raises(UserError, match=problem):
        llmc.generate(folder, "a", chat=True, max_tokens=1, threads=1)
    assert time.monotonic() - start < 30


@pytest.mark.usefixtures("impatient")
def test_a_template_in_a_gguf_file_is_stopped(made: SimpleNamespace, tmp_path: Path) -> None:
    text = copy(made.gguf, tmp_path / "m.gguf", {"tokenizer.chat_template": (LOOP, 8, None)})
    with pytest.raises(UserError, match="stopped after"):
        llmc.generate(text, "a", chat=True, max_tokens=1, threads=1)


def test_a_good_rendering_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread, no limit, no exception that comes later."""
    monkeypatch.setattr(template_limits, "SECONDS", 0.05)
    threads = threading.active_count()
    before = resource and resource.getrlimit(resource.RLIMIT_AS)
    assert [render_within_limits(lambda: "text", 1, "it") for _ in range(200)] == ["text"] * 200
    for _ in range(20):
        with contextlib.suppress(UserError):  # it takes about as long as the limit
            render_within_limits(lambda: str(sum(range(10**6))), 1, "it")
    time.sleep(0.2)
    assert threading.active_count() <= threads + 1
    if resource is not None:
        assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_rendering_leaves_python_as_it_was() -> None:
    """Python 3.11 hangs under a tracer if an asynchronous exception was taken back before it was raised."""
    code = ("import sys\nfrom llmc.formats.template_limits import render_within_limits\n"
            "assert render_within_limits(lambda: 'text', 1, 'it') == 'text'\n"
            "sys.settrace(lambda *_: None)\ndef step() -> int:\n    return 1\nprint(sum(step() for _ in range(1000)))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "1000\n"
