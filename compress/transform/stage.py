"""A stage of `llmc transform`: from a float folder to a float folder of the same architecture and shapes, layer by layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmc.compress.arguments import LayerArguments
from llmc.compress.calibration import Loop, LoopSettings, Workspace, settings_for
from llmc.compress.ends import is_tied, name_of, stored_head
from llmc.compress.entering import enter
from llmc.compress.skeleton import Skeleton
from llmc.compress.text import Calibration
from llmc.compress.transform.layer_pass import PROOF_TOKENS, Rotation, Scaling, Transform, as_stored
from llmc.compress.transform.roles import family_of
from llmc.compress.transform.rotations import fold, orthogonal, rotate_columns
from llmc.compress.unfinished import fingerprint
from llmc.console import say
from llmc.formats import model_folder
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.manifest import passes_of, read_manifest
from llmc.formats.shards import pieces_of, rest_of
from llmc.formats.source import hash_source, origin_of
from llmc.formats.types import AnyType
from llmc.precision import matmul_precision
from llmc.temporary import remove


class Stage(ABC):
    """name: of the pass in the manifest.  settings: the options that affect the result.  calibration: the text; None if the
    stage needs none."""

    name: str
    calibration: Calibration | None = None

    def __init__(self, source: Path, out: Path, settings: dict[str, Any], device: str, threads: int, resume: bool) -> None:
        self.source, self.out, self.settings, self.device, self.threads = source, out, settings, device, threads
        self.resume = resume

    def run(self) -> dict[str, Any]:
        """Make the folder `out`, or use the one that an interrupted run has finished. Returns its manifest."""
        key = fingerprint(__name__, {**self.settings, "pass": self.name}, self.threads, hash_source(self.source),
                          self.calibration)
        folder = self.out.with_name(f".{self.out.name.lstrip('.')}.unfinished")
        found = read_manifest(self.out)
        if self.resume and found and found.get("fingerprint") == key:
            say(f"{self.out} is finished already")
            remove(folder)  # of a run that died when the output had its name
            return found
        self.checkpoint = Checkpoint.open(self.source)
        self.skeleton = Skeleton(self.checkpoint, self.device)
        work = Workspace(folder, key, self.resume)
        if work.done:
            say(f"resuming after layer {work.done} of {len(self.skeleton.layers)}")
        self.layers(work, self.proof_arguments())
        self.outside(work)
        return self._publish(work, key)

    @abstractmethod
    def layers(self, work: Workspace, arguments: list[LayerArguments]) -> None:
        """Change every decoder layer that is not finished yet. arguments: see `proof_arguments`."""

    def outside(self, work: Workspace) -> None:  # noqa: B027 - most stages have nothing to do there
        """Change the tensors outside the decoder layers. They are stored as layer number len(layers)."""

    def edit_config(self, config: dict[str, Any]) -> None:  # noqa: B027 - most stages do not change it
        """Change the content of config.json if the stage needs it."""

    def entry(self) -> dict[str, Any]:
        """Further manifest entries of the pass."""
        return {}

    def proof_arguments(self) -> list[LayerArguments]:
        """The keyword arguments that the model passes to each layer for PROOF_TOKENS tokens, for the check of the output."""
        entered = enter(self.skeleton, iter(()), PROOF_TOKENS)
        self.skeleton.leave()
        return entered.layers

    def without_text(self, work: Workspace, transform: Transform) -> None:
        """Run a transform without text over every layer that is not finished yet."""
        Loop(self.skeleton, None, work, LoopSettings()).run(transform, label=f"{self.name}, layer")

    def _publish(self, work: Workspace, key: dict[str, Any]) -> dict[str, Any]:
        folder, records = work.folder / "artifact", work.records()
        changed = [piece for file in sorted(work.layers.glob("*.safetensors")) for piece in pieces_of(file)]
        config = dict(self.checkpoint.config)
        self.edit_config(config)
        model_folder.write(folder, self.source, changed + rest_of(self.checkpoint, {p.name for p in changed}), config,
                           model_folder.same_bytes(changed))
        widened = [p.name for p in changed if p.dtype == "F32" and p.name in self.checkpoint
                   and self.checkpoint.dtype(p.name) != "F32"]
        sizes = [sum(f.stat().st_size for f in files) for files in (folder.glob("*.safetensors"), self.checkpoint.files)]
        entry = {"name": self.name, "config": self.settings, "threads": self.threads, "device": self.device,
                 "matmul": matmul_precision(), "proof": max(r.get("proof", 0.0) for r in records), "layers": records,
                 "widened": len(widened), "grown_bytes": sizes[0] - sizes[1], **self.entry()}
        manifest = model_folder.publish(folder, self.out, "hf", origin_of(self.source), [*passes_of(self.source), entry],
                                        fingerprint=key)
        remove(work.folder)
        return manifest


class ScalingStage(Stage):
    """Channel scalings: AWQ's or SmoothQuant's (with settings['alpha']) on calibration text; equalization if calibration is
    None."""

    name = "scaling"

    def __init__(self, *args: Any, type_of: Callable[[int], AnyType], calibration: Calibration | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.type_of, self.calibration = type_of, calibration

    def entry(self) -> dict[str, Any]:
        return {"calibration": self.calibration.origin if self.calibration else None}

    def layers(self, work: Workspace, arguments: list[LayerArguments]) -> None:
        smooth = self.settings.get("alpha")
        transform = Scaling(self.skeleton, arguments, self.type_of, smooth, self.calibration is None)
        if self.calibration is None:
            self.without_text(work, transform)
            return
        sequences = self.calibration.sequences
        # all groups of a layer at once: the scaling of one place does not change the inputs of the others
        settings = settings_for(self.skeleton, sequences, true_sequential=False, peaks=smooth is not None)
        Loop(self.skeleton, sequences, work, settings).run(transform, _note)


class RotateStage(Stage):
    """R2 on every layer, and R1 too if settings['rotate'] is 'r1r2'."""

    name = "rotate"

    def layers(self, work: Workspace, arguments: list[LayerArguments]) -> None:
        hidden, seed = self.skeleton.config.get_text_config().hidden_size, self.settings["seed"]
        with_r1 = self.settings["rotate"] == "r1r2"
        self.stream = orthogonal(hidden, torch.Generator().manual_seed(seed)) if with_r1 else None
        self.without_text(work, Rotation(self.skeleton, arguments, seed, self.stream))

    def outside(self, work: Workspace) -> None:
        """Apply R1 to embedding and head, and fold the last norm into the head. A tied head becomes a separate matrix."""
        if self.stream is None:
            return
        model, family, names = self.skeleton.model, family_of(self.skeleton.config), self.skeleton.names
        embedding = names.stored(name_of(self.skeleton, model.get_input_embeddings()))
        final = names.stored(f"{model.base_model_prefix}.{family.final_norm}.weight")
        tied = is_tied(self.skeleton)
        head = name_of(self.skeleton, model.get_output_embeddings()) if tied else stored_head(self.skeleton)
        rotated, norm = (self.checkpoint.tensor(n).float().clone() for n in (embedding, final))
        projection = rotated.clone() if tied else self.checkpoint.tensor(head).float()
        fold(norm, [projection], family.offset)
        rotate_columns(projection, self.stream)
        rotate_columns(rotated, self.stream)
        index = len(self.skeleton.layers)
        changed = ((embedding, rotated, embedding), (head, projection, embedding if tied else head), (final, norm, final))
        tensors = {name: as_stored(t, self.checkpoint.tensor(source).dtype) for name, t, source in changed}
        work.save_layer(index, tensors, {"layer": index, "proof": 0.0, "places": {}, "left": []})

    def edit_config(self, config: dict[str, Any]) -> None:
        if self.stream is not None:
            config["tie_word_embeddings"] = False


def _note(record: dict[str, Any]) -> str:
    places = record["places"].values()
    before, after = (sum(p[k] for p in places) for k in ("before", "after"))
    return f"rounding error {after / before:.3f}x" if before else ""
