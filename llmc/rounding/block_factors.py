"""The factors of GGUF's block types, always in the precision in which they are stored.

A weight is  s * level + a  with s and a of its group of 16 or 32 columns. In blocks of 32, s and a are fp16. In blocks of 256
each is the product of a small integer of the group and an fp16 factor of the block: s = d * scale, a = -dmin * minimum. So
the search has three steps:

1. Find the best real s and a for each group.
2. Find the d and dmin of each block with the smallest error, with the weights rounded again for each candidate.
3. Move each group's integers by one step up or down.

The error is that of the metric in scales.py, where all other groups compensate. All matrices are [in, out], as in gptq.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from llmc.formats.types import BlockTensor, BlockType
from llmc.rounding.codebook import STEP, entries
from llmc.rounding.levels import levels_of
from llmc.rounding.scales import ROWS, Columns, column_groups, least_squares, metric
from llmc.rounding.scales import stored as as_float16

SHRINKS = 14  # number of candidates: the full range times SMALLEST to 1.1
SMALLEST = {2: 0.5, 3: 0.55, 4: 0.7, 5: 0.8, 6: 0.88, 8: 0.96}  # by bits: fewer levels clip more
TERNARY = 0.2  # SMALLEST for three levels: a block of 256 weights has a largest one that is far from the others
POLISH = 2  # least-squares steps from the best candidate
# for codebooks: candidates of the scale, relative to the one that reaches the largest weight
BOOK_SHRINKS = (0.5, 0.6, 0.7, 0.78, 0.86, 0.93, 1.0, 1.08, 1.18)
BLOCK_STEPS = (0.90, 0.94, 0.97, 1.03, 1.06)  # candidates of d and dmin, relative to the one that uses the full range


@dataclass
class BlockFactors:
    """d, m: float32 [blocks, out], values that the file holds. scales, mins: float32 [groups, out], integers. None: see
    BlockTensor.

    For types with a codebook: weights: float32 [in], by which `nearest` weighs the error of each column.  shift: float32
    [groups, out], 1 or -1, where all columns of a group are shifted alike."""

    type: BlockType
    d: torch.Tensor
    m: torch.Tensor | None
    scales: torch.Tensor | None
    mins: torch.Tensor | None
    weights: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def group_scales(self) -> torch.Tensor:
        """The factors of the levels, [groups, out]."""
        return self.d if self.scales is None else self._wide(self.d) * self.scales * self.type.unit

    def group_lows(self) -> torch.Tensor:
        """The numbers that are added after scaling, [groups, out]."""
        if self.m is None:
            return torch.zeros_like(self.group_scales())
        return self.m if self.mins is None else -(self._wide(self.m) * self.mins)

    def columns(self, order: torch.Tensor | None = None) -> Columns:
        assert self.type.codebook is None, "a codebook's columns are not rounded one by one"
        scale, low = self.group_scales(), self.group_lows()
        group_of = column_groups(scale.shape[0], self.type.group, order, scale.device)
        start = codes_of(torch.zeros_like(scale), scale, low, self.type, rounded=False)
        levels = None if self.type.uniform else levels_of(self.type.levels, scale.dtype, scale.device)
        first = 0 if levels is not None else self.type.levels[0]
        return Columns(scale, low + scale * first, start, group_of, len(self.type.levels) - 1, levels)

    def nearest(self, w: torch.Tensor) -> torch.Tensor:
        if self.type.codebook is not None:
            return self._entries(w)
        grouped = w.view(-1, self.type.group, w.shape[1])
        return codes_of(grouped, self.group_scales()[:, None], self.group_lows()[:, None], self.type).view(w.shape)

    def _entries(self, w: torch.Tensor) -> torch.Tensor:
        book, steps = entries(self.type, w.device), w.shape[0] // STEP
        weights = torch.ones_like(w[:, 0]) if self.weights is None else self.weights
        found = book.nearest(w.view(steps, STEP, -1), self.of_steps(self.group_scales()), weights.view(steps, STEP),
                             None if self.shift is None else self.of_steps(self.shift))
        return book.codes(found).view(w.shape)

    def of_steps(self, factors: torch.Tensor) -> torch.Tensor:
        """[groups, out] -> [in / STEP, out]."""
        return factors.repeat_interleave(self.type.group // STEP, 0)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        grouped = self._levels(codes)[codes.long()].view(-1, self.type.group, codes.shape[1])
        return (grouped * self.group_scales()[:, None] + self.group_lows()[:, None]).view(codes.shape)

    def refit(self, hessian: torch.Tensor, codes: torch.Tensor, gradient: torch.Tensor) -> BlockFactors:
        """Fit d and m of every block by least squares, with fixed integers."""
        steps = least_squares(hessian, self._units(codes), gradient, self.type.block)
        m = None if self.m is None else as_float16(self.m + steps[1])
        return replace(self, d=stored(self.d + steps[0], self.type), m=m)

    def where(self, rows: torch.Tensor, other: BlockFactors) -> BlockFactors:
        def pick(new: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor | None:
            if new is None or old is None:
                return old
            wide = rows if rows.ndim == 1 else rows.repeat_interleave(len(old) // len(rows), 0)
            return torch.where(wide, new, old)

        return replace(self, d=torch.where(rows, other.d, self.d), m=pick(other.m, self.m),
                       scales=pick(other.scales, self.scales), mins=pick(other.mins, self.mins))

    def descend(self, hessian: torch.Tensor, codes: torch.Tensor, values: torch.Tensor,
                gradient: torch.Tensor) -> BlockFactors:
        """Coordinate descent on the integers of the groups.

        If one step of an integer adds u to the group's weights, its best change is -(u g) / (u H_gg u), rounded."""
        if self.scales is None or self.type.scale_range is None:
            return self
        size, levels = self.type.group, self._levels(codes)[codes.long()]
        step = self.type.scale_step
        parts = [(self.scales.clone(), self._wide(self.d) * self.type.unit, self.type.scale_range, step, levels)]
        if self.mins is not None and self.m is not None and self.type.min_range is not None:
            parts.append((self.mins.clone(), -self._wide(self.m), self.type.min_range, 1, torch.ones_like(levels)))
        for group in range(self.scales.shape[0]):
            columns = slice(group * size, (group + 1) * size)
            moved = torch.zeros_like(values[columns])
            for integers, factor, allowed, step, unit in parts:
                u = unit[columns] * factor[group]
                inside = hessian[columns, columns]
                slope = (u * (gradient[columns] + inside @ moved)).sum(0)
                curve = (u * (inside @ u)).sum(0)
                best = on_grid(torch.where(curve > 0, integers[group] - slope / curve, integers[group]), allowed, step)
                moved += u * (best - integers[group])
                integers[group] = best
            values[columns] += moved
            gradient.addmm_(hessian[:, columns], moved)
        return replace(self, scales=parts[0][0], mins=parts[1][0] if len(parts) > 1 else self.mins)

    def tensor(self, codes: torch.Tensor) -> BlockTensor:
        def half(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.t().to(torch.float16).contiguous()

        def integers(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.t().to(torch.int16).contiguous()

        d = self.d.t().contiguous() if self.type.exponent else half(self.d)
        assert d is not None
        return BlockTensor(self.type, codes.t().to(torch.uint8).contiguous(), d, half(self.m), integers(self.scales),
                           integers(self.mins))

    def _units(self, codes: torch.Tensor) -> list[torch.Tensor]:
        """The change of the weights for one step of d, and of m if there is one: [in, out] each."""
        grouped = self._levels(codes)[codes.long()].view(-1, self.type.group, codes.shape[1])
        units = [grouped if self.scales is None else grouped * (self.scales[:, None] * self.type.unit)]
        if self.m is not None:
            units.append(torch.ones_like(grouped) if self.mins is None else -self.mins[:, None].expand_as(grouped))
        return [u.reshape(codes.shape) for u in units]

    def _levels(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.type.levels, dtype=like.dtype, device=like.device)

    def _wide(self, factor: torch.Tensor) -> torch.Tensor:
        """[blocks, out] -> [groups, out]."""
        return factor.repeat_interleave(self.type.groups, 0)


def stored(d: torch.Tensor, qtype: BlockType) -> torch.Tensor:
    """d in the precision in which the type stores it: float16, or the nearest power of two (a factor of 0 is the least)."""
    if not qtype.exponent:
        return as_float16(d)
    mantissa, exponent = torch.frexp(d.abs())  # 0.5 <= mantissa < 1: the middle between two powers is 0.75
    return torch.ldexp(torch.ones_like(d), (exponent - (mantissa < 0.75).int()).clamp(-126, 120))


def on_grid(x: torch.Tensor, allowed: tuple[int, int], step: int) -> torch.Tensor:
    """The nearest allowed integers: lowest, lowest + step, …"""
    if step == 1:
        return x.round().clamp_(*allowed)
    return ((x - allowed[0]) / step).round_().mul_(step).add_(allowed[0]).clamp_(*allowed)


def codes_of(w: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, qtype: BlockType,
             rounded: bool = True) -> torch.Tensor:
    """The codes (as floats) of the values nearest to w; shapes broadcast.

    rounded: if False, a uniform type gives the unrounded position of w among its levels."""
    position = torch.where(scale == 0, 0.0, (w - low) / scale)
    if qtype.uniform:
        position -= qtype.levels[0]
        return position.round_().clamp_(0, len(qtype.levels) - 1) if rounded else position
    levels = levels_of(qtype.levels, w.dtype, w.device)
    return torch.take(levels.codes, levels.entries(position.mul_(2)))


def search_blocks(w: torch.Tensor, hessian: torch.Tensor, factor: torch.Tensor | None, qtype: BlockType) -> BlockFactors:
    """The best factors of every block of w [in, out]. hessian and factor: see scales.search."""
    blocks = metric(w, hessian, factor, qtype.group)
    kind = _Search if qtype.codebook is None else _BookSearch
    parts = [kind(rows.contiguous(), blocks, qtype).run() for rows in w.split(ROWS // 2, dim=1)]

    def join(name: str) -> torch.Tensor | None:
        found = [getattr(p, name) for p in parts]
        return None if found[0] is None else torch.cat(found, 1)

    d = join("d")
    assert d is not None
    return BlockFactors(qtype, d, join("m"), join("scales"), join("mins"), parts[0].weights, join("shift"))


class _Search:
    """Runs `search_blocks` for some rows of the weight: w [in, rows], metric [groups, g, g]."""

    def __init__(self, w: torch.Tensor, blocks: torch.Tensor, qtype: BlockType) -> None:
        self.w, self.metric, self.type = w.view(blocks.shape[0], qtype.group, -1), blocks, qtype
        self.levels = torch.tensor(qtype.levels, dtype=w.dtype, device=w.device)
        self.ones = blocks.sum(2)  # [groups, g]: the metric times a vector of ones

    def run(self) -> BlockFactors:
        scale, low = self._real()
        if self.type.scale_range is None:
            m = as_float16(low) if self.type.has_min else None
            return BlockFactors(self.type, stored(scale, self.type), m, None, None)
        return self._integers(scale, low)

    def _cost(self, scale: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round the weights with scale and low [groups, rows]; return the error [groups, rows], levels [groups, g, rows]."""
        levels = self.levels[codes_of(self.w, scale[:, None], low[:, None], self.type).long()]
        delta = levels * scale[:, None] + low[:, None] - self.w
        return torch.bmm(self.metric, delta).mul_(delta).sum(1), levels

    def _real(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The best real scale and low of every group [groups, rows]."""
        best_scale = torch.zeros_like(self.w[:, 0])
        best_low, best = torch.zeros_like(best_scale), torch.full_like(best_scale, torch.inf)
        for start in self._candidates():
            scale, low = start
            for _ in range(1 + POLISH):
                error, levels = self._cost(scale, low)
                better = error < best
                best = torch.where(better, error, best)
                best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, low, best_low)
                scale, low = self._fit(levels, scale)
                if self.type.exponent:
                    scale = stored(scale, self.type)
        return best_scale, best_low

    def _candidates(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        bits = (len(self.levels) - 1).bit_length()
        shrinks = torch.linspace(TERNARY if len(self.levels) == 3 else SMALLEST[bits], 1.1, SHRINKS).tolist()
        if self.type.exponent:  # the largest weight becomes the largest level, or less
            largest = self.w.abs().amax(1) / float(self.levels[-1])
            for power in (0.5, 1.0, 2.0):
                yield stored(largest * power, self.type), torch.zeros_like(largest)
            return
        if self.type.has_min:
            low, high = self.w.amin(1), self.w.amax(1)
            if self.type.min_range is not None:
                low = low.clamp(max=0)  # minimums of super-blocks only subtract
            for shrink in shrinks:
                yield (high - low).clamp(min=0) * (shrink / float(self.levels[-1])), low * shrink
            return
        extreme = self.w.gather(1, self.w.abs().argmax(1, keepdim=True))[:, 0]
        ends = (self.levels[0], self.levels[-1]) if bits <= 3 or not self.type.uniform else (self.levels[0],)
        for end in ends:  # a negative scale mirrors the type
            for shrink in shrinks:
                yield extreme * (shrink / float(end)), torch.zeros_like(extreme)

    def _fit(self, levels: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best real scale and low for fixed levels."""
        weighted = torch.bmm(self.metric, levels)
        ll, lw = (weighted * levels).sum(1), (weighted * self.w).sum(1)
        if not self.type.has_min:
            return torch.where(ll > 0, lw / ll, scale), torch.zeros_like(scale)
        one, l1 = self.ones[..., None], weighted.sum(1)
        w1, n = (one * self.w).sum(1), self.ones.sum(1)[:, None]
        det = ll * n - l1 * l1
        sound = det > 1e-6 * ll * n
        fitted = torch.where(sound, (lw * n - w1 * l1) / det, scale)
        low = torch.where(sound, (ll * w1 - l1 * lw) / det, (w1 - scale * l1) / n)
        if self.type.min_range is None:
            return fitted, low
        without_low = torch.where(ll > 0, lw / ll, scale)  # if the best low is positive, low is 0
        return torch.where(low > 0, without_low, fitted).clamp(min=0), low.clamp(max=0)

    def _integers(self, scale: torch.Tensor, low: torch.Tensor) -> BlockFactors:
        """The best factors whose scale and low are integer multiples of fp16 factors of the block."""
        qtype, rows = self.type, scale.shape[1]
        assert qtype.scale_range is not None
        by_block = scale.view(-1, qtype.groups, rows)
        # a signed range has one more integer below zero: the largest scale gets that one
        end = qtype.scale_range[0] if qtype.scale_range[0] < 0 else qtype.scale_range[1]
        full = by_block.gather(1, by_block.abs().argmax(1, keepdim=True))[:, 0] / (end * qtype.unit)
        full_low = (-low).view(-1, qtype.groups, rows).amax(1) / qtype.min_range[1] if qtype.min_range else None
        found = self._rounded(as_float16(full), None if full_low is None else as_float16(full_low), scale, low)
        error = self._of_blocks(found)
        for part in ("d", "m")[: 1 + qtype.has_min]:
            middle_d, middle_m = found.d, found.m
            for step in BLOCK_STEPS:
                d = as_float16(middle_d * step) if part == "d" else middle_d
                m = as_float16(middle_m * step) if part == "m" and middle_m is not None else middle_m
                tried = self._rounded(d, m, scale, low)
                new = self._of_blocks(tried)
                better = new < error
                error = torch.where(better, new, error)
                found = self._pick(better, tried, found)
        return self._neighbours(found)

    def _rounded(self, d: torch.Tensor, m: torch.Tensor | None, scale: torch.Tensor, low: torch.Tensor) -> BlockFactors:
        """The integers nearest to scale and low for given d and m."""
        def nearest(value: torch.Tensor, factor: torch.Tensor, bounds: tuple[int, int], step: int = 1) -> torch.Tensor:
            wide = factor.repeat_interleave(self.type.groups, 0)
            return on_grid(torch.where(wide == 0, 0.0, value / wide), bounds, step)

        assert self.type.scale_range is not None
        mins = None if m is None or self.type.min_range is None else nearest(-low, m, self.type.min_range)
        return BlockFactors(self.type, d, m, nearest(scale / self.type.unit, d, self.type.scale_range, self.type.scale_step),
                            mins)

    def _of_groups(self, f: BlockFactors) -> torch.Tensor:
        return self._cost(f.group_scales(), f.group_lows())[0]

    def _of_blocks(self, f: BlockFactors) -> torch.Tensor:
        """The error of each block, [blocks, rows]."""
        error = self._of_groups(f)
        return error.view(-1, self.type.groups, error.shape[1]).sum(1)

    def _pick(self, blocks: torch.Tensor, new: BlockFactors, old: BlockFactors) -> BlockFactors:
        """The factors of `new` where `blocks` [blocks, rows] is true, else those of `old`."""
        groups = blocks.repeat_interleave(self.type.groups, 0)

        def choose(where: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
            return b if a is None or b is None else torch.where(where, a, b)

        return BlockFactors(self.type, torch.where(blocks, new.d, old.d), choose(blocks, new.m, old.m),
                            choose(groups, new.scales, old.scales), choose(groups, new.mins, old.mins))

    def _neighbours(self, f: BlockFactors) -> BlockFactors:
        """Change each group's integers by at most one, if that lowers the error."""
        assert f.scales is not None
        assert self.type.scale_range is not None
        best_scales, best_mins, error = f.scales, f.mins, self._of_groups(f)
        for up in (-1, 0, 1):
            for down in (-1, 0, 1) if f.mins is not None else (0,):
                scales = (f.scales + up * self.type.scale_step).clamp(*self.type.scale_range)
                mins = None if f.mins is None or self.type.min_range is None else (f.mins + down).clamp(*self.type.min_range)
                tried = replace(f, scales=scales, mins=mins)
                new = self._of_groups(tried)
                better = new < error
                error = torch.where(better, new, error)
                best_scales = torch.where(better, scales, best_scales)
                best_mins = None if mins is None or best_mins is None else torch.where(better, mins, best_mins)
        return replace(f, scales=best_scales, mins=best_mins)


class _BookSearch(_Search):
    """`_Search` for a type with a codebook: the levels of 8 columns are chosen together. Its scales are positive."""

    def __init__(self, w: torch.Tensor, blocks: torch.Tensor, qtype: BlockType) -> None:
        super().__init__(w, blocks, qtype)
        self.book = entries(qtype, w.device)
        self.weights = blocks.diagonal(dim1=1, dim2=2).flatten()
        self.steps, self.roughly = qtype.group // STEP, True

    def _neighbours(self, f: BlockFactors) -> BlockFactors:
        self.roughly = False  # from here on
        return super()._neighbours(f)

    def run(self) -> BlockFactors:
        found = self._integers(*self._real())
        if self.type.codebook is not None and self.type.codebook.shared == self.type.group:
            levels = self._cost(found.group_scales(), found.group_lows())[1]
            found = replace(found, shift=self.book.shift(levels[:, 0]))
        return replace(found, weights=self.weights)

    def _cost(self, scale: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        by_step = self.w.view(-1, STEP, self.w.shape[2])
        by_columns = self.weights.view(-1, STEP)
        levels = self.book.nearest(by_step, scale.repeat_interleave(self.steps, 0), by_columns, None, self.roughly)
        levels = levels.reshape(self.w.shape)
        delta = levels * scale[:, None] - self.w
        return torch.bmm(self.metric, delta).mul_(delta).sum(1), levels

    def _real(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The best scale of every group: of some candidates, then by least squares from the best of these."""
        largest = self.w.abs().amax(1) / float(self.levels[-1])
        best_scale, best = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
        best_levels = torch.zeros_like(self.w)

        def consider(scale: torch.Tensor) -> None:
            nonlocal best_scale, best, best_levels
            error, levels = self._cost(scale, scale)
            better = error < best
            best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
            best_levels = torch.where(better[:, None], levels, best_levels)

        for shrink in BOOK_SHRINKS:
            consider(largest * shrink)
        for _ in range(POLISH):
            consider(self._fit(best_levels, best_scale)[0].clamp(min=0))
        return best_scale, torch.zeros_like(best_scale)
