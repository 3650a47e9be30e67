"""What is in a report. The file is this `Report` as JSON; nothing else is written into it. What an artifact weighs, and what
its KV cache takes, is said where they are found: llmc/formats/artifact.py and kv.py.

A key that is NotRequired is missing where its comment says so. The values of `dict[str, Any]` come from other files as they
are: manifests, whose passes have keys of their own, and the settings of runtimes.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from llmc.formats.artifact import Size
from llmc.formats.kv import KvDescribed, KvUse

Value = Literal["nll", "kld", "top1"]
"""What is kept of each scored token: negative log-likelihood and KL divergence in nats, and whether both models rank the same
first."""
Accuracy = Literal["acc", "acc_norm"]
"""Share of items that were answered rightly, by log-likelihood alone and by log-likelihood over the answer's length."""


# --------------------------------------------------------------------------------------------------------------- figures


class Stat(TypedDict):
    """A mean, in the unit of what it is of."""

    value: float
    se: float | None  # standard error in the same unit; None: one chunk alone does not tell


class TokenStat(Stat):
    """A mean over tokens. `se` is from the spread of the chunks' means."""

    se_token: float | None  # standard error as if tokens were independent; None: one token alone


class Kld(TokenStat):
    """KL divergence from the base in nats for each token: its mean, and how it is spread over the tokens."""

    median: float  # nats
    p99: float  # nats: 99 of 100 tokens have less
    max: float  # nats


class Packed(TypedDict):
    """An array (see store.pack)."""

    dtype: str  # numpy's name: "<f4" or "|b1"
    shape: list[int]
    data: str  # the bytes in C order, base64


class Spread(TypedDict):
    """Repetitions of one measurement, in its unit."""

    median: float
    iqr: float  # interquartile range
    values: list[float]  # of each repetition, in their order


# -------------------------------------------------------------------------------------------------------------- artifact


class Layer(TypedDict):
    """What the last pass with a record of its layers says of one."""

    layer: int | None  # number, from 0
    error: float | None  # share of the layer's output energy that was lost; None: not measured
    events: list[str]  # what went another way than usual


class Described(TypedDict):
    """Which artifact it is, and where it comes from."""

    name: str  # of the file or folder
    path: str  # as it was given
    sha256: str  # of the file; of a folder see store.hash_artifact
    kind: str  # hf, gptq, gguf, onnx, …
    size: Size
    kv: KvDescribed | None  # None: the artifact does not tell
    source: dict[str, Any] | None  # of the manifest; None: not made by llmc
    created: str | None  # date and time, ISO 8601
    passes: list[dict[str, Any]]  # of the manifest, oldest first, without their layers
    layers: list[Layer]  # in the order of the model; empty: no pass recorded any


# --------------------------------------------------------------------------------------------------------------- machine


class Facts(TypedDict):
    """A machine."""

    system: str  # name and release of the operating system, and architecture
    machine: str  # architecture
    cpu: str
    physical_cores: int | None
    logical_cores: int | None
    usable_cores: int  # physical ones that the process may use
    cpu_features: list[str]  # instruction sets, sorted
    memory: int  # bytes
    governor: str | None  # how the kernel chooses the frequency
    temperature_c: float | None  # degrees Celsius
    power: str | None  # ac or battery
    gpus: NotRequired[list[dict[str, Any]]]  # name, driver, backend; missing: not probed
    probed: NotRequired[str]  # date and time, ISO 8601; missing: not probed
    read_bandwidth: NotRequired[float]  # bytes/s from memory with all usable cores; missing: not probed, and on Android
    matmul_flops: NotRequired[float]  # of float32; missing: not probed, and on Android


class Where(TypedDict):
    """The target on which something ran."""

    name: str
    address: str  # local-cpu, local-gpu, ssh://…, adb://…, emulated-…
    emulated: bool  # its speed says nothing of the device
    facts: Facts


