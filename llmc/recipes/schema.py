"""The JSON results of `llmc run` and `llmc sweep`: `RunReport` and `SweepReport`, with --dry-run `Plan` and `SweepPlan`."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict, final

from llmc.evals.compare.schema import GateResult
from llmc.evals.report.schema import Kld, Report, TokenStat

# ------------------------------------------------------------------------------------------------------------------- run

_MadeOf = TypedDict("_MadeOf", {"from": list[str]})  # ids of jobs, or `base`
_MadeFrom = TypedDict("_MadeFrom", {"from": str | None})  # name of an artifact; None for the base


class RecipeFacts(TypedDict):
    """The recipe and the keys of its jobs: equal for equal runs."""

    name: str
    about: str
    text: str  # of the file
    keys: dict[str, str]  # {job: hash of everything that its result depends on}


class StepReport(_MadeOf):
    """One job: its inputs, options, result and time."""

    job: str  # id
    command: str
    teacher: str | None  # id of a job, or a path
    options: dict[str, Any]  # without the command's defaults
    key: str  # hash of everything that its result depends on
    artifact: str  # path
    bytes: int | None  # of the weights, or of the files of a job that measures; None: not done
    seconds: float | None  # None: not timed
    resumed: bool  # seconds then counts only the part after it continued
    curve: NotRequired[dict[str, Any]]  # curve, losses and best_step of training; missing for other jobs


class Provenance(TypedDict):
    """The manifest of an artifact without the data that only programs read."""

    source: dict[str, Any] | None
    created: str | None  # date and time, ISO 8601
    versions: dict[str, str] | None  # of Python and of packages
    passes: list[dict[str, Any]]  # oldest first


class RunArtifact(_MadeFrom):
    """One artifact, or the base."""

    name: str  # of its step
    step: str | None  # command; None for the base
    kind: str  # 'base', or the kind of the step's result (see commands.py)
    path: str
    bytes: int | None  # of the weights; None: unknown
    provenance: NotRequired[Provenance]  # missing for the base
    report: NotRequired[Report]  # the newest eval and bench reports, merged, without arrays; missing: not measured


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
    """The report of a run."""

    schema: int  # report.SCHEMA
    kind: str  # report.KIND
    recipe: RecipeFacts
    model: str  # the base, as given
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
    """The plan of a run."""

    recipe: str  # name
    folder: str
    plan: list[dict[str, Any]]  # a row for each job (see plan.py)


# ----------------------------------------------------------------------------------------------------------------- sweep


class Variant(TypedDict):
    """One combination of option values. The last three keys are missing if a step failed."""

    variant: str  # the option values
    failed: list[str]  # errors of the steps that failed
    steps: list[str]  # names of their folders
    gates: NotRequired[list[GateResult]]
    passed: NotRequired[bool]
    seconds: NotRequired[float]


class Measured(_MadeFrom):
    """The figures of a file. None: not measured."""

    name: str
    variant: str  # the option values, or 'every variant'
    kind: str
    path: str
    bytes: int | None
    text: str | None  # name of the first text
    perplexity: TokenStat | None
    kld: Kld | None
    decode: float | None  # tokens/s on the first real target
    unstable: bool


class Point(Measured):
    """A file, once for all variants that share it."""

    variants: list[str]
    front: bool  # on the Pareto front


@final
class SweepReport(TypedDict):
    """The report of a sweep."""

    schema: int  # report.SCHEMA
    kind: str  # sweep.KIND
    recipe: str  # name
    folder: str
    variants: list[Variant]
    artifacts: list[Point]
    passed: bool  # all gates of all variants
    versions: dict[str, str]  # of Python and of packages
    ran: NotRequired[list[str]]  # folders of the jobs that were run; not in the file


@final
class SweepPlan(TypedDict):
    """The plan of a sweep."""

    recipe: str  # name
    folder: str
    variants: list[str]
    plan: list[dict[str, Any]]  # a row for each job (see plan.py)
