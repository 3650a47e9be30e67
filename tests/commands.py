"""Command lines for every command of llmc, on a tiny model, for tests that hold for all of them.

They run one after another in one folder. `every` finds the commands in the program itself: a new one needs a line here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import typer

from llmc.cli import app

OUTPUTS = ("-o", "--page", "--markdown")  # the word after these is written
RECIPE = """\
defaults: {threads: 1, context: 32, chunks: 1}
steps:
  - quantize: {method: rtn}
  - export
  - eval
  - compare
"""
GATES = """\
artifacts: [q.gguf]
reports: [base.json, q.gguf.json]
targets:
  local-cpu: {max_size: 1GB, max_kld: 100}
"""


@dataclass(frozen=True)
class Line:
    """words: what follows `llmc`.  code: its exit code.  writes: other names in the folder that it makes or changes."""

    words: tuple[str, ...]
    code: int = 0
    writes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(self.words)

    @property
    def outputs(self) -> set[str]:
        """The names of what the line writes."""
        return {after for word, after in zip(self.words, self.words[1:], strict=False) if word in OUTPUTS} | {*self.writes}


def line(text: str, *more: str, code: int = 0, writes: tuple[str, ...] = ()) -> Line:
    return Line((*text.split(), *more), code, writes)


SMALL = "--threads 1"
TEXT = f"--calibration text.txt --samples 4 --seq-len 32 {SMALL}"
TRAIN = f"--teacher base --calibration text.txt --seq-len 32 --steps 2 --batch 1 --held-out 2 --sampled 0 {SMALL}"
CHUNK = f"--context 32 --chunks 1 {SMALL}"
SPEED = f"--prompt 8 --generate 2 --warmup 0 {SMALL}"
ARTIFACTS = ("base", "q.gguf", "q-onnx")
LINES = (
    line("doctor"), line("inspect base"), line("models"), line("setup converter --sdist text.txt", code=2),
    line("recipe ls"), line("recipe show edge-4bit"), line("recipe cp edge-4bit copy.yaml", writes=("copy.yaml",)),
    line("recipe validate copy.yaml"),
    line(f"quantize base --method rtn -o q {SMALL}"), line(f"quantize base {TEXT} -o g"),
    line(f"prune base --method wanda --sparsity 0.5 {TEXT} -o p"),
    line(f"transform base --scaling none --rotate r2 -o t {SMALL}"),
    line(f"distill base {TRAIN} -o d"), line(f"heal q {TRAIN} -o h"), line(f"imatrix base {TEXT} -o i.gguf"),
    line(f"export q --format gguf -o q.gguf {SMALL}"),
    line(f"export q --format onnx --accuracy-level 4 -o q-onnx {SMALL}"),
    *(line(f"eval {a} --base base {CHUNK} -o {a}.json") for a in ARTIFACTS),
    *(line(f"bench {a} {SPEED} -o {a}.json") for a in ARTIFACTS),
    *(line(f"generate {a} a --max-tokens 2 {SMALL}") for a in ARTIFACTS),
    line("inspect q.gguf"), line("inspect q-onnx"), line("verify q"), line("verify q.gguf"), line("verify q-onnx"),
    line("compare base.json q.gguf.json --page c.html --markdown c.md"),
    line("fit q.gguf --target pi5 --min-decode 0.1"), line("fit --profiles"), line("ship gates.yaml -o shipped"),
    line("run chain.yaml --model base -o ran"), line("sweep chain.yaml quantize.bits=4,8 --model base -o swept"),
    line("target add pi ssh://pi --targets devices.toml", writes=("devices.toml",)), line("target ls --targets devices.toml"),
    line("target show pi --targets devices.toml"), line("target probe local-cpu --targets devices.toml"),
    line("target rm pi --targets devices.toml"),
    # only for other machines
    line("target setup local-cpu", code=2), line("target clean local-cpu", code=2),
)


def prepare(folder: Path, base: Path) -> None:
    """Fill the folder with what the lines need."""
    (folder / "base").symlink_to(base)
    tiny.write_text(folder / "text.txt", 20_000)
    (folder / "chain.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "gates.yaml").write_text(GATES, encoding="utf-8")


def every() -> dict[tuple[str, ...], Any]:
    """All commands of the program, by ('quantize',) and ('target', 'add')."""
    def below(group: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        for name, command in group.commands.items():
            yield from below(command, (*names, name)) if hasattr(command, "commands") else [((*names, name), command)]

    return dict(below(typer.main.get_command(app), ()))


def command_of(words: tuple[str, ...]) -> tuple[str, ...]:
    """The name of the command that a line's words call."""
    return next(words[:n] for n in (1, 2) if words[:n] in every())
