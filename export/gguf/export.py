"""The GGUF export from end to end: plan, write, verify, publish."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGUFWriter

from llmc.console import say, size, warn
from llmc.errors import UserError
from llmc.export.gguf import blocks, metadata, tokenizer, verify, writer
from llmc.export.gguf.architectures import add_hyperparameters, find_architecture
from llmc.export.gguf.arithmetic import Kinds
from llmc.export.gguf.blocks import Kind
from llmc.export.gguf.config import GgufExportConfig
from llmc.export.gguf.plan import EMBEDDING, OUTPUT, Plan, Planner, Types
from llmc.export.gguf.projector import beside, publish
from llmc.export.gguf.rope import yarn_note
from llmc.export.gguf.writer import GgufTensor
from llmc.export.memory import MORE, memory_of
from llmc.export.source import model_folder, source_of, stem
from llmc.export.text_model import config_of, text_model
from llmc.export.windows import ignored
from llmc.families import of_config
from llmc.files import check_disk
from llmc.formats import quantized
from llmc.formats.chat_template import hash_template
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_config, load_tokenizer
from llmc.formats.manifest import check_output, new_manifest, note_last, passes_of, read_manifest, staged_artifact
from llmc.formats.pretokenizers import WITHOUT_MARKS
from llmc.machine import physical_cores
from llmc.memory import LLAMA_CPP, Memory
from llmc.runtimes.amx import use_extra_buffers
from llmc.runtimes.memory import REPACKED
from llmc.runtimes.trial import try_unfinished
from llmc.sources.llama_cpp import SCRIPT, SETUP, converter_architectures, find_converter


def run(config: GgufExportConfig) -> dict[str, Any]:
    """Run `llmc.export.gguf.export_gguf`. If a check fails, no file is left. With `dry_run` it returns the plan."""
    _need_packages()
    if not config.dry_run:
        check_output(config.out, "gguf", config)
    folder = model_folder(config.model)
    ckpt = Checkpoint.open(folder)
    # errors that are cheap to find come before slow work
    quantized.linears(ckpt)
    quantized.check_order(ckpt)
    written, script = _way(config, ckpt)
    threads = config.threads or physical_cores()
    types = Types.choose(config, ckpt)
    torch.set_num_threads(threads)
    tok = load_tokenizer(folder)
    if script is None:
        return _finish(config, ckpt, written, tok, threads, types, plan_file(config, written, tok, types))
    if config.dry_run:
        raise UserError("--dry-run does not go with --converter: the converter lays out the file while it runs",
                        "leave out --dry-run")
    from llmc.export.gguf.converter import converted

    with converted(config, script, ckpt, written, tok, types) as plan:
        return _finish(config, ckpt, written, tok, threads, types, plan, script)


def _way(config: GgufExportConfig, ckpt: Checkpoint) -> tuple[Checkpoint, Path | None]:
    """What is written, the checkpoint or the text model in it; and the script of llama.cpp's converter, if it is asked for or
    needed; None for an architecture that llmc writes itself."""
    folder = config.converter.expanduser() if config.converter else None
    text: Checkpoint | None = None
    if folder is None:
        family = of_config(ckpt.config)
        if not family and (text := text_model(ckpt)):
            family = of_config(text.config)
        if family and family.gguf.name and not config.mmproj:
            return text or ckpt, None
        if (folder := find_converter()) is None:
            find_architecture((text or ckpt).config)
            raise UserError("--mmproj needs llama.cpp's converter", f"run `{SETUP}` once")
    if not (folder / SCRIPT).is_file():
        raise UserError(f"{folder} has no {SCRIPT}", "give the folder of a llama.cpp checkout, or leave --converter out")
    if not (folder / "conversion").is_dir() or _is_known(ckpt.config, folder):
        return ckpt, folder / SCRIPT
    text = text or text_model(ckpt)
    if text and _is_known(text.config, folder):
        return text, folder / SCRIPT
    what = ", ".join(ckpt.config.get("architectures") or []) or ckpt.config.get("model_type") or "unnamed"
    within = f", nor that of its text model, {', '.join(text.config['architectures'])}" if text else ""
    raise UserError(f"llama.cpp does not have the architecture {what}{within}: its converter lacks it, and llmc too",
                    "`llmc eval` and `llmc generate` run the folder itself; a newer llama-cpp-python may have it")


def _is_known(config: dict[str, Any], folder: Path) -> bool:
    """Whether the converter in a folder of llama.cpp has the architecture of a config.json."""
    known = {name.lower() for name in converter_architectures(folder)}
    named = [*(config.get("architectures") or []), *((config.get("text_config") or {}).get("architectures") or [])]
    return any(str(name).lower() in known for name in named) or not named


def _need_packages() -> None:
    missing = [name for name in ("gguf", "llama_cpp") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"exporting GGUF needs {' and '.join(missing)}: gguf to write the file, llama_cpp to check it",
                        "pip install 'llmc-toolkit[gguf]'")


def plan_file(config: GgufExportConfig, ckpt: Checkpoint, tok: Any, types: Types) -> Plan:
    """The plan of the whole file, for an architecture that llmc knows."""
    family = find_architecture(ckpt.config)
    hf = config_of(ckpt)
    w = GGUFWriter(None, family.gguf.name)
    rope_tensors, notes = add_hyperparameters(w, family, hf)
    planner = Planner(ckpt, family, hf, types, w)
    entries = planner.entries()
    planner.add_values(entries)
    rows = next(e.shape[0] for e in entries if e.name == EMBEDDING)
    w.add_vocab_size(rows)
    vocabulary = tokenizer.read_vocabulary(ckpt.folder, tok, rows, config.pre, config.chat_template)
    tokenizer.add_vocabulary(w, vocabulary)
    metadata.add_sampling(w, ckpt.folder)
    entries += [_constant(name, values) for name, values in rope_tensors.items()]
    return Plan(w, entries, vocabulary, int(hf.max_position_embeddings), notes + planner.notes + vocabulary.notes)


def _constant(name: str, values: np.ndarray) -> GgufTensor:
    tensor = torch.from_numpy(values)
    return GgufTensor(name, values.shape, Kind.F32, lambda: tensor)


def _finish(config: GgufExportConfig, ckpt: Checkpoint, written: Checkpoint, tok: Any, threads: int, types: Types,
            plan: Plan, script: Path | None = None) -> dict[str, Any]:
    """Complete the metadata, write, verify and publish the file; return the report. The file is proved with the whole model.

    written: the checkpoint or the text model in it."""
    source = source_of(ckpt.folder)
    if note := yarn_note(config_of(ckpt).get_text_config().to_dict()):
        plan.notes.append(note)
    entries, w = plan.entries, plan.writer
    number, type_name = writer.file_type(entries)
    parameters = sum(int(np.prod(e.shape)) for e in entries)
    metadata.add_provenance(w, source, plan.vocabulary, parameters)
    w.add_file_type(number)
    w.add_quantization_version(GGML_QUANT_VERSION)
    out = config.out or Path(f"{stem(ckpt.folder, source)}-{type_name}.gguf")
    total = sum(e.nbytes for e in entries)
    memory = _memory(ckpt, entries)
    if config.dry_run:
        return {"source": str(ckpt.folder), "out": str(out), "architecture": w.arch, "file_type": type_name, "bytes": total,
                "bytes_by_class": writer.bytes_by_role(entries), "notes": plan.notes, "disk_bytes": total, **memory.plan(),
                "threads": threads}
    check_output(out, "gguf", config, ckpt.folder)
    if config.mmproj:
        check_output(beside(out, config.mmproj), "gguf", config, ckpt.folder)
    check_disk(out, total + (64 << 20), f"writing {out}")
    memory.check("exporting", MORE)
    for note in plan.notes:
        warn(note)
    ends = ", ".join(f"{what} {e.kind.name}" for what, name in (("embedding", EMBEDDING), ("head", OUTPUT))
                     for e in entries if e.name == name)
    say(f"writing {out}: {size(total)} of tensors, mostly {type_name}; {ends} ({types.reason})")
    v = plan.vocabulary
    with staged_artifact(out) as (tmp, manifest):
        def check() -> None:
            if script is not None:  # llama.cpp aborts at metadata of architectures that few have tried
                try_unfinished(tmp, run=False)
            verify.header(tmp, ckpt, w.arch)

        writer.write(w, tmp, entries, check)
        kinds = Kinds()
        verified = verify.tensors(tmp, entries, kinds)
        for linear in plan.moved:
            kind = blocks.kind_of_type(quantized.type_of(written, linear))
            kinds.add(quantized.read(written, linear).dequantize().numpy(), kind, exact=True)
        if script is not None:  # and at some graphs
            try_unfinished(tmp, run=True)
        checks = verify.in_llama_cpp(tmp, ckpt, tok, plan.vocabulary, entries, plan.context_length, threads, kinds,
                                     transposed=plan.lost > 0)
        # where llama.cpp has a window, it has that of the architecture's layers
        unapplied = ignored("llama.cpp", load_config(ckpt.folder), 0 if checks["window"] == 0 else sys.maxsize)
        late = [note for note in [*unapplied, *_coarse(checks["logits"])] if note not in plan.notes]
        report = {
            "path": str(out), "source": str(ckpt.folder), "architecture": w.arch, "file_type": type_name,
            "bytes": tmp.stat().st_size, "bytes_by_class": writer.bytes_by_role(entries), "parameters": parameters,
            "tensor_types": dict(Counter(e.kind.name for e in entries)), "verified": verified,
            "pre_tokenizer": v.pre, "chat_template_sha256": hash_template(v.template), "notes": plan.notes + late, **checks,
        }
        if plan.projector is not None:
            report["mmproj"] = publish(plan.projector, out, str(config.mmproj), source, passes_of(ckpt.folder))
        manifest.update(_record(ckpt, config, source, report, script is not None))
    note_last(out, "gguf")
    for note in late:
        warn(note)
    if not checks["token_ids"]["leading_space_alike"]:
        warn("a text that begins with a space is tokenized differently by llama.cpp and by transformers")
    if not checks["token_ids"]["combining_marks_alike"]:
        other = WITHOUT_MARKS[v.pre]
        warn(f"words with combining marks (Hindi, Tamil, Thai …) are tokenized differently by llama.cpp's {v.pre!r}"
             + (f"; --pre {other} keeps them whole, in versions of llama.cpp that have it" if other else ""))
    return report


def _memory(ckpt: Checkpoint, entries: list[GgufTensor]) -> Memory:
    """The memory of writing and verifying the file."""
    ends = [int(np.prod(e.shape)) for e in entries if e.name in (EMBEDDING, OUTPUT)]
    copies = sum(e.nbytes for e in entries if e.kind.name in REPACKED) if use_extra_buffers() else 0
    return memory_of(ckpt.folder, sum(e.nbytes for e in entries), ends, copies, LLAMA_CPP)


def _coarse(logits: dict[str, Any]) -> list[str]:
    """A note if the check of the logits could miss a small fault."""
    if logits["max_relative_error"] < verify.COARSE or "layers" in logits:
        return []
    return [f"the layers of this model cannot be compared one by one with llama.cpp's: its logits differ by "
            f"{logits['relative_error']:.1%}, as far as roundings can explain"]


def _record(ckpt: Checkpoint, config: GgufExportConfig, source: dict[str, Any], report: dict[str, Any],
            converter: bool) -> dict[str, Any]:
    """The manifest beside the file. It continues the passes of the source model."""
    before = read_manifest(ckpt.folder) or {}
    options = {"embedding": config.embedding, "head": config.head, "float_type": config.float_type,
               "pre": config.pre, "chat_template": config.chat_template,
               "converter": converter}
    measured = {k: v for k, v in report.items() if k not in ("path", "source")}
    this = {"name": "export-gguf", "config": options, **measured}
    return new_manifest("gguf", source, [*before.get("passes", []), this])
