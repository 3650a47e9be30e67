"""Channel scalings: per-channel factors that keep a model's output and change the rounding error of its weights.

Channel c of a writer's output is divided by s_c, and the columns of the linears that read it are multiplied by s_c. This
changes the rounding error of the readers. With Q the type's rounding, X the readers' input and H = X X^T it is

    error(s) = tr(dW (H / s s^T) dW^T),   dW = Q(W s) - W s

This equals |Q(W s) X/s - W X|^2. The writer's rounding error does not change: each of its rows has one factor, and the block
scales absorb it.

Sources
-------
* Lin et al., "AWQ: Activation-aware Weight Quantization", 2023 (arXiv:2306.00978), eq. 4 and 5: s = (mean |x|)^alpha, alpha
  searched over a list of values by the readers' output error. Here |x| is the root mean square, from the diagonal of the
  calibration loop's Hessian, and the error is computed in the target type with its own scale search.
* Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019 (arXiv:1906.04721), eq. 11:
  s = sqrt(range of the writer's row / range of the readers' column). Here s^alpha, with alpha searched over the same list.
  The input is unknown, so its second moments are assumed to be those of the writer's rows.
* Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2022
  (arXiv:2211.10438), eq. 4: s = (max |x|)^alpha / (max |w|)^(1 - alpha), with a given alpha. It is for inputs that are
  rounded to 8 bits with one scale per token (8-bit ONNX), where a few large channels would determine the scale.

For the first two methods alpha = 0, which does not change the weights, is always one of the choices.
"""

from __future__ import annotations

import torch
from torch import nn

from llmc.compress.transform.opening import Opening, loaded
from llmc.compress.transform.roles import Place
from llmc.formats.linears import get_weight
from llmc.formats.types import AnyType
from llmc.rounding.search import objective, search_factors

ALPHAS = tuple(i / 10 for i in range(11))
ROWS = 512  # rows of the readers that the search for alpha uses
WIDEST = 2.0**12  # largest ratio of a factor to the geometric mean of all factors, and of the mean to a factor


def activation_factors(second_moments: torch.Tensor, place: Place) -> torch.Tensor:
    """AWQ's s for alpha = 1, from the diagonal of the readers' Hessian [in] -> float64 [channels], geometric mean 1.

    Columns that share a channel (query heads of one group) are averaged. An unused channel (zero norm) gets the smallest
    non-zero norm.
    """
    summed = torch.zeros(place.channels, dtype=torch.float64).index_add_(0, place.columns, second_moments.double().cpu())
    return normalized((summed / torch.bincount(place.columns, minlength=place.channels)).sqrt())


def smoothing_factors(peak: torch.Tensor, layer: nn.Module, place: Place, alpha: float,
                      opened: Opening = loaded) -> torch.Tensor:
    """SmoothQuant's s, eq. 4, from the largest |x| of the readers' columns [in] -> float64 [channels], geometric mean 1. (A
    common factor has no effect, because the scales of tokens and rows absorb it.)"""
    largest = torch.zeros(place.channels, dtype=torch.float64)
    largest.scatter_reduce_(0, place.columns, peak.double().cpu(), "amax")
    return normalized(normalized(largest) ** alpha / normalized(_readers_range(layer, place, opened)) ** (1 - alpha))


def int8_noise(peak: torch.Tensor, layer: nn.Module, place: Place, s: torch.Tensor, opened: Opening = loaded) -> float:
    """A bound of the readers' mean squared output error if inputs x / s are rounded to 8 bits with one scale per token, up to
    a
    constant factor: (max |x / s|)^2 |W s|^2."""
    columns = s[place.columns]
    squares = torch.zeros(len(place.columns), dtype=torch.float64)
    for name in place.readers:
        with opened(layer, name) as reader:
            squares += get_weight(reader).double().cpu().square().sum(0)
    return float((peak.double().cpu() / columns).amax().square() * (squares * columns.square()).sum())


