"""The choice of codes of types with a codebook: 8 columns take one choice together.

The error of 8 columns is  (q - x) M (q - x)^T  with the metric M [8, 8] of the caller, in units of the group's scale. x is
the target and q one of the runs of levels that the codebook has. Two searches:

* `nearest`: M is diagonal. All entries are tried, in one matrix product: with the signs of x, the error is linear in the
  entries and their squares. Where the number of minus signs must be even, the sign is turned where this costs least.
* `choose`: any M. With fixed signs the error is linear in the entries and their products, so all entries are tried in one
  product again. Then signs are turned (two of them, where their number must be even) if that lowers the error, and in turns.
  It starts from the signs of x and, where there is one, from the present choice, so that the error never rises.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache

import torch

from llmc.formats import codebooks
from llmc.formats.types import BlockType

STEP = 8  # columns of one choice
CHUNK = 1 << 20  # scores of entries at once: bounds memory, and stays in the cache
TURNS = 2  # of signs and entries
Find = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [steps, rows, STEP], weights) -> entries in the shape of x


class Entries:
    """The entries of a type as levels: magnitudes, or with a shift 8 * (-1, 0, 1). values: float32 [entries, size]."""

    def __init__(self, qtype: BlockType, device: torch.device) -> None:
        c, digits = codebooks.book(qtype), torch.from_numpy(codebooks.table(qtype).digits).long()
        self.size, self.signs, self.shared = c.size, c.signs, c.shared
        levels = torch.tensor(qtype.levels, dtype=torch.float32)
        positive = levels[len(levels) // 2 :] if c.signs else torch.tensor([-8.0, 0.0, 8.0])
        self.values = positive[digits].to(device)
        self.first, self.second = torch.triu_indices(self.size, self.size, 1, device=device)
        products = 2 * self.values[:, self.first] * self.values[:, self.second]
        self.squares, self.linear = self.values.t().square().contiguous(), -2 * self.values.t().contiguous()
        self.table = torch.cat([products.t(), self.linear]).contiguous()  # [pairs + size, entries]
        self.pairs = torch.triu_indices(STEP, STEP, 1, device=device)
        self._codes = torch.zeros(int(2 * levels[-1]) + 1, device=device)
        self._codes[(levels - levels[0]).long()] = torch.arange(len(levels), dtype=torch.float32, device=device)
        self._lowest = int(levels[0])
        self._any = self.values[0].repeat(STEP // self.size) + (0 if c.signs else 1)  # entry 0, for blocks of zeros

    @cached_property
    def cells(self) -> Cells:
        return Cells(self)

    def codes(self, levels: torch.Tensor) -> torch.Tensor:
        """The codes (as floats) of levels."""
        return torch.take(self._codes, (levels - self._lowest).long())

    def rounded(self, levels: torch.Tensor) -> torch.Tensor:
        """Levels again, from values over their scale. Where the scale is 0, so are these, and they become some entry."""
        found = levels.round()
        return torch.where((found == 0).any(1, keepdim=True), self._any, found)

    def shift(self, levels: torch.Tensor) -> torch.Tensor:
        """1 or -1: the shift of levels."""
        return levels - 8 * (levels / 8).round()

    def nearest(self, w: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor,
                shift: torch.Tensor | None = None, roughly: bool = False) -> torch.Tensor:
        """The levels nearest to w [steps, STEP, rows], in its shape.

        scale: [steps, rows].  weights: of the columns' errors [steps, STEP].  shift: [steps, rows], where it is given.
        roughly: by a table of cells, without the weights (`Cells`)."""
        find = self._entries_of if not roughly else self.cells.entries_of
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        x = (w * inverse[:, None]).transpose(1, 2)  # [steps, rows, STEP]
        if self.signs:
            return self._nearest_signed(x, weights, find).transpose(1, 2)
        if shift is not None:
            return self._nearest_shifted(x, weights, shift[..., None], find)[0].transpose(1, 2)
        down, up = (self._nearest_shifted(x, weights, torch.tensor(by, device=w.device), find) for by in (-1.0, 1.0))
        # columns that are shifted alike are whole steps that follow each other
        lower = down[1] < up[1] if self.shared == STEP else self._together(down[1]) < self._together(up[1])
        return torch.where(lower[..., None], down[0], up[0]).transpose(1, 2)

    def _together(self, cost: torch.Tensor) -> torch.Tensor:
        """The cost [steps, rows] of all steps that are shifted alike."""
        alike = self.shared // STEP
        return cost.view(-1, alike, cost.shape[1]).sum(1).repeat_interleave(alike, 0)

    def _nearest_signed(self, x: torch.Tensor, weights: torch.Tensor, find: Find) -> torch.Tensor:
        sign = torch.where(x < 0, -1.0, 1.0)
        if self.signs == 7:
            odd = sign.prod(-1, keepdim=True) < 0
            cheapest = (x.abs() * weights[:, None]).argmin(-1, keepdim=True)
            sign = torch.where(odd, sign.scatter(-1, cheapest, -sign.gather(-1, cheapest)), sign)
        return find(x * sign, weights).mul_(sign)

    def _nearest_shifted(self, x: torch.Tensor, weights: torch.Tensor, by: torch.Tensor,
                         find: Find) -> tuple[torch.Tensor, torch.Tensor]:
        """(levels, their cost [steps, rows]) with a given shift."""
        found = find(x - by, weights).add_(by)
        return found, ((found - x).square() * weights[:, None]).sum(-1)

    def _entries_of(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The entries nearest to x [steps, rows, STEP], in its shape."""
        steps, rows, _ = x.shape
        found = torch.empty_like(x)
        per = max(1, CHUNK // len(self.values))
        for part in range(0, STEP, self.size):
            columns = slice(part, part + self.size)
            squares = weights[:, columns] @ self.squares  # [steps, entries]
            pulled = x[..., columns] * weights[:, None, columns]
            for start in range(0, steps, some := max(1, per // rows)):
                here = slice(start, start + some)
                for row in range(0, rows, per):
                    there = slice(row, row + per)
                    scores = torch.matmul(pulled[here, there], self.linear).add_(squares[here, None])
                    found[here, there, columns] = self.values[scores.argmin(-1)]
        return found

    def choose(self, x: torch.Tensor, metric: torch.Tensor, present: torch.Tensor | None = None,
               shift: torch.Tensor | None = None) -> torch.Tensor:
        """The best levels for the targets x [rows, STEP] under one metric [STEP, STEP], in the shape of x.

        present: the levels so far; the error does not rise.  shift: [rows], where it is given."""
        rows = max(1, CHUNK // len(self.values))
        if len(x) > rows:
            parts = [None if t is None else t.split(rows) for t in (x, present, shift)]
            return torch.cat([self.choose(xs, metric, None if parts[1] is None else parts[1][i],
                                          None if parts[2] is None else parts[2][i]) for i, xs in enumerate(x.split(rows))])
        if present is not None and self.size < STEP:  # a second start gains nothing here, and 8 % with entries of 8 columns
            return self._improved(x, metric, present)
        found = self._signed(x, metric) if self.signs else self._shifted(x, metric, shift)
        if present is None:
            return found
        other = self._improved(x, metric, present) if self.signs else present
        return torch.where((cost(found - x, metric) < cost(other - x, metric))[:, None], found, other)

    def _shifted(self, x: torch.Tensor, metric: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        squares = ((self.values @ metric) * self.values).sum(1)
        found = []
        for by in (x.new_tensor(-1.0), x.new_tensor(1.0)) if shift is None else (shift[:, None],):
            scores = torch.addmm(squares, (x - by) @ metric, self.linear)
            found.append(self.values[scores.argmin(1)] + by)
        if len(found) == 1:
            return found[0]
        lower = cost(found[0] - x, metric) < cost(found[1] - x, metric)
        return torch.where(lower[:, None], found[0], found[1])

    def _signed(self, x: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        """From the signs of x, with no thought of their number; then it is mended where it costs least."""
        return self._improved(x, metric, self._with_signs(x, metric, torch.where(x < 0, -1.0, 1.0), x))

    def _improved(self, x: torch.Tensor, metric: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        for turn in range(TURNS):
            turned = self._turned(q, x, metric)
            sign = torch.where(turned < 0, -1.0, 1.0)
            # with two entries in a step, the second was found after the first
            again = (turned != q).any(1) if turn or self.size == STEP else torch.ones_like(q[:, 0], dtype=torch.bool)
            q = turned
            some = again.nonzero()[:, 0]
            if len(some):
                q[some] = self._with_signs(x[some], metric, sign[some], q[some])
        return q

    def _with_signs(self, x: torch.Tensor, metric: torch.Tensor, sign: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """The best entries for given signs, one after the other, with q in the columns of the others."""
        pulled, q = x @ metric, q.clone()
        for part in range(0, STEP, self.size):
            columns = slice(part, part + self.size)
            inside, own = metric[columns, columns], sign[:, columns]
            slope = pulled[:, columns]
            if self.size < STEP:
                slope = slope - q @ metric[:, columns] + q[:, columns] @ inside
            products = own[:, self.first] * own[:, self.second] * inside[self.first, self.second]
            features = torch.cat([products, slope * own], 1)
            scores = torch.addmm(inside.diagonal() @ self.squares, features, self.table)
            q[:, columns] = self.values[scores.argmin(1)] * own
        return q

    def _turned(self, q: torch.Tensor, x: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        """q with the signs turned that lower the error most: of one column, or of two where their number must be even. If it
        is odd, one is turned in any case."""
        one = 4 * q * (q * metric.diagonal() - (q - x) @ metric)  # the change of the error
        least, at = one.min(1)
        if self.signs == 8:
            turn = torch.zeros_like(q).scatter_(1, at[:, None], (least < 0).to(q.dtype)[:, None])
            return torch.where(turn > 0, -q, q)
        first, second = self.pairs
        two = one[:, first] + one[:, second] + 8 * q[:, first] * q[:, second] * metric[first, second]
        least, pair = two.min(1)
        odd, lower = (q < 0).sum(1) % 2 == 1, least < 0
        turn = torch.zeros_like(q).scatter_(1, torch.where(odd, at, first[pair])[:, None], (odd | lower).to(q.dtype)[:, None])
        both = torch.zeros_like(q).scatter_(1, second[pair][:, None], (~odd & lower).to(q.dtype)[:, None])
        return torch.where(turn + both > 0, -q, q)


class Cells:
    """The entry nearest to the middle of each cell of a grid: a fast and rough choice, for the search of scales.

    Each column has 5 or 16 cells of one width, the outer ones open. On random weights the squared error is 12 (IQ3), 20 (IQ2)
    and 40 % (IQ1) higher than with the nearest entry."""

    def __init__(self, book: Entries) -> None:
        levels = book.values.unique()
        apart = float(levels[1] - levels[0])
        if book.signs:
            self.count, self.width, self.low = 2 * len(levels) if book.size < STEP else 5, apart / 2, 0.0
        else:
            self.count, self.width, self.low = 5, apart * 2 / 3, -apart * 5 / 3
        middles = self.low + (torch.arange(self.count, device=levels.device) + 0.5) * self.width
        middles[-1] = max(float(middles[-1]), float(levels[-1]))
        self.size, self.values = book.size, book.values
        self.places = float(self.count) ** torch.arange(book.size, device=levels.device)
        keys = torch.arange(self.count**book.size, device=levels.device)
        self.nearest = torch.empty_like(keys)
        squares = book.values.square().sum(1)
        for some in keys.split(max(1, CHUNK // len(book.values))):
            digits = some[:, None] // self.places.long() % self.count
            self.nearest[some] = torch.addmm(squares, middles[digits], book.linear).argmin(1)

    def entries_of(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `Entries._entries_of`; the weights are not used."""
        found = ((x - self.low) / self.width).clamp_(0, self.count - 0.5).floor_()
        keys = found.reshape(-1, self.size) @ self.places
        return self.values[self.nearest[keys.long()]].view(x.shape)


def cost(delta: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """delta M delta^T of each row."""
    return ((delta @ metric) * delta).sum(1)


@lru_cache
def entries(qtype: BlockType, device: torch.device) -> Entries:
    return Entries(qtype, device)
