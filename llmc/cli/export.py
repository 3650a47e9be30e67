"""`llmc export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def register(app: typer.Typer) -> None:
    app.command()(export)


def export(
    context: typer.Context,
    model: str = typer.Argument(None, help="A model folder (float or quantized) or a hub id. "
                                           "Left out: the newest model made in this folder."),
    format: str = typer.Option("gguf", "--format", help="gguf, a file for llama.cpp, or onnx, a folder for ONNX Runtime."),
    out: Path = typer.Option(None, "--out", "-o", help="The file or folder to write. Left out: "
                                                           "<model>-<file type>.gguf or <model>-onnx here."),
    embedding: str = typer.Option(None, help="gguf: type of the token embedding: f32, f16, bf16 or any GGUF weight type. "
                                             "Left out: what a preset or budget chose, else q8_0 with a quantized "
                                             "model, else as --float-type."),
    head: str = typer.Option(None, help="gguf: type of the output matrix. Left out: what a preset or budget chose, else "
                                        "as --embedding. "
                                        "A tied model has no output matrix of its own."),
    float_type: str = typer.Option("f16", help="gguf: type of matrices that are not quantized: f32, f16, bf16 or q8_0."),
    converter: Path = typer.Option(None, help="gguf: a llama.cpp checkout whose converter lays the file out, for "
                                              "architectures that llmc does not write by itself. Its Python code is "
                                              "run."),
    pre: str = typer.Option(None, help="gguf: llama.cpp's name of the pre-tokenizer. Left out: found from tokenizer.json."),
    exporter: str = typer.Option("builder", help="onnx: builder (for ONNX Runtime) or optimum (float32 in ONNX's "
                                                 "standard operators, for other runtimes; needs the extra 'optimum')."),
    dequantize: bool = typer.Option(False, "--dequantize", help="onnx, --exporter optimum: write a quantized model's "
                                                                "values as float32."),
    dtype: str = typer.Option(None, help="onnx: how a float model's matrices are stored: fp32, fp16, int8 (rounded, in "
                                         "blocks of 32) or w8a8 (int8 by rows, and inputs in int8 by tokens: transform "
                                         "with --scaling smoothquant first). Left out: fp16. A quantized model carries its codes."),
    accuracy_level: str = typer.Option("auto", help="onnx: 0 (float32 activations), 4 (rounded to int8, faster), or auto: "
                                                    "4 where it is measured to be faster and to lose little."),
    head_accuracy_level: str = typer.Option(None, help="onnx: the same of the output matrix alone, where it has 4 or 8 bits: "
                                                       "0, 4 or auto. Left out: as --accuracy-level, and measured apart "
                                                       "where that is auto."),
    int4: str = typer.Option("nbits", help="onnx: nbits (ONNX Runtime's MatMulNBits) or qdq (standard operators: "
                                           "DequantizeLinear and MatMul)."),
    head_bits: int = typer.Option(None, help="onnx: bits of embedding and output matrix: 4, 8 or 16. Left out: 8 beside a "
                                             "quantized decoder, else as --dtype."),
    chat_template: str = typer.Option("keep", help="keep, drop, or a Jinja file to carry instead."),
    threads: int = typer.Option(None, help="Threads of the checks. Left out: this machine's physical cores."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as one JSON object."),
) -> None:
    """Write a model for its runtime, as a GGUF file or an ONNX folder, and prove what was written.

    The codes of a quantized model are carried over bit for bit, and every tensor is read back. The runtime must then open
    it, make the same tokens as transformers and the same logits as torch, and generate 16 tokens. What fails is not kept.
    """
    import llmc

    # only what was given is passed on, so that an option of the other format is noticed
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name: context.params[name] for name, source in sources.items()
             if source is not None and source.name != "DEFAULT" and name not in ("model", "format", "as_json")}
    report = llmc.export(model, format=format, **given)
    print(json.dumps(report, indent=2) if as_json else describe(report))


def describe(report: dict[str, Any]) -> str:
    """The report in a few lines for a person."""
    from llmc.console import size

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
    return "\n".join([*lines, f"  says       {report['generated']!r}"])
