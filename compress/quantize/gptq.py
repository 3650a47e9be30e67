"""GPTQ: round a weight matrix to a type, column by column, with the least change of the layer's output.

Sources
-------
* Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023
  (arXiv:2210.17323), algorithm 1: the sweep with the Cholesky factor of the inverse Hessian.
* Nagel et al., "Up or Down?", 2020 (arXiv:2004.10568), eq. 13: the layer objective  tr((Q - W) H (Q - W)^T).
* Behdin et al., "QuantEase", 2023 (arXiv:2309.01885), eq. 7: cyclic coordinate descent on the same objective.

Differences from the GPTQ paper
-------------------------------
* The scales of all groups are chosen before the sweep and rounded to fp16, so the sweep uses the stored scales. The search
  minimizes the error that remains when all other groups compensate (see scales.py).
* The activation order is static: columns are visited by falling H_jj and then return to their places, each with the scale of
  its own group. So no g_idx is needed at run time.
* A dead column (H_jj = 0) is rounded to nearest, not set to zero: the deployed model may use an input that the calibration
  text never used.
* The upper Cholesky factor of H^-1 comes from one reversed Cholesky and one triangular inverse.
* The entries of H outside of its diagonal are shrunk by as much as the text leaves them uncertain (compress/shrinkage.py).
* After the sweep, scales (least squares with fixed codes) and codes (coordinate descent with fixed scales) are improved in
  turns. New scales are taken, row by row, where they lower the error. A step of descent cannot raise the error.
* Types with a codebook choose the codes of 8 columns together (steps.py).

Matrices are [in, out] here, the transpose of a linear's weight. The sweep works on one input column at a time, and this
column is then one contiguous row (several times as fast on a CPU).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llmc.compress.quantize import steps
from llmc.compress.shrinkage import restore, shrink
from llmc.formats.types import AnyType, BlockTensor, BlockType, QuantizedTensor
from llmc.rounding.block_factors import BlockFactors
from llmc.rounding.codebook import STEP
from llmc.rounding.lattice import Found, Held
from llmc.rounding.scales import Columns, Factors
from llmc.rounding.search import objective, search_factors

BLOCK = 64  # columns swept before the rest of the matrix is updated
MAX_DAMP = 1.0
# Error of the states after 12 layers of SmolLM2-135M on WikiText-2 valid (128 x 512 calibration tokens): 1.75 % at 0.01,
# 1.61 % at 0.1, 1.48 % at 0.3, 1.46 % at 1 and at 3. GPTQ's own damp was 0.01, 0.1, 0.03, 0.03, 0.03, with little effect.
DRIFT_DAMP = 1.0
REFINEMENTS = 2  # turns of least squares and coordinate descent after the sweep


@dataclass
class GPTQResult:
    """weight: codes and scales; None if no damping made the Hessian invertible.
    error: (q - w) H (q - w)^T of each row.  energy: w H w^T of each row. Both are float32 [out], under the Hessian as it was
    given, without shrinking and damping.  damp: the damping that was used.  dead: number of columns that the calibration text
    never used.  events: sentences."""

    weight: QuantizedTensor | BlockTensor | None
    error: torch.Tensor
    energy: torch.Tensor
    damp: float
    dead: int
    events: list[str] = field(default_factory=list)


def inverse_factor(h: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor | None:
    """Upper triangular U with U^T U = h[order, order]^-1, for a symmetric positive definite h [n, n]; None if h is not
    positive definite.

    Let J reverse rows and columns, and J h J = L L^T. Then R = J L J is upper triangular and h = R R^T, so U = R^-1.
    At most two matrices besides h are in memory at a time.
    """
    n = h.shape[0]
    reverse = torch.arange(n - 1, -1, -1, device=h.device) if order is None else order.flip(0)
    lower, info = torch.linalg.cholesky_ex(h.index_select(0, reverse).index_select(1, reverse))
    if int(info) != 0:
        return None
    upper = lower.flip(0, 1)
    del lower
    eye = torch.eye(n, dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True, out=eye)


def compensate(weight: torch.Tensor, hessian: torch.Tensor, drift: torch.Tensor) -> torch.Tensor | None:
    """The weight [out, in] that compensates the errors of the layers before this one. None if H cannot be factored.

    The input is x here and x' in the unchanged model. Over real-valued W', sum |W x' - W' x|^2 is least at

        W' = W + W D H^-1,   D = sum (x' - x) x^T [in, in],   H = sum x x^T [in, in]

    For a quantized weight Q the sum is larger than this minimum by tr((W' - Q) H (W' - Q)^T). So it is enough to quantize W'
    under H. The objective is that of Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
    2025, arXiv:2504.02692; they use a first-order form of it in the sweep. DRIFT_DAMP times the mean of H's diagonal is added
    to the diagonal, because x and x' - x are weakly correlated: in directions with little energy of x the estimate is noise.
    """
    ridge = hessian.clone()
    ridge.diagonal().add_(DRIFT_DAMP * float(hessian.diagonal().mean()))
    lower, info = torch.linalg.cholesky_ex(ridge)
    del ridge
    return None if int(info) != 0 else weight + torch.cholesky_solve((weight @ drift).t(), lower).t()


@dataclass
class Damped:
    """The factor of a damped Hessian.

    factor: U with U^T U = H^-1 in `order`; None if no damping helped.  order: of the columns, int64 [in]; None for the
    natural order.  damp: the damping that was used.  dead: number of columns that the calibration text never used.
    events: sentences."""

    factor: torch.Tensor | None
    order: torch.Tensor | None
    damp: float
    dead: int
    events: list[str]


def damped(hessian: torch.Tensor, damp: float, by_use: bool = True, step: int = 1) -> Damped:
    """Damp `hessian` [in, in] in place and factor it.

    damp: share of the diagonal's mean that is added to the diagonal. It is raised tenfold until the Hessian can be factored;
    each raise is an event.  by_use: sort the columns by falling H_jj; else in natural order.  step: columns that stay
    together, sorted by the sum of their H_jj.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = diagonal.mean() if not bool(dead.all()) else 1.0
    mean, raised = float(diagonal.mean()), 0.0
    order = None
    if by_use:
        first = torch.argsort(diagonal.view(-1, step).sum(1), descending=True, stable=True) * step
        order = (first[:, None] + torch.arange(step, device=first.device)).flatten()
    factor, events = None, []
    while factor is None and damp <= MAX_DAMP:
        diagonal += mean * (damp - raised)
        raised = damp
        factor = inverse_factor(hessian, order)
        if factor is None:
            events.append(f"the Hessian could not be factored at damp {damp:g}")
            damp *= 10
    return Damped(factor, order, raised, int(dead.sum()), events)


