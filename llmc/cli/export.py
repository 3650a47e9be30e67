"""`llmc export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def register(app: typer.Typer) -> None:
    app.command()(export)


def export(
    model: str = typer.Argument(None, help="A model folder (float or quantised) or a hub id. "
                                           "Left out: the newest model made in this folder."),
    format: str = typer.Option("gguf", "--format", help="The format: gguf, for llama.cpp."),
    out: Path = typer.Option(None, "--out", "-o", help="The file to write. Left out: <model>-<file type>.gguf here."),
    embedding: str = typer.Option(None, help="Type of the token embedding: f32, f16, bf16 or any GGUF weight type. "
                                             "Left out: what a preset or budget chose, else q8_0 with a quantised "
                                             "model, else as --float-type."),
    head: str = typer.Option(None, help="Type of the output matrix. Left out: what a preset or budget chose, else "
                                        "as --embedding. "
                                        "A tied model has no output matrix of its own."),
    float_type: str = typer.Option("f16", help="Type of matrices that are not quantised: f32, f16, bf16 or q8_0."),
    converter: Path = typer.Option(None, help="A llama.cpp checkout whose converter lays the file out, for "
                                              "architectures that llmc does not write by itself. Its Python code is "
                                              "run."),
    pre: str = typer.Option(None, help="llama.cpp's name of the pre-tokenizer. Left out: found from tokenizer.json."),
    chat_template: str = typer.Option("keep", help="keep, drop, or a Jinja file to carry instead."),
    threads: int = typer.Option(None, help="Threads of the checks. Left out: this machine's physical cores."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as one JSON object."),
) -> None:
    """Write a model as one file for its runtime, and prove the file.

    The codes of a quantised model are carried over bit for bit, and every tensor is read back. llama.cpp must then open
    the file, make the same tokens and the same logits as transformers, and generate 16 tokens. A file that fails is not
    kept.
    """
    import llmc

    report = llmc.export(model, format=format, out=out, embedding=embedding, head=head, float_type=float_type,
                         converter=converter, pre=pre, chat_template=chat_template, threads=threads)
    print(json.dumps(report, indent=2) if as_json else describe(report))


def describe(report: dict[str, Any]) -> str:
    """The report in a few lines for a person."""
    from llmc.console import size

    verified, logits, ids = report["verified"], report["logits"], report["token_ids"]
    classes = ", ".join(f"{name} {size(n)}" for name, n in report["bytes_by_class"].items() if n)
    types = ", ".join(f"{n} {name}" for name, n in sorted(report["tensor_types"].items()))
    lines = [
        f"{report['path']}: {size(report['bytes'])}, {report['architecture']}, {report['file_type']}",
        f"  bytes      {classes}",
        f"  tensors    {types}",
        f"  read back  {verified['weights']:,} weights equal their source, {verified['code_weights']:,} of them codes bit "
        "for bit",
        f"  token ids  {ids['text_tokens']} of the check text and {ids['added_tokens']} added tokens are the same; "
        f"pre-tokenizer {report['pre_tokenizer']}",
        f"  logits     relative error {logits['relative_error']:.2g}, mean KL divergence {logits['mean_kld']:.2g}, "
        f"top-1 agreement {logits['top1_agreement']:.1%} over {logits['tokens']} tokens",
        f"  says       {report['generated']!r}",
    ]
    return "\n".join(lines)
