"""`llmc quantize`: from a float model folder to a GPTQ checkpoint folder, layer by layer."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmc import block_grids, compress, grids
from llmc.artifact import (
    MANIFEST,
    check_disk,
    check_output,
    hash_folder,
    new_manifest,
    note_last,
    publish_folder,
    read_manifest,
    staged_file,
    write_json,
)
from llmc.checkpoint import CARD_FILES, TOKENIZER_FILES, Checkpoint
from llmc.compress.calibration import Loop, LoopSettings, Workspace
from llmc.compress.precision import matmul_precision, prepare_cpu
from llmc.compress.quantize.assignment import assign, linears_of
from llmc.compress.quantize.budget import assign_to_budget
from llmc.compress.quantize.budget import memory_bytes as memory_to_measure
from llmc.compress.quantize.config import QuantizeConfig, budget_lines
from llmc.compress.quantize.layer_pass import QuantizePass, digest
from llmc.compress.sampling import sample_from_model
from llmc.compress.skeleton import Skeleton, get_weight
from llmc.compress.text import SELF, Calibration, from_model, load_calibration
from llmc.console import progress, say, warn
from llmc.errors import UserError
from llmc.export.blocks import checkpoint as blocks_format
from llmc.export.gguf import packing
from llmc.export.gptq import checkpoint as gptq_format
from llmc.export.quantized import read
from llmc.runtimes.targets.this_machine import physical_cores
from llmc.runtimes.torch_model import load_tokenizer, load_torch_model, torch_device
from llmc.shards import Piece, pieces_of, write_checkpoint
from llmc.sources import describe_source, resolve_model

BATCH_BYTES = 32 << 20  # activations of one batch of sequences (hidden and the widest linear), float32
SAMPLING_BATCH = 32
# The unchanged model runs along on a quarter of the sequences, at least 32, for time: it is a second forward pass.
REFERENCE_SHARE, REFERENCE_LEAST = 4, 32


def quantize(model: str | Path, config: QuantizeConfig) -> dict[str, Any]:
    """Quantise every linear of the decoder layers of `model` and write a GPTQ checkpoint folder.

    Returns {'out', 'bits_per_weight', 'bytes', 'layers', 'error', 'fallbacks', 'seconds', …}; with `dry_run` the plan
    and its estimates. Raises UserError before any work for whatever can be known before.
    """
    start = time.monotonic()
    threads = config.threads or physical_cores()
    prepare_cpu(threads)
    source = resolve_model(model)
    job = _Job(source, config, threads)
    plan = job.plan()
    if config.dry_run:
        return plan
    check_disk(job.out, plan["disk_bytes"], "quantising")
    job.check_weights()
    result = job.run()
    note_last(job.out, job.kind)
    return {**result, "seconds": round(time.monotonic() - start, 1)}


class _Job:
    """One quantisation: what is known before it starts, and the steps."""

    def __init__(self, source: Path, config: QuantizeConfig, threads: int) -> None:
        self.source, self.config, self.threads = source, config, threads
        self.checkpoint = Checkpoint.open(source)
        if self.checkpoint.quantization is not None:
            raise UserError(f"{source} is quantised already ({self.checkpoint.quantization.get('quant_method')})",
                            "start from the float model")
        self.skeleton = Skeleton(self.checkpoint, str(torch_device(config.device)))
        what = config.grid or config.preset or (config.target or f"{config.bits}bit").removeprefix("--").replace(" ", "-")
        self.out = config.out or Path(f"{source.resolve().name}-{config.method}-{what}")
        self.work = self.out.with_name(f".{self.out.name}.unfinished")
        if not config.dry_run:
            check_output(self.out)
        self.assignment = (assign_to_budget(config, self.skeleton, self.described) if config.target
                           else assign(config, self.skeleton))
        self._say_missed()

    @cached_property
    def described(self) -> dict[str, Any]:
        """What the manifest says of the source; its files are hashed for it."""
        return describe_source(self.source)

    @property
    def kind(self) -> str:
        """Of the artifact: 'gptq', or 'blocks' for grids that no GPTQ checkpoint holds."""
        return "gptq" if self.assignment.portable else "blocks"

    def _say_missed(self) -> None:
        """Which linears take another grid than the one asked for, because of their rows."""
        a, c = self.assignment, self.config
        if a.missed:
            first, grid = next(iter(a.missed.items()))
            named = f"instead of {c.grid} (first {first}; --fallback chooses)" if c.grid else (
                f"instead of what {c.preset} would give them (first {first}: {grid})")
            warn(f"{len(a.missed)} of {len(a.grids)} linears have rows that are no multiple of 256 and take "
                 f"{' or '.join(sorted(set(a.missed.values())))} {named}")

    def check_weights(self) -> None:
        """Read every tensor once: a damaged one is found now and not at layer 30."""
        for name in self.checkpoint.names():
            self.checkpoint.tensor(name)

    def plan(self) -> dict[str, Any]:
        """What will be done, what it will weigh and what it needs."""
        c, weights = self.config, self._linear_weights()
        hidden = self.skeleton.config.get_text_config().hidden_size
        widest = max(get_weight(m).shape[1] for m in self.skeleton.linears(0).values())
        layer = sum(get_weight(m).numel() for m in self.skeleton.linears(0).values()) * 4
        states = c.samples * c.seq_len * hidden * 4 if c.method == "gptq" else 0
        other = sum(self.checkpoint.nbytes(n) for n in set(self.checkpoint.names()) - self._linear_names())
        out_bytes = other + round(self._bits() / 8)
        memory = 600_000_000 + 2 * layer + 4 * widest * widest * 4 + BATCH_BYTES * 4
        return {
            "source": str(self.source), "out": str(self.out), **self._what(), "method": c.method,
            "bits_per_weight": self._bits() / weights,
            "layers": len(self.skeleton.layers), "linear_weights": weights, "out_bytes": out_bytes,
            "disk_bytes": 2 * out_bytes + 3 * states,  # parts and their copy; two sides and one scratch of the states
            "memory_bytes": max(memory, memory_to_measure(self.skeleton)) if c.target else memory,
            "device": c.device, "threads": self.threads, "matmul": matmul_precision(),
            "calibration": c.calibration if c.method == "gptq" else None, "tokens": c.samples * c.seq_len,
            **({"plan": self.assignment.plan} if c.target else {}),
        }

    def _what(self) -> dict[str, Any]:
        """The grids, for plan, manifest and result."""
        a = self.assignment
        what = {"grid": a.name, "grids": a.counts(), "fallback_grids": a.missed, "tables": a.tables}
        return what if a.plan is None else what | {"plan": {k: v for k, v in a.plan.items() if k != "tensors"}}

    def _bits(self) -> float:
        """Bits of all quantised weights, factors included."""
        return sum(get_weight(m).numel() * self.assignment.grids[name].bits_per_weight
                   for _, name, m in linears_of(self.skeleton))

    def _linear_weights(self) -> int:
        return sum(get_weight(m).numel() for _, _, m in linears_of(self.skeleton))

    def _linear_names(self) -> set[str]:
        """The checkpoint's names of the weights that will be quantised."""
        stored = {n: self.skeleton.stored_name(f"{n}.weight") for n in self.assignment.grids}
        if missing := sorted(n for n, s in stored.items() if s is None):
            raise UserError(f"{self.source} has no tensor {missing[0]}.weight", "the checkpoint is incomplete")
        return {s for s in stored.values() if s is not None}

    def run(self) -> dict[str, Any]:
        source = self.described
        calibration = self._calibration(source) if self.config.method == "gptq" else None
        fingerprint = {**self.config.numbers(), "threads": self.threads, "source": source["files"],
                       "calibration_text": calibration.origin["sha256"] if calibration else None,
                       "matmul": matmul_precision(), "torch": torch.__version__, "code": _code_digest(),
                       "types": {n: self.assignment.stored(n) for n in self.assignment.grids}}
        work = Workspace(self.work, fingerprint, self.config.resume)
        if self.assignment.plan:
            say(budget_lines(self.assignment.plan, self.assignment.counts(), self.assignment.tables))
        if work.done:
            say(f"resuming after layer {work.done} of {len(self.skeleton.layers)}")
        pass_ = QuantizePass(self.skeleton, self.assignment, self.config.damp)
        if calibration is not None:
            self._explain(calibration)
            settings = LoopSettings(self._batch(calibration), self.config.true_sequential, self._along())
            loop = Loop(self.skeleton, spread(calibration.sequences, self._along()), work, settings)
            loop.run(pass_, lambda r: f"error {100 * r['error']:.2f} %")
        else:
            self._round_all(pass_, work)
        return self._publish(work, source, calibration)

    def _along(self) -> int:
        """On how many sequences the unchanged model runs along."""
        n = self.config.samples
        return max(min(n, REFERENCE_LEAST), n // REFERENCE_SHARE)

    def _batch(self, calibration: Calibration) -> int:
        """Sequences at once, so that a layer's activations stay near BATCH_BYTES."""
        widest = max(max(get_weight(m).shape) for m in self.skeleton.linears(0).values())
        return max(1, min(16, BATCH_BYTES // (calibration.sequences.shape[1] * widest * 4)))

    def _calibration(self, source: dict[str, Any]) -> Calibration:
        c = self.config
        tokenizer = load_tokenizer(self.source)
        limit = getattr(self.skeleton.config.get_text_config(), "max_position_embeddings", None) or c.seq_len
        if c.seq_len > limit:
            raise UserError(f"--seq-len {c.seq_len}: {self.source} has positions for {limit} tokens",
                            f"use --seq-len {limit} or less")
        if c.calibration != SELF:
            return load_calibration(c.calibration, tokenizer, c.samples, c.seq_len)
        say("no calibration text: sampling it from the model itself "
            "(text like what the model will see is better: --calibration FILE)")
        # beside the workspace, which is not there yet; an interrupted run finds it again
        kept = self.work.with_suffix(".sampled.safetensors")
        origin = {"seed": c.seed, "temperature": 1.0, "samples": c.samples, "seq_len": c.seq_len}
        key = {**origin, "source": source["files"], "threads": self.threads}
        ids = _sampled_before(kept, key) if c.resume else None
        if ids is None:
            loaded = load_torch_model(self.source, str(torch_device(c.device)), torch.bfloat16)
            ids = sample_from_model(loaded, tokenizer, c.samples, c.seq_len, c.seed, SAMPLING_BATCH)
            del loaded
            with staged_file(kept) as tmp:
                save_file({"ids": ids}, tmp, metadata={"key": json.dumps(key, sort_keys=True)})
        return from_model(ids, tokenizer, origin)

    def _explain(self, calibration: Calibration) -> None:
        """Say what the Hessians rest on."""
        widths = sorted({get_weight(m).shape[1] for m in self.skeleton.linears(0).values()})
        per_column = [calibration.tokens / w for w in widths]
        say(f"calibration: {calibration.origin['name']}, {calibration.tokens:,} tokens, "
            + ", ".join(f"{p:.1f} per column of {w}" for p, w in zip(per_column, widths, strict=True)))
        if min(per_column) < 2:
            warn(f"fewer than 2 calibration tokens per Hessian column ({min(per_column):.1f}): "
                 "GPTQ can lose to RTN; raise --samples")

    def _round_all(self, pass_: QuantizePass, work: Workspace) -> None:
        """RTN needs no activations: layers are read, rounded and written."""
        with progress("layer", len(self.skeleton.layers), work.done) as p:
            for index in range(work.done, len(self.skeleton.layers)):
                with self.skeleton.layer(index) as layer:
                    pass_.begin(index, layer, [])
                    for name, linear in self.skeleton.linears(index).items():
                        pass_.round(name, linear)
                    work.save_layer(index, *pass_.finish(index, layer))
                work.commit(index + 1)
                p.step()

    def _publish(self, work: Workspace, source: dict[str, Any], calibration: Calibration | None) -> dict[str, Any]:
        """Join the layers, add what a reader needs, verify by reading back, and put the folder in its place."""
        folder = work.folder / "artifact"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_checkpoint(folder, self._pieces(work))
        self._write_configs(folder)
        for name in (*TOKENIZER_FILES, *CARD_FILES, "generation_config.json"):
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)
        records = work.records()
        self._verify(folder, records)
        summary = _summary(records)
        entry = {"name": "quantize", **self._what(), "config": self.config.numbers(), "threads": self.threads,
                 "device": str(self.skeleton.device), "matmul": matmul_precision(),
                 "calibration": calibration.origin if calibration else None,
                 "reference_sequences": self._along() if calibration else None, "layers": records, **summary}
        before = read_manifest(self.source) or {}
        manifest = new_manifest(self.kind, source, [*before.get("passes", []), entry])
        manifest["outputs"] = hash_folder(folder)
        write_json(folder / MANIFEST, manifest)
        publish_folder(folder, self.out)
        shutil.rmtree(work.folder)
        self.work.with_suffix(".sampled.safetensors").unlink(missing_ok=True)
        total = sum(p.stat().st_size for p in self.out.glob("*.safetensors"))
        return {"out": str(self.out), **self._what(), "bits_per_weight": self._bits() / self._linear_weights(),
                "bytes": total, "weights_sha256": {k: v for k, v in manifest["outputs"].items() if "safetensors" in k},
                **{k: v for k, v in summary.items() if k != "layers"}}

    def _pieces(self, work: Workspace) -> list[Piece]:
        """The finished layers, and the bytes of everything else as the source has them."""
        pieces: list[Piece] = []
        for index in range(len(self.skeleton.layers)):
            pieces += pieces_of(work.layer_file(index))
        replaced = self._linear_names()
        for shard in self.checkpoint.files:
            pieces += pieces_of(shard, set(self.checkpoint.headers[shard]) - replaced)
        return pieces

    def _write_configs(self, folder: Path) -> None:
        """config.json with `quantization_config`; for the GPTQ form the identical quantize_config.json too."""
        a = self.assignment
        portable = a.portable
        if portable:
            quantization = gptq_format.config(portable, self.config.damp, self.config.true_sequential, None)
        else:
            stored = {n: str(self.skeleton.stored_name(f"{n}.weight")).removesuffix(".weight") for n in a.grids}
            quantization = blocks_format.config({stored[n]: a.stored(n) for n in a.grids})
        if a.tables:
            quantization["tables"] = a.tables
        config = {**self.checkpoint.config, "quantization_config": quantization}
        for name, value in (("config.json", config), ("quantize_config.json", quantization))[: 1 + (portable is not None)]:
            (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _verify(self, folder: Path, records: list[dict[str, Any]]) -> None:
        """Read the written checkpoint back: every linear must decode to the codes and scales that were swept."""
        written = Checkpoint.open(folder)
        for index, record in enumerate(records):
            for name, linear in record["linears"].items():
                stored = self.skeleton.stored_name(f"{self.skeleton.layer_name(index)}.{name}.weight") or name
                if digest(read(written, stored.removesuffix(".weight"))) != linear["sha256"]:
                    raise RuntimeError(f"{stored} was not written as it was computed")


def spread(sequences: torch.Tensor, first: int) -> torch.Tensor:
    """The sequences reordered so that the first `first` are evenly spaced over all."""
    n = sequences.shape[0]
    chosen = [i * n // first for i in range(first)]
    return sequences[chosen + sorted(set(range(n)) - set(chosen))]


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures over all layers: mean error, and how often the plan was departed from."""
    linears = [x for r in records for x in r["linears"].values()]
    return {
        "error": sum(r["error"] for r in records) / len(records),
        "fallbacks": sum(bool(r["events"]) and any(x["method"] == "rtn" for x in r["linears"].values()) for r in records),
        "events": sum(len(r["events"]) for r in records),
        "dead_columns": sum(x.get("dead_columns", 0) for x in linears),
    }


def _sampled_before(kept: Path, key: dict[str, Any]) -> torch.Tensor | None:
    """The sampled sequences of an interrupted run, if they were sampled under the same key."""
    if not kept.is_file():
        return None
    with safe_open(kept, framework="pt") as f:
        same = f.metadata() == {"key": json.dumps(key, sort_keys=True)}
        ids: torch.Tensor = f.get_tensor("ids")
    return ids if same else None


def _code_digest() -> str:
    """Changes when the code that decides the result does, so that `--resume` never mixes two versions."""
    h = hashlib.sha256()
    for module in (compress, grids, block_grids, packing, gptq_format, blocks_format):
        path = Path(str(module.__file__))
        for file in sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]:
            h.update(file.read_bytes())
    return h.hexdigest()
