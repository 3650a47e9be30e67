"""What compare and ship answer: `Comparison` and `Shipping`, as JSON."""

from __future__ import annotations

from typing import Literal, TypedDict

from llmc.evals.fit.schema import Bounds
from llmc.evals.report.schema import Kld, Report, Stat, TaskRise, TokenStat

# --------------------------------------------------------------------------------------------------------------- compare


class TextRise(TypedDict):
    """One text, paired by token."""

    text: str  # name
    perplexity_ratio: TokenStat  # to the baseline's
    kld: TokenStat | None  # less the baseline's, nats; None: not measured of both
    top1: TokenStat | None  # less the baseline's, share; None: not measured of both


class SpeedChange(TypedDict):
    """One target, over the baseline's figures."""

    decode_speedup: Stat  # ratio
    first_token_ratio: Stat
    peak_rss_ratio: float


class Differences(TypedDict):
    """An artifact against the baseline. None: not measured of both."""

    size_ratio: float  # of the files
    texts: list[TextRise] | None
    tasks: dict[str, TaskRise] | None  # by name
    speeds: dict[str, SpeedChange] | None  # by target, without emulated ones


class Compared(TypedDict):
    """One artifact."""

    name: str  # unlike all others
    report: Report
    differences: Differences | None  # None: it is the baseline


class FirstToken(Bounds):
    """Seconds to the first token."""

    tokens: int  # of the prompt


class Memory(TypedDict):
    """Bytes at the peak."""

    weights: int
    kv: int
    rest: int


class Cell(TypedDict):
    """An artifact on a target. Bounds of what was measured: the median, less and plus half the interquartile range."""

    artifact: str
    target: str
    source: Literal["measured", "emulated", "estimate"]
    unstable: bool
    decode: Bounds  # tokens/s
    depth: int  # tokens in the KV cache when decoding begins
    kld: Kld | None  # on the first text; None: not measured
    texts: list[Kld]  # on each text
    first_token: list[FirstToken]  # by prompt
    memory: Memory
    basis: str  # the CPU; of an estimate, where its rates come from
    front: bool  # no other of the same source and target is as fast and as near the base


class GateResult(TypedDict):
    """A gate of compare, of one candidate on one text or target."""

    gate: str  # the option
    artifact: str
    text: str | None  # or the target
    limit: float  # share, nats or factor
    value: float  # likewise
    passed: bool


class Comparison(TypedDict):
    """The answer of `llmc compare`."""

    baseline: str  # name of the first artifact
    artifacts: list[Compared]
    matrix: list[Cell]
    gates: list[GateResult]
    passed: bool  # all gates


# ------------------------------------------------------------------------------------------------------------------ ship


class ShipFigure(TypedDict, total=False):
    """A figure with its interval, in the unit of its gate."""

    low: float
    mid: float
    high: float
    note: str  # what a reader must know of it


class Verdict(TypedDict):
    """One gate on one target."""

    target: str
    gate: str  # a figure of fit, ppl_increase or stable
    limit: float | bool  # in the unit of its gate; of ppl_increase a share, of stable True
    figure: ShipFigure | None  # None: not known
    source: str | None  # measured or estimate; None: not known
    passed: bool
    why: str  # it was missed; empty: it was passed


class Shipped(TypedDict):
    """One artifact that would ship."""

    name: str
    path: str
    sha256: str
    bytes: int  # of all its files
    ships: bool  # every gate was passed
    results: list[Verdict]


class Signed(TypedDict):
    """Who asked."""

    by: str  # name of the user
    host: str
    at: str  # date and time, ISO 8601
    versions: dict[str, str]  # of Python and of packages


class Shipping(TypedDict):
    """The answer of `llmc ship`."""

    gates: str  # path of the gates file
    passed: bool  # all artifacts ship
    artifacts: list[Shipped]
    allow_estimates: bool
    context: int  # tokens
    prompt: int  # tokens
    signed: Signed
