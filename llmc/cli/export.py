"""`llmc export`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from llmc import memory
from llmc.cli.options import Json, add
from llmc.console import size
from llmc.export.formats import FORMATS


def register(app: typer.Typer) -> None:
    add(app, export, *(row.config for row in FORMATS.values()))


def export(
    context: typer.Context,
    format: Annotated[str, typer.Option("--format", help=(
        "Format of the result: gguf, a file for llama.cpp, or onnx, a folder for ONNX Runtime."))] = "gguf",
    *, options: dict[str, Any], as_json: Json = False,
) -> None:
    """Write a model for its runtime, as a GGUF file or an ONNX folder, and verify what was written.

    The codes of a quantized model are copied bit for bit, and every tensor is read back. The runtime must then open
    it, make the same tokens as transformers and the same logits as torch, and generate 16 tokens. A result that fails is
    deleted.
    """
    from llmc import api

    # only options that the user gave are passed on, so that an option of the other format is an error
    sources = {name: context.get_parameter_source(name) for name in options}
    given = {name: options[name] for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    report = api.export(format=format, **given)
    print(json.dumps(report, indent=2) if as_json else _plan(report) if options["dry_run"] else describe(report))


def _plan(p: dict[str, Any]) -> str:
    notes = "".join(f"  {note}\n" for note in p.get("notes", []))
    return f"{p['source']} -> {p['out']}\n  {size(p['bytes'])} of matrices when done\n{notes}  {memory.described(p)}"


def describe(report: dict[str, Any]) -> str:
    """The report as text."""
    verified, logits, ids = report["verified"], report["logits"], report.get("token_ids", {})
    lines = [f"{report['path']}: {size(report['bytes'])}, {report['architecture']}"]
    if "forms" in report:
        lines += [
            f"  matrices   {', '.join(f'{n} {name}' for name, n in sorted(report['forms'].items()))}",
            f"  read back  {verified['weights']:,} weights equal their source, {verified['code_weights']:,} of them codes "
            "bit for bit",
            f"  token ids  {ids['text_tokens']} of the check text are the same",
        ]
    elif "opset" in report:
        lines += [
            f"  operators  {sum(report['operators'].values())} of {len(report['operators'])} kinds, all of ONNX's standard, "
            f"opset {report['opset']}",
            f"  read back  {verified['weights']:,} weights of {verified['matrices']} matrices equal their source",
        ]
    else:
        lines[0] += f", {report['file_type']}"
        classes = ", ".join(f"{name} {size(n)}" for name, n in report["bytes_by_class"].items() if n)
        types = ", ".join(f"{n} {name}" for name, n in sorted(report["tensor_types"].items()))
        lines += [
            f"  bytes      {classes}",
            f"  tensors    {types}",
            f"  read back  {verified['weights']:,} weights equal their source, {verified['code_weights']:,} of them codes "
            "bit for bit",
            f"  token ids  {ids['text_tokens']} of the check text and {ids['added_tokens']} added tokens are the same; "
            f"pre-tokenizer {report['pre_tokenizer']}",
        ]
    lines.append(f"  logits     relative error {logits['relative_error']:.2g}, mean KL divergence {logits['mean_kld']:.2g}, "
                 f"top-1 agreement {logits['top1_agreement']:.1%} over {logits['tokens']} tokens")
    if products := logits.get("products"):
        lines.append(f"  products   {products['equal']:,} of {products['products']:,} of {products['linears']} W8A8 matrices "
                     f"equal torch's, the rest within {products['largest_error']:.2g} of the largest")
    if "accuracy_level" in report:
        head = "" if report["head_accuracy_level"] is None else f", head {report['head_accuracy_level']}"
        lines.append(f"  level      {report['accuracy_level']}{head}: {report['accuracy_reason']}")
    return "\n".join([*lines, f"  generated  {report['generated']!r}"])
