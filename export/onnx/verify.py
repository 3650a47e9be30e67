"""Verification of an ONNX folder. No part of it can be skipped.

1. Every tensor is read back from the finished files with the onnx package. Codes, scales and zero points must equal the
   checkpoint's bit for bit, floats in their type, and the builder's own tensors must not change.
2. ONNX Runtime opens the file and must give torch's logits. W8A8 is verified in steps (w8a8_proof.py).
3. onnxruntime-genai must give the token ids of the model's tokenizer (genai.py). It generates 16 tokens for the user to read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch

from llmc.console import progress, warn
from llmc.errors import UserError
from llmc.export import token_proof
from llmc.export.onnx import layout
from llmc.export.onnx.emit import Placed
from llmc.export.onnx.w8a8_proof import MOST_INPUT, Linears
from llmc.export.onnx.weights import W8A8, Weights
from llmc.export.parity import PLEASE_REPORT, compare_logits, first_difference, show
from llmc.export.reference import reference_logits
from llmc.files import read_json
from llmc.formats import quantized
from llmc.formats.chat_template import Template
from llmc.formats.check_text import CHECK_TEXT, MARKS
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.onnx_folder import open_onnx
from llmc.formats.tokenizer_json import TOKENIZER
from llmc.formats.types import IntegerType, QuantizedTensor
from llmc.runtimes.onnx_model import OnnxModel

# Bounds of the logits at accuracy level 0, both sides in float32. Trained and untrained models have a relative error of 1e-6.
MOST_RELATIVE, MOST_KLD = 1e-4, 1e-4
# {key of the report: (text, what is warned of if its ids differ)}
NOTED = {"combining_marks_alike": (MARKS, "a word with combining marks (Hindi, Tamil, Thai …)"),
         "leading_space_alike": (" a", "a text that begins with a space"),
         "long_runs_alike": ("a" + " " * 130 + "b", "a run of more than 100 characters without a new word")}


def stored_tensors(folder: Path) -> dict[str, tuple[onnx.TensorProto, np.ndarray]]:
    """Every tensor of model.onnx with its raw bytes, uint8 [n], mapped from the data file."""
    source = open_onnx(folder)
    return {t.name: (t, source.raw(t)) for t in source.proto.graph.initializer}


def damaged(what: str) -> UserError:
    return UserError(f"the folder does not read back as it was written: {what}",
                     f"check the disk and export again; if the error stays, {PLEASE_REPORT}")


def tensors(folder: Path, own: dict[str, np.ndarray], weights: Weights, placed: list[Placed]) -> dict[str, int]:
    """Read every tensor back and compare it; `own` are the builder's own tensors.

    Returns the number of matrices and weights compared, in total and of those copied as codes; raises UserError."""
    stored = stored_tensors(folder)
    planned = {name for w in placed for name in (w.weight, w.scales, w.zeros) if name}
    if stored.keys() != planned | own.keys():
        raise damaged("model.onnx does not hold the planned tensors")
    counts = {"tensors": len(stored), "matrices": 0, "weights": 0, "code_matrices": 0, "code_weights": 0}
    with progress("reading back tensor", len(placed)) as p:
        for w in placed:
            shape = sum(x.stop - x.start for x in w.pieces), weights.columns(w.pieces[0].module)
            _compare(w, stored, weights, shape)
            carried = all(x.module in weights.linears for x in w.pieces)
            for prefix in ("", "code_")[: 1 + carried]:
                counts[f"{prefix}matrices"] += 1
                counts[f"{prefix}weights"] += shape[0] * shape[1]
            p.step(w.node)
    for name, values in own.items():
        if stored[name][1].tobytes() != values.tobytes():
            raise damaged(f"{name} differs from the model builder's tensor")
    return counts


def _compare(w: Placed, stored: dict[str, Any], weights: Weights, shape: tuple[int, int]) -> None:
    """Compare one matrix [N, K] of the file with the checkpoint, which is read again."""
    raw = stored[w.weight][1]
    if not isinstance(w.form, IntegerType) and w.form != W8A8:
        dtype = np.float32 if w.form == "fp32" else np.float16
        values = raw.view(dtype).reshape(shape[::-1]).T if w.transposed else raw.view(dtype).reshape(shape)
        if not np.array_equal(values, weights.values(w.pieces).numpy()[slice(None) if w.order is None else w.order]):
            raise damaged(f"{w.weight} differs from its source")
        return
    found = decode(w, stored, shape)
    if w.order is not None:
        found = cast(QuantizedTensor, quantized.rows_of(found, torch.from_numpy(np.argsort(w.order))))
    at = 0
    for piece in w.pieces:
        rows = slice(at, at + piece.stop - piece.start)
        at = rows.stop
        source = weights.source(piece.module)
        for what, a, b in (("codes", found.codes, source.codes), ("scales", found.scales, source.scales),
                           ("zero points", found.zeros, source.zeros)):
            if (a is None) != (b is None) or (a is not None and b is not None
                                              and not torch.equal(a[rows], b[piece.start : piece.stop])):
                raise damaged(f"{w.node} has other {what} than {piece.module}")
        if piece.module in weights.linears:  # the dequantized values must be equal too
            values = quantized.rows_of(quantized.read(weights.ckpt, piece.module), slice(piece.start, piece.stop))
            if not torch.equal(quantized.rows_of(found, rows).dequantize(), values.dequantize()):
                raise damaged(f"{w.node} has other values than {piece.module}")


def decode(w: Placed, stored: dict[str, Any], shape: tuple[int, int]) -> QuantizedTensor:
    """A quantized matrix from the file's bytes, in the formats that layout.py describes."""
    n, k = shape
    qtype = w.form if isinstance(w.form, IntegerType) else IntegerType(8, k)
    assert w.scales is not None
    blocks, qdq = k // qtype.group_size, w.standard
    wide = (k, n) if w.transposed else (n, k)
    narrow = (blocks, n) if w.transposed else (n, blocks)

    def integers(name: str, size: tuple[int, int], flat: bool) -> np.ndarray:
        raw = stored[name][1]
        rows = (1, size[0] * size[1]) if flat else size
        values = layout.unpack(raw.reshape(rows[0], -1), qtype.bits, rows[1]).reshape(size)
        return values.T if w.transposed else values

    codes = integers(w.weight, wide, qdq)
    if w.signed:
        codes = layout.signed(codes, qtype.bits)
    scales = stored[w.scales][1].view(np.float32).reshape(narrow)
    scales = scales.T if w.transposed else scales
    if w.form != W8A8:
        half = scales.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), scales):
            raise damaged(f"{w.scales} holds scales that float16 cannot hold")
        scales = half
    zeros = None if w.zeros is None else torch.from_numpy(integers(w.zeros, narrow, qdq).copy())
    return QuantizedTensor(qtype, torch.from_numpy(codes.copy()), torch.from_numpy(scales.copy()), zeros)


