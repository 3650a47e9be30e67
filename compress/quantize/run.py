"""`llmc quantize`: make a quantized model folder of a float model folder, layer by layer.

The result is a GPTQ checkpoint if all linears have one integer type, else a folder of GGUF blocks (llmc.formats.blocks).
"""

from __future__ import annotations

import re
import time
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from llmc.compress.calibration import (
    REFERENCE_LEAST,
    REFERENCE_SHARE,
    Loop,
    LoopSettings,
    Workspace,
    settings_for,
    spread,
)
from llmc.compress.coverage import checked
from llmc.compress.ends import name_of
from llmc.compress.expected import expected, say_expected
from llmc.compress.heal.config import HealConfig
from llmc.compress.heal.memory import after_quantizing
from llmc.compress.imatrix.importance import Importance
from llmc.compress.memory import Sizes, loading
from llmc.compress.preparation import calibration_text, check_weights, open_float, sampled_file
from llmc.compress.quantize import carried
from llmc.compress.quantize.assignment import assign, has_own_head, keeps_zeros, unfit
from llmc.compress.quantize.budget import LENGTH, SEQUENCES, assign_to_budget
from llmc.compress.quantize.config import TOKENS_PER_COLUMN, QuantizeConfig, budget_lines
from llmc.compress.quantize.layer_pass import QuantizePass, digest
from llmc.compress.quantize.memory import measuring, memory_of
from llmc.compress.shared_options import SAMPLES
from llmc.compress.skeleton import Skeleton, linears_of
from llmc.compress.text import SELF, Calibration, content_of, rows_in
from llmc.compress.transform.choose import Choice, choose
from llmc.compress.unfinished import fingerprint
from llmc.console import say, warn
from llmc.files import check_disk, read_note, write_sealed
from llmc.formats import blocks as blocks_format
from llmc.formats import gptq as gptq_format
from llmc.formats import model_folder
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.experts import share_of_config, used_of
from llmc.formats.linears import get_weight
from llmc.formats.manifest import check_output, note_last, passes_of
from llmc.formats.quantized import read
from llmc.formats.shards import pieces_of, rest_of
from llmc.formats.source import describe_source, model_name, origin_of
from llmc.locks import check_unlocked, locked
from llmc.machine import physical_cores, torch_device
from llmc.memory import Memory
from llmc.precision import matmul_precision, prepare_cpu
from llmc.sources.resolve import resolve_model
from llmc.temporary import remove


def quantize(model: str | Path, config: QuantizeConfig) -> dict[str, Any]:
    """Quantize every linear of the decoder layers of `model` and write a GPTQ checkpoint or a folder of GGUF blocks.

    Returns {'out', 'bits_per_weight', 'bytes', 'layers', 'error', 'fallbacks', 'seconds', …}; with `dry_run` the plan
    and its estimates. UserError comes before any work if a check can find the problem.
    """
    start = time.monotonic()
    threads = config.threads or physical_cores()
    prepare_cpu(threads)
    if not config.dry_run:
        check_output(config.out, "gptq", model, config)
    source = resolve_model(model)
    job = _Job(source, config, threads)
    plan = job.plan()
    if config.dry_run:
        return plan
    check_disk(job.out, plan["disk_bytes"], "quantizing")
    sampled = config.calibrated and config.calibration == SELF
    job.memory().check("quantizing" + (" on text that the whole model writes" if sampled else ""),
                       "give a text with --calibration FILE" if sampled else "lower --seq-len")
    check_weights(job.checkpoint)
    with locked(job.out):
        result = quantize_and_heal(job) if config.heal else job.run()
    note_last(job.out, job.kind)
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def quantize_and_heal(job: _Job) -> dict[str, Any]:
    """Quantize into a folder beside the output, heal this folder into the output, and remove it. A resumed run uses it
    again."""
    from llmc.compress.heal.run import heal

    c, out, settings = job.config, job.out, job.healing()
    job.out = out.with_name(f".{out.name}.unhealed")
    note = job.out.with_suffix(".json")  # the fingerprint of the finished folder, and its result
    key = fingerprint(__name__, {**c.numbers(), "imatrix": job.importance and job.importance.origin}, job.threads,
                      job.described["files"], calibration_content=content_of(c.calibration))
    found = read_note(note) if c.resume and job.out.is_dir() else {}
    if found.get("key") == key:
        say(f"{job.out} is finished: healing continues")
    else:
        found = {"key": key, "result": job.run()}
        write_sealed(note, found)
    healed = heal(job.out, settings)
    remove(note)  # first: a run that finds the note takes the folder for finished
    remove(job.out)
    job.out = out
    return {**found["result"], "out": str(out), "weights_sha256": healed["weights_sha256"], "healed": healed}


