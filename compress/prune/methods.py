"""The five pruning methods. Each returns the tensors and the config of the pruned model, and its record for the manifest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file

from llmc.compress.calibration import REFERENCE_LEAST, REFERENCE_SHARE, Loop, Workspace, settings_for, spread
from llmc.compress.ends import is_tied
from llmc.compress.passes import LayerPass, LayerWatch
from llmc.compress.prune import depth, width
from llmc.compress.prune.config import MASKS, PruneConfig
from llmc.compress.prune.mask_pass import MaskPass
from llmc.compress.skeleton import Skeleton
from llmc.formats.hf import load_torch_model
from llmc.formats.shards import Piece, pieces_of, rest_of


@dataclass
class Made:
    """A pruned model. pieces, config: its tensors and config.json.  summary: for result and manifest.  record: for the
    manifest alone."""

    pieces: list[Piece]
    config: dict[str, Any]
    summary: dict[str, Any]
    record: dict[str, Any]


def make(skeleton: Skeleton, c: PruneConfig, work: Workspace, sequences: torch.Tensor) -> Made:
    """Prune by `c.method`. sequences: calibration text, int64 [n, seq_len]. The pieces are in the source and in `work`."""
    if c.method in MASKS:
        return by_mask(skeleton, c, work, sequences)
    return by_depth(skeleton, c, work, sequences) if c.method == "depth" else by_width(skeleton, c, work, sequences)


def by_mask(skeleton: Skeleton, c: PruneConfig, work: Workspace, sequences: torch.Tensor) -> Made:
    reference = reference_sequences(c)
    seen = None if c.method == "magnitude" else spread(sequences, reference) if reference else sequences
    run(skeleton, work, seen, MaskPass(skeleton, c), reference)
    pieces = [p for i in range(len(skeleton.layers)) for p in pieces_of(work.layer_file(i))]
    pieces += rest_of(skeleton.checkpoint, {p.name for p in pieces})
    records = work.records()
    return Made(pieces, skeleton.checkpoint.config, {
        "error": sum(r["error"] for r in records) / len(records), "events": sum(len(r["events"]) for r in records),
        "fallbacks": sum(any(x["method"] != c.method for x in r["linears"].values()) for r in records)}, {"layers": records})


def by_depth(skeleton: Skeleton, c: PruneConfig, work: Workspace, sequences: torch.Tensor) -> Made:
    assert c.drop is not None  # PruneConfig checks it
    depth.check_alike(skeleton)
    if c.by == "influence":
        run(skeleton, work, sequences, depth.InfluenceWatch())
        dropped = depth.lowest([r["influence"] for r in work.records()], c.drop)
    else:
        few = min(depth.KL_SEQUENCES, len(sequences))
        model = load_torch_model(skeleton.checkpoint.folder, str(skeleton.device), torch.float32)
        dropped = depth.drop_by_kl(model, skeleton.layers_name, spread(sequences, few)[:few], c.drop, work)
    return without(skeleton, dropped, work.records())


def without(skeleton: Skeleton, dropped: list[int], records: list[dict[str, Any]]) -> Made:
    """The model without the layers `dropped`."""
    config = depth.shortened(skeleton.checkpoint.config, skeleton.config, dropped)
    return Made(depth.pieces_without(skeleton, dropped), config, {"dropped": dropped}, {"layers": records})


def by_width(skeleton: Skeleton, c: PruneConfig, work: Workspace, sequences: torch.Tensor) -> Made:
    new, _ = width.narrowed(skeleton.config, c)
    count, checkpoint, tied = len(skeleton.layers), skeleton.checkpoint, is_tied(skeleton)
    run(skeleton, work, sequences, width.ImportanceWatch(skeleton.config))
    kept = width.slices(skeleton, new, [load_file(work.layer_file(i)) for i in range(count)])
    by_layer: dict[int, list[str]] = {}
    for name in checkpoint.names():
        place = depth.place_of(skeleton, name)
        by_layer.setdefault(count if place is None else place[1], []).append(name)
    pieces: list[Piece] = []
    for index, names in by_layer.items():
        layer = None if index == count else index
        tensors = {n: kept.cut(n, checkpoint.tensor(n), layer, tied) for n in names}
        work.save_layer(count + index, tensors, {"layer": index})  # numbers above the sums, which a resumed run reads again
        pieces += pieces_of(work.layer_file(count + index))
    layers = [{"layer": i, "groups": kept.groups[i].tolist()} for i in range(count)]
    return Made(pieces, width.narrow_config(checkpoint.config, new), {"shape": vars(new)},
                {"layers": layers, "channels": kept.hidden.tolist()})


def reference_sequences(c: PruneConfig) -> int:
    """The number of sequences that also run through the unchanged model, as in the quantizer."""
    n = c.samples - c.held_out
    return max(min(n, REFERENCE_LEAST), n // REFERENCE_SHARE) if c.method == "sparsegpt" else 0


def run(skeleton: Skeleton, work: Workspace, sequences: torch.Tensor | None, pass_: LayerPass | LayerWatch,
        reference: int = 0) -> None:
    """Run a pass in the calibration loop. reference: number of sequences that also run through the unchanged model."""
    settings = settings_for(skeleton, sequences, reference=reference)
    Loop(skeleton, sequences, work, settings).run(pass_, _note if sequences is not None else lambda r: "")


def _note(record: dict[str, Any]) -> str:
    return f"error {100 * record['error']:.1f} %" if "error" in record else ""
