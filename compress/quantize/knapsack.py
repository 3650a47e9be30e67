"""Choose one option for each item, with the least sum of losses within a budget of bytes.

This is the multiple-choice knapsack problem. Dynamic programming over bytes solves it exactly (Kellerer, Pferschy, Pisinger,
"Knapsack Problems", 2004, ch. 11).

The size differences of a tensor's options have a large common divisor, so the table of all budgets is small. If it would be
longer than STEPS, the differences are rounded up to a coarser unit. The result still keeps its budget, and it is the best
choice for the rounded sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

STEPS = 1 << 16


@dataclass(frozen=True)
class Option:
    """name: of a type.  nbytes: the item's size in this type.  loss: its part of the sum."""

    name: str
    nbytes: int
    loss: float


class Frontier:
    """The least loss for every budget. items: {name: its options}, at least one option for each item."""

    def __init__(self, items: dict[str, list[Option]]) -> None:
        self.items = {name: useful(options) for name, options in items.items()}
        self.least = sum(options[0].nbytes for options in self.items.values())
        self.most = sum(options[-1].nbytes for options in self.items.values())
        self.unit = max(math.gcd(*(o.nbytes - options[0].nbytes for options in self.items.values() for o in options)),
                        -(-(self.most - self.least) // STEPS), 1)
        extra = [[-(-(o.nbytes - options[0].nbytes) // self.unit) for o in options] for options in self.items.values()]
        self.losses = np.zeros(1 + sum(steps[-1] for steps in extra))  # index: number of units above the smallest size
        self.chosen = np.zeros((len(extra), len(self.losses)), np.uint8)
        for row, (steps, options) in enumerate(zip(extra, self.items.values(), strict=True)):
            best = np.full_like(self.losses, np.inf)
            for index, (step, option) in enumerate(zip(steps, options, strict=True)):
                with_it = np.full_like(best, np.inf)
                with_it[step:] = self.losses[: len(best) - step] + option.loss
                better = with_it < best
                best[better] = with_it[better]
                self.chosen[row, better] = index
            self.losses = best
        self.extra = extra

    def within(self, nbytes: int) -> dict[str, Option] | None:
        """The choice with the least loss of at most `nbytes`; None if every choice is larger."""
        if nbytes < self.least:
            return None
        return self._at(min((nbytes - self.least) // self.unit, len(self.losses) - 1))

    def reaching(self, loss: float) -> dict[str, Option] | None:
        """The smallest choice whose loss is at most `loss`; None if every choice has a larger loss."""
        enough = np.flatnonzero(self.losses <= loss)
        return self._at(int(enough[0])) if len(enough) else None

    def _at(self, units: int) -> dict[str, Option]:
        found = {}
        for row, name in reversed(list(enumerate(self.items))):
            index = int(self.chosen[row, units])
            units -= self.extra[row][index]
            found[name] = self.items[name][index]
        return {name: found[name] for name in self.items}


def useful(options: list[Option]) -> list[Option]:
    """The options that no other option beats in both size and loss, smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept
