"""Weights that lie on a K type of GGUF (see lattice.py): value = (d * scale) * level - (dmin * minimum), where scale and
minimum are small integers of a group of 16 or 32 weights, and d and dmin float16 of a block of 256.

Three steps, each on many blocks at once:

1. A line through each group. The levels are evenly spaced, so the largest and the smallest weight are n steps apart, and
   every weight is a whole number of steps from them, within the rounding of the stored values. The largest n that fits is
   taken. Least squares then give step and start of the group far more exactly than one weight does.
2. One d that makes the steps of all groups of a block whole numbers, and one dmin that does so with their starts.
3. The float16 numbers next to d and dmin are tried, and other codes of each group's smallest weight. A block lies on the type
   if it gives every stored value again, exactly.

A block may be missed where step 1 has a choice: a group whose weights are few or all multiples of a larger step. Values in
bfloat16 are too coarse for step 2 and are not searched.
"""

from __future__ import annotations

from itertools import product

import torch

from llmc.formats.quantized import tensors_of
from llmc.formats.types import BlockTensor, BlockType
from llmc.rounding.block_factors import codes_of

DIGITS = {torch.float16: 11, torch.float32: 24}  # significant bits
SMALLEST = {torch.float16: 2.0**-25, torch.float32: 2.0**-150}  # half a step of the subnormal numbers
NEAR = 0.1  # of a scale or minimum to a whole number, at most
CHOICES = 4  # codes that the smallest weight of a group may have
UNLIKELY = 0.03  # the same for each code that the smallest weight of a group is above 0


def found_again(qtype: BlockType) -> bool:
    """Whether weights on a K type can be found again. Fewer levels than 16 leave step 1 too much choice."""
    return qtype.scale_range is not None and qtype.uniform and len(qtype.levels) >= 16


def find(v: torch.Tensor, qtype: BlockType, dtype: torch.dtype) -> tuple[BlockTensor, torch.Tensor]:
    """Blocks v float32 [n, block] -> (codes and factors, a row for each block; whether it lies on the type, bool [n])."""
    groups = v.view(len(v), qtype.groups, qtype.group)
    if dtype not in DIGITS:
        step, middle = torch.zeros(2, *groups.shape[:2], device=v.device)
    else:
        step, middle = (_lines if qtype.has_min else _rays)(groups, qtype, dtype)
    d, scales = _divisor(step, qtype.scale_range or (0, 0))
    m, choices = torch.zeros_like(d), torch.zeros(1, *step.shape, device=v.device)
    if qtype.has_min:
        step = d.to(torch.float16).to(torch.float32)[:, None] * scales  # exact now
        m, choices = _starts(groups.mean(2) - step * middle, step, qtype)
    best = _try(v, qtype, d, m, scales, choices[0])
    lies, left = torch.zeros(len(v), dtype=torch.bool, device=v.device), torch.arange(len(v), device=v.device)
    nearest = sorted(product((0, 1, -1), (0, 1, -1) if qtype.has_min else (0,)), key=lambda x: abs(x[0]) + abs(x[1]))
    for up, down in nearest:
        if len(left) == 0:
            break
        mins = choices[0, left]
        for choice in choices[:, left]:
            tried = _try(v[left], qtype, _next(d[left], up), _next(m[left], down), scales[left], mins)
            same = (tried.dequantize().to(dtype).to(torch.float32) == v[left]).view(len(left), *groups.shape[1:]).all(2)
            for name, part in tensors_of(tried).items():
                getattr(best, name)[left[same.all(1)]] = part[same.all(1)]
            lies[left[same.all(1)]] = True
            mins = torch.where(same, mins, choice)  # for the next turn
        left = (~lies).nonzero()[:, 0]
    return best, lies


def _half_step(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The largest error of rounding to dtype at x."""
    error = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - DIGITS[dtype] - 1)
    return torch.where(x == 0, 0.0, error).clamp(min=SMALLEST[dtype])


def _lines(groups: torch.Tensor, qtype: BlockType, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Step of each group [n, groups] of a type with minimums, and the mean number of steps from its smallest weight; 0 where
    none fits."""
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    error = _half_step(groups, dtype)
    ends = _half_step(low, dtype) + _half_step(high, dtype)
    step, middle = torch.zeros_like(low), torch.zeros_like(low)
    for n in range(len(qtype.levels) - 1, len(qtype.levels) // 2 - 1, -1):
        size = (high - low) / n
        k = torch.where(size > 0, (groups - low) / size, 0.0).round()
        fits = ((groups - low - size * k).abs() <= error + ends * 1.01).all(2, keepdim=True) & (size > 0) & (step == 0)
        mean = k.mean(2, keepdim=True)
        away = k - mean
        slope = (away * groups).sum(2, keepdim=True) / away.square().sum(2, keepdim=True).clamp(min=1e-9)
        step, middle = torch.where(fits, slope, step), torch.where(fits, mean, middle)
    return step[..., 0], middle[..., 0]


def _rays(groups: torch.Tensor, qtype: BlockType, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Step of each group [n, groups] of a type without minimums, with the sign that gives the outermost weight a negative
    level, as quantizers do; 0 where none fits."""
    end = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    error, most = _half_step(groups, dtype), -qtype.levels[0]
    step = torch.zeros_like(end)
    for n in range(most, most // 2, -1):
        size = -end / n
        k = torch.where(size != 0, groups / size, 0.0).round()
        fits = ((groups - size * k).abs() <= error + k.abs() / n * _half_step(end, dtype) * 1.01).all(2, keepdim=True)
        fitted = (k * groups).sum(2, keepdim=True) / k.square().sum(2, keepdim=True).clamp(min=1e-9)
        step = torch.where(fits & (step == 0), fitted, step)
    return step[..., 0], torch.zeros_like(step[..., 0])


def _divisor(step: torch.Tensor, bounds: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """d [n] and whole numbers [n, groups] within bounds, so that d times the numbers is nearest to `step` [n, groups]. The
    largest step has the outermost number that makes the others whole; 0 where no number does. A step whose number is one too
    high gets its negative: its weights have the levels of the other sign."""
    low, high = bounds
    largest = step.gather(1, step.abs().argmax(1, keepdim=True))
    d, numbers = torch.zeros_like(largest), torch.zeros_like(step)
    sizes = [x for size in range(max(-low, high), max(-low, high) // 2, -1) for x in (-size, size) if low <= x <= high]
    for size in sizes:
        tried = largest / size
        whole = torch.where(tried != 0, step / tried, 0.0)
        near = whole.round()
        near = torch.where((near > high) & (low < 0), -near, near).clamp(low, high)
        fits = ((whole.abs() - near.abs()).abs() <= NEAR).all(1, keepdim=True) & (d == 0) & (tried != 0)
        d, numbers = torch.where(fits, tried, d), torch.where(fits, near, numbers)
    return _fitted(step.abs(), numbers.abs(), d[:, 0].abs()) * d[:, 0].sign(), numbers


def _starts(start: torch.Tensor, step: torch.Tensor, qtype: BlockType) -> tuple[torch.Tensor, torch.Tensor]:
    """dmin [n], and minimums [choices, n, groups], the likeliest first. The smallest weight of a group has code 0, or one of
    the next codes: then the minimum is so many steps farther down."""
    assert qtype.min_range is not None
    most = qtype.min_range[1]
    m, mins = torch.zeros_like(start[:, :1]), torch.zeros_like(start)
    codes = torch.arange(len(qtype.levels) // 2, device=start.device)
    every = step[..., None] * codes - start[..., None]  # [n, groups, codes]
    for base in range(2):  # the code of the group with the largest minimum
        largest = every[..., base].amax(1, keepdim=True)
        for size in range(most, most // 2, -1):
            tried = largest / size
            whole = torch.where(tried[..., None] > 0, every / tried[..., None], 0.0)
            near = whole.round()
            off = torch.where((near >= 0) & (near <= most), (whole - near).abs(), torch.inf)
            fit, code = (off + codes * UNLIKELY).min(2, keepdim=True)
            fits = (fit[..., 0] <= NEAR).all(1, keepdim=True) & (m == 0) & (tried > 0)
            taken, values = near.gather(2, code)[..., 0], every.gather(2, code)[..., 0]
            m = torch.where(fits, _fitted(values, taken, tried[:, 0])[:, None], m)
            mins = torch.where(fits, taken, mins)
    others = torch.where(m[..., None] > 0, every[..., :CHOICES] / m[..., None], 0.0).round().clamp(0, most)
    return m[:, 0], torch.cat([mins[None], others.permute(2, 0, 1)])


def _fitted(values: torch.Tensor, numbers: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """The factor [n] by least squares: values [n, groups] = factor * numbers."""
    weight = numbers.square().sum(1)
    return torch.where(weight > 0, (values * numbers).sum(1) / weight.clamp(min=1), otherwise)


def _next(x: torch.Tensor, steps: int) -> torch.Tensor:
    """The float16 number that is `steps` numbers from the one nearest to x [n]."""
    return (x.to(torch.float16).view(torch.int16) + steps).to(torch.int16).view(torch.float16)


def _try(v: torch.Tensor, qtype: BlockType, d: torch.Tensor, m: torch.Tensor, scales: torch.Tensor,
         mins: torch.Tensor) -> BlockTensor:
    """The blocks with these factors, and the codes nearest to v."""
    def half(x: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.isfinite(x), x, 0.0).to(torch.float16)[:, None]

    codes = torch.zeros(v.shape, dtype=torch.uint8, device=v.device)
    t = BlockTensor(qtype, codes, half(d), half(m) if qtype.has_min else None, scales.to(torch.int16),
                    mins.to(torch.int16) if qtype.has_min else None)
    groups = v.view(len(v), qtype.groups, qtype.group)
    t.codes = codes_of(groups, t.group_scales()[..., None], t.group_lows()[..., None], qtype).to(torch.uint8).view(v.shape)
    return t
