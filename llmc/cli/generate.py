"""`llmc generate`."""

from __future__ import annotations

import json

import typer

from llmc.runtimes.config import GenerateConfig


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    artifact: str = typer.Argument(..., metavar="ARTIFACT", help="A model or ONNX folder, a .gguf file or a hub id."),
    prompt: str = typer.Argument(..., metavar="PROMPT", help="What to continue, or to answer with --chat."),
    max_tokens: int = typer.Option(GenerateConfig.max_tokens, help="The most tokens to make."),
    temperature: float = typer.Option(GenerateConfig.temperature, help="0 takes the likeliest token each time."),
    seed: int = typer.Option(GenerateConfig.seed, help="For a temperature above 0."),
    chat: bool = typer.Option(GenerateConfig.chat, "--chat/--raw",
                              help="Put the prompt through the model's chat template, or continue it as it is."),
    threads: int | None = typer.Option(GenerateConfig.threads, help="Default: the physical cores.", show_default=False),
    device: str = typer.Option(GenerateConfig.device, help="cpu or gpu."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Look at what an artifact says, in its own runtime."""
    from llmc.console import say
    from llmc.runtimes.generation import generate
    from llmc.sources.resolve import locate

    config = GenerateConfig(max_tokens, temperature, seed, chat, threads, device)
    found = locate(artifact)
    if as_json:
        made = generate(found, prompt, config)
        print(json.dumps({"artifact": artifact, "prompt": prompt, **made}, ensure_ascii=False, indent=2))
        return
    if not chat:
        print(prompt, end="", flush=True)
    made = generate(found, prompt, config, show=lambda text: print(text, end="", flush=True))
    print()
    speed = f", {made['tokens_per_second']:.1f} tokens/s" if made["tokens_per_second"] else ""
    say(f"({made['tokens']} tokens, stopped at {made['stopped']}{speed})")
