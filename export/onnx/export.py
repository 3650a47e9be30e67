"""The ONNX export from end to end: plan, write, verify, publish."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmc.console import say, size, warn
from llmc.errors import UserError
from llmc.export.memory import MORE, memory_of
from llmc.export.onnx.config import OnnxExportConfig
from llmc.export.source import model_folder, source_of, stem
from llmc.export.windows import ignored
from llmc.files import check_disk, staged_folder, write_json
from llmc.formats import quantized
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.chat_template import hash_template
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_config, load_tokenizer
from llmc.formats.manifest import check_output, hash_folder, new_manifest, note_last, read_manifest
from llmc.formats.no_code import remove_code
from llmc.formats.onnx_folder import MODEL
from llmc.formats.text_ends import note_of_eos
from llmc.locks import locked
from llmc.machine import physical_cores
from llmc.memory import ONNX_RUNTIME, PROCESS, TORCH, Memory, Step

if TYPE_CHECKING:
    from llmc.export.onnx.emit import Emitter
    from llmc.export.onnx.weights import Weights

PACKAGES = {"onnx": "onnx", "onnx_ir": "onnx-ir", "onnxruntime": "onnxruntime", "onnxruntime_genai": "onnxruntime-genai"}


def run(config: OnnxExportConfig) -> dict[str, Any]:
    """Run `llmc.export.onnx.export_onnx`. If a check fails, no folder is left. With `dry_run` it returns the plan."""
    if missing := [d for module, d in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise UserError(f"exporting ONNX needs {', '.join(missing)}: to build the graph, write it and check it",
                        f"pip install 'llmc-toolkit[{'optimum' if config.exporter == 'optimum' else 'onnx'}]'")
    from llmc.export.onnx import builder, plain, tracers

    traces = config.exporter != "builder"
    if traces:
        tracers.check_packages(config.exporter)
    if not config.dry_run:
        check_output(config.out, "onnx", config)
    folder = model_folder(config.model)
    ckpt = Checkpoint.open(folder)
    # errors that are cheap to find come before slow work
    quantized.linears(ckpt)
    quantized.check_order(ckpt)
    if traces:
        plain.check_model(config, ckpt)
    else:
        builder.name_of(ckpt.config)
    source = source_of(folder)
    out = config.out or Path(f"{stem(folder, source)}-onnx")
    torch.set_num_threads(config.threads or physical_cores())
    if config.dry_run:
        with tempfile.TemporaryDirectory() as work:
            memory, total = _traced(ckpt) if traces else _planned(config, ckpt, Path(work)).sizes
        return {"source": str(folder), "out": str(out), "exporter": config.exporter, "bytes": total, "disk_bytes": total,
                **memory.plan(), "threads": torch.get_num_threads()}
    check_output(out, "onnx", config, folder)
    if traces:
        _traced(ckpt)[0].check("exporting", MORE)
    with locked(out), staged_folder(out) as work:
        write = plain.write if traces else _write
        report = write(config, ckpt, work, str(out))
        remove_code(work, str(out))
        _record(config, ckpt, source, work, report)
    note_last(out, "onnx")
    return report


@dataclass(frozen=True)
class Planned:
    """A folder that is planned but not written.  made: the graph.  context: the largest number of tokens.  sizes: the memory
    of writing and verifying it, and the bytes of its matrices."""

    hf: Any
    made: Any
    weights: Weights
    emitter: Emitter
    context: int
    sizes: tuple[Memory, int]


def _planned(config: OnnxExportConfig, ckpt: Checkpoint, work: Path) -> Planned:
    """Build the graph without the data of its matrices. Small files are written to `work`."""
    from llmc.export.onnx import emit, graph, rope, skeleton
    from llmc.export.onnx.weights import Weights

    hf = load_config(ckpt.folder)
    context, ends_early = rope.context_of(hf.get_text_config().to_dict())
    whole = skeleton.Skeleton(ckpt, hf)
    ends = whole.ends
    weights = Weights(config, ckpt, ends.embedding, ends.head, whole.sources)
    weights.notes += [ends_early] if ends_early else []
    if hf.get_text_config() is not hf:
        weights.notes.append("the file holds the language model alone: what reads pictures or sound is left out")
    emitter = emit.Emitter(weights, qdq=config.int4 == "qdq")
    made = graph.build(ckpt, hf.get_text_config(), weights, whole, emitter, work)
    weights.notes += ignored("ONNX Runtime", hf, graph.windowed(made))
    tables: Any = whole.model
    modules = [tables.get_input_embeddings(), *([] if weights.tied else [tables.get_output_embeddings()])]
    total = sum(e.nbytes for e in emitter.entries.values())
    # ONNX Runtime packs every matrix; float16 ones become float32 first
    copies = sum(e.nbytes * (2 if e.dtype.itemsize == 2 and len(e.shape) == 2 else 1) for e in emitter.entries.values())
    memory = memory_of(ckpt.folder, total, [m.weight.numel() for m in modules], copies, ONNX_RUNTIME)
    return Planned(hf, made, weights, emitter, context, (memory, total))


def _traced(ckpt: Checkpoint) -> tuple[Memory, int]:
    """The memory of `plain.write`, which traces the model in float32: its weights and those of the graph. And the bytes of
    the result."""
    weights = 4 * artifact_at(ckpt.folder).weigh()["parameters"]
    terms = {PROCESS: TORCH + ONNX_RUNTIME, "weights in float32": weights, "weights of the graph": weights}
    return Memory((Step("tracing", terms),)), weights


def _write(config: OnnxExportConfig, ckpt: Checkpoint, work: Path, out: str) -> dict[str, Any]:
    """Plan, write and verify the folder `work`; return the report."""
    from llmc.export.onnx import files, genai, levels, verify, w8a8_proof, writer
    from llmc.export.onnx.weights import form_name
    from llmc.export.parity import check_ids
    from llmc.formats import onnx_lint
    from llmc.formats.onnx_folder import open_onnx
    from llmc.runtimes.onnx_model import OnnxModel

    started = time.perf_counter()
    threads = config.threads or physical_cores()
    planned = _planned(config, ckpt, work)
    hf, weights, emitter, context = planned.hf, planned.weights, planned.emitter, planned.context
    memory, total = planned.sizes
    tok = load_tokenizer(ckpt.folder)
    template = files.copy_tokenizer(ckpt.folder, work, tok, config.chat_template)
    weights.notes += note_of_eos(tok) + genai.note_of_special(tok)
    memory.check("exporting", MORE)
    check_disk(work, total + (64 << 20), f"writing {out}")
    for note in weights.notes:
        warn(note)
    forms = dict.fromkeys(form_name(weights.form(end)) for end in (weights.embedding, weights.head))
    say(f"writing {out}: {size(total)} of matrices; embedding and head {' and '.join(forms)} ({weights.reason})")
    own = writer.write(planned.made, emitter.entries, work)
    verified = verify.tensors(work, own, weights, emitter.placed)
    ids = check_ids(tok, verified["weights"], context)
    linears = w8a8_proof.Linears(emitter, weights)
    runtime = OnnxModel(open_onnx(work).edit(level=0, watched=linears.watched), len(ids), threads)
    checked = verify.logits(runtime, ckpt, ids, weights, linears)
    runtime.close()
    taken, reason, measured = levels.settle(work, config, ids, threads)
    stops = files.end_ids(ckpt.folder, tok, hf.get_text_config().vocab_size)
    files.finish_genai(work, stops, taken.level if emitter.qdq else None)
    say(f"accuracy {taken}: {reason}")
    findings = onnx_lint.lint(work / MODEL)
    notes = weights.notes + onnx_lint.as_notes(findings)
    for note in onnx_lint.as_notes(findings):
        say(f"note: {note}")
    proved = genai.prove(work, tok, template, hf.get_text_config().vocab_size, context)
    return {
        "path": out, "source": str(ckpt.folder), "architecture": hf.architectures[0],
        "bytes": sum(p.stat().st_size for p in work.iterdir() if p.is_file()),
        "weight_bytes": (work / writer.DATA).stat().st_size,
        "forms": dict(Counter(form_name(w.form) for w in emitter.placed)),
        "int4": config.int4, "tied": weights.tied, "verified": verified, "logits": checked,
        "accuracy_level": taken.level, "head_accuracy_level": taken.head, "accuracy_reason": reason,
        "accuracy_levels": [asdict(m) for m in measured],
        "chat_template_sha256": hash_template(template), "notes": notes, "lint": [asdict(f) for f in findings],
        "seconds": round(time.perf_counter() - started, 1), **proved,
    }


def _record(config: OnnxExportConfig, ckpt: Checkpoint, source: dict[str, Any], work: Path, report: dict[str, Any]) -> None:
    """Write the manifest. It continues the passes of the source model."""
    before = read_manifest(ckpt.folder) or {}
    options = {"exporter": config.exporter, "dequantize": config.dequantize, "dtype": config.dtype,
               "accuracy_level": config.accuracy_level, "head_accuracy_level": config.head_accuracy_level,
               "int4": config.int4, "head_bits": config.head_bits, "chat_template": config.chat_template}
    measured = {k: v for k, v in report.items() if k not in ("path", "source")}
    this = {"name": "export-onnx", "config": options, **measured}
    manifest = new_manifest("onnx", source, [*before.get("passes", []), this], outputs=hash_folder(work))
    write_json(work / "llmc.json", manifest)
