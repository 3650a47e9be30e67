"""The options of `llmc eval`, `bench`, `compare` and `fit`."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from llmc import options
from llmc.console import parse_size
from llmc.errors import UserError
from llmc.options import ADVANCED, RUN, Wrong, check, fitting, option


def _device() -> Any:
    return option("cpu", help="Device to run on.", choices=("cpu", "gpu"), group=RUN)


def _kv(more: str = "") -> Any:
    return option(None, help=f"Type of the artifact's KV cache.{more}", choices=("f16", "q8_0"), group=ADVANCED,
                  shown="the runtime's own, f16 in llama.cpp")


@dataclass(frozen=True)
class EvalConfig:
    """The options of `llmc eval`. Defaults are the protocol of `llama-perplexity`, on the first 40 chunks."""

    artifact: str = option(help="A model or ONNX folder, a .gguf file or a hub id.", argument=True, metavar="ARTIFACT")
    _: KW_ONLY
    base: str | None = option(
        None, help="Model that the artifact was made from: a folder, a .gguf file or a hub id.", metavar="MODEL")
    text: str = option(
        "python-docs", help="Text to evaluate on: a text file, wikitext (from the hub) or python-docs.", metavar="TEXT")
    second_text: str | None = option(
        None, help="A second text, unlike the first. A loss on one text alone is a sign of overfitting to the other.",
        metavar="TEXT")
    context: int = option(512, help="Number of tokens in a chunk. The second half of each chunk is scored.", low=8,
                          group=ADVANCED)
    chunks: int = option(40, help="Number of chunks of each text to evaluate. 0 means all.", low=0)
    threads: int | None = options.threads()
    device: str = _device()
    output: Path | None = options.out("Report to write. If it holds the same artifact already, the results are added.")
    tasks: tuple[str, ...] = option(
        (), help="Zero-shot tasks, separated by commas, each with a JSONL file of items. Without a file the items come from "
                 "the hub. Tasks: lambada, arc_easy, arc_challenge, piqa, hellaswag, winogrande, boolq, openbookqa.",
        metavar="TASK[=FILE],...")
    task_items: int = option(
        200, help="Number of items of each task to evaluate, evenly spaced. 0 means all.", low=0, group=ADVANCED)
    no_text: bool = option(False, help="Evaluate tasks only, no text.", group=ADVANCED)
    kv: str | None = _kv(" The base keeps its own type. To measure the effect of --kv alone, give the artifact as --base.")
    target: str | None = option(
        None, help="Device that runs the artifact (see `llmc target`). The base runs on this machine.", metavar="NAME",
        group=RUN, shown="this machine")
    targets: Path | None = options.targets()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", fitting(tuple[str, ...], self.tasks))
        check(self, "eval", word=Wrong.out_of_range)
        if self.no_text and not self.tasks:
            raise UserError("--no-text leaves nothing to evaluate", "name some --tasks, or leave it out")


@dataclass(frozen=True)
class BenchConfig:
    """The options of `llmc bench`. Several artifacts are measured in turns (A B A B), so that a drift of the machine affects
    all of them alike."""

    artifacts: tuple[str, ...] = option(
        help="Model or ONNX folders, .gguf files or hub ids. Several are measured in turns.", argument=True,
        metavar="ARTIFACT")
    _: KW_ONLY
    prompt: tuple[int, ...] = option(
        (512,), help="Number of tokens in the prompt. The headline figures of a report are of the first number.", low=1,
        metavar="N,...")
    depth: tuple[int, ...] = option(
        (), help="Number of tokens in the cache when decoding begins.", low=0, metavar="N,...", shown="the first --prompt")
    generate: int = option(64, help="Number of tokens to decode.", low=1)
    repetitions: int = option(5, help="Number of measured repetitions.", low=5, group=ADVANCED)
    max_repetitions: int = option(
        15, help="Largest number of repetitions. More than --repetitions are made while the medians are uncertain.",
        group=ADVANCED)
    warmup: int = option(2, help="Number of repetitions before the measured ones.", low=0, group=ADVANCED)
    threads: int | None = options.threads()
    thread_sweep: bool = option(False, help="Try other numbers of threads too, and name the best.", group=ADVANCED)
    device: str = _device()
    kv: str | None = _kv()
    target: tuple[str, ...] = option(
        (), help="Device to measure on (see `llmc target`). The option may be repeated.", metavar="NAME", shown="local-cpu")
    targets: Path | None = options.targets()
    outputs: tuple[Path, ...] = option(
        (), help="Report to write, one for each artifact. If it holds the same artifact already, the results are added.",
        flags=("--out", "-o"), metavar="FILE")

    def __post_init__(self) -> None:
        for name in ("prompt", "depth"):
            object.__setattr__(self, name, _lengths(f"--{name}", getattr(self, name)))
        object.__setattr__(self, "depth", self.depth or self.prompt[:1])
        object.__setattr__(self, "target", fitting(tuple[str, ...], self.target))
        if self.device == "gpu" and "local-cpu" in self.target:
            raise UserError("--device gpu does not go with --target local-cpu", "name --target local-gpu")
        object.__setattr__(self, "target", self.target or (f"local-{self.device}",))
        below = self.max_repetitions < self.repetitions
        check(self, "bench", [f"--max-repetitions {self.max_repetitions} is out of range: at least --repetitions "
                              f"{self.repetitions}"] if below else [], Wrong.out_of_range)
        if not self.artifacts:
            raise UserError("no artifact to bench", "name a model folder or a .gguf file")
        if self.outputs and len(self.outputs) != len(self.artifacts):
            raise UserError(f"{len(self.artifacts)} artifacts and {len(self.outputs)} report files were given",
                            "give one -o for each artifact, in the same order, or none")


@dataclass(frozen=True)
class CompareConfig:
    """The options of `llmc compare`. Gates are as typed: '5%', '0.1', '80%', '2x'."""

    reports: tuple[Path, ...] = option(
        help="Reports of `llmc eval` and `llmc bench`. The first is the baseline.", argument=True, metavar="REPORT")
    _: KW_ONLY
    max_ppl_increase: str | None = option(
        None, help="Gate: largest increase of perplexity over the baseline.", metavar="5%")
    max_kld: str | None = option(None, help="Gate: largest mean KL divergence to the base, in nats.", metavar="0.1")
    min_top1: str | None = option(None, help="Gate: smallest top-1 agreement with the base.", metavar="80%")
    min_decode_speedup: str | None = option(
        None, help="Gate: smallest decode speed, relative to the baseline.", metavar="2x")
    page: Path = option(Path("compare.html"), help="HTML page to write.", metavar="FILE")
    target: tuple[str, ...] = option(
        (), help="Target or device profile. Speeds that were not measured on it are estimated. The option may be repeated.",
        metavar="NAME", group=ADVANCED)
    targets: Path | None = options.targets()
    context: int = option(2048, help="Number of tokens in the KV cache of estimates.", low=8, group=ADVANCED)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", fitting(tuple[str, ...], self.target))
        check(self, "compare", word=Wrong.out_of_range)


@dataclass(frozen=True)
class FitConfig:
    """The options of `llmc fit`. Sizes and shares are as typed: '2GB', '90MB', '80%'. None: no such limit."""

    items: tuple[Path, ...] = option(
        (), help=".gguf files, ONNX folders, and reports of `llmc eval` and `llmc bench`.", argument=True,
        metavar="ARTIFACT-or-REPORT")
    target: tuple[str, ...] = option(
        (), help="Name of a target or of a device profile (pi5, m2). The option may be repeated.", metavar="NAME",
        shown="local-cpu")
    _: KW_ONLY
    min_decode: float | None = option(None, help="Smallest decode speed at --context, in tokens per second.", metavar="TOK/S")
    max_first_token: float | None = option(
        None, help="Longest time to the first token after --prompt tokens, in seconds.", metavar="S")
    max_kld: float | None = option(
        None, help="Largest mean KL divergence to the base, on the worst text, in nats.", metavar="NATS")
    min_top1: str | None = option(None, help="Smallest top-1 agreement with the base.", metavar="80%")
    max_ram: str | None = option(None, help="Largest amount of memory at --context.", metavar="2GB")
    max_size: str | None = option(None, help="Largest size of the file.", metavar="90MB")
    context: int = option(
        2048, help="Number of tokens in the KV cache. Memory and decode speed are estimated for it.", low=8, group=ADVANCED)
    prompt: int = option(512, help="Number of tokens in the prompt.", low=1, group=ADVANCED)
    targets: Path | None = options.targets()

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(Path(i) for i in self.items))
        object.__setattr__(self, "target", fitting(tuple[str, ...], self.target))
        check(self, "fit", word=Wrong.out_of_range)
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
