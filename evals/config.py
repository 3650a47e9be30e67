"""What can be asked of `llmc eval`, `bench` and `compare`. The command line takes its names and defaults from here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmc.console import parse_size
from llmc.errors import UserError


@dataclass(frozen=True)
class EvalConfig:
    """`llmc eval`. Defaults are the protocol of `llama-perplexity`, on the first 40 chunks."""

    artifact: str
    base: str | None = None
    text: str = "python-docs"
    second_text: str | None = None
    context: int = 512
    chunks: int = 40
    """Chunks of each text that are evaluated; 0 for all."""
    threads: int | None = None
    """None: the physical cores."""
    device: str = "cpu"
    output: Path | None = None
    tasks: tuple[str, ...] = ()
    """As typed: 'arc_easy=FILE', 'piqa', or several with commas between."""
    task_items: int = 200
    """Items of each task that are evaluated, evenly spaced; 0 for all."""
    no_text: bool = False
    """Only the tasks."""
    kv: str | None = None
    """Type of the artifact's KV cache, f16 or q8_0; None: the runtime's own. The base keeps its own."""
    target: str | None = None
    """Name of the target on which the artifact runs; the base always runs here. None: this machine."""
    targets: Path | None = None
    """The file that names targets; None: ./targets.toml, or the user's own."""

    def __post_init__(self) -> None:
        _at_least("--context", self.context, 8)
        _at_least("--chunks", self.chunks, 0)
        _at_least("--task-items", self.task_items, 0)
        _common(self.threads, self.device, self.kv)
        if isinstance(self.tasks, str):
            object.__setattr__(self, "tasks", (self.tasks,))
        if self.no_text and not self.tasks:
            raise UserError("--no-text leaves nothing to evaluate", "name some --tasks, or leave it out")


@dataclass(frozen=True)
class BenchConfig:
    """`llmc bench`. Several artifacts are measured in turns (A B A B …): a drift of the machine then hits all alike."""

    artifacts: tuple[str, ...]
    prompt: tuple[int, ...] = (512,)
    """Lengths of prompts; a report's headline figures are of the first."""
    depth: tuple[int, ...] = ()
    """Tokens in the KV cache when decoding begins; none given: the first prompt's."""
    generate: int = 64
    repetitions: int = 5
    max_repetitions: int = 15
    """Where the medians are not known well after `repetitions`, up to so many are made."""
    warmup: int = 2
    threads: int | None = None
    thread_sweep: bool = False
    """Try numbers of threads as well, and name the best."""
    device: str = "cpu"
    kv: str | None = None
    """Type of the KV cache, f16 or q8_0; None: the runtime's own."""
    target: tuple[str, ...] = ()
    """Names of targets; none given: this machine."""
    targets: Path | None = None
    """The file that names them; None: ./targets.toml, or the user's own."""
    outputs: tuple[Path, ...] = ()
    """One report file for each artifact, in their order, or none."""

    def __post_init__(self) -> None:
        for name in ("prompt", "depth"):
            object.__setattr__(self, name, _lengths(f"--{name}", getattr(self, name)))
        object.__setattr__(self, "depth", self.depth or self.prompt[:1])
        object.__setattr__(self, "target", (self.target,) if isinstance(self.target, str) else tuple(self.target))
        if self.device == "gpu" and "local-cpu" in self.target:
            raise UserError("--device gpu does not go with --target local-cpu", "name --target local-gpu")
        object.__setattr__(self, "target", self.target or (f"local-{self.device}",))
        for n in self.prompt:
            _at_least("--prompt", n, 1)
        for n in self.depth:
            _at_least("--depth", n, 0)
        _at_least("--generate", self.generate, 1)
        _at_least("--repetitions", self.repetitions, 5)
        _at_least("--max-repetitions", self.max_repetitions, self.repetitions)
        _at_least("--warmup", self.warmup, 0)
        _common(self.threads, self.device, self.kv)
        if not self.artifacts:
            raise UserError("no artifact to bench", "name a model folder or a .gguf file")
        if self.outputs and len(self.outputs) != len(self.artifacts):
            raise UserError(f"{len(self.artifacts)} artifacts and {len(self.outputs)} report files were given",
                            "give one -o for each artifact, in the same order, or none")


