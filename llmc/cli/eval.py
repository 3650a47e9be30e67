"""`llmc eval`."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from llmc.evals.config import EvalConfig


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    artifact: str = typer.Argument(..., metavar="ARTIFACT", help="A model or ONNX folder, a .gguf file or a hub id."),
    base: str | None = typer.Option(EvalConfig.base, help="The model it was made from: a folder, .gguf or hub id.",
                                    show_default=False),
    text: str = typer.Option(EvalConfig.text, help="A text file, wikitext (from the hub) or python-docs."),
    second_text: str | None = typer.Option(EvalConfig.second_text, show_default=False,
                                           help="Another text, unlike the first: shows overfitting to it."),
    context: int = typer.Option(EvalConfig.context, help="Tokens in a chunk; the second half of each is scored."),
    chunks: int = typer.Option(EvalConfig.chunks, help="Chunks of each text that are evaluated; 0 for all."),
    tasks: list[str] = typer.Option(list(EvalConfig.tasks), metavar="TASK[=FILE],…", show_default=False,
                                    help="Zero-shot tasks too, each with a JSONL file of items (from the hub without): "
                                         "lambada, arc_easy, arc_challenge, piqa, hellaswag, winogrande, boolq, "
                                         "openbookqa."),
    task_items: int = typer.Option(EvalConfig.task_items, help="Items of each task, evenly spaced; 0 for all."),
    no_text: bool = typer.Option(EvalConfig.no_text, "--no-text", help="Only the tasks, no text."),
    threads: int | None = typer.Option(EvalConfig.threads, help="Default: the physical cores.", show_default=False),
    device: str = typer.Option(EvalConfig.device, help="cpu or gpu."),
    kv: str | None = typer.Option(EvalConfig.kv, show_default=False,
                                  help="Type of the artifact's KV cache, f16 or q8_0. Default: the runtime's own. With the "
                                       "artifact as its own --base: what the cache's type costs."),
    target: str | None = typer.Option(EvalConfig.target, show_default=False,
                                      help="Run the artifact on this device (see llmc target), the base here."),
    targets: Path | None = typer.Option(EvalConfig.targets, metavar="FILE", show_default=False,
                                        help="Default: ./targets.toml, or the one in ~/.config/llmc."),
    output: Path | None = typer.Option(EvalConfig.output, "--out", "-o", show_default=False,
                                       help="The report; one of the same artifact is added to."),
    as_json: bool = typer.Option(False, "--json", help="Print the report (without per-token values) as JSON."),
) -> None:
    """Measure what an artifact lost: perplexity, KL divergence to its base and agreement with it.

    The file itself is measured, in its own runtime, on the token ids of the base's tokenizer. --tasks adds the accuracy
    on multiple-choice and last-word tasks, scored as lm-evaluation-harness does. With --target the same file as --base
    shows what that device's arithmetic changes.
    """
    from llmc.evals.quality.run import evaluate
    from llmc.evals.report import store as report
    from llmc.evals.report.show import quality_lines

    made = evaluate(EvalConfig(artifact, base, text, second_text, context, chunks, threads, device, output,
                               tuple(tasks), task_items, no_text, kv, target, targets))
    print(json.dumps(report.without_arrays(made), indent=2, ensure_ascii=False) if as_json else quality_lines(made))
