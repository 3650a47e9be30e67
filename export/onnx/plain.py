"""`--exporter transformers` and `optimum`: a traced graph of ONNX's standard operators, for runtimes that support no others.

All values are float32; a quantized model is dequantized. The folder has config.json instead of genai_config.json. Tracing may
freeze a branch on a length or a mask. So the checks run a longer text than the traced one, first at once and then token by
token with the cache.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from llmc.console import say, size, warn
from llmc.errors import UserError
from llmc.export.onnx import files, rope, tracers, verify, writer
from llmc.export.onnx.config import OnnxExportConfig
from llmc.export.onnx.tracers import OTHERS
from llmc.export.parity import GENERATED, PLEASE_REPORT, PROMPT, check_ids
from llmc.export.reference import reference_logits
from llmc.export.windows import ignored, window_of
from llmc.files import check_disk, write_json
from llmc.formats import quantized
from llmc.formats.chat_template import hash_template
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_config, load_tokenizer, load_torch_model
from llmc.formats.onnx_folder import MODEL
from llmc.formats.text_ends import note_of_eos
from llmc.machine import physical_cores
from llmc.runtimes.onnx_model import OnnxModel


def check_model(config: OnnxExportConfig, ckpt: Checkpoint) -> None:
    """Raise UserError for a model that this exporter cannot write, before slow work starts."""
    tracers.check_model(config.exporter, ckpt)
    if kind := rope.by_length(ckpt.config):
        raise UserError(f"{ckpt.folder} has a rotary embedding that depends on the length of the text ({kind}), and a traced "
                        "graph has only that of short texts", OTHERS)
    if quantized.is_quantized(ckpt) and not config.dequantize:
        raise UserError(f"{ckpt.folder} is quantized, and --exporter {config.exporter} writes float32",
                        "leave --exporter out to keep the codes (--int4 qdq stores them for the standard DequantizeLinear), "
                        "or add --dequantize to write their values")


def write(config: OnnxExportConfig, ckpt: Checkpoint, work: Path, out: str) -> dict[str, Any]:
    """Trace, write and verify the folder `work`; return the report."""
    started = time.perf_counter()
    dequantized = quantized.is_quantized(ckpt)
    tok = load_tokenizer(ckpt.folder)
    notes = (["the values of the codes are written as float32"] if dequantized else []) + note_of_eos(tok)
    for note in notes:
        warn(note)
    template = files.copy_tokenizer(ckpt.folder, work, tok, config.chat_template)
    write_json(work / "config.json", {k: v for k, v in ckpt.config.items() if k != "quantization_config"})
    model = load_torch_model(ckpt.folder)
    floats = sum(p.nbytes for p in model.parameters())
    check_disk(work, 3 * floats, f"writing {out}")  # traced, written, and a tied table twice
    say(f"tracing {out}: {size(floats)} of float32 weights, held in memory twice")
    architecture = type(model).__name__
    hf = load_config(ckpt.folder)
    context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    ends = {"embedding": model.get_input_embeddings().weight.detach(),
              "head": model.get_output_embeddings().weight.detach()}
    traced = work / "traced"
    tracers.trace(config.exporter, model, traced)
    own = writer.write(ir.load(traced / MODEL), {}, work)
    verified = read_back(work, own, model)
    rows = len(ends["embedding"])
    del model, own
    shutil.rmtree(traced)
    operators = standard_operators(work)
    window, layers = window_of(hf) or (0, 0)
    notes += (late := ignored("ONNX Runtime", hf, layers if windowed(work, window) else 0))
    for note in late:
        warn(note)
    ids, prompt = check_ids(tok, verified["weights"], context), np.array(tok(PROMPT)["input_ids"])
    runtime = OnnxModel(work, max(len(ids), len(prompt) + GENERATED), config.threads or physical_cores())
    logits = verify_logits(runtime, ckpt, ids, ends)
    tokens = verify.token_ids("the package tokenizers", lambda text, special: runtime.tokenize(text, special).tolist(), work,
                              tok, template, rows)
    generated, cached = generate(runtime, tok, prompt)
    runtime.close()
    return {
        "path": out, "source": str(ckpt.folder), "architecture": architecture, "exporter": config.exporter,
        "bytes": sum(p.stat().st_size for p in work.iterdir() if p.is_file()),
        "weight_bytes": (work / writer.DATA).stat().st_size, "dequantized": dequantized, **operators,
        "verified": verified, "logits": logits, "cached_logits": cached, "token_ids": tokens, "generated": generated,
        "generated_tokens": cached["tokens"], "chat_template_sha256": hash_template(template), "notes": notes,
        "seconds": round(time.perf_counter() - started, 1),
    }


def read_back(work: Path, own: dict[str, np.ndarray], model: Any) -> dict[str, int]:
    """Compare every tensor of the file with the tracer's, and find every matrix of the model among them, transposed or not.

    Returns the counts; raises UserError."""
    stored = verify.stored_tensors(work)
    if stored.keys() != own.keys():
        raise verify.damaged("model.onnx does not hold the traced tensors")
    for name, values in own.items():
        if stored[name][1].tobytes() != values.tobytes():
            raise verify.damaged(f"{name} differs from the traced tensor")
    present = {sha256(raw.tobytes()).digest() for _, raw in stored.values()}
    matrices = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}
    for name, p in matrices.items():
        if not present & {sha256(m.contiguous().numpy().tobytes()).digest() for m in (p, p.t())}:
            raise UserError(f"the traced graph does not hold the values of {name}", PLEASE_REPORT)
    return {"tensors": len(stored), "matrices": len(matrices), "weights": sum(p.numel() for p in matrices.values()),
            "code_matrices": 0, "code_weights": 0}


def standard_operators(work: Path) -> dict[str, Any]:
    """The opset and the count of each operator in the graph; raises UserError for an operator outside of the standard."""
    onnx.checker.check_model(work / MODEL, full_check=True)
    model = onnx.load(work / MODEL, load_external_data=False)
    nodes = list(all_nodes(model.graph))
    if foreign := sorted({f"{n.domain}.{n.op_type}" for n in nodes if n.domain not in ("", "ai.onnx")}):
        raise UserError(f"the traced graph holds operators outside of the ONNX standard: {', '.join(foreign)}", PLEASE_REPORT)
    (opset,) = (o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    return {"opset": opset, "operators": dict(sorted(Counter(n.op_type for n in nodes).items()))}


def windowed(work: Path, window: int) -> bool:
    """Whether the graph holds a sliding window: it subtracts this number from the positions to make the mask.

    The check text may be shorter than the window, so that the logits do not tell."""
    graph = onnx.load(work / MODEL, load_external_data=False).graph
    values = {t.name: t for t in graph.initializer if t.data_location == onnx.TensorProto.DEFAULT}
    values |= {n.output[0]: n.attribute[0].t for n in all_nodes(graph) if n.op_type == "Constant"}
    taken = [values[n.input[1]] for n in all_nodes(graph) if n.op_type == "Sub" and n.input[1] in values]
    return any(onnx.numpy_helper.to_array(t).tolist() in (window, [window]) for t in taken)


def all_nodes(graph: onnx.GraphProto) -> Any:
    """Yield the nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from all_nodes(inner)


def verify_logits(runtime: OnnxModel, ckpt: Checkpoint, ids: np.ndarray, ends: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Compare the logits of ONNX Runtime and torch for one text, run at once."""
    return verify.bounded(reference_logits(ckpt, ids, ends), runtime.logits(ids), "torch's")


def generate(runtime: OnnxModel, tok: Any, prompt: np.ndarray) -> tuple[str, dict[str, Any]]:
    """A greedy continuation, token by token with the cache, and the comparison of its logits with those of the whole text."""
    rows = [runtime.prefill(prompt)]
    while len(rows) < min(GENERATED, runtime.context - len(prompt)):
        rows.append(runtime.decode(int(rows[-1].argmax())))
    new = [int(row.argmax()) for row in rows]
    whole = runtime.logits(np.append(prompt, new[:-1]), start=len(prompt) - 1)
    text = tok.decode([*prompt, *new], skip_special_tokens=True)
    return text, verify.bounded(whole, np.stack(rows), "with a cache those without")