def logits(runtime: OnnxModel, ckpt: Checkpoint, ids: np.ndarray, weights: Weights, linears: Linears) -> dict[str, Any]:
    """Compare the logits of torch and ONNX Runtime at accuracy level 0 for the same ids; raise UserError beyond the bounds.

    runtime: a session at that level that also outputs the inputs and outputs of W8A8 linears."""
    try:
        linears.values = runtime.values(ids)
    except RuntimeError as e:
        raise UserError(f"ONNX Runtime does not run the graph: {' '.join(str(e).split())[:300]}",
                        "its operators do not support this model; export it as GGUF (--format gguf)") from e
    found = linears.values.pop("logits")
    products = linears.products() if linears.watched else {}  # first: a wrong product makes all later inputs wrong
    ends = {"embedding": weights.as_stored(weights.embedding), "head": weights.as_stored(weights.head)}
    expected = reference_logits(ckpt, ids, ends, weights.as_stored, linears.replace)[:, : found.shape[1]]
    report = bounded(expected, found, "torch's", MOST_INPUT if linears.watched else MOST_RELATIVE)
    inputs = {"input_error": linears.worst_input, "max_input_error": MOST_INPUT}
    return report | {"products": products | inputs} if products else report


def bounded(expected: np.ndarray, found: np.ndarray, what: str, most: float = MOST_RELATIVE) -> dict[str, Any]:
    """Compare two logits [n, vocab]; return the figures. Beyond the bounds, raise UserError: `found` are not `what`."""
    relative, kld, top1 = compare_logits(expected, found)
    if not (relative <= most and kld <= MOST_KLD):  # NaN must fail too
        raise UserError(
            f"ONNX Runtime's logits are not {what}: relative error {relative:.3g} (at most {most:g}), mean KL "
            f"divergence {kld:.3g} (at most {MOST_KLD:g}), top-1 agreement {top1:.0%}", PLEASE_REPORT)
    return {"tokens": len(found), "relative_error": relative, "max_relative_error": most, "mean_kld": kld,
            "max_mean_kld": MOST_KLD, "top1_agreement": top1}


def token_ids(name: str, encode: Callable[[str, bool], list[int]], folder: Path, tokenizer: Any, template: Template | None,
              rows: int) -> dict[str, Any]:
    """Compare the ids of texts, of rendered chats and around added tokens. Returns the counts. Raises UserError if those of
    the check text or of a chat differ, and warns of the others.

    name: of the runtime.  encode: its ids of a text, with or without special tokens around it.  folder: the written one.
    template: its chat templates.  rows: of the embedding."""
    if (different := difference(encode, tokenizer, CHECK_TEXT)) is not None:
        raise UserError(f"{name} does not tokenize as the model does: {different}",
                        "its tokenizer does not support this kind; export it as GGUF (--format gguf)")
    alike = {key: difference(encode, tokenizer, text) is None for key, (text, _) in NOTED.items()}
    for key, (_, what) in NOTED.items():
        if not alike[key]:
            warn(f"{what} is tokenized differently by {name} and by transformers")
    # a chat template names the special tokens
    side = token_proof.Side(name, lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
                            lambda text: encode(text, False),
                            "export it as GGUF (--format gguf), or leave the template out (--chat-template drop)")
    prompts = token_proof.chats(side, tokenizer, template)
    spec = read_json(folder / TOKENIZER)
    beside = token_proof.added(side, tokenizer, spec, [t for t in spec.get("added_tokens", []) if t["id"] < rows])
    return {"text_tokens": len(tokenizer(CHECK_TEXT)["input_ids"]), "chat_tokens": prompts, "around_added_tokens": beside,
            **alike}


def difference(encode: Callable[[str, bool], list[int]], tokenizer: Any, text: str) -> str | None:
    """What a runtime does otherwise in a text with special tokens around it; None if nothing."""
    expected, found = list(tokenizer(text)["input_ids"]), encode(text, True)
    at = first_difference(expected, found)
    return None if at is None else show(at[0], expected, found, tokenizer)
