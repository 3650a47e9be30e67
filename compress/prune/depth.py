"""Remove whole decoder layers: choose them, and make a plain model of the others.

* influence: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024
  (arXiv:2403.03853), eq. 1: 1 - the mean cosine similarity of a layer's input and output. It removes the layers with the
  lowest influence, all at once.
* kl: it removes the layer whose removal adds the least KL divergence from the whole model, then measures again and removes
  the next one. This takes the interaction of layers into account, which influence does not. The whole model is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmc.compress.calibration import Workspace
from llmc.compress.entering import Outputs, enter
from llmc.compress.forward import run
from llmc.compress.passes import LayerWatch
from llmc.compress.rows import Rows
from llmc.compress.skeleton import LinearGroup, Skeleton
from llmc.compress.teaching.loss import divergence
from llmc.compress.tracing import Replay, recorded, replaced, states_of
from llmc.console import progress
from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.shards import Piece, pieces_of
from llmc.precision import fast_forward

PROBE_TOKENS = 8
KL_SEQUENCES = 8  # sequences for the KL divergence: with 8 x 256 scored tokens the order of the layers is stable
STALE = ("sliding_window_pattern", "_sliding_window_pattern")  # rules on a layer's number: per-layer lists replace them
TOLERANCE = 1e-4  # the operations and weights are the same, so measured differences are 0


class InfluenceWatch(LayerWatch):
    """Measures the influence of each layer. Its record is {'layer', 'influence'}: 1 - the mean cosine over all tokens."""

    def begin(self, index: int, layer: nn.Module, groups: list[LinearGroup]) -> None:
        self.total, self.tokens = 0.0, 0
        self.handle = layer.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        cosine = torch.cosine_similarity(entering.double(), states_of(out).double(), dim=-1)
        self.total += float(cosine.sum())
        self.tokens += cosine.numel()

    def see(self, group: LinearGroup, inputs: torch.Tensor) -> None:
        """Does nothing: the influence does not depend on the inputs of linears."""

    def finish(self, index: int, layer: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        self.handle.remove()
        return {}, {"layer": index, "influence": 1 - self.total / self.tokens}


def lowest(influences: list[float], drop: int) -> list[int]:
    """The `drop` layers with the lowest influence, ascending."""
    return sorted(sorted(range(len(influences)), key=lambda i: influences[i])[:drop])


@torch.no_grad()
def drop_by_kl(model: nn.Module, layers: str, ids: torch.Tensor, drop: int, work: Workspace) -> list[int]:
    """The layers to remove, in the order of removal. model: in memory.  layers: the name of its list of layers.  ids: int64
    [n, length].

    Each round has a record in `work`: {'layer': round, 'dropped': layer, 'kld': {layer: mean KL}}.
    """
    dropped = [int(r["dropped"]) for r in work.records()[: work.done]]
    count = len(model.get_submodule(layers))  # type: ignore[arg-type]
    with progress("dropping layer", drop, work.done) as p:
        for turn in range(work.done, drop):
            kld = without_each(model, layers, ids, dropped, count)
            dropped.append(min(kld, key=lambda i: kld[i]))
            record = {"layer": turn, "dropped": dropped[-1], "kld": {str(i): v for i, v in kld.items()}}
            work.save_layer(turn, {}, record)
            work.commit(turn + 1)
            p.step(f"layer {dropped[-1]} is removed, KLD {kld[dropped[-1]]:.4f}")
    return dropped


def without_each(model: nn.Module, layers: str, ids: torch.Tensor, dropped: list[int], count: int) -> dict[int, float]:
    """{layer: mean KL divergence from the whole model when the layers `dropped` and this layer are removed}.

    The divergence is in nats per token, over the second half of each sequence. Layers before the tested one do not run again.
    """
    found = {i: 0.0 for i in range(count) if i not in dropped}
    device = next(model.parameters()).device
    with fast_forward(device):
        for row in ids.to(device):
            whole, outputs = _run(model, layers, row, {})
            through = _identity(Outputs.like(outputs[0].out))
            absent = {f"{layers}.{i}": through for i in dropped}
            _, outputs = _run(model, layers, row, absent)
            for i in found:
                known = {f"{layers}.{j}": outputs[j] for j in range(i)}
                logits, _ = _run(model, layers, row, {**absent, **known, f"{layers}.{i}": through})
                found[i] += float(divergence(logits, whole))
    return {i: total / (ids.shape[0] * (ids.shape[1] // 2)) for i, total in found.items()}


def _run(model: nn.Module, layers: str, row: torch.Tensor,
         forwards: dict[str, Callable[..., Any]]) -> tuple[torch.Tensor, list[Replay]]:
    """Returns (the logits [length / 2, vocab] of the second half of a sequence, every layer's run). forwards: functions
    that replace the forward of some layers, by the layer's name."""
    half = row.shape[0] // 2
    with recorded(model.get_submodule(layers)) as outputs, replaced(model, forwards):
        logits: torch.Tensor = model(input_ids=row[None], use_cache=False, logits_to_keep=half).logits
    return logits[0, -half:], outputs  # OPT of transformers 4.57 ignores logits_to_keep


def _identity(outputs: Outputs) -> Callable[..., Any]:
    """A forward that returns its input states. outputs: what a layer returns."""
    return lambda *args, **kwargs: outputs.of(args[0] if args else kwargs["hidden_states"])


def check_alike(skeleton: Skeleton) -> None:
    """UserError if a layer is given more than hidden states by other layers, or values that are made for its number. Such a
    layer does not compute the same after another one is removed."""
    entered = enter(skeleton, iter(()), PROBE_TOKENS, Rows(skeleton.checkpoint.folder, "none", 0))
    skeleton.leave()
    own = {x.layer: names for x in entered.layers if (names := x.own(entered.layers))}
    if own:
        first = min(own)
        raise UserError(f"no layer of {skeleton.checkpoint.folder} can be removed: its layers are given values that other "
                        f"layers make, or that are made for their number, as {skeleton.layer_name(first)} "
                        f"({', '.join(own[first])})", "use --method width, or a method that makes weights zero")


# ------------------------------------------------------------------------------------------------------- the new model


def place_of(skeleton: Skeleton, name: str) -> tuple[str, int, str] | None:
    """The name of a tensor of the checkpoint in parts: ('model.layers', 3, 'mlp.up_proj.weight'); None outside the decoder
    layers."""
    listed = re.escape(skeleton.layers_name.rpartition(".")[2])
    found = re.match(rf"((?:.*\.)?{listed})\.(\d+)\.(.*)", name)
    return (found[1], int(found[2]), found[3]) if found else None


def pieces_without(skeleton: Skeleton, dropped: list[int]) -> list[Piece]:
    """Every tensor that stays, unchanged, with the layers renumbered."""
    kept = [i for i in range(len(skeleton.layers)) if i not in dropped]
    found = []
    for piece in (piece for shard in skeleton.checkpoint.files for piece in pieces_of(shard)):
        place = place_of(skeleton, piece.name)
        if place is None:
            found.append(piece)
        elif place[1] in kept:
            found.append(replace(piece, name=f"{place[0]}.{kept.index(place[1])}.{place[2]}"))
    return found


def shortened(raw: dict[str, Any], config: Any, dropped: list[int]) -> dict[str, Any]:
    """config.json of the model without the layers `dropped`. raw: config.json of the source.  config: the config object that
    transformers makes of it. It has the per-layer lists that raw may replace by a rule on the layer's number."""
    text = config.get_text_config()
    count = text.num_hidden_layers
    kept = [i for i in range(count) if i not in dropped]
    before = raw.get("text_config", raw)
    known = {**text.to_dict(), **{k: v for k, v in before.items() if v is not None}}
    edited: dict[str, Any] = {
        key: [value[i] for i in kept] for key, value in known.items()
        if isinstance(value, list) and len(value) == count and not key.endswith("token_id") and key != "architectures"}
    edited |= {key: [kept.index(i) for i in value if i in kept] for key, value in known.items()
               if key not in edited and _layer_numbers(key, value, count)}
    edited[getattr(text, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    if isinstance(limit := known.get("max_window_layers"), int):
        edited["max_window_layers"] = sum(i < limit for i in kept)
    own = {k: v for k, v in {**before, **edited}.items() if k not in STALE}
    return {**raw, "text_config": own} if "text_config" in raw else own


def _layer_numbers(key: str, value: Any, count: int) -> bool:
    """Whether an entry of config.json is a list of layers' numbers, as Bamba's attn_layer_indices."""
    return (bool(re.search(r"layer|attn", key)) and isinstance(value, list) and value != [] and len(set(value)) == len(value)
            and all(type(v) is int and 0 <= v < count for v in value))


def prove(source: Path, pruned: Path, dropped: list[int], ids: torch.Tensor, device: str) -> float:
    """Compare the new folder with the source run without the layers `dropped`.

    Returns the largest difference of the last layer's output, relative to its largest value. UserError if it is larger than
    float noise."""
    count = len(Skeleton(Checkpoint.open(source), device).layers)
    kept = [i for i in range(count) if i not in dropped]
    wanted = run(source, ids, device, None, "the source without these layers", kept).states
    what = f"layers {', '.join(map(str, sorted(dropped)))} of {source} cannot be removed"
    hint = "use --method width, or a method that makes weights zero"
    try:
        found = run(pruned, ids, device, None, "the new folder").states
    except UserError as e:
        raise UserError(f"{what}: the kinds of the others depend on their number ({e.problem})", hint) from e
    difference = float((wanted - found).abs().max() / wanted.abs().max())
    if not difference < TOLERANCE:
        raise UserError(f"{what}: after the others are renumbered, the output differs by {difference:.2g} (relative), "
                        "because its layers depend on their number", hint)
    return difference
