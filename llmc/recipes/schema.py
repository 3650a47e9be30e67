"""What `llmc run` and `llmc sweep` answer, as JSON: `RunReport` and `SweepReport`, with --dry-run `Plan` and `SweepPlan`."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, final

from llmc.evals.compare.schema import GateResult
from llmc.evals.report.schema import Kld, Report, TokenStat

# ------------------------------------------------------------------------------------------------------------------- run

_MadeOf = TypedDict("_MadeOf", {"from": list[str]})  # ids of jobs, or `base`
_MadeFrom = TypedDict("_MadeFrom", {"from": str | None})  # name of an artifact; None: it is the base


class RecipeFacts(TypedDict):
    """The recipe as it was run: equal for equal runs."""

    name: str
    about: str
    text: str  # of the file
    keys: dict[str, str]  # by job: the hash of all that it depends on


class StepReport(_MadeOf):
    """One job: what was asked for, and what it took."""

    job: str  # id
    command: str
    teacher: str | None  # id of a job, or a path
    options: dict[str, Any]  # that are not the command's defaults
    key: str  # the hash of all that it depends on
    artifact: str  # path
    bytes: int | None  # of weights; of a job that measures, of its files; None: not done
    seconds: float | None  # None: not timed
    resumed: bool  # the seconds are of the last part
    curve: NotRequired[dict[str, Any]]  # curve, losses and best_step of a training; missing of other jobs


class Provenance(TypedDict):
    """What an artifact's manifest tells, without what only machines read."""

    source: dict[str, Any] | None
    created: str | None  # date and time, ISO 8601
    versions: dict[str, str] | None  # of Python and of packages
    passes: list[dict[str, Any]]  # oldest first


class RunArtifact(_MadeFrom):
    """One artifact, or the base."""

    name: str  # of its step
    step: str | None  # command; None: it is the base
    kind: str  # base, or what the step makes (see commands.py)
    path: str
    bytes: int | None  # of weights; None: not known
    provenance: NotRequired[Provenance]  # missing of the base
    report: NotRequired[Report]  # what eval and bench last found, without the arrays; missing: not measured


class ComparisonFacts(TypedDict):
    """One compare step."""

    job: str  # id
    page: str  # path
    gates: list[GateResult]
    passed: bool
    baseline: str  # name
    artifacts: list[str]  # names, the baseline first


@final
class RunReport(TypedDict):
    """What a run made."""

    schema: int  # report.SCHEMA
    kind: str  # report.KIND
    recipe: RecipeFacts
    model: str  # the base, as it was named
    folder: str  # of the run
    steps: list[StepReport]
    artifacts: list[RunArtifact]  # the base first
    comparisons: list[ComparisonFacts]
    gates: list[GateResult]  # of all comparisons
    passed: bool  # all gates
    seconds: float  # of all steps
    versions: dict[str, str]  # of Python and of packages
    ran: NotRequired[list[str]]  # ids of the jobs that this run ran; not in the file


@final
class Plan(TypedDict):
    """What a run would do."""

    recipe: str  # name
    folder: str
    plan: list[dict[str, Any]]  # a row for each job (see plan.py)


# ----------------------------------------------------------------------------------------------------------------- sweep


class Variant(TypedDict):
    """One combination of options. The last three are missing where a step failed."""

    variant: str  # the options
    failed: list[str]  # why steps failed
    steps: list[str]  # names of their folders
    gates: NotRequired[list[GateResult]]
    passed: NotRequired[bool]
    seconds: NotRequired[float]


class Measured(_MadeFrom):
    """What is compared of a file; None: not measured."""

    name: str
    variant: str  # the options, or that it is of every variant
    kind: str
    path: str
    bytes: int | None
    text: str | None  # name of the first text
    perplexity: TokenStat | None
    kld: Kld | None
    decode: float | None  # tokens/s on the first target
    unstable: bool


class Point(Measured):
    """A file, once for all variants that share it."""

    variants: list[str]
    front: bool  # on the Pareto front


@final
class SweepReport(TypedDict):
    """What a sweep made."""

    schema: int  # report.SCHEMA
    kind: str  # sweep.KIND
    recipe: str  # name
    folder: str
    variants: list[Variant]
    artifacts: list[Point]
    passed: bool  # every variant's gates
    versions: dict[str, str]  # of Python and of packages
    ran: NotRequired[list[str]]  # folders of the jobs that were run; not in the file


@final
class SweepPlan(TypedDict):
    """What a sweep would do."""

    recipe: str  # name
    folder: str
    variants: list[str]
    plan: list[dict[str, Any]]  # a row for each job (see plan.py)