@dataclass(frozen=True)
class CompareConfig:
    """`llmc compare`. Gates are as typed: '5%', '0.1', '80%', '2x'."""

    reports: tuple[Path, ...]
    max_ppl_increase: str | None = None
    max_kld: str | None = None
    min_top1: str | None = None
    min_decode_speedup: str | None = None
    page: Path = Path("compare.html")
    target: tuple[str, ...] = ()
    """Targets or device profiles for which there are estimates where nothing was measured."""
    targets: Path | None = None
    """The file of targets; None: ./targets.toml or the user's."""
    context: int = 2048
    """Tokens in the KV cache of estimates."""

    def __post_init__(self) -> None:
        _at_least("--context", self.context, 8)
        object.__setattr__(self, "target", (self.target,) if isinstance(self.target, str) else tuple(self.target))


@dataclass(frozen=True)
class FitConfig:
    """`llmc fit`. Sizes as typed: '2GB', '90MB'; shares: '80%'. None: no such limit."""

    items: tuple[Path, ...]
    """Artifacts (.gguf files, ONNX folders) and reports."""
    target: tuple[str, ...] = ()
    """Names of targets, or ids of device profiles; () : this machine."""
    min_decode: float | None = None
    """Tokens/s at `context`."""
    max_first_token: float | None = None
    """Seconds, for `prompt` tokens."""
    max_kld: float | None = None
    min_top1: str | None = None
    max_ram: str | None = None
    max_size: str | None = None
    context: int = 2048
    """Tokens in the KV cache: what memory is counted with, and where decoding is looked at."""
    prompt: int = 512
    targets: Path | None = None
    """The file of targets; None: ./targets.toml or the user's."""

    def __post_init__(self) -> None:
        _at_least("--context", self.context, 8)
        _at_least("--prompt", self.prompt, 1)
        object.__setattr__(self, "items", tuple(Path(i) for i in self.items))
        object.__setattr__(self, "target", (self.target,) if isinstance(self.target, str) else tuple(self.target))
        if not self.items:
            raise UserError("no artifact to judge", "name .gguf files, ONNX folders or reports")


def parse_bytes(option: str, written: str) -> int:
    """`parse_size`, where anything else is an error of `option`."""
    found = parse_size(written)
    if found is None:
        raise UserError(f"{option} {written!r} is no size", f"write it with a unit, like {option} 2GB or 90MB")
    return found


def parse_number(option: str, written: str, unit: str, example: str) -> float:
    """The number of '5%' or '2x', as it is written; `unit` may be empty."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)" + re.escape(unit), written.strip())
    if not match:
        raise UserError(f"{option} {written!r} is not a number{' with ' + unit if unit else ''}", f"write it like {example}")
    return float(match[1])


def _lengths(option: str, given: object) -> tuple[int, ...]:
    """(128, 512) of '128,512', of 128, or of a sequence of either; no length twice."""
    parts: list[object] = []
    for item in given if isinstance(given, tuple | list) else (given,):
        parts += str(item).split(",")
    try:
        return tuple(dict.fromkeys(int(str(p)) for p in parts))
    except ValueError as e:
        raise UserError(f"{option} {','.join(map(str, parts))} is no list of token counts",
                        f"write it like {option} 128,512") from e


def _at_least(option: str, value: int, low: int) -> None:
    if value < low:
        raise UserError(f"{option} {value} is out of range: at least {low}", f"try {option} {low}")


def _common(threads: int | None, device: str, kv: str | None) -> None:
    if threads is not None:
        _at_least("--threads", threads, 1)
    if device not in ("cpu", "gpu"):
        raise UserError(f"--device {device!r} is not known", "choose cpu or gpu")
    if kv not in (None, "f16", "q8_0"):
        raise UserError(f"--kv {kv!r} is not known", "choose f16 or q8_0")
