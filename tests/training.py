"""What the tests of healing and distillation share: short trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.formats.checkpoint import TOKENIZER_FILES
from llmc.formats.hf import load_torch_model

DISTILL: dict[str, Any] = {"seq_len": 64, "steps": 24, "batch": 4, "check_every": 8, "held_out": 4, "threads": 2,
                           "sampled": 0, "lr": 3e-3, "precision": "fp32"}
HEAL: dict[str, Any] = {"seq_len": 64, "steps": 32, "batch": 4, "check_every": 16, "held_out": 4, "threads": 2, "lr": 0.01,
                        "sampled": 0}


def drop_layer(base: Path, out: Path, index: int) -> Path:
    """The model without one decoder layer, as depth pruning leaves it."""
    model = load_torch_model(base)
    del model.model.layers[index]
    model.config.num_hidden_layers -= 1
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            (out / name).write_bytes((base / name).read_bytes())
    return out


def flags(options: dict[str, Any]) -> list[str]:
    """Options of the API as those of the command line."""
    return [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]
