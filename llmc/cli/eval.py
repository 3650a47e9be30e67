"""`llmc eval`."""

from __future__ import annotations

import json
from typing import Any

import typer

from llmc import memory
from llmc.cli.options import Json, add
from llmc.evals.quality.config import EvalConfig


def register(app: typer.Typer) -> None:
    add(app, evaluate, EvalConfig, name="eval")


def evaluate(config: EvalConfig, as_json: Json = False) -> None:
    """Measure the loss of quality of an artifact: perplexity, KL divergence to its base and agreement with it.

    The file itself is measured, in its own runtime, on the token ids of the base's tokenizer. --tasks adds the accuracy
    on multiple-choice and last-word tasks, scored as in lm-evaluation-harness. To see what a device's arithmetic changes,
    give the same file as --base, and the device as --target. --json leaves out the values of each token.
    """
    from llmc.evals.quality.run import evaluate, plan
    from llmc.evals.report import store as report
    from llmc.evals.report.show import quality_lines

    if config.dry_run:
        found = plan(config)
        print(json.dumps(found, indent=2) if as_json else _plan(found))
        return
    made = evaluate(config)
    print(json.dumps(report.without_arrays(made), indent=2, ensure_ascii=False) if as_json else quality_lines(made))


def _plan(p: dict[str, Any]) -> str:
    base = f" against {p['base']}" if p["base"] else ""
    return f"{p['artifact']}{base}, {p['context']} tokens at a time\n  {memory.described(p)}"
