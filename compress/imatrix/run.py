"""`llmc imatrix`: sum the squared inputs of every linear over calibration text, and write llama.cpp's importance matrix.

The unchanged model runs once over the text, layer by layer in bounded memory (compress/calibration.py). llama-imatrix sums
the same squares. It also puts the start token before each chunk if the tokenizer asks for it; llmc adds no token.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmc.compress.calibration import Loop, Workspace, settings_for
from llmc.compress.coverage import checked
from llmc.compress.expected import expected, say_expected
from llmc.compress.imatrix.config import ImatrixConfig
from llmc.compress.imatrix.importance import Matrix, matrix_names
from llmc.compress.memory import FLOAT, Running, Sizes, entering, reading, sampling
from llmc.compress.passes import LayerWatch
from llmc.compress.preparation import calibration_text, check_weights, open_float, sampled_file
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.compress.text import SELF, Calibration, rows_in
from llmc.compress.unfinished import fingerprint
from llmc.console import say
from llmc.errors import UserError
from llmc.files import check_disk, sha256
from llmc.formats.imatrix import Imatrix, InputSums, write_imatrix
from llmc.formats.manifest import check_output, new_manifest, staged_artifact
from llmc.formats.source import describe_source, model_name
from llmc.locks import locked
from llmc.machine import physical_cores, torch_device
from llmc.memory import Memory
from llmc.precision import matmul_precision, prepare_cpu
from llmc.sources.resolve import resolve_model
from llmc.temporary import remove


class SquaresPass(LayerWatch):
    """Sums x_j^2 over tokens for every linear, and counts the tokens. An expert sees those that the router sends to it, each
    as often as any other, whatever its routing weight is: so does llama-imatrix.

    names: {the linear's name in the model: llama.cpp's tensor}.  A layer's tensors: {llama.cpp's name: float32
    [experts, in]}; its record: {'layer', 'counts' {llama.cpp's name: [tokens of each expert]}}. A matrix that is none of
    several has one row and one count.
    """

    def __init__(self, skeleton: Skeleton, names: dict[str, Matrix]) -> None:
        self.skeleton, self.names = skeleton, names

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        self.groups = groups
        # the sums of a batch are float32, as products are; the sums over batches are float64
        self.sums = {g: torch.zeros(g.in_features, dtype=torch.float64) for g in groups}
        self.tokens = dict.fromkeys(groups, 0)

    def see(self, group: LinearGroup, inputs: torch.Tensor) -> None:
        rows = inputs.reshape(-1, group.in_features)
        self.sums[group] += rows.float().square().sum(0).double().cpu()
        self.tokens[group] += rows.shape[0]

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        prefix, tensors, counts = self.skeleton.layer_name(index), dict[str, torch.Tensor](), dict[str, list[int]]()
        for group, sums in self.sums.items():
            if not bool(torch.isfinite(sums).all()):
                raise UserError(f"the input of {prefix}.{group.names[0]} has NaN or infinity on the calibration text",
                                "the checkpoint is damaged or its training diverged: use an earlier checkpoint")
            for name in group.names:
                matrix = self.names[f"{prefix}.{name}"]
                if matrix.name not in tensors:
                    tensors[matrix.name] = torch.zeros(matrix.experts, group.in_features)
                    counts[matrix.name] = [0] * matrix.experts
                tensors[matrix.name][matrix.expert] = sums.float()
                counts[matrix.name][matrix.expert] = self.tokens[group]
        return tensors, {"layer": index, "counts": counts}


def imatrix(model: str | Path, config: ImatrixConfig) -> dict[str, Any]:
    """Write the importance matrix of `model`.

    Returns {'out', 'layers', 'matrices', 'tokens', 'calibration', 'sha256', 'bytes', 'seconds'}; with `dry_run` the plan.
    UserError comes before any
    work if a check can find the problem.
    """
    start = time.monotonic()
    threads = config.threads or physical_cores()
    prepare_cpu(threads)
    if not config.dry_run:
        check_output(config.out, "imatrix", model, config)
    job = _Job(resolve_model(model), config, threads)
    if config.dry_run:
        return job.plan()
    job.check()
    with locked(job.out):
        return {**job.run(), "seconds": round(time.monotonic() - start, 1)}


class _Job:
    """One importance matrix: the checks before it starts, and its steps."""

    def __init__(self, source: Path, config: ImatrixConfig, threads: int) -> None:
        self.source, self.config, self.threads = source, config, threads
        self.skeleton = Skeleton(open_float(source), str(torch_device(config.device)))
        checked(self.skeleton, "measured")
        self.names = matrix_names(self.skeleton)
        self.out = config.out or Path(f"{model_name(source)}-imatrix.gguf")
        self.work = self.out.with_name(f".{self.out.name}.unfinished")
        sizes = Sizes.of(self.skeleton)
        run = Running.of(self.skeleton, config.seq_len, config.samples, workers=1)
        steps = [reading(sizes), entering(sizes, config.seq_len), run.tracing(), run.gathering(0)]
        if config.calibration == SELF:
            steps.append(sampling(self.skeleton, config.seq_len, config.samples))
        self.memory = Memory(steps)
        self.disk = 3 * FLOAT * config.samples * config.seq_len * sizes.hidden  # the hidden states take three files

    def plan(self) -> dict[str, Any]:
        """The plan: the options, and the disk and memory that it needs (bytes)."""
        c = self.config
        return {"source": str(self.source), "out": str(self.out), "layers": len(self.skeleton.layers),
                "matrices": len({m.name for m in self.names.values()}), "tokens": c.samples * c.seq_len,
                "calibration": c.calibration, "experts": expected(self.skeleton, c.samples * c.seq_len),
                "calibration_rows": rows_in(c.calibration), "disk_bytes": self.disk, **self.memory.plan(), "device": c.device,
                "threads": self.threads, "matmul": matmul_precision()}

    def check(self) -> None:
        """UserError if the output, the disk, the memory or the weights do not allow the run."""
        check_output(self.out, "imatrix", self.source, self.config)
        check_disk(self.out, self.disk, "gathering statistics")
        self.memory.check("gathering statistics", "lower --seq-len")
        check_weights(self.skeleton.checkpoint)

    def run(self) -> dict[str, Any]:
        source = describe_source(self.source)
        text = calibration_text(self.skeleton, source["files"], self.config, self.threads, sampled_file(self.work))
        say(f"calibration: {text.origin['name']}, {text.tokens:,} tokens")
        say_expected(self.skeleton, text.tokens, self.config.seq_len)
        key = fingerprint(__name__, self.config.numbers(), self.threads, source["files"], text)
        work = Workspace(self.work, key, self.config.resume)
        if work.done:
            say(f"resuming after layer {work.done} of {len(self.skeleton.layers)}")
        settings = settings_for(self.skeleton, text.sequences, workers=1, true_sequential=False)
        Loop(self.skeleton, text.sequences, work, settings).run(SquaresPass(self.skeleton, self.names))
        matrix = self._join(work, text)
        result = {"layers": len(self.skeleton.layers), "matrices": len(matrix.entries), "tokens": text.tokens}
        this = {"name": "imatrix", "config": self.config.numbers(), "threads": self.threads, "matmul": matmul_precision(),
                "device": str(self.skeleton.device), "calibration": text.origin, **result}
        with staged_artifact(self.out) as (tmp, manifest):
            write_imatrix(tmp, matrix)
            manifest.update(new_manifest("imatrix", source, [this]))
        remove(work.folder)
        remove(sampled_file(self.work))
        return {"out": str(self.out), **result, "calibration": text.origin["name"], "sha256": sha256(self.out),
                "bytes": self.out.stat().st_size}

    def _join(self, work: Workspace, text: Calibration) -> Imatrix:
        """The importance matrix of all finished layers. llama.cpp calls a sequence of the text a chunk."""
        entries = {}
        for index, record in enumerate(work.records()):
            for name, sums in work.tensors(index).items():
                entries[name] = InputSums(sums.numpy(), np.array(record["counts"][name], dtype=np.float32))
        samples, seq_len = text.sequences.shape
        return Imatrix(entries, [text.origin["name"]], samples, seq_len)