def some_rows(layer: nn.Module, place: Place, opened: Opening = loaded) -> torch.Tensor:
    """Evenly spaced rows of the readers, stacked, float32 [at least ROWS if there are as many, in]."""
    step = max(1, sum(len(get_weight(layer.get_submodule(n))) for n in place.readers) // ROWS)
    rows, first = [], 0
    for name in place.readers:
        with opened(layer, name) as reader:
            weight = get_weight(reader)
            rows.append(weight[first::step].clone())
        first = (first - len(weight)) % step  # the spacing goes on over the edges
    return torch.cat(rows)


def _readers_range(layer: nn.Module, place: Place, opened: Opening = loaded) -> torch.Tensor:
    """float64 [channels]: the largest |w| of the readers' columns."""
    ranges = torch.zeros(place.channels, dtype=torch.float64)
    for name in place.readers:
        with opened(layer, name) as reader:
            columns = get_weight(reader).abs().amax(0).double().cpu()
        ranges = ranges.scatter_reduce(0, place.columns, columns, "amax")
    return ranges


def equalizing_factors(layer: nn.Module, place: Place, offset: float, opened: Opening = loaded) -> torch.Tensor:
    """Nagel's s, eq. 11 -> float64 [channels], geometric mean 1. offset: a norm multiplies by its weight + offset."""
    ranges = _readers_range(layer, place, opened).clamp_min(1e-30)
    return normalized((writer_size(layer, place, offset, "range", opened) / ranges).sqrt())


def writer_size(layer: nn.Module, place: Place, offset: float, of: str, opened: Opening = loaded) -> torch.Tensor:
    """float64 [channels]: the largest magnitude (of='range') or root mean square (of='rms') of the writer's weights for each
    channel."""
    writer = layer.get_submodule(place.writer)
    if place.rows is None:
        assert isinstance(writer.weight, torch.Tensor)
        return (writer.weight.data.double().cpu() + offset).abs()
    with opened(layer, place.writer):
        rows = get_weight(writer).double().cpu()[place.rows]
    return rows.abs().amax(1) if of == "range" else rows.square().mean(1).sqrt()


def normalized(s: torch.Tensor) -> torch.Tensor:
    """s divided by its geometric mean, clamped to 1 / WIDEST … WIDEST. Zeros first become the smallest positive value."""
    positive = s[s > 0]
    if not positive.numel():
        return torch.ones_like(s)
    logs = s.clamp_min(float(positive.min())).log()
    return (logs - logs.mean()).exp().clamp(1 / WIDEST, WIDEST)


def rounding_error(weight: torch.Tensor, hessian: torch.Tensor, s: torch.Tensor, qtype: AnyType) -> float:
    """error(s) of the module's docstring. weight [out, in], hessian [in, in], s [in] (a factor for each column), all
    float32."""
    w = (weight * s).t().contiguous()
    scaled = hessian / s / s[:, None]
    factors = search_factors(w, scaled, None, qtype)
    return float(objective(factors.values(factors.nearest(w)) - w, scaled).double().sum())


def search_alpha(weight: torch.Tensor, hessian: torch.Tensor, s: torch.Tensor,
                 qtype: AnyType) -> tuple[float, dict[float, float]]:
    """Returns (the alpha with the least rounding error of columns scaled by s^alpha, {alpha: its error as a share of the
    output energy}).

    weight: the readers' rows, stacked, float32 [out, in]. Of many rows it uses at least ROWS evenly spaced ones.
    hessian: [in, in].  s: float64 [in].
    """
    weight = weight[:: max(1, weight.shape[0] // ROWS)]
    energy = float(objective(weight.t(), hessian).double().sum()) or 1.0
    errors = {a: rounding_error(weight, hessian, (s**a).float().to(weight.device), qtype) / energy for a in ALPHAS}
    best = min(errors, key=lambda a: (errors[a], a))
    return best, errors


def apply_scaling(layer: nn.Module, place: Place, s: torch.Tensor, offset: float, opened: Opening = loaded) -> None:
    """Divide the writer's channels by s, and multiply the readers' columns by s. s: positive float64 [channels].  opened:
    gives each linear its weights and keeps the changed ones.

    It changes the modules' float32 weights in place, with float64 arithmetic. offset: a norm multiplies by its weight +
    offset.
    """
    writer = layer.get_submodule(place.writer)
    bias = getattr(writer, "bias", None)
    if place.rows is None:
        assert isinstance(writer.weight, torch.Tensor)
        scale = s.to(writer.weight.device)
        writer.weight.data.copy_((writer.weight.data.double() + offset) / scale - offset)
        if bias is not None:
            bias.data.copy_(bias.data.double() / scale)
    else:
        with opened(layer, place.writer):
            weight, rows = get_weight(writer), place.rows.to(get_weight(writer).device)
            scale = s.to(weight.device)
            weight[rows] = (weight[rows].double() / scale[:, None]).to(weight.dtype)
        if bias is not None:
            bias.data[rows] = (bias.data[rows].double() / scale).to(bias.dtype)
    for name in place.readers:
        with opened(layer, name) as reader:
            weight = get_weight(reader)
            weight.copy_(weight.double() * s[place.columns].to(weight.device))
