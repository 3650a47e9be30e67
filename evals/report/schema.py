"""The types of a report. The file is `Report` as JSON and contains nothing else. The types of sizes and of KV caches are in
llmc/formats/artifact.py and kv.py.

The comment of a NotRequired key explains when it is missing. The values of `dict[str, Any]` are copied unchanged from other
sources: manifests, whose passes have their own keys, and the settings of runtimes.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from llmc.formats.artifact import Size
from llmc.formats.kv import KvDescribed, KvUse

Value = Literal["nll", "kld", "top1"]
"""A stored value of each scored token: negative log-likelihood (nats), KL divergence (nats), or whether the top-1 tokens of
both models are equal."""
Accuracy = Literal["acc", "acc_norm"]
"""Share of correct items, by log-likelihood (acc) or by log-likelihood divided by the answer's length (acc_norm)."""


# --------------------------------------------------------------------------------------------------------------- metrics


class Stat(TypedDict):
    """A mean, in the unit of its metric."""

    value: float
    se: float | None  # standard error in the same unit; None: unknown, as for a single chunk


class TokenStat(Stat):
    """A mean over tokens. `se` is computed from the means of the chunks."""

    se_token: float | None  # standard error that assumes independent tokens; None: there is only one token


class Tails(TypedDict):
    """Quantiles over tokens, in the unit of their metric: so many tokens in a hundred have no more. `se` by a bootstrap over
    chunks."""

    p90: Stat
    p99: Stat
    p999: Stat  # 99.9 of a hundred


class Kld(TokenStat):
    """KL divergence from the base per token, in nats: the mean and the distribution over tokens."""

    median: float  # nats
    p99: float  # nats, 99th percentile
    max: float  # nats, of the tokens that were measured; more text can only raise it, so it has no error
    tails: NotRequired[Tails]  # nats; missing: the report is of an earlier version


class Packed(TypedDict):
    """An array (see store.pack)."""

    dtype: str  # name in numpy: "<f4" or "|b1"
    shape: list[int]
    data: str  # the bytes in C order, base64


class Spread(TypedDict):
    """Repetitions of one measurement, in its unit."""

    median: float
    iqr: float  # interquartile range
    values: list[float]  # one for each repetition, in order


# -------------------------------------------------------------------------------------------------------------- artifact


class Layer(TypedDict):
    """A layer, as recorded by the last pass that recorded layers."""

    layer: int | None  # number, from 0
    error: float | None  # lost share of the layer's output energy; None: not measured
    events: list[str]  # unusual events, as 'damp raised'


class Described(TypedDict):
    """The identity and the origin of an artifact."""

    name: str  # of the file or folder
    path: str  # as the user gave it
    sha256: str  # of the file; of a folder see store.hash_artifact
    kind: str  # hf, gptq, gguf, onnx, …
    size: Size
    kv: KvDescribed | None  # None: the artifact does not contain it
    source: dict[str, Any] | None  # from the manifest; None: not made by llmc
    created: str | None  # date and time, ISO 8601
    passes: list[dict[str, Any]]  # from the manifest, oldest first, without their layers
    layers: list[Layer]  # in the order of the model; empty: no pass recorded layers


# --------------------------------------------------------------------------------------------------------------- machine


class Facts(TypedDict):
    """Facts about a machine."""

    system: str  # name and release of the operating system, and architecture
    machine: str  # architecture
    cpu: str
    physical_cores: int | None
    logical_cores: int | None
    usable_cores: int  # physical cores that the process may use
    cpu_features: list[str]  # instruction sets, sorted
    memory: int  # bytes
    governor: str | None  # CPU frequency governor of the kernel
    temperature_c: float | None  # degrees Celsius
    power: str | None  # ac or battery
    gpus: NotRequired[list[dict[str, Any]]]  # name, driver, backend; missing: not probed
    probed: NotRequired[str]  # date and time, ISO 8601; missing: not probed
    read_bandwidth: NotRequired[float]  # bytes/s from memory with all usable cores; missing: not probed, or Android
    matmul_flops: NotRequired[float]  # float32 operations/s; missing: not probed, or Android


class Where(TypedDict):
    """The target on which a model ran."""

    name: str
    address: str  # local-cpu, local-gpu, ssh://…, adb://…, emulated-…
    emulated: bool  # if so, the speed is not that of the real device
    facts: Facts


