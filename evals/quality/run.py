"""`llmc eval`: compare an artifact in its own runtime with its base, on the same token ids, chunk by chunk.

Both models stay loaded. The logits of only one chunk are in memory at a time, so no array of the size text x vocabulary is
held or written.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from llmc.console import progress, say, warn
from llmc.errors import UserError
from llmc.evals.quality import metrics, task_items, tasks
from llmc.evals.quality.config import EvalConfig
from llmc.evals.quality.memory import memory_of
from llmc.evals.quality.protocol import Chunks, FolderTokenizer, RuntimeTokenizer, Tokenizer, cut
from llmc.evals.quality.texts import load_text
from llmc.evals.report import store as report
from llmc.evals.report.schema import Quality, Report, RuntimeFacts, Task, Text, Value
from llmc.formats import kv
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.gguf_check import check_runnable
from llmc.formats.manifest import read_manifest
from llmc.machine import physical_cores
from llmc.overlap import overlap
from llmc.places import check_place
from llmc.runtimes.base import NoTokenizerError, Runtime
from llmc.runtimes.open import open_runtime
from llmc.runtimes.trial import try_first
from llmc.sources.resolve import locate

# Text on which tokenizers often differ: repeated spaces, digits, case, accents, scripts, code, emoji, a text like a token.
SAMPLE = ("Hello  world, it's 2024-11-05;\n\n\tdef f(x):  return x*100000  # naïve Ünïcode"
          " 日本語 Привет العربية 🙂👍🏽 <|x|>\r\n")

SAME_TEXT = 0.02  # a share of common 13-word sequences above this is not chance or quotation


def plan(config: EvalConfig) -> dict[str, Any]:
    """The plan: the models, the number of tokens in a chunk, and the memory that the evaluation needs here (bytes)."""
    artifact, base = locate(config.artifact), locate(config.base) if config.base is not None else None
    base = None if base == artifact else base
    return {"artifact": str(artifact), "base": None if base is None else str(base), "context": config.context,
            "chunks": config.chunks, "tasks": list(config.tasks), **memory_of(artifact, base, config).plan()}


def evaluate(config: EvalConfig) -> Report:
    """Return the report of `config.artifact` with its `quality` section. Write it to `config.output` if that is given.

    Raises UserError for bad input, before the long work if possible.
    """
    if config.output is not None:
        check_place(config.output, [config])
    artifact = locate(config.artifact)
    base = locate(config.base) if config.base is not None else None
    wanted = () if config.no_text else (config.text, config.second_text)
    texts = [load_text(t, artifact_at(base or artifact).tokenizer_folder) for t in wanted if t is not None]
    asked = task_items.load(config.tasks, config.task_items)
    overlaps = {name: _overlap(artifact, name, text) for name, text in [*texts, *((t.name, t.text) for t in asked)]}
    described = report.describe_artifact(artifact)
    kv_type = config.kv or artifact_at(artifact).kv_default
    report.check_output(config.output, described["sha256"], kv_type)
    base_digest = None if base is None else report.hash_artifact(base)
    # the same file on another device or with another KV cache type is not its own base: it must be measured
    is_base = base_digest == described["sha256"] and kv_type == artifact_at(artifact).kv_default and config.target is None
    for model in (artifact, base):  # a wrong number in the header would count as memory
        if model is not None and model.suffix == ".gguf":
            check_runnable(model)
    if config.device == "cpu":
        memory_of(artifact, None if is_base else base, config).check("evaluating", "choose a smaller --context")
    if config.second_text is None and texts:
        say("hint: --second-text FILE with a different text shows whether the model overfits to the calibration text")
    if base is None and texts:
        say("hint: without --base only perplexity is measured, not the KL divergence from the base model")

    threads = config.threads or physical_cores()
    start = time.monotonic()
    context = max(config.context, tasks.WINDOW) if asked else config.context
    here = config.device if config.target is None else "cpu"
    runtime = _open(artifact, context, threads, config)
    try:
        base_runtime = _open_base(base, context, threads, here) if base and not is_base else None
        try:
            if texts:
                _check_context(config.context, runtime, *([base_runtime] if base_runtime else []))
            tokenizer = _tokenizer(base or artifact, base_runtime or runtime)
            agrees = _check_tokenizer(runtime, tokenizer, artifact)
            jobs = [cut(name, text, tokenizer, config.context, config.chunks) for name, text in texts]
            results = [_run(job, runtime, base_runtime, is_base, overlaps[job.protocol.text]) for job in jobs]
            sections = [_run_task(task, tokenizer, runtime, base_runtime, is_base, overlaps[task.name]) for task in asked]
            quality: Quality = {
                "texts": results, "runtime": _facts(runtime), "tokenizer_agrees": agrees,
                "kv": kv.section(described["kv"], runtime.kv_type),
                "base": None if base is None or base_digest is None else {
                    "name": base.name, "sha256": base_digest, "is_artifact": is_base,
                    "runtime": _facts(base_runtime or runtime)},
                "seconds": round(time.monotonic() - start, 1),
            }
            if asked:
                quality["tasks"] = sections
        finally:
            if base_runtime:
                base_runtime.close()
    finally:
        runtime.close()
    made = report.new_report(described, "quality", quality)
    if config.output is not None:
        report.save(config.output, made)
    return made


def _open(artifact: Path, context: int, threads: int, config: EvalConfig) -> Runtime:
    """Open the artifact in its runtime, on this machine or on the target. threads: for this machine. The target chooses its
    own number of threads if --threads is not given."""
    if config.target is None:
        try_first(artifact)
        return open_runtime(artifact, context, threads, config.device, config.kv)
    from llmc.runtimes.remote import RemoteRuntime
    from llmc.runtimes.targets.device import connect
    from llmc.runtimes.targets.target import find_target

    target = find_target(config.target, config.targets)
    kind = "gpu" if target.address == "local-gpu" else config.device
    return RemoteRuntime(connect(target), artifact, context, config.threads, kind, config.kv)


def _open_base(base: Path, context: int, threads: int, device: str) -> Runtime:
    try_first(base)
    return open_runtime(base, context, threads, device)


def _facts(runtime: Runtime) -> RuntimeFacts:
    return cast(RuntimeFacts, runtime.describe())


def _overlap(artifact: Path, name: str, text: str) -> float:
    """Share of the artifact's calibration text that occurs in the evaluation text, from the sketch in the manifest. Warns if
    it is large."""
    sketches = [p["calibration"]["sketch"] for p in (read_manifest(artifact) or {}).get("passes", [])
                if (p.get("calibration") or {}).get("sketch")]
    share = max((overlap(sketch, text) for sketch in sketches), default=0.0)
    if share > SAME_TEXT:
        warn(f"about {share:.0%} of the calibration text occurs in {name}: the results on it are too good; "
             "use another text")
    return share


def _check_context(wanted: int, *runtimes: Runtime) -> None:
    limit = min(r.context for r in runtimes)
    if limit < wanted:
        raise UserError(f"--context {wanted} is more than the {limit} tokens that the model was trained for",
                        f"try --context {limit}")


def _tokenizer(source: Path, runtime: Runtime) -> Tokenizer:
    """The tokenizer of the base, or of the artifact if no base is given."""
    folder = artifact_at(source).tokenizer_folder
    return FolderTokenizer(folder) if folder else RuntimeTokenizer(runtime)


def _check_tokenizer(runtime: Runtime, tokenizer: Tokenizer, artifact: Path) -> bool:
    """Whether the artifact's own tokenizer gives the same ids as `tokenizer` on SAMPLE. Warns if it does not: the results
    here do not show this error, but users of the artifact get other ids."""
    ours = tokenizer.encode(SAMPLE)
    if tokenizer.bos is not None:
        ours = np.concatenate([[tokenizer.bos], ours])
    try:
        found = runtime.tokenize(SAMPLE, special=True)
    except NoTokenizerError:
        warn(f"{artifact.name} holds no tokenizer: the results are for the base's token ids")
        return False
    agrees = bool(np.array_equal(ours, found))
    if agrees:
        say(f"the tokenizer in {artifact.name} gives the same ids as the base's")
    else:
        warn(f"the tokenizer in {artifact.name} gives other ids than the base's: the results are for the base's ids, "
             "but users of this artifact feed it other ids")
    return agrees


def _run(job: Chunks, runtime: Runtime, base: Runtime | None, is_base: bool, calibration_overlap: float) -> Text:
    """The metrics of one text, with the per-token values that paired comparisons need."""
    n = job.ids.shape[1] - 1 - job.first
    shape = (len(job.ids), n)
    vocab = _vocabulary(int(job.ids.max()), runtime, base)
    nll, kld = np.empty(shape, np.float32), np.zeros(shape, np.float32)
    top1, base_nll = np.ones(shape, bool), np.empty(shape, np.float32)
    with progress(f"evaluating {job.protocol.text}, chunk", len(job.ids)) as p:
        for i, ids in enumerate(job.ids):
            targets = ids[job.first + 1 :]
            got = _logits(runtime, ids, job.first, vocab)
            nll[i] = metrics.nll(got, targets)
            if base:
                wanted = _logits(base, ids, job.first, vocab)
                base_nll[i] = metrics.nll(wanted, targets)
                kld[i], top1[i] = metrics.divergence(wanted, got)
            p.step(f"perplexity {np.exp(nll[: i + 1].mean(dtype=np.float64)):.3f}"
                   + (f"  KLD {kld[: i + 1].mean():.4f}" if base else ""))
    known = base is not None or is_base
    found = metrics.summarise(nll, job.protocol.bytes, kld if known else None, top1 if known else None,
                              (nll if is_base else base_nll) if known else None)
    arrays: dict[Value, np.ndarray] = {"nll": nll, "kld": kld, "top1": top1} if known else {"nll": nll}
    return {"protocol": job.protocol.as_dict(vocab), **found,
            "per_token": {k: report.pack(v) for k, v in arrays.items()}, "calibration_overlap": calibration_overlap}


def _run_task(task: task_items.Task, tokenizer: Tokenizer, runtime: Runtime, base: Runtime | None,
              is_base: bool, calibration_overlap: float) -> Task:
    """The metrics of one task, with the per-item values that paired comparisons need."""
    runtimes = [runtime, *([base] if base else [])]
    prepared = tasks.prepare(task, tokenizer, min(tasks.WINDOW, *(r.context for r in runtimes)))
    if prepared.cut:
        warn(f"{prepared.cut} items of {task.name} do not fit {prepared.window} tokens: their beginning is cut off")
    vocab = _vocabulary(prepared.highest, runtime, base)
    measures = task_items.KINDS[task.name].measures
    values: list[list[dict[str, Any]]] = [[] for _ in runtimes]
    with progress(f"evaluating {task.name}, item", len(task.items)) as p:
        for item, requests in zip(task.items, prepared.requests, strict=True):
            for one, out in zip(runtimes, values, strict=True):
                out.append(tasks.judge(item, *tasks.score(requests, partial(_logits, one, vocab=vocab)), measures))
            p.step(" against ".join(f"{np.mean([v['acc'] for v in out]):.1%}" for out in values))
    artifact_values, *base_values = [tasks.gather(v) for v in values]
    reference = artifact_values if is_base else base_values[0] if base_values else None
    return tasks.section(prepared, vocab, artifact_values, reference, calibration_overlap)


def _vocabulary(highest: int, runtime: Runtime, base: Runtime | None) -> int:
    """Number of tokens that both models have. Raises UserError if one of them lacks the id `highest`."""
    vocab = min(runtime.vocab_size, base.vocab_size if base else runtime.vocab_size)
    if highest >= vocab:
        raise UserError(f"the text has the token id {highest}, but the smaller model has only {vocab} tokens",
                        "check that the artifact was made from this base")
    return vocab


def _logits(runtime: Runtime, ids: np.ndarray, first: int, vocab: int) -> np.ndarray:
    """Logits float32 [scored, vocab] of one chunk, from position `first`. The last token is not fed: no token follows it.

    Raises UserError for NaN or infinite logits.
    """
    logits = runtime.logits(ids[:-1], first)[:, :vocab]
    if not np.isfinite(logits).all():
        raise UserError(f"the {runtime.name} runtime gave NaN or infinite logits",
                        "the artifact is damaged, or its float type overflows: make it again")
    return logits
