"""The memory that a command needs, planned before it starts: for each of its steps a sum of terms. The largest step counts.

Memory is what the system reports for the process (its resident set). Pages of a mapped file belong to it while they are
mapped. The system drops pages that are read only once if memory is short, so they do not decide whether a command fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmc.machine import check_memory

PROCESS = "Python and its libraries"
# Bytes of a process that has run a model of a few megabytes, measured on Linux: with torch and transformers, without them,
# and what llama.cpp and ONNX Runtime add.
TORCH, WITHOUT_TORCH, LLAMA_CPP, ONNX_RUNTIME = 490_000_000, 120_000_000, 30_000_000, 150_000_000


@dataclass(frozen=True)
class Step:
    """A step of a command. terms: {what: bytes}.  once: bytes of mapped files that the step reads only once."""

    name: str
    terms: dict[str, int]
    once: int = 0

    @property
    def peak(self) -> int:
        """Bytes of the process in this step, pages of mapped files included."""
        return self.held + self.once

    @property
    def held(self) -> int:
        """Bytes that the system cannot drop."""
        return sum(self.terms.values())

    def needed(self) -> int:
        """Bytes that must be free before the step: the process is there already."""
        return self.held - self.terms.get(PROCESS, 0)


@dataclass(frozen=True)
class Memory:
    """The steps of a command."""

    steps: Sequence[Step] = field(default_factory=tuple)

    @property
    def largest(self) -> Step:
        return max(self.steps, key=lambda s: s.peak)

    def plan(self) -> dict[str, Any]:
        """The entries of a plan: 'memory_bytes', the peak; 'memory', its step and terms."""
        step = self.largest
        terms = {**step.terms, **({"files that are read once": step.once} if step.once else {})}
        return {"memory_bytes": step.peak, "memory": {"step": step.name, **terms}}

    def check(self, what: str, instead: str = "") -> None:
        """Raise UserError if the memory that is free does not hold every step. what: the command's work.  instead: an
        alternative, for the hint."""
        step = max(self.steps, key=lambda s: s.needed())
        check_memory(step.needed(), f"{what} ({step.name})", instead)


def described(plan: dict[str, Any]) -> str:
    """The largest terms of a plan in words: 'at most about 2.1 GB of memory (training: weights 1.2 GB, optimizer 600 MB)'."""
    from llmc.console import size

    terms = sorted(((k, v) for k, v in plan["memory"].items() if k != "step"), key=lambda kv: -kv[1])
    parts = ", ".join(f"{name} {size(n)}" for name, n in terms[:3])
    return f"at most about {size(plan['memory_bytes'])} of memory ({plan['memory']['step']}: {parts})"
