"""FP8 weights with scales, read as the values that they mean: code times scale, in float32.

    X.weight            float8 e4m3 (or e5m2) [out, in], or stacked [experts, out, in]
    X.weight_scale_inv  the factor of each block of weights, despite its name (DeepSeek, transformers' `fp8`)
    X.weight_scale      the same (compressed-tensors, FBGEMM, ModelOpt)

A scale holds for a whole matrix (one number), for a row ([out] or [out, 1]) or for blocks, as in [ceil(out / 128),
ceil(in / 128)]. Scales of activations and of a KV cache belong to a way of running the model, not to its weights.
Sources: transformers 5.23, integrations/finegrained_fp8.py; compressed-tensors, compressors/naive_quantized.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from llmc.errors import UserError
from llmc.formats.decoded import Coded, Decoded, Index
from llmc.formats.layouts import listed

if TYPE_CHECKING:
    import torch

    from llmc.formats.checkpoint import Checkpoint

CODES = re.compile(r"F8_E4M3.*|F8_E5M2.*")
SUFFIXES = ("_scale_inv", "_scale")
ACTIVATIONS = re.compile(r"(?:^|[._])(?:input|output|activation|[qkv]|[kv]_cache)_scale$")


def decode(ckpt: Checkpoint, config: dict[str, Any]) -> Decoded:
    """The FP8 tensors that have a scale. One without a scale is left: contents.check refuses it."""
    names, found, sizes = set(ckpt.names()), dict[str, Coded](), set[str]()
    for name in ckpt.names():
        scale = next((name + suffix for suffix in SUFFIXES if name + suffix in names), None)
        if scale is None or not CODES.fullmatch(ckpt.dtype(name)):
            continue
        shape = ckpt.shape(name)
        blocks = _blocks(ckpt, name, scale, _asked(config))
        whole = [block == n for block, n in zip(blocks, shape, strict=True)]
        sizes.add("matrix" if all(whole[-2:]) else "row" if whole[-1] and blocks[-2] == 1 else
                  f"{blocks[-2]} x {blocks[-1]} weights")
        found[name] = Coded((name, scale), ckpt.dtype(name), shape, "F32", partial(_values, ckpt, name, scale, blocks))
    unused = frozenset(n for n in names if ACTIVATIONS.search(n)) - {part for c in found.values() for part in c.parts}
    more = f"; {len(unused)} scales of activations ({listed(sorted(unused), 1)}) are not used" if unused else ""
    note = (f"{len(found)} matrices are FP8 with a scale for each {' or '.join(sorted(sizes))}: they are read as code times "
            f"scale{more}")
    return Decoded(found, unused, note)


def _asked(config: dict[str, Any]) -> list[int]:
    """The blocks in the config: `weight_block_size`, or `block_structure` of compressed-tensors; [] without blocks."""
    groups = config.get("config_groups")
    weights = [g.get("weights") or {} for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    found = config.get("weight_block_size") or next((w["block_structure"] for w in weights if w.get("block_structure")), None)
    if isinstance(found, str):
        found = found.split("x")
    return [int(n) for n in found] if isinstance(found, list | tuple) and len(found) == 2 else []


def _blocks(ckpt: Checkpoint, name: str, scale: str, asked: list[int]) -> tuple[int, ...]:
    """The weights along each axis that share a scale. Raises UserError if the scales do not fit the weights."""
    shape, scales = ckpt.shape(name), ckpt.shape(scale)
    scales = (*scales, *[1] * (len(shape) - len(scales)))
    found = list[int]()
    for axis, (n, count) in enumerate(zip(shape, scales, strict=False)):
        block = asked[axis - len(shape)] if asked and axis >= len(shape) - 2 else 0
        if block and -(-n // block) == count:
            found.append(block)
        elif count and n % count == 0:
            found.append(n // count)
    if len(shape) < 2 or not len(found) == len(shape) == len(scales):
        raise UserError(f"{scale} of {ckpt.folder} has the shape {list(ckpt.shape(scale))}, which does not fit "
                        f"{list(shape)} weights" + (f" in blocks of {asked}" if asked else ""),
                        "download the model again, or correct weight_block_size in config.json")
    return tuple(found)


def _values(ckpt: Checkpoint, name: str, scale: str, blocks: tuple[int, ...], index: Index) -> torch.Tensor:
    import torch

    codes, factors = ckpt.raw(name).to(torch.float32), ckpt.raw(scale).to(torch.float32)
    factors = factors.view(*factors.shape, *[1] * (codes.ndim - factors.ndim))
    for axis, block in enumerate(blocks):
        if factors.shape[axis] > 1:
            factors = factors.repeat_interleave(block, axis).narrow(axis, 0, codes.shape[axis])
    values = codes.mul_(factors)
    return values if index is None else values[index]