class RuntimeFacts(TypedDict):
    """What ran an artifact, as it says of itself."""

    runtime: str  # torch, llama.cpp or onnxruntime
    version: str
    device: str
    threads: int
    kv_type: str  # of the KV cache's elements
    cpu_features: list[str]  # instruction sets that the CPU has
    build: NotRequired[Any]  # a dict of options and instruction sets, of onnxruntime one text; missing on Android
    target: NotRequired[Where]  # only of an evaluation on another device
    transformers: NotRequired[str]  # version; of torch alone, as is dtype
    dtype: NotRequired[str]  # in which weights are held
    offloaded_layers: NotRequired[int]  # on a GPU; of llama.cpp alone, as are the next four
    layers: NotRequired[int]  # with the head
    buffers: NotRequired[dict[str, float]]  # MiB of weights by backend; missing on Android
    extra_buffers: NotRequired[bool]  # weights are repacked for the CPU; missing on Android
    engine: NotRequired[str]  # llama-bench: on Android alone, as are the next two
    tokens: NotRequired[str]  # what was fed
    backends: NotRequired[str | None]
    accuracy_levels: NotRequired[list[int]]  # of MatMulNBits; of onnxruntime alone, as are the next three
    session: NotRequired[dict[str, Any]]  # options
    nodes: NotRequired[dict[str, dict[str, int]]]  # by execution provider: how many nodes of each operator
    kv: NotRequired[dict[str, Any]]  # shared (one buffer for past and present), bytes, types


# --------------------------------------------------------------------------------------------------------------- quality


class TextProtocol(TypedDict):
    """How a text was put to the models: figures may be compared only where all of it is equal."""

    text: str  # name
    text_sha256: str
    tokenizer_sha256: str
    ids_sha256: str  # of the token ids of all chunks
    context: int  # tokens of a chunk
    stride: int  # tokens from one chunk to the next
    scored: str  # which tokens of a chunk
    bos: str  # what was done with the token that begins a text
    chunks: int
    scored_tokens: int  # of all chunks
    bytes: int  # of the scored text in UTF-8
    vocabulary: int  # tokens that both models know


class TextFigures(TypedDict):
    """What was found on a text. The last four are None where there was no base."""

    perplexity: TokenStat
    bits_per_byte: TokenStat
    kld: Kld | None
    top1: TokenStat | None  # share of tokens of which both models rank the same first
    base_perplexity: TokenStat | None
    perplexity_ratio: TokenStat | None  # perplexity / base_perplexity, paired by token


class Text(TextFigures):
    """One text."""

    protocol: TextProtocol
    per_token: NotRequired[dict[Value, Packed]]  # [chunks, tokens]; kld and top1 with a base; missing without the arrays
    calibration_overlap: NotRequired[float]  # share of the calibration text in it; missing in reports of earlier versions


class ItemsProtocol(TypedDict):
    """How the items of a task are put to a model."""

    task: str
    sha256: str  # of the file of items
    items: int  # that are asked
    of: int  # that the file has
    examples: int  # shown before each item: none
    bos: str
    tokenizer_sha256: str
    ids_sha256: str  # of the token ids of all answers


class TaskProtocol(ItemsProtocol):
    """How a task was put to the models: figures may be compared only where all of it is equal."""

    vocabulary: int  # tokens that both models know


class TaskFigures(TypedDict):
    """What one model reached in a task; None: the task does not have that figure."""

    acc: Stat | None  # share
    acc_norm: Stat | None  # share
    perplexity: Stat | None  # of the last word


class TaskRise(TypedDict):
    """Figures of one model less those of another, paired by item; None: the task does not have that figure."""

    acc: Stat | None
    acc_norm: Stat | None
    perplexity_ratio: Stat | None


class PerItem(TypedDict):
    """A value for each item: accuracies as a text of 0 and 1."""

    acc: str
    acc_norm: NotRequired[str]  # missing: the task does not have it
    nll: NotRequired[Packed]  # nats, float32 [items]; missing: the task does not have it


class Task(TaskFigures):
    """One zero-shot task."""

    protocol: TaskProtocol
    source: str  # name of the file, or what the hub calls it
    window: int  # most tokens that were put to a model at once
    cut: int  # items that lost tokens on the left
    base: TaskFigures | None
    difference: TaskRise | None  # to the base
    per_item: NotRequired[PerItem]  # missing without the arrays
    calibration_overlap: NotRequired[float]  # as of a text


class Base(TypedDict):
    """The model that the artifact was made from."""

    name: str
    sha256: str  # as an artifact's
    is_artifact: bool  # it is the artifact itself
    runtime: RuntimeFacts


class Quality(TypedDict):
    """What `llmc eval` found."""

    texts: list[Text]
    runtime: RuntimeFacts
    tokenizer_agrees: bool  # the artifact's own tokenizer gives the ids that it was fed
    kv: NotRequired[KvUse]  # missing in reports of earlier versions
    base: Base | None
    seconds: float  # that it took
    tasks: NotRequired[list[Task]]  # missing: none was asked for


# ---------------------------------------------------------------------------------------------------------------- speeds


