"""Weights that lie on a type already: codes and factors are found again, bit for bit, from the values alone.

Quantization-aware training and dequantized files leave float weights  v = round(d * level[code] + m).  d and m are float16,
and `round` is to the type in which the folder stores its weights (float32, float16 or bfloat16). This module finds d, m and
the codes of each block (lattice_k.py for types with integer scales). A block lies on the type if they give every stored value
again, exactly; there is no tolerance. So a block that lies on a type by chance is carried without loss too.

The search: the outermost weight of a block has one of the levels, so d is near  weight / level.  The rounding of the stored
value moves d by at most a few float16 numbers. All of them are tried, the outermost level first, as quantizers use it. With a
minimum m, the smallest weight has code 0, so m is near it. This holds for every quantizer that takes m from that weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from llmc.formats.quantized import tensors_of, with_tensors
from llmc.formats.types import BLOCK_TYPES, AnyType, BlockTensor, BlockType, IntegerType, QuantizedTensor
from llmc.rounding import lattice_k
from llmc.rounding.block_factors import BlockFactors, codes_of, stored
from llmc.rounding.scales import Factors, Scales

# The most float16 numbers between weight / level and d, by the type of the stored values. A stored value is wrong by at most
# 2^-8, 2^-11 or 2^-24 of itself. Neighbours in float16 are at least 2^-11 of themselves apart. One more for the division.
REACH = {torch.bfloat16: 9, torch.float16: 2, torch.float32: 1}
LEAST_POWER = 2.0**-126  # the factor of blocks of zeros, where it must be a power of two
CHUNK = 1 << 21  # weights times candidates at once, to bound memory
ROWS, SAMPLE = 64, 8  # rows of a matrix, and blocks of them, that are looked at before it is searched
LIKELY = 0.5  # share of these blocks from which on it is searched
# Share of all blocks from which on a matrix counts as one of this type. The blocks that lie on it are held while GPTQ rounds
# the others. Random matrices, 1 % and 10 % of the blocks off Q4_0: the error is 1.3 times the one when every code may move,
# and 0.7 times that of rounding to nearest. Held codes are those that were trained, so they are worth this.
LEAST = 0.9


@dataclass
class Found:
    """A matrix [out, in] as codes of a type. tensor: of all blocks; the codes of blocks that do not lie on it mean nothing.
    lies: bool [out, in / block]."""

    tensor: QuantizedTensor | BlockTensor
    lies: torch.Tensor

    @property
    def whole(self) -> bool:
        return bool(self.lies.all())

    @property
    def weights(self) -> torch.Tensor:
        """bool [out, in]: the weights whose blocks lie on the type."""
        return _wide(self.lies, self.tensor.shape[1])

    def over(self, other: QuantizedTensor | BlockTensor) -> QuantizedTensor | BlockTensor:
        """`other`, a tensor of the same type, with the blocks that lie on the type in place of its own."""
        mine = tensors_of(self.tensor)
        return with_tensors(other, {n: torch.where(_wide(self.lies, t.shape[1]), mine[n], t)
                                    for n, t in tensors_of(other).items()})

    @classmethod
    def none_of(cls, shape: tuple[int, ...], qtype: AnyType, device: torch.device) -> Found:
        """A matrix of which no block lies on the type."""
        levels = as_blocks(qtype)
        assert levels is not None
        rows, blocks = shape[0], shape[1] // levels.block
        nothing = _nothing(levels, rows * blocks, device)
        return cls(_joined([nothing], qtype, rows), torch.zeros(rows, blocks, dtype=torch.bool, device=device))


def stacked(found: Sequence[Found]) -> Found:
    """Matrices of one type as one matrix, [sum of out, in]."""
    parts = [tensors_of(f.tensor) for f in found]
    joined = {n: torch.cat([p[n] for p in parts]) for n in parts[0]}
    return Found(with_tensors(found[0].tensor, joined), torch.cat([f.lies for f in found]))


class Held:
    """The blocks of a `Found` that lie on its type, as GPTQ takes them: it gives their codes whatever the target is.

    All are [in, out], the transpose of a weight. weights: true where the codes and values (float32) are given.
    """

    def __init__(self, found: Found) -> None:
        t = found.tensor
        self.weights, self.values = found.weights.t(), t.dequantize().t()
        self.codes, self.blocks = t.codes.t().to(torch.float32), found.lies.t()
        if isinstance(t, QuantizedTensor):
            scale = t.scales.t().to(torch.float32)
            self.factors: Factors = Scales(t.type, scale, torch.full_like(scale, t.type.zero))
        else:
            d, *others = (None if x is None else x.t().to(torch.float32) for x in (t.d, t.m, t.scales, t.mins))
            assert d is not None
            self.factors = BlockFactors(t.type, d, *others)

    def over(self, factors: Factors) -> Factors:
        """`factors` with those of the held blocks in place of its own."""
        return factors.where(self.blocks, self.factors)


def _wide(lies: torch.Tensor, columns: int) -> torch.Tensor:
    """bool [out, blocks] -> [out, columns]: of groups or weights."""
    return lies.repeat_interleave(columns // lies.shape[1], 1)


def as_blocks(qtype: AnyType) -> BlockType | None:
    """The levels of a type that can be found again, as a block type; None for the other types: those with zero points, and
    with integer scales of few or uneven levels."""
    if isinstance(qtype, BlockType):
        return qtype if qtype.scale_range is None or lattice_k.found_again(qtype) else None
    levels = tuple(range(-qtype.zero, qtype.zero))
    return BlockType(qtype.name, qtype.group_size, qtype.group_size, levels) if qtype.symmetric else None


TYPES = tuple(sorted(filter(as_blocks, BLOCK_TYPES.values()), key=lambda t: t.bits_per_weight))


def precision(w: torch.Tensor) -> torch.dtype:
    """The coarsest type that holds every value of w: the one in which they were stored, whatever w is."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(w.to(dtype).to(w.dtype), w):
            return dtype
    return torch.float32


