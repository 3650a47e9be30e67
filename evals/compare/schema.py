"""Types of the results of `llmc compare` (`Comparison`) and `llmc ship` (`Shipping`). They are printed as JSON."""

from __future__ import annotations

from typing import Literal, TypedDict

from llmc.evals.fit.schema import Answer, Bounds
from llmc.evals.report.schema import Kld, Report, Stat, TaskDifference, TokenStat

# --------------------------------------------------------------------------------------------------------------- compare


class TextDifference(TypedDict):
    """Differences from the baseline on one text, paired by token."""

    text: str  # name
    perplexity_ratio: TokenStat  # perplexity / baseline's perplexity
    kld: TokenStat | None  # minus the baseline's, nats; None: not measured for both
    top1: TokenStat | None  # minus the baseline's, share; None: not measured for both


class SpeedChange(TypedDict):
    """Speed and memory on one target, divided by those of the baseline."""

    decode_speedup: Stat  # ratio
    first_token_ratio: Stat
    peak_rss_ratio: float


class Differences(TypedDict):
    """Differences of an artifact from the baseline. None: not measured for both."""

    size_ratio: float  # of the file sizes
    texts: list[TextDifference] | None
    tasks: dict[str, TaskDifference] | None  # by name
    speeds: dict[str, SpeedChange] | None  # by target, without emulated ones


class Compared(TypedDict):
    """One compared artifact."""

    name: str  # unique
    report: Report
    differences: Differences | None  # None: this is the baseline


class FirstToken(Bounds):
    """Seconds to the first token."""

    tokens: int  # in the prompt


class Memory(TypedDict):
    """Peak memory in bytes."""

    weights: int
    kv: int
    rest: int


class Cell(TypedDict):
    """An artifact on a target. Measured bounds are the median, minus and plus half of the interquartile range."""

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
    basis: str  # the CPU; for an estimate, the source of the rates
    front: bool  # on the Pareto front of decode speed and KL divergence of its target and source


class GateResult(TypedDict):
    """The result of a gate of `llmc compare`, for one candidate on one text or target."""

    gate: str  # name of the option
    artifact: str
    text: str | None  # name of the text or of the target
    limit: float  # share, nats or factor
    value: float  # in the unit of `limit`
    low: float  # interval of the value, see llmc.evals.interval
    high: float
    answer: Answer  # maybe: not decided, because the limit lies inside the interval, or the speed is unstable
    passed: bool  # answer is yes


class Comparison(TypedDict):
    """The result of `llmc compare`."""

    baseline: str  # name of the first artifact
    artifacts: list[Compared]
    matrix: list[Cell]
    gates: list[GateResult]
    passed: bool  # all gates passed


# ------------------------------------------------------------------------------------------------------------------ ship


class ShipFigure(TypedDict, total=False):
    """A value with its interval, in the unit of its gate."""

    low: float
    mid: float
    high: float
    note: str  # how it was measured


class Verdict(TypedDict):
    """The result of one gate on one target."""

    target: str
    gate: str  # a metric of fit (see fit.schema.Name), ppl_increase or stable
    limit: float | bool  # in the unit of its gate; a share for ppl_increase, True for stable
    figure: ShipFigure | None  # None: unknown
    source: str | None  # measured or estimate; None: unknown
    answer: Answer  # maybe: not decided; unknown: not measured
    passed: bool
    why: str  # reason why the gate was not passed; empty: it passed


class Shipped(TypedDict):
    """One artifact that the gates file lists."""

    name: str
    path: str
    sha256: str
    bytes: int  # of all its files
    ships: bool  # it passed every gate
    results: list[Verdict]


class Signed(TypedDict):
    """Who ran the command, where, when, and with which versions. Nothing is signed."""

    by: str  # name of the user
    host: str
    at: str  # date and time, ISO 8601
    versions: dict[str, str]  # of Python and of packages


class Shipping(TypedDict):
    """The result of `llmc ship`."""

    gates: str  # path of the gates file
    passed: bool  # all artifacts may ship
    artifacts: list[Shipped]
    allow_estimates: bool
    context: int  # tokens
    prompt: int  # tokens
    signed: Signed
