"""`llmc bench`."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from llmc.evals.config import BenchConfig


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    artifacts: list[str] = typer.Argument(..., metavar="ARTIFACT…", show_default=False,
                                          help="Model or ONNX folders, .gguf files or hub ids; several are run in turns."),
    prompt: int = typer.Option(BenchConfig.prompt, help="Tokens of the prompt (prefill, time to first token)."),
    generate: int = typer.Option(BenchConfig.generate, help="Tokens to decode after it."),
    repetitions: int = typer.Option(BenchConfig.repetitions, help="Measured repetitions, at least 5."),
    warmup: int = typer.Option(BenchConfig.warmup, help="Repetitions before those."),
    threads: int | None = typer.Option(BenchConfig.threads, help="Default: the physical cores.", show_default=False),
    device: str = typer.Option(BenchConfig.device, help="cpu or gpu."),
    output: list[Path] = typer.Option([], "--out", "-o", show_default=False,
                                      help="The report; one of the same artifact is added to. One for each artifact."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON (several: {\"reports\": […]})."),
) -> None:
    """Measure an artifact's speed and memory on this machine, in a fresh process."""
    from llmc.evals.bench import bench
    from llmc.evals.show import speed_lines

    made = bench(BenchConfig(tuple(artifacts), prompt, generate, repetitions, warmup, threads, device, tuple(output)))
    if as_json:
        print(json.dumps(made[0] if len(made) == 1 else {"reports": made}, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(speed_lines(r) for r in made))
