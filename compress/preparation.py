"""The steps of a job before the calibration loop starts: checks, and the calibration text."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from llmc.closure import digest
from llmc.compress.memory import sampling
from llmc.compress.sampling import BATCH, sample_from_model
from llmc.compress.skeleton import Skeleton
from llmc.compress.state_file import load_state, save_state
from llmc.compress.text import SELF, Calibration, from_model, load_calibration
from llmc.console import say, warn
from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_tokenizer, load_torch_model
from llmc.formats.text_rows import described
from llmc.machine import torch_device
from llmc.memory import Memory
from llmc.precision import matmul_precision


class Settings(Protocol):
    """The options that all commands with calibration text have."""

    @property
    def calibration(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def resume(self) -> bool: ...


def open_float(source: Path) -> Checkpoint:
    """The checkpoint of a float folder. UserError if it is quantized."""
    checkpoint = Checkpoint.open(source)
    if checkpoint.quantization is not None:
        raise UserError(f"{source} is quantized already ({checkpoint.quantization.get('quant_method')})",
                        "start from the float model")
    return checkpoint


def check_weights(checkpoint: Checkpoint) -> None:
    """Read every tensor once, so that a damaged one is found now and not at layer 30."""
    for name in checkpoint.names():
        checkpoint.tensor(name)


def calibration_text(skeleton: Skeleton, files: dict[str, str], c: Settings, threads: int,
                     kept: Path, fewer: bool = False) -> Calibration:
    """The calibration sequences of the options. files: sha256 of each file of the model.  kept: the file for sampled
    sequences; the caller removes it.  fewer: a text with fewer than c.samples is taken whole."""
    source = skeleton.checkpoint.folder
    tokenizer = load_tokenizer(source)
    limit = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None) or c.seq_len
    if c.seq_len > limit:
        raise UserError(f"--seq-len {c.seq_len}: {source} has positions for {limit} tokens", f"use --seq-len {limit} or less")
    if c.calibration != SELF:
        rows = skeleton.model.get_input_embeddings().weight.shape[0]
        text = load_calibration(c.calibration, tokenizer, c.samples, c.seq_len, rows, fewer)
        if "rows" in text.origin:
            say(f"calibration text {text.origin['name']}{described(text.origin['rows'])}")
        return text
    say("no calibration text was given: sampling text from the model "
        "(text like the model's later input is better: --calibration FILE)")
    origin = {"seed": c.seed, "temperature": 1.0, "samples": c.samples, "seq_len": c.seq_len}
    key = {**origin, "source": files, "threads": threads, "device": c.device, "torch": torch.__version__,
           "transformers": version("transformers"), "matmul": matmul_precision(), "code": digest(__name__)}
    ids = _sampled_before(kept, key) if c.resume else None
    if ids is None:
        if c.device == "cpu":
            Memory((sampling(skeleton, c.seq_len, c.samples),)).check("calibrating", "give a text with --calibration FILE")
        loaded = load_torch_model(source, str(torch_device(c.device)), torch.bfloat16)
        ids = sample_from_model(loaded, tokenizer, c.samples, c.seq_len, c.seed, BATCH)
        del loaded
        save_state(kept, {"ids": ids}, {"key": json.dumps(key, sort_keys=True)})
    return from_model(ids, tokenizer, origin)


def sampled_file(work: Path) -> Path:
    """The file that keeps sampled text for `--resume`. It lies beside the workspace, which does not exist yet then."""
    return work.with_suffix(".sampled.safetensors")


def _sampled_before(kept: Path, key: dict[str, Any]) -> torch.Tensor | None:
    """The sampled sequences of an interrupted run, if they were sampled under the same key."""
    if not os.path.lexists(kept):
        return None
    try:
        tensors, metadata = load_state(kept)
    except UserError as e:
        warn(f"text is sampled again: {e.problem}")
        return None
    return tensors["ids"] if metadata == {"key": json.dumps(key, sort_keys=True)} else None