def find(w: torch.Tensor, qtype: AnyType) -> Found | None:
    """Codes and factors of w float32 [out, in] on a type. None if the type cannot be found again, if its blocks do not divide
    the rows, or if too few blocks lie on it (LEAST)."""
    levels = as_blocks(qtype)
    if levels is None or w.shape[1] % levels.block or share(w, levels) < LIKELY:
        return None
    dtype, step = precision(w), max(1, CHUNK // w.shape[1])
    parts = [_blocks(part.reshape(-1, levels.block), levels, dtype) for part in w.split(step)]
    lies = torch.cat([p[1] for p in parts])
    if float(lies.double().mean()) < LEAST:
        return None
    return Found(_joined([p[0] for p in parts], qtype, w.shape[0]), lies.view(w.shape[0], -1))


def _joined(parts: Sequence[BlockTensor], qtype: AnyType, rows: int) -> QuantizedTensor | BlockTensor:
    """Blocks, a row for each, as a matrix of `rows` rows."""
    found = [tensors_of(p) for p in parts]
    tensors = {n: torch.cat([f[n] for f in found]).view(rows, -1) for n in found[0]}
    if isinstance(qtype, IntegerType):
        return QuantizedTensor(qtype, tensors["codes"], tensors["d"])
    return BlockTensor(qtype, **tensors)


def _nothing(qtype: BlockType, n: int, device: torch.device) -> BlockTensor:
    """n blocks of zeros, a row for each."""
    def zeros(columns: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(n, columns, dtype=dtype, device=device)

    code = min(range(len(qtype.levels)), key=lambda i: abs(qtype.levels[i]))
    d = torch.full((n, 1), LEAST_POWER, device=device) if qtype.exponent else zeros(1, torch.float16)
    return BlockTensor(qtype, torch.full((n, qtype.block), code, dtype=torch.uint8, device=device), d,
                       zeros(1, torch.float16) if qtype.has_min else None,
                       zeros(qtype.groups, torch.int16) if qtype.scale_range else None,
                       zeros(qtype.groups, torch.int16) if qtype.min_range else None)


def share(w: torch.Tensor, qtype: BlockType) -> float:
    """The share of a few blocks of w that lie on a type. Blocks of zeros, which lie on every type, are left out. If the first
    two do not lie on it, the others are not tried."""
    rows = w[torch.linspace(0, len(w) - 1, min(ROWS, len(w))).long()]
    blocks = rows.reshape(-1, qtype.block)
    blocks = blocks[blocks.any(1)]
    if len(blocks) == 0:
        return 1.0
    some = blocks[torch.linspace(0, len(blocks) - 1, min(SAMPLE, len(blocks))).long()]
    dtype = precision(rows)
    if not bool(_blocks(some[:2], qtype, dtype)[1].any()):
        return 0.0
    return float(_blocks(some, qtype, dtype)[1].double().mean())


def type_of(w: torch.Tensor) -> BlockType | None:
    """The type on which most blocks of w float32 [out, in] lie, the smallest of equals; None if no type has LIKELY of
    a few of them."""
    if not bool(w.any()):
        return None
    shares = {t.name: share(w, t) for t in TYPES if w.shape[1] % t.block == 0}
    best = max(shares, key=shares.__getitem__, default=None)
    return BLOCK_TYPES[best] if best is not None and shares[best] >= LIKELY else None


def _blocks(v: torch.Tensor, qtype: BlockType, dtype: torch.dtype) -> tuple[BlockTensor, torch.Tensor]:
    """Blocks v float32 [n, block] -> (codes and factors, a row for each block; whether it lies on the type, bool [n])."""
    if qtype.scale_range is not None:
        return lattice_k.find(v, qtype, dtype)
    levels = torch.tensor(qtype.levels, dtype=torch.float32, device=v.device)
    made = _nothing(qtype, len(v), v.device)
    lies = ~v.any(1)
    left, tried, candidates = (~lies).nonzero()[:, 0], 0, _candidates(qtype, dtype).to(v.device)
    while len(left) and tried < len(candidates):
        x = v[left]
        some = candidates[tried : tried + max(1, CHUNK // x.numel())]  # many candidates at once for the last few blocks
        tried += len(some)
        level, step, low_step = some.t()[..., None]  # [candidates, 1]
        low = _moved(x.amin(1), low_step) if qtype.has_min else torch.zeros_like(x[None, :, 0])
        # with a minimum the largest weight has the highest code of its block, else the weight farthest from zero an outer one
        end = x.amax(1) if qtype.has_min else x.gather(1, x.abs().argmax(1, keepdim=True))[:, 0]
        exact = (end - low) / (level * (end - low).sign())
        scale = stored(exact, qtype) if qtype.exponent else _moved(exact, step)
        found = codes_of(x, scale[..., None], low[..., None], qtype)  # [candidates, n, block]
        again = (levels[found.long()] * scale[..., None] + low[..., None]).to(dtype).to(torch.float32)
        hits = (again == x).all(2)
        at, first = hits.any(0).nonzero()[:, 0], hits.to(torch.uint8).argmax(0)
        first = first[at]
        made.codes[left[at]] = found[first, at].to(torch.uint8)
        made.d[left[at], 0], lies[left[at]] = scale[first, at].to(made.d.dtype), True
        if made.m is not None:
            made.m[left[at], 0] = low.expand(scale.shape)[first, at].to(torch.float16)
        left = left[~hits.any(0)]
    return made, lies


@lru_cache
def _candidates(qtype: BlockType, dtype: torch.dtype) -> torch.Tensor:
    """int64 [candidates, 3], the likeliest first: the level of the outermost weight, times the sign of d; the float16 numbers
    from its quotient to d, and from the smallest weight to m."""
    reach = 0 if qtype.exponent else REACH[dtype]
    steps = sorted(range(-reach, reach + 1), key=abs)
    sizes = sorted({abs(x) for x in qtype.levels} - {0}, reverse=True)
    signs = (1,) if qtype.has_min or qtype.exponent else (1, -1)  # of two ways to write a block the one with d > 0
    found = [(sign * size, step, low_step) for size in sizes for sign in signs
             for low_step in (steps if qtype.has_min else (0,)) for step in steps]
    return torch.tensor(found)


def _moved(x: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The float16 number `steps` numbers farther from zero than the one nearest to x, as float32; 0 if there is none."""
    found = (x.to(torch.float16).view(torch.int16) + steps).to(torch.int16).view(torch.float16).to(torch.float32)
    return torch.where(torch.isfinite(found) & (found.sign() == x.sign()), found, 0.0)