class SpeedProtocol(TypedDict):
    """How speed was measured: speeds may be compared only where all of it is equal."""

    prompt: int  # tokens, of the headline figures
    depth: int  # tokens in the KV cache when decoding begins, of the headline figures
    generate: int  # tokens that are decoded
    threads: int
    device: str  # cpu or gpu
    cpu: str
    cores: int | None  # physical ones


class PrefillPoint(TypedDict):
    """A prompt."""

    tokens: int
    first_token: Spread  # s
    prefill: Spread  # tokens/s


class DecodePoint(TypedDict):
    """Decoding from one depth on."""

    depth: int  # tokens in the KV cache when it begins
    decode: Spread  # tokens/s


class Curves(TypedDict):
    """Speed by length, in the order in which lengths were asked for."""

    prefill_curve: list[PrefillPoint]
    decode_curve: list[DecodePoint]


class Conditions(TypedDict):
    """Of the machine after the first and after the last repetition; None: it does not tell."""

    mhz: list[float | None]
    temperature_c: list[float | None]


class Energy(TypedDict):
    """Of decoding."""

    joules_per_token: float
    source: str  # the counter or sensor


class Ran(TypedDict, total=False):
    """What really ran, in few words (see bench.ran)."""

    nodes: dict[str, int]  # of onnxruntime: how many by execution provider
    offloaded_layers: int  # of llama.cpp, as are the next two
    layers: int | None
    buffers: dict[str, float]  # MiB of weights by backend
    device: str | None  # of torch
    instruction_sets: list[str]  # of llama.cpp and torch


class LoadAverage(TypedDict):
    """Runnable processes over 1, 5 and 15 minutes; None: the machine does not tell."""

    before: list[float] | None
    after: list[float] | None


class ThreadPoint(TypedDict):
    """Speed with a number of threads."""

    threads: int
    median: float  # tokens/s


class BestThreads(TypedDict):
    """The fastest numbers of threads."""

    prefill: int
    decode: int


class ThreadSweep(TypedDict):
    """Speed by the number of threads, at the first prompt and depth."""

    prefill: list[ThreadPoint]
    decode: list[ThreadPoint]
    best: BestThreads


class Speed(Curves):
    """What `llmc bench` found on one target."""

    target: Where
    protocol: SpeedProtocol
    warmup: int  # repetitions before those that count
    repetitions: int  # that count
    load_s: float  # seconds to load the artifact from the page cache
    peak_rss: int  # bytes, the most that the process ever held
    prefill: Spread  # tokens/s of the first prompt
    first_token: Spread  # s of the first prompt
    decode: Spread  # tokens/s at the first depth
    throttled: list[str]  # why the machine was not at its full speed
    unstable: list[str]  # why the speeds are not to be trusted; empty: they are
    conditions: Conditions
    energy: Energy | None  # None: the machine does not tell
    runtime: RuntimeFacts
    ran: Ran
    kv: NotRequired[KvUse]  # missing in reports of earlier versions
    token_bytes: int  # of weights that one decoded token reads
    read_bandwidth: float  # bytes/s: token_bytes times the median of decode
    load_average: LoadAverage
    in_turns_with: list[str]  # names of artifacts that were measured in turns with this one
    thread_sweep: ThreadSweep | None  # None: not asked for


# ---------------------------------------------------------------------------------------------------------------- report


class BudgetText(TypedDict):
    """A prediction held against one text."""

    text: str  # name
    kld: float  # nats, measured
    se: float | None  # nats
    ratio: float | None  # measured / predicted; None: nothing was predicted to be lost


class Budget(TypedDict):
    """What a budget predicted when it chose the artifact's types, and what was found."""

    target: str  # the budget, as it was asked for
    planned_bytes: int  # of the .gguf file
    file_bytes: int | None  # of the artifact; None: it is not that file
    predicted_kld: float  # nats, on calibration text
    peer: dict[str, Any] | None  # the preset whose size was the budget: preset, file_bytes, …
    healed: bool  # healing came after the prediction
    measured: list[BudgetText]


class Report(TypedDict):
    """One artifact."""

    schema: int  # store.SCHEMA
    kind: str  # store.KIND
    artifact: Described
    quality: NotRequired[Quality]  # missing: not evaluated
    budget: NotRequired[Budget]  # missing: no budget chose the types, or not evaluated
    speeds: NotRequired[dict[str, Speed]]  # by target, in the order of measuring; missing: not benched
    versions: dict[str, str]  # of Python and of packages
