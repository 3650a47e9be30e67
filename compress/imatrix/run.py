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
from safetensors.torch import load_file
from torch import nn

from llmc.compress.calibration import Loop, Workspace, settings_for
from llmc.compress.coverage import checked
from llmc.compress.imatrix.config import ImatrixConfig
from llmc.compress.imatrix.importance import matrix_names
from llmc.compress.passes import LayerWatch
from llmc.compress.preparation import calibration_text, check_weights, open_float, sampled_file
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.compress.text import Calibration
from llmc.compress.unfinished import fingerprint
from llmc.console import say
from llmc.errors import UserError
from llmc.files import check_disk, sha256
from llmc.formats.imatrix import Imatrix, InputSums, write_imatrix
from llmc.formats.manifest import check_output, new_manifest, staged_artifact
from llmc.formats.source import describe_source, model_name
from llmc.locks import locked
from llmc.machine import physical_cores, torch_device
from llmc.precision import matmul_precision, prepare_cpu
from llmc.sources.resolve import resolve_model
from llmc.temporary import remove


class SquaresPass(LayerWatch):
    """Sums x_j^2 over tokens for every linear, and counts the tokens.

    names: {the linear's name in the model: llama.cpp's name}.  A layer's tensors: {llama.cpp's name: float32 [in]}; its
    record: {'layer', 'tokens'}.
    """

    def __init__(self, skeleton: Skeleton, names: dict[str, str]) -> None:
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
        prefix, tensors = self.skeleton.layer_name(index), {}
        for group, sums in self.sums.items():
            if not bool(torch.isfinite(sums).all()):
                raise UserError(f"the input of {prefix}.{group.names[0]} has NaN or infinity on the calibration text",
                                "the checkpoint is damaged or its training diverged: use an earlier checkpoint")
            for name in group.names:
                tensors[self.names[f"{prefix}.{name}"]] = sums.float()
        tokens = set(self.tokens.values())
        assert len(tokens) == 1, "every linear of a layer sees every token"
        return tensors, {"layer": index, "tokens": tokens.pop()}


def imatrix(model: str | Path, config: ImatrixConfig) -> dict[str, Any]:
    """Write the importance matrix of `model`.

    Returns {'out', 'layers', 'matrices', 'tokens', 'calibration', 'sha256', 'bytes', 'seconds'}. UserError comes before any
    work if a check can find the problem.
    """
    start = time.monotonic()
    threads = config.threads or physical_cores()
    prepare_cpu(threads)
    check_output(config.out, "imatrix", model, config)
    job = _Job(resolve_model(model), config, threads)
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
        check_output(self.out, "imatrix", source, config)
        hidden = self.skeleton.config.get_text_config().hidden_size
        states = config.samples * config.seq_len * hidden * 4
        check_disk(self.out, 3 * states, "gathering statistics")  # the hidden states take three files
        check_weights(self.skeleton.checkpoint)

    def run(self) -> dict[str, Any]:
        source = describe_source(self.source)
        text = calibration_text(self.skeleton, source["files"], self.config, self.threads, sampled_file(self.work))
        say(f"calibration: {text.origin['name']}, {text.tokens:,} tokens")
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
            counts = np.array([record["tokens"]], dtype=np.float32)
            for name, sums in load_file(work.layer_file(index)).items():
                entries[name] = InputSums(sums.numpy()[None], counts)
        samples, seq_len = text.sequences.shape
        return Imatrix(entries, [text.origin["name"]], samples, seq_len)
