"""`llmc generate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llmc.cli.options import Json, add
from llmc.runtimes.config import GenerateConfig


def register(app: typer.Typer) -> None:
    add(app, generate, GenerateConfig)


def generate(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A model or ONNX folder, a .gguf file or a hub id.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue, or to answer with --chat.")],
    config: GenerateConfig, as_json: Json = False,
) -> None:
    """Generate text from an artifact, in its own runtime."""
    from llmc.console import say
    from llmc.runtimes.generation import generate
    from llmc.sources.resolve import locate

    found = locate(artifact)
    if as_json:
        made = generate(found, prompt, config)
        print(json.dumps({"artifact": artifact, "prompt": prompt, **made}, ensure_ascii=False, indent=2))
        return
    if not config.chat:
        print(prompt, end="", flush=True)
    made = generate(found, prompt, config, show=lambda text: print(text, end="", flush=True))
    print()
    speed = f", {made['tokens_per_second']:.1f} tokens/s" if made["tokens_per_second"] else ""
    say(f"({made['tokens']} tokens, stopped at {made['stopped']}{speed})")
