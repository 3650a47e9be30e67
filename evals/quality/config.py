"""The options of `llmc eval`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from llmc import options
from llmc.errors import UserError
from llmc.evals import shared_options as shared
from llmc.options import ADVANCED, RUN, Wrong, check, fitting, option


@dataclass(frozen=True)
class EvalConfig:
    """The options of `llmc eval`. The defaults are those of `llama-perplexity`, on the first 40 chunks."""

    artifact: str = option(help="A model or ONNX folder, a .gguf file or a hub id.", argument=True, metavar="ARTIFACT")
    _: KW_ONLY
    base: str | None = option(
        None, help="Model that the artifact was made from: a folder, a .gguf file or a hub id.", metavar="MODEL")
    text: str = option(
        "python-docs", help="Text to evaluate on: a text file, wikitext (from the hub) or python-docs.", metavar="TEXT")
    second_text: str | None = option(
        None, help="A second, different text. A loss on only one text is a sign of overfitting to the other.",
        metavar="TEXT")
    context: int = option(512, help="Number of tokens in a chunk. The second half of each chunk is scored.", low=8,
                          group=ADVANCED)
    chunks: int = option(40, help="Number of chunks of each text to evaluate. 0 means all.", low=0)
    threads: int | None = options.threads()
    device: str = shared.device()
    output: Path | None = options.out("Report to write. If it holds the same artifact already, the results are added.")
    tasks: tuple[str, ...] = option(
        (), help="Zero-shot tasks, separated by commas, each with a JSONL file of items. Without a file the items come from "
                 "the hub. Tasks: lambada, arc_easy, arc_challenge, piqa, hellaswag, winogrande, boolq, openbookqa.",
        metavar="TASK[=FILE],...")
    task_items: int = option(
        200, help="Number of items of each task to evaluate, evenly spaced. 0 means all.", low=0, group=ADVANCED)
    no_text: bool = option(False, help="Evaluate tasks only, no text.", group=ADVANCED)
    kv: str | None = shared.kv(
        " The base keeps its own type. To measure the effect of --kv alone, give the artifact as --base.")
    target: str | None = option(
        None, help="Device that runs the artifact (see `llmc target`). The base runs on this machine.", metavar="NAME",
        group=RUN, shown="this machine")
    targets: Path | None = options.targets()
    dry_run: bool = options.dry_run()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", fitting(tuple[str, ...], self.tasks))
        check(self, "eval", word=Wrong.out_of_range)
        if self.no_text and not self.tasks:
            raise UserError("--no-text leaves nothing to evaluate", "name some --tasks, or leave it out")
