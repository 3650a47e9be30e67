"""Types of the results of estimates and of `llmc fit`. `llmc fit --json` prints `Fit`."""

from __future__ import annotations

from typing import Literal, TypedDict

from llmc.evals.report.sections import QualityName

Name = Literal["decode", "first_token", "ram", "size"] | QualityName
"""A metric that may have a limit. The units are, in this order: tokens/s, s, bytes, bytes, three times nats, share."""
Limits = dict[Name, tuple[float, bool]]
"""The limit of each metric, in its unit, and whether it is an upper limit (otherwise it is a lower one)."""
Answer = Literal["no", "unknown", "maybe", "yes"]
"""Whether a limit is met. maybe: the limit lies inside the metric's interval. unknown: neither measured nor estimated."""


class Bounds(TypedDict):
    """An interval, in the unit of its metric."""

    low: float
    mid: float
    high: float


class Estimate(TypedDict):
    """Estimated speed and memory of an artifact on a device."""

    target: str
    decode: Bounds  # tokens/s after `depth` tokens
    prefill: Bounds | None  # tokens/s of `prompt` tokens; None: no matmul rate is known
    first_token: Bounds | None  # s for `prompt` tokens; None: no matmul rate is known
    ram: int  # bytes with `context` tokens in the KV cache; the middle of `memory`
    memory: Bounds  # bytes
    fits: bool  # `ram` is not more than the device's memory
    basis: str  # source of the rates
    depth: int  # tokens
    prompt: int  # tokens
    context: int  # tokens


class Point(Bounds):
    """An estimate and a measurement of the same quantity, both in the unit of `measured`."""

    target: str  # name of a target, or id of a profile
    point: str  # name of the artifact, or model and type of the published measurement
    what: str  # 'decode at 512', 'prefill of 128', 'peak memory' or 'decode, published'
    measured: float  # tokens/s; bytes for memory
    error: float  # mid / measured - 1
    inside: bool  # `measured` lies inside the interval


class LeftOut(TypedDict):
    """A published decode speed and its estimate from the other points of its profile."""

    point: str  # model and type
    measured: float  # tokens/s
    decode: Bounds  # tokens/s
    error: float  # mid / measured - 1
    inside: bool  # `measured` lies inside the interval


class JudgedFigure(TypedDict, total=False):
    """A metric of a candidate. The first five keys are missing if nothing is known, the last two if there is no limit."""

    low: float
    mid: float
    high: float
    source: str  # measured or estimate
    note: str  # how it was measured, and UNSTABLE for an unstable measurement
    limit: float
    answer: Answer


class Judged(TypedDict):
    """A candidate on one target."""

    name: str
    token_bytes: int | None  # of weights that decoding one token reads, not the size of the file; None: unknown
    fits: Answer  # the worst answer of its metrics
    figures: dict[Name, JudgedFigure]


class FitTarget(TypedDict):
    """All candidates on one target."""

    target: str
    basis: str | None  # source of the rates; None: no rates were needed
    candidates: list[Judged]
    fits: bool  # a candidate meets all limits with certainty (yes)
    advice: list[str]  # what to build; empty if a candidate fits


class Fit(TypedDict):
    """The result of `llmc fit`."""

    context: int  # tokens
    prompt: int  # tokens
    limits: dict[Name, float]
    targets: list[FitTarget]
    fits: bool  # every target has a candidate that fits
