"""`llmc prune`: make a smaller or sparser float model folder of a float model folder."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llmc.compress.calibration import Workspace
from llmc.compress.coverage import checked
from llmc.compress.expected import expected, say_expected
from llmc.compress.preparation import calibration_text, check_weights, open_float, sampled_file
from llmc.compress.prune.config import MASKS, PATTERNS, PruneConfig
from llmc.compress.prune.depth import prove
from llmc.compress.prune.memory import memory_of
from llmc.compress.prune.methods import Made, make, reference_sequences
from llmc.compress.prune.quality import advice, judge, split, zeros_of
from llmc.compress.prune.width import narrowed
from llmc.compress.skeleton import Skeleton, linears_of
from llmc.compress.text import Calibration, rows_in
from llmc.compress.unfinished import fingerprint
from llmc.console import say
from llmc.errors import UserError
from llmc.files import check_disk
from llmc.formats import model_folder
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.linears import get_weight
from llmc.formats.manifest import check_output, note_last, passes_of
from llmc.formats.source import describe_source, model_name, origin_of
from llmc.locks import locked
from llmc.machine import physical_cores, torch_device
from llmc.precision import matmul_precision, prepare_cpu
from llmc.sources.resolve import resolve_model
from llmc.temporary import remove


def prune(model: str | Path, config: PruneConfig) -> dict[str, Any]:
    """Write a pruned copy of the float model `model`.

    Returns {'out', 'method', 'parameters', 'parameters_before', 'nonzero', 'bytes', 'bytes_before', 'sparsity' (of the
    linears of the decoder layers), 'sparsity_per_layer', 'quality', 'advice', 'seconds', …}; with `dry_run` the plan.
    UserError comes before any work if a check can find the problem.
    """
    start = time.monotonic()
    threads = config.threads or physical_cores()
    prepare_cpu(threads)
    if not config.dry_run:
        check_output(config.out, "hf", model, config)
    job = _Job(resolve_model(model), config, threads)
    plan = job.plan()
    if config.dry_run:
        return plan
    check_disk(job.out, plan["disk_bytes"], "pruning")
    whole = config.method == "depth" and config.by == "kl"
    memory_of(job.skeleton, config).check("pruning", "use --by influence" if whole else "lower --seq-len")
    check_weights(job.checkpoint)
    with locked(job.out):
        result = job.run()
    note_last(job.out, "hf")
    return {**result, "seconds": round(time.monotonic() - start, 1)}


class _Job:
    """One pruning: the checks before it starts, and its steps."""

    def __init__(self, source: Path, config: PruneConfig, threads: int) -> None:
        self.source, self.config, self.threads = source, config, threads
        self.checkpoint = open_float(source)
        self.skeleton = Skeleton(self.checkpoint, str(torch_device(config.device)))
        if config.method in MASKS:
            checked(self.skeleton, "pruned")
        self.out = config.out or Path(f"{model_name(source)}-{config.what}")
        self.work = self.out.with_name(f".{self.out.name}.unfinished")
        if not config.dry_run:
            check_output(self.out, "hf", source, config)
        self.notes: list[str] = []
        self._check()

    def _check(self) -> None:
        """UserError if the options do not fit the model."""
        c, count = self.config, len(self.skeleton.layers)
        if c.drop is not None and c.drop >= count:
            raise UserError(f"--drop {c.drop}: {self.source} has {count} layers", f"drop at most {count - 1}")
        if c.pattern is not None:
            of = PATTERNS[c.pattern][1]
            widths = {get_weight(module).shape[1]: name for _, name, module in linears_of(self.skeleton)}
            if uneven := sorted(w for w in widths if w % of):
                raise UserError(f"--pattern {c.pattern}: rows of {uneven[0]} weights ({widths[uneven[0]]}) do not divide "
                                f"into runs of {of}", "use --sparsity")
        if c.method == "width":
            self.notes = narrowed(self.skeleton.config, c)[1]

    @cached_property
    def described(self) -> dict[str, Any]:
        """The manifest's description of the source, with the hashes of its files."""
        return describe_source(self.source)

    def plan(self) -> dict[str, Any]:
        """The plan: the options, the size of the model, and the disk and memory that pruning needs (bytes)."""
        c = self.config
        hidden = self.skeleton.config.get_text_config().hidden_size
        widest = max(max(shape) for of_layer in self.skeleton.shapes for shape in of_layer)
        tokens = c.sequences * c.seq_len if c.method in ("wanda", "sparsegpt") else 0
        reference = reference_sequences(c) * c.seq_len
        states = 12 * hidden * (tokens + reference) + 4 * (hidden + widest) * tokens + 4 * (3 * hidden + widest) * reference
        if c.method in ("depth", "width"):
            states = 12 * hidden * c.sequences * c.seq_len
        before = sum(self.checkpoint.nbytes(n) for n in self.checkpoint.names())
        return {
            "source": str(self.source), "out": str(self.out), "method": c.method, "what": c.what, "notes": self.notes,
            "layers": len(self.skeleton.layers), "bytes_before": before, "disk_bytes": 2 * before + states,
            **memory_of(self.skeleton, c).plan(), "whole_model_in_memory": c.method == "depth" and c.by == "kl",
            "device": c.device, "threads": self.threads, "matmul": matmul_precision(), "calibration": c.calibration,
            "calibration_rows": rows_in(c.calibration),
            "experts": expected(self.skeleton, (c.sequences - c.held_out) * c.seq_len if tokens else 0),
            "tokens": (c.sequences - c.held_out) * c.seq_len, "held_out_tokens": c.held_out * c.seq_len,
        }

    def run(self) -> dict[str, Any]:
        files = self.described["files"]
        sized = replace(self.config, samples=self.config.sequences)
        text = calibration_text(self.skeleton, files, sized, self.threads, sampled_file(self.work))
        key = fingerprint(__name__, self.config.numbers(), self.threads, files, text)
        work = Workspace(self.work, key, self.config.resume)
        if work.done:
            say(f"resuming after step {work.done}")
        if self.config.method == "magnitude":
            seen, held = text.sequences[:0], text.sequences
        else:
            seen, held = split(text.sequences, self.config.held_out)
            say(f"calibration: {text.origin['name']}, {seen.numel():,} tokens, and {held.numel():,} held-out tokens")
        if self.config.method in ("wanda", "sparsegpt"):
            say_expected(self.skeleton, seen.numel(), self.config.seq_len)
        for note in self.notes:
            say(note)
        made = make(self.skeleton, self.config, work, seen)
        folder = work.folder / "artifact"
        written = model_folder.write(folder, self.source, made.pieces, made.config, model_folder.same_bytes(made.pieces))
        if self.config.method == "depth":
            made.summary["proof"] = prove(self.source, folder, made.summary["dropped"], held[:1, :64],
                                          str(self.skeleton.device))
        return self._publish(work, written, made, text, held)

    def _publish(self, work: Workspace, written: Checkpoint, made: Made, text: Calibration,
                 held: torch.Tensor) -> dict[str, Any]:
        """Measure the quality of the folder, write its manifest, and move it to its place."""
        c, folder = self.config, written.folder
        quality = judge(self.source, folder, held, text.origin["name"], str(self.skeleton.device))
        zeros, weights = zeros_of(written)
        before, after = (sum(math.prod(k.shape(n)) for n in k.names()) for k in (self.checkpoint, written))
        summary = {
            "method": c.method, "parameters_before": before, "parameters": after, "nonzero": after - sum(zeros),
            "bytes_before": sum(self.checkpoint.nbytes(n) for n in self.checkpoint.names()),
            "bytes": sum(written.nbytes(n) for n in written.names()), "sparsity": sum(zeros) / sum(weights),
            "sparsity_per_layer": [z / w for z, w in zip(zeros, weights, strict=True)], "quality": quality, **made.summary,
        }
        entry = {"name": "prune", "config": c.numbers(), "threads": self.threads, "device": str(self.skeleton.device),
                 "matmul": matmul_precision(), "calibration": text.origin, "held_out_sequences": len(held),
                 "notes": self.notes, **summary, **made.record}
        manifest = model_folder.publish(folder, self.out, "hf", origin_of(self.source, self.described),
                                        [*passes_of(self.source), entry])
        remove(work.folder)
        remove(sampled_file(self.work))
        return {"out": str(self.out), "source": str(self.source), **summary, "notes": self.notes,
                "advice": advice(quality, self.source, self.out), "weights_sha256": model_folder.weight_hashes(manifest)}