def gptq(weight: torch.Tensor, hessian: torch.Tensor, qtype: AnyType, damp: float = 0.01,
         refinements: int = REFINEMENTS, keep: torch.Tensor | None = None, found: Found | None = None,
         share: float = 0.0) -> GPTQResult:
    """Quantize `weight` float32 [out, in] under `hessian` float32 [in, in], which is shrunk and damped in place and restored
    at the end.

    share: see shrinkage.py.  damp: see `damped`.
    keep: bool [out, in], for types with a code for zero. Weights outside `keep` get this code, the other weights compensate
    the error, and the scales are searched for the weights that stay.
    found: blocks that lie on the type already. They keep their codes and factors; errors of others do not move them.
    """
    by_entries = isinstance(qtype, BlockType) and qtype.codebook is not None
    if by_entries and (keep is not None or found is not None):
        raise ValueError(f"{qtype.name} has no code for zero and no blocks that are found again")
    w = weight.t().contiguous()
    stay = None if keep is None else keep.t().contiguous()
    held = None if found is None else Held(found)
    energy, squares = objective(w, hessian), hessian.diagonal().clone()
    shrink(hessian, share)
    ready = damped(hessian, damp, step=STEP if by_entries else 1)
    factor, order = ready.factor, ready.order
    if factor is None or order is None:
        restore(hessian, share, squares)
        return GPTQResult(None, energy.clone(), energy, ready.damp, ready.dead, ready.events)
    back = torch.argsort(order)
    factors = search_factors(w if stay is None else w * stay, hessian, factor[:, back], qtype)
    if held is not None:
        factors = held.over(factors)
    if isinstance(factors, BlockFactors) and by_entries:
        codes = steps.sweep(w[order], factor, factors, order)[back]
    else:
        codes = sweep(w[order], factor, only(factors.columns(order), stay, order, held))[back]
    del factor, ready.factor
    codes, factors, moved, gradient = refine(w, hessian, codes, factors, refinements, stay, held)
    # the gradient under the given Hessian: take out the damped diagonal, undo the shrinking, put in the given diagonal
    gradient.addcmul_(hessian.diagonal()[:, None], moved, value=-1).div_(1 - share).addcmul_(squares[:, None], moved)
    restore(hessian, share, squares)
    error = (gradient * moved).sum(0).clamp_(min=0)
    return GPTQResult(factors.tensor(codes), error, energy, ready.damp, ready.dead, ready.events)