class _Job:
    """One quantization: the checks before it starts, and its steps."""

    def __init__(self, source: Path, config: QuantizeConfig, threads: int) -> None:
        self.source, self.config, self.threads = source, config, threads
        self.checkpoint = open_float(source)
        self.skeleton = Skeleton(self.checkpoint, str(torch_device(config.device)))
        target = re.sub("[ :]", "-", (config.target or "").removeprefix("--"))
        self.coverage = checked(self.skeleton, "quantized", config.keep, can_keep=True)
        self.skeleton.kept = self.coverage.left_linears()
        for why, linears in unfit(config, self.skeleton).items():
            self.coverage.leave(why, linears, self.skeleton)
        self.skeleton.kept = self.coverage.left_linears()
        self.chosen = config.samples == 0  # the number of sequences; a text with fewer is taken whole
        if self.chosen:
            self.config = config = replace(config, samples=enough(self.widths(), config.seq_len))
        what = config.type or config.preset or target or f"{config.code_bits}bit"
        self.out = config.out or Path(f"{model_name(source)}-{config.method}-{what}")
        self.work = self.out.with_name(f".{self.out.name}.unfinished")
        if not config.dry_run:
            check_output(self.out, "gptq", source, config)
            check_unlocked(self.out)  # now, because measuring for a target takes long
        self.importance = Importance(config.imatrix, self.skeleton) if config.imatrix else None
        self.assignment = (assign_to_budget(config, self.skeleton, self.described) if config.target
                           else assign(config, self.skeleton))
        # a transform moves weights off their type
        self.on = carried.look(self.skeleton) if config.carry and config.transform == "none" else {}
        if self.on and not config.typed:
            self.assignment = carried.keeping(self.assignment, self.on)
        self.notes = carried.planned(self.assignment, self.on, (c.type for c in self.checkpoint.decoded.tensors.values()))
        self._say_missed()
        self.masked = keeps_zeros(source, config, self.assignment)

    @cached_property
    def described(self) -> dict[str, Any]:
        """The manifest's description of the source, with the hashes of its files."""
        return describe_source(self.source)

    @property
    def kind(self) -> str:
        """The artifact's kind: 'gptq', or 'blocks' for types that a GPTQ checkpoint cannot hold."""
        return "gptq" if self.assignment.portable else "blocks"

    def _say_missed(self) -> None:
        """Warn about linears whose rows the requested type cannot hold, and that get another type."""
        a, c = self.assignment, self.config
        if a.missed:
            first, qtype = next(iter(a.missed.items()))
            named = f"instead of {c.type} (first {first}; --fallback chooses)" if c.type else (
                f"instead of what {c.preset} would give them (first {first}: {qtype})")
            warn(f"{len(a.missed)} of {len(a.types)} linears have rows that are not a multiple of 256 and get "
                 f"{' or '.join(sorted(set(a.missed.values())))} {named}")

    def plan(self) -> dict[str, Any]:
        """The plan: types and options, the size of the output, and the disk and memory that quantization needs (bytes)."""
        c, weights = self.config, self._linear_weights()
        hidden = self.skeleton.config.get_text_config().hidden_size
        widest = self.skeleton.widths[-1]
        tokens, reference = (n * c.seq_len if c.calibrated else 0 for n in (c.samples, self._reference_sequences()))
        # three files of states; the inputs of the two linears that end a child module; the unchanged inputs of four groups
        states = 12 * hidden * (tokens + reference) + 4 * (hidden + widest) * tokens + 4 * (3 * hidden + widest) * reference
        other = sum(self.checkpoint.nbytes(n) for n in set(self.checkpoint.names()) - self._linear_names())
        out_bytes = other + round(self._bits() / 8)
        return {
            "source": str(self.source), "out": str(self.out), **self._what(), "method": c.method,
            "bits_per_weight": self._bits_per_weight(),
            "layers": len(self.skeleton.layers), "linear_weights": weights, "out_bytes": out_bytes,
            "token_bytes": self._token_bytes(), "transform": c.transform, "heal": c.heal, "zeros_kept": self.masked,
            "disk_bytes": 2 * out_bytes + states + self._transform_bytes(),  # the layers, and the output folder
            **self.memory().plan(),
            "device": c.device, "threads": self.threads, "matmul": matmul_precision(),
            "calibration": c.calibration if c.calibrated else None,
            "calibration_rows": rows_in(c.calibration) if c.calibrated else {}, "tokens": c.samples * c.seq_len,
            "tokens_per_column": {w: round(tokens / w, 2) for w in self.widths()} if tokens else {},
            "experts": expected(self.skeleton, tokens if c.method == "gptq" else 0),
            "imatrix": self.importance and self.importance.origin, "on_types": self.on, "notes": list(self.notes),
            **({"plan": self.assignment.plan} if c.target else {}),
        }

    def memory(self) -> Memory:
        """The memory that quantization needs, the measurement of a budget and the healing included."""
        c = self.config
        steps = memory_of(self.skeleton, c, self.assignment.types.values(), reference=self._reference_sequences() > 0)
        if c.target:
            steps += [loading(Sizes.of(self.skeleton)), measuring(self.skeleton, SEQUENCES, LENGTH)]
        if c.heal:
            steps += after_quantizing(self.skeleton, self.assignment.types, self.healing())
        return Memory(steps)

    def healing(self) -> HealConfig:
        """The options of the healing that follows. The teacher is the given model, before any transform."""
        c = self.config
        return HealConfig(teacher=str(self.source), calibration=(c.calibration,), steps=c.heal, seq_len=c.seq_len,
                          seed=c.seed, device=c.device, threads=c.threads, out=self.out, resume=c.resume)

    def _transform_bytes(self) -> int:
        """Bytes of disk for the float32 folders of the transformed model: a working folder and the candidates."""
        folders = {"none": 0, "auto": 5}.get(self.config.transform, 3)
        return folders * 4 * sum(p.numel() for p in self.skeleton.model.parameters())

    def _what(self) -> dict[str, Any]:
        """The entries on types, for plan, manifest and result."""
        a = self.assignment
        what = {"type": a.name, "types": a.counts(), "fallback_types": a.missed, "end_types": a.end_types,
                "floats": self.coverage.record()}
        return what if a.plan is None else what | {"plan": {k: v for k, v in a.plan.items() if k != "tensors"}}

    def _bits(self) -> float:
        """The number of bits of all quantized weights, factors included."""
        return sum(get_weight(m).numel() * self.assignment.types[name].bits_per_weight
                   for _, name, m in linears_of(self.skeleton))

    def _bits_per_weight(self) -> float:
        """Over all matrices of the decoder layers, those that stay floats included."""
        floats = [(p.value.numel(), p.value.numel() * self.skeleton.weights.dtype(p.name).itemsize)
                  for p in self.coverage.float_matrices()]
        weights = self._linear_weights() + sum(n for n, _ in floats)
        return (self._bits() + 8 * sum(nbytes for _, nbytes in floats)) / weights

    def _token_bytes(self) -> int:
        """The bytes of the output that decoding a token reads: of experts only those that the router chooses."""
        chosen = share_of_config(self.skeleton.config.get_text_config().to_dict())
        left = set(self.checkpoint.names()) - self._linear_names()
        if has_own_head(self.skeleton):  # of the embedding one row is read
            left -= {self.skeleton.names.stored(name_of(self.skeleton, self.skeleton.model.get_input_embeddings()))}
        linears = sum(get_weight(m).numel() * self.assignment.types[name].bits_per_weight / 8 * used_of(name, chosen)
                      for _, name, m in linears_of(self.skeleton))
        return round(linears + sum(self.checkpoint.nbytes(n) * used_of(n, chosen) for n in left))

    def _linear_weights(self) -> int:
        return sum(get_weight(m).numel() for _, _, m in linears_of(self.skeleton))

    def _linear_names(self) -> set[str]:
        """The checkpoint's names of the tensors that will be quantized."""
        return self.skeleton.names.replaced(f"{n}.weight" for n in self.assignment.types)

    def run(self) -> dict[str, Any]:
        source = self.described
        text = choice = None
        for note in self.notes:
            say(note)
        if self._all_carried():
            say("every block lies on its type: all codes are carried over, and no text is needed")
        elif self.config.calibrated:
            kept = sampled_file(self.work)
            text = calibration_text(self.skeleton, source["files"], self.config, self.threads, kept, self.chosen)
            if len(text.sequences) < self.config.samples:
                say(f"the text has {len(text.sequences)} sequences of {self.config.seq_len} tokens, and all are taken")
                self.config = replace(self.config, samples=len(text.sequences))
        if text is not None and self.config.transform != "none":
            choice = choose(self.source, self.skeleton, self.config, text, self.threads, self._transformed())
            self.checkpoint = Checkpoint.open(choice.folder)  # from now on all weights are those of the transformed model
            self.skeleton = Skeleton(self.checkpoint, str(self.skeleton.device))
            self.skeleton.kept = self.coverage.left_linears()
        calibration = text if self.config.method == "gptq" else None
        deciding = {**self.config.numbers(), "imatrix": self.importance and self.importance.origin,
                    "types": {n: self.assignment.stored(n) for n in self.assignment.types}}
        key = fingerprint(__name__, deciding, self.threads, source["files"], calibration)
        work = Workspace(self.work, key, self.config.resume)
        if self.assignment.plan:
            say(budget_lines(self.assignment.plan, self.assignment.counts(), self.assignment.end_types))
        if work.done:
            say(f"resuming after layer {work.done} of {len(self.skeleton.layers)}")
        pass_ = QuantizePass(self.skeleton, self.assignment, self.config.damp, self.importance, self.masked,
                             self.config.carry)
        if calibration is None:
            Loop(self.skeleton, None, work, LoopSettings()).run(pass_)
        else:
            self._explain(calibration)
            sequences = spread(calibration.sequences, self._reference_sequences())
            settings = settings_for(self.skeleton, sequences, true_sequential=self.config.true_sequential,
                                    reference=self._reference_sequences())
            Loop(self.skeleton, sequences, work, settings).run(pass_, lambda r: f"error {100 * r['error']:.2f} %")
        return self._publish(work, source, calibration, choice)

    def _all_carried(self) -> bool:
        """Whether nothing is left to round."""
        types = self.assignment.types
        return self.on.keys() >= types.keys() and carried.complete(self.skeleton, types)

    def _reference_sequences(self) -> int:
        """The number of sequences that also run through the unchanged model."""
        n = self.config.samples
        return max(min(n, REFERENCE_LEAST), n // REFERENCE_SHARE)

    def _transformed(self) -> Path:
        """The folder of the transformed float models. It lies beside the workspace, which is made later."""
        return self.work.with_suffix(".transformed")

    def widths(self) -> list[int]:
        """The numbers of columns of the linears, without experts, which see a part of the text."""
        return sorted({get_weight(m).shape[1] for _, name, m in linears_of(self.skeleton)
                       if self.skeleton.starred(name) == name})

    def _explain(self, calibration: Calibration) -> None:
        """Print the number of calibration tokens per Hessian column, and warn if it is low. Experts see a part of them."""
        widths = self.widths()
        per_column = [calibration.tokens / w for w in widths]
        say(f"calibration: {calibration.origin['name']}, {calibration.tokens:,} tokens, "
            + ", ".join(f"{p:.1f} per column of {w}" for p, w in zip(per_column, widths, strict=True)))
        if per_column and min(per_column) < 2:
            warn(f"fewer than 2 calibration tokens per Hessian column ({min(per_column):.1f}): "
                 "GPTQ can be worse than RTN; raise --samples")
        if len(calibration.sequences) < 2:
            warn("one calibration sequence says nothing about others, so almost only the importance of columns is used: "
                 "raise --samples")
        say_expected(self.skeleton, calibration.tokens, self.config.seq_len)

    def _publish(self, work: Workspace, source: dict[str, Any], calibration: Calibration | None,
                 choice: Choice | None) -> dict[str, Any]:
        """Join the layers, verify the folder by reading it back, and move it to its place."""
        folder, records = work.folder / "artifact", work.records()
        layers = [p for index in range(len(self.skeleton.layers)) for p in pieces_of(work.layer_file(index))]
        pieces = layers + rest_of(self.checkpoint, self._linear_names())
        config = {**self.checkpoint.config, "quantization_config": self._quantization()}
        model_folder.write(folder, self.source, pieces, config, partial(self._verify, records))
        summary = _summary(records, self.config.method)
        known = calibration.origin if calibration else self.importance and self.importance.calibration
        entry = {"name": "quantize", **self._what(), "config": self.config.numbers(), "threads": self.threads,
                 "device": str(self.skeleton.device), "matmul": matmul_precision(), "zeros_kept": self.masked,
                 "calibration": known, "imatrix": self.importance and self.importance.origin,
                 "reference_sequences": self._reference_sequences() if calibration else None, "layers": records, **summary,
                 **({"transform": choice.record} if choice else {})}
        passes = [*passes_of(self.source), *(choice.passes if choice else []), entry]
        manifest = model_folder.publish(folder, self.out, self.kind, origin_of(self.source, source), passes)
        bits = self._bits_per_weight()  # asks the transformed folder for the types of what stays float
        remove(work.folder)
        remove(sampled_file(self.work))
        remove(self._transformed())
        total = sum(p.stat().st_size for p in self.out.glob("*.safetensors"))
        return {"out": str(self.out), **self._what(), "bits_per_weight": bits,
                "bytes": total, "transform": choice.record if choice else None,
                "weights_sha256": model_folder.weight_hashes(manifest),
                **{k: v for k, v in summary.items() if k != "layers"}}

    def _quantization(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        a = self.assignment
        if a.portable:
            quantization = gptq_format.config(a.portable, self.config.damp, self.config.true_sequential,
                                              *self._quantized_by_layer())
        else:
            stored = {n: self.skeleton.names.stored(f"{n}.weight").removesuffix(".weight") for n in a.types}
            quantization = blocks_format.config({stored[n]: a.stored(n) for n in a.types})
        if a.end_types:
            quantization["end_types"] = a.end_types
        return quantization

    def _quantized_by_layer(self) -> tuple[list[list[str]] | None, list[str]]:
        """What a GPTQ config says if some linears stay floats: the quantized linears of a layer if all layers have the same,
        and otherwise the names of the linears that stay."""
        kept = self.skeleton.kept
        if not kept:
            return None, []
        layers = [[n for n in self.skeleton.linears(i) if f"{self.skeleton.layer_name(i)}.{n}" not in kept]
                  for i in range(len(self.skeleton.layers))]
        if all(names == layers[0] for names in layers):
            return [[name] for name in layers[0]], []
        return None, sorted(self.skeleton.names.stored(f"{n}.weight").removesuffix(".weight") for n in kept)

    def _verify(self, records: list[dict[str, Any]], written: Checkpoint) -> None:
        """Check that every linear of the written checkpoint decodes to the codes and scales that were computed."""
        for index, record in enumerate(records):
            for name, linear in record["linears"].items():
                stored = self.skeleton.names.stored(f"{self.skeleton.layer_name(index)}.{name}.weight")
                if digest(read(written, stored.removesuffix(".weight"))) != linear["sha256"]:
                    raise RuntimeError(f"{stored} was not written as it was computed")


def enough(widths: list[int], seq_len: int) -> int:
    """The default number of sequences: TOKENS_PER_COLUMN for each column of the widest matrix, and at least SAMPLES."""
    return max(SAMPLES, -(-TOKENS_PER_COLUMN * max(widths, default=0) // seq_len))


def _summary(records: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Totals over all layers: the mean error; the numbers of layers with another method than `method` ('fallbacks'), of
    events, and of dead columns."""
    linears = [x for r in records for x in r["linears"].values()]
    return {
        "error": sum(r["error"] for r in records) / len(records),
        "fallbacks": sum(any(x["method"] not in (method, carried.CARRIED) for x in r["linears"].values()) for r in records),
        "events": sum(len(r["events"]) for r in records),
        "dead_columns": sum(x.get("dead_columns", 0) for x in linears),
        "carried": carried.count(records),
    }