class RuntimeFacts(TypedDict):
    """The runtime that ran an artifact, as it describes itself."""

    runtime: str  # torch, llama.cpp or onnxruntime
    version: str
    device: str
    threads: int
    kv_type: str  # of the KV cache's elements
    cpu_features: list[str]  # instruction sets of the CPU
    build: NotRequired[Any]  # options and instruction sets; a text for onnxruntime; missing: Android
    target: NotRequired[Where]  # only for an evaluation on another device
    transformers: NotRequired[str]  # version; only torch, like dtype
    dtype: NotRequired[str]  # of the weights in memory
    offloaded_layers: NotRequired[int]  # on a GPU; only llama.cpp, like the next three
    layers: NotRequired[int]  # including the output layer (lm_head)
    buffers: NotRequired[dict[str, float]]  # MiB of weights by backend; missing on Android
    extra_buffers: NotRequired[bool]  # weights are repacked for the CPU; missing on Android
    engine: NotRequired[str]  # llama-bench; only on Android, like the next two
    tokens: NotRequired[str]  # which tokens were fed
    backends: NotRequired[str | None]
    accuracy_levels: NotRequired[list[int]]  # of MatMulNBits; only onnxruntime, like the next three
    session: NotRequired[dict[str, Any]]  # options
    nodes: NotRequired[dict[str, dict[str, int]]]  # number of nodes, by execution provider and operator
    kv: NotRequired[dict[str, Any]]  # shared (one buffer for past and present), bytes, types


# --------------------------------------------------------------------------------------------------------------- quality


class TextProtocol(TypedDict):
    """How a text was fed to the models. Two results are comparable only if all fields are equal."""

    text: str  # name
    text_sha256: str
    tokenizer_sha256: str
    ids_sha256: str  # over the token ids of all chunks
    context: int  # tokens in a chunk
    stride: int  # tokens between the starts of two chunks
    scored: str  # which tokens of a chunk
    bos: str  # use of the BOS token
    chunks: int
    scored_tokens: int  # in all chunks
    bytes: int  # length of the scored text in UTF-8
    vocabulary: int  # number of tokens that both models have


class TextMetrics(TypedDict):
    """The metrics of a text. The last four are None if there was no base."""

    perplexity: TokenStat
    bits_per_byte: TokenStat
    kld: Kld | None
    top1: TokenStat | None  # share of positions at which both models have the same top-1 token
    base_perplexity: TokenStat | None
    perplexity_ratio: TokenStat | None  # perplexity / base_perplexity, paired by token


class Text(TextMetrics):
    """The results on one text."""

    protocol: TextProtocol
    per_token: NotRequired[dict[Value, Packed]]  # [chunks, tokens]; kld, top1: only with a base; missing if left out
    calibration_overlap: NotRequired[float]  # share of the calibration text that occurs in the text; missing: earlier version


class ItemsProtocol(TypedDict):
    """How the items of a task are fed to a model."""

    task: str
    sha256: str  # of the items file
    items: int  # evaluated items
    of: int  # items in the file
    examples: int  # few-shot examples before each item: 0
    bos: str
    tokenizer_sha256: str
    ids_sha256: str  # over the token ids of all answers


class TaskProtocol(ItemsProtocol):
    """How a task was fed to the models. Two results are comparable only if all fields are equal."""

    vocabulary: int  # number of tokens that both models have


class TaskMetrics(TypedDict):
    """The metrics of one model on a task. None: the task does not have this metric."""

    acc: Stat | None  # share
    acc_norm: Stat | None  # share
    perplexity: Stat | None  # of the last word


class TaskDifference(TypedDict):
    """Metrics of one model minus those of another, paired by item. None: the task does not have this metric."""

    acc: Stat | None
    acc_norm: Stat | None
    perplexity_ratio: Stat | None


class PerItem(TypedDict):
    """A value for each item. An accuracy is a text of 0 and 1, one character per item."""

    acc: str
    acc_norm: NotRequired[str]  # missing: the task does not have this metric
    nll: NotRequired[Packed]  # nats, float32 [items]; missing: the task does not have this metric


class Task(TaskMetrics):
    """The results on one zero-shot task."""

    protocol: TaskProtocol
    source: str  # name of the file, or of the dataset on the hub
    window: int  # largest number of tokens fed to a model at once
    cut: int  # items that lost tokens on the left
    base: TaskMetrics | None
    difference: TaskDifference | None  # from the base
    per_item: NotRequired[PerItem]  # missing if arrays are left out
    calibration_overlap: NotRequired[float]  # as of a text


class Base(TypedDict):
    """The model that the artifact was made from."""

    name: str
    sha256: str  # like that of an artifact
    is_artifact: bool  # the base is the artifact itself
    runtime: RuntimeFacts


class Quality(TypedDict):
    """The results of `llmc eval`."""

    texts: list[Text]
    runtime: RuntimeFacts
    tokenizer_agrees: bool  # the artifact's own tokenizer gives the ids that were used
    kv: NotRequired[KvUse]  # missing in reports of earlier versions
    base: Base | None
    seconds: float  # duration of the evaluation
    tasks: NotRequired[list[Task]]  # missing: no tasks were requested