class Kept:
    """Columns of a pruned weight: the target of a pruned weight is always zero. keep: bool [in, out], false where pruned."""

    def __init__(self, columns: Columns, keep: torch.Tensor) -> None:
        self.columns, self.keep = columns, keep.unbind()

    def round(self, column: int, target: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return self.columns.round(column, target * self.keep[column], code)


class Given:
    """Columns of a weight of which some blocks are held: there, the code is the given one, whatever the target is."""

    def __init__(self, columns: Columns | Kept, held: Held, order: torch.Tensor | None) -> None:
        self.columns = columns
        parts = (held.weights, held.codes, held.values)
        self.weights, self.codes, self.values = (p.unbind() if order is None else p[order].unbind() for p in parts)

    def round(self, column: int, target: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        value = self.columns.round(column, target, code)
        torch.where(self.weights[column], self.codes[column], code, out=code)
        return torch.where(self.weights[column], self.values[column], value)


def only(columns: Columns, keep: torch.Tensor | None, order: torch.Tensor | None = None,
         held: Held | None = None) -> Columns | Kept | Given:
    """Returns `columns`, wrapped so that weights outside `keep` [in, out] are quantized to zero, and held blocks to their
    codes. order: of the columns."""
    kept = columns if keep is None else Kept(columns, keep if order is None else keep[order])
    return kept if held is None else Given(kept, held, order)


def sweep(w: torch.Tensor, factor: torch.Tensor, columns: Columns | Kept | Given) -> torch.Tensor:
    """Algorithm 1 of the GPTQ paper. Returns codes (as floats) [in, out].

    w: [in, out], overwritten.  factor: U with U^T U = H^-1.  columns: round to the type. All are in the order of the sweep.
    """
    n = w.shape[0]
    codes = torch.empty_like(w)
    errors = torch.empty_like(w[:BLOCK])
    scaled = factor / factor.diagonal()[:, None]
    weights, rounded = w.unbind(), codes.unbind()
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        for i, error in zip(range(start, end), errors.unbind(), strict=False):
            torch.sub(columns.round(i, weights[i], rounded[i]), weights[i], out=error)
            w[i + 1 : end].addr_(scaled[i, i + 1 : end], error)
        w[end:].addmm_(scaled[start:end, end:].t(), errors[: end - start])
    return codes


def descend(hessian: torch.Tensor, codes: torch.Tensor, values: torch.Tensor, gradient: torch.Tensor,
            columns: Columns | Kept | Given) -> None:
    """One pass of coordinate descent (QuantEase, eq. 7): one code after another becomes the best one for the present others,
    the nearest to q_j - gradient_j / H_jj.

    Changed in place, all [in, out]: codes, their values q, gradient = H (q - w)^T.
    """
    n = codes.shape[0]
    shrink = (-1 / hessian.diagonal()).tolist()
    held, rounded = values.unbind(), codes.unbind()
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        before, inside = values[start:end].clone(), gradient[start:end].clone()
        for i, slope in zip(range(start, end), inside.unbind(), strict=True):
            value = columns.round(i, torch.add(held[i], slope, alpha=shrink[i]), rounded[i])
            step = value - held[i]
            held[i].copy_(value)
            inside[i - start + 1 :].addr_(hessian[i, i + 1 : end], step)
        gradient.addmm_(hessian[:, start:end], values[start:end] - before)


def refine(w: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, factors: Factors,
           turns: int, keep: torch.Tensor | None = None,
           held: Held | None = None) -> tuple[torch.Tensor, Factors, torch.Tensor, torch.Tensor]:
    """Improve factors and codes in turns. Returns codes, factors, q - w and H (q - w), both [in, out].

    codes [in, out] are changed in place; those outside `keep` stay the code of zero, and held blocks stay as they are. Then
    integer factors are not improved."""
    values = factors.values(codes)
    gradient = hessian @ (values - w)
    error = (gradient * (values - w)).sum(0)
    for _ in range(turns):
        tried = factors.refit(hessian, codes, gradient)
        if held is not None:
            tried = held.over(tried)
        new_values = tried.values(codes)
        new_gradient = hessian @ (new_values - w)
        better = (new_gradient * (new_values - w)).sum(0) < error
        factors = factors.where(better, tried)
        values, gradient = torch.where(better, new_values, values), torch.where(better, new_gradient, gradient)
        if held is None:
            factors = factors.descend(hessian, codes, values, gradient)
        if isinstance(factors, BlockFactors) and factors.type.codebook is not None:
            steps.descend(hessian, codes, values, gradient, factors)
        else:
            descend(hessian, codes, values, gradient, only(factors.columns(), keep, None, held))
        error = (gradient * (values - w)).sum(0)
    return codes, factors, values - w, gradient
