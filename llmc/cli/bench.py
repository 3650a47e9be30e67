"""`llmc bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llmc.evals.config import BenchConfig

if TYPE_CHECKING:
    from llmc.evals.report.schema import Report


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    artifacts: list[str] = typer.Argument(..., metavar="ARTIFACT…", show_default=False,
                                          help="Model or ONNX folders, .gguf files or hub ids; several are run in turns."),
    target: list[str] = typer.Option(list(BenchConfig.target), show_default=False,
                                     help="A device by its name (see llmc target); may be given again. Default: local-cpu."),
    prompt: str = typer.Option(",".join(map(str, BenchConfig.prompt)), metavar="N,…",
                               help="Tokens of the prompt (prefill, time to first token)."),
    depth: str | None = typer.Option(None, metavar="N,…", show_default=False,
                                     help="Tokens in the cache when decoding begins. Default: the first prompt's."),
    generate: int = typer.Option(BenchConfig.generate, help="Tokens to decode there."),
    repetitions: int = typer.Option(BenchConfig.repetitions, help="Measured repetitions, at least 5."),
    max_repetitions: int = typer.Option(BenchConfig.max_repetitions, help="So many where they do not agree well."),
    warmup: int = typer.Option(BenchConfig.warmup, help="Repetitions before those."),
    threads: int | None = typer.Option(BenchConfig.threads, help="Default: the physical cores.", show_default=False),
    thread_sweep: bool = typer.Option(BenchConfig.thread_sweep, "--thread-sweep",
                                      help="Try other numbers of threads as well, and name the best."),
    device: str = typer.Option(BenchConfig.device, help="cpu or gpu."),
    kv: str | None = typer.Option(BenchConfig.kv, show_default=False,
                                  help="Type of the KV cache, f16 or q8_0. Default: the runtime's own (llama.cpp: f16)."),
    targets: Path | None = typer.Option(BenchConfig.targets, metavar="FILE", show_default=False,
                                        help="Default: ./targets.toml, or the one in ~/.config/llmc."),
    output: list[Path] = typer.Option([], "--out", "-o", show_default=False,
                                      help="The report; one of the same artifact is added to. One for each artifact."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON (several: {\"reports\": […]})."),
) -> None:
    """Measure an artifact's speed and memory on this machine or another, in a fresh process."""
    from llmc.evals.bench.run import TargetsError, bench

    config = BenchConfig(tuple(artifacts), (prompt,), () if depth is None else (depth,), generate, repetitions,  # type: ignore[arg-type]
                         max_repetitions, warmup, threads, thread_sweep, device, kv, tuple(target), targets, tuple(output))
    try:
        _show(bench(config), as_json)
    except TargetsError as e:
        _show(e.reports, as_json)
        raise


def _show(reports: list[Report], as_json: bool) -> None:
    from llmc.evals.report.show import speed_lines

    if as_json:
        print(json.dumps(reports[0] if len(reports) == 1 else {"reports": reports}, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(speed_lines(r) for r in reports))