# ---------------------------------------------------------------------------------------------------------------- speeds


class SpeedProtocol(TypedDict):
    """How speed was measured. Two speeds are comparable only if all fields are equal."""

    prompt: int  # tokens, for the main results
    depth: int  # tokens in the KV cache when decoding begins, for the main results
    generate: int  # decoded tokens
    threads: int
    device: str  # cpu or gpu
    cpu: str
    cores: int | None  # physical cores


class PrefillPoint(TypedDict):
    """Speed with a prompt of one length."""

    tokens: int
    first_token: Spread  # s
    prefill: Spread  # tokens/s


class DecodePoint(TypedDict):
    """Decode speed at one depth."""

    depth: int  # tokens in the KV cache when decoding begins
    decode: Spread  # tokens/s


class Curves(TypedDict):
    """Speed by length, in the order of the options."""

    prefill_curve: list[PrefillPoint]
    decode_curve: list[DecodePoint]


class Conditions(TypedDict):
    """State of the machine after the first and after the last repetition. None: unknown."""

    mhz: list[float | None]
    temperature_c: list[float | None]


class Energy(TypedDict):
    """Energy of decoding."""

    joules_per_token: float
    source: str  # name of the counter or sensor


class Ran(TypedDict, total=False):
    """A short record of what ran (see bench/ran.py)."""

    nodes: dict[str, int]  # number of nodes by execution provider; only onnxruntime
    offloaded_layers: int  # only llama.cpp, like the next two
    layers: int | None
    buffers: dict[str, float]  # MiB of weights by backend
    device: str | None  # only torch
    instruction_sets: list[str]  # llama.cpp and torch


class LoadAverage(TypedDict):
    """Load average over 1, 5 and 15 minutes, before and after the bench. None: unknown."""

    before: list[float] | None
    after: list[float] | None


class ThreadPoint(TypedDict):
    """Speed with one number of threads."""

    threads: int
    median: float  # tokens/s


class BestThreads(TypedDict):
    """The fastest number of threads."""

    prefill: int
    decode: int


class ThreadSweep(TypedDict):
    """Speed by the number of threads, at the first prompt and depth."""

    prefill: list[ThreadPoint]
    decode: list[ThreadPoint]
    best: BestThreads


class Speed(Curves):
    """The results of `llmc bench` on one target."""

    target: Where
    protocol: SpeedProtocol
    warmup: int  # repetitions before the measured ones
    repetitions: int  # measured repetitions
    load_s: float  # seconds to load the artifact from the page cache
    peak_rss: int  # bytes, the peak of the process
    prefill: Spread  # tokens/s, for the first prompt length
    first_token: Spread  # s, for the first prompt length
    decode: Spread  # tokens/s, at the first depth
    throttled: list[str]  # reasons why the machine was not at full speed
    unstable: list[str]  # reasons why the speeds are unreliable; empty: they are reliable
    conditions: Conditions
    energy: Energy | None  # None: unknown
    runtime: RuntimeFacts
    ran: Ran
    kv: NotRequired[KvUse]  # missing in reports of earlier versions
    token_bytes: int  # bytes of weights read for one decoded token
    read_bandwidth: float  # bytes/s: token_bytes times the median of decode
    load_average: LoadAverage
    in_turns_with: list[str]  # names of artifacts that were measured in turns with this one
    thread_sweep: ThreadSweep | None  # None: not requested


# ---------------------------------------------------------------------------------------------------------------- report


class BudgetText(TypedDict):
    """Predicted and measured KL divergence on one text."""

    text: str  # name
    kld: float  # nats, measured
    se: float | None  # nats
    ratio: float | None  # measured / predicted; None: the prediction is 0


class Budget(TypedDict):
    """The prediction of the budget that chose the artifact's types, and the measurement."""

    target: str  # the budget, as given in the option
    planned_bytes: int  # of the .gguf file
    file_bytes: int | None  # of the artifact; None: it is not a .gguf file of llmc
    predicted_kld: float  # nats, on calibration text
    peer: dict[str, Any] | None  # the preset whose size was the budget: preset, file_bytes, …
    healed: bool  # the artifact was healed after the prediction
    measured: list[BudgetText]


class Report(TypedDict):
    """The report of one artifact."""

    schema: int  # store.SCHEMA
    kind: str  # store.KIND
    artifact: Described
    quality: NotRequired[Quality]  # missing: not evaluated
    budget: NotRequired[Budget]  # missing: no budget chose the types, or not evaluated
    speeds: NotRequired[dict[str, Speed]]  # by target, in the order of measuring; missing: not benched
    versions: dict[str, str]  # of Python and of packages
