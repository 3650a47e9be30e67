"""What estimates and `llmc fit` answer. The result of fit is `Fit` as JSON."""

from __future__ import annotations

from typing import Literal, TypedDict

Name = Literal["decode", "first_token", "kld", "top1", "ram", "size"]
"""A figure that may have a limit, in tokens/s, seconds, nats, share, bytes and bytes."""
Limits = dict[Name, tuple[float, bool]]
"""The limit of a figure, in its unit, and whether it is the most."""
Answer = Literal["no", "unknown", "maybe", "yes"]
"""Whether a limit is kept. maybe: it lies in the figure's interval; unknown: neither measured nor estimated."""


class Bounds(TypedDict):
    """An interval, in the unit of what it is of."""

    low: float
    mid: float
    high: float


class Estimate(TypedDict):
    """What an artifact will do on a device."""

    target: str
    decode: Bounds  # tokens/s after `depth` tokens
    prefill: Bounds | None  # tokens/s of `prompt` tokens; None: no matmul rate is known
    first_token: Bounds | None  # s for `prompt` tokens; None likewise
    ram: int  # bytes at `context`
    memory: Bounds  # its interval
    fits: bool  # in the device's memory
    basis: str  # where the rates come from
    depth: int  # tokens
    prompt: int  # tokens
    context: int  # tokens


class Point(Bounds):
    """An estimate held against a measurement, both in the unit of `measured`."""

    target: str  # or id of a profile
    point: str  # the artifact, or what was published
    what: str  # decode at …, prefill of …, peak memory
    measured: float  # tokens/s; of memory bytes
    error: float  # of mid, relative to what was measured
    inside: bool  # of the interval


class LeftOut(TypedDict):
    """A published decoding estimated from the other points of its profile."""

    point: str  # model and type
    measured: float  # tokens/s
    decode: Bounds  # tokens/s
    error: float  # of mid, relative to what was measured
    inside: bool  # of the interval


class JudgedFigure(TypedDict, total=False):
    """A figure of a candidate: the first five are missing where nothing is known, the last two where it has no limit."""

    low: float
    mid: float
    high: float
    source: str  # measured or estimate
    note: str  # what a reader must know of it
    limit: float
    answer: Answer


class Judged(TypedDict):
    """A candidate on one target."""

    name: str
    fits: Answer  # the worst of its answers
    figures: dict[Name, JudgedFigure]


class FitTarget(TypedDict):
    """All candidates on one target."""

    target: str
    basis: str | None  # where rates come from; None: none were needed
    candidates: list[Judged]
    fits: bool  # a candidate certainly keeps all limits
    advice: list[str]  # what to make; empty where one fits


class Fit(TypedDict):
    """The answer of `llmc fit`."""

    context: int  # tokens
    prompt: int  # tokens
    limits: dict[Name, float]
    targets: list[FitTarget]
    fits: bool  # every target has a candidate
