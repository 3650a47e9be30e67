"""Zero-shot tasks scored by log-likelihood, as EleutherAI's lm-evaluation-harness 0.4 scores them.

The score of an answer is the sum of its token log-probabilities after its context. `acc`: the share of items whose right
answer has the highest score. `acc_norm`: the same after each score is divided by the answer's length in characters. LAMBADA
has one answer, the last word of the text: `acc` is the share of items for which greedy decoding gives it, `perplexity` is exp
of its mean negative log-likelihood. Deviations: BOS is added only if the tokenizer adds it. The window has at most WINDOW
tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from llmc.errors import UserError
from llmc.evals.quality import metrics
from llmc.evals.quality.protocol import Tokenizer
from llmc.evals.quality.task_items import Item, Task
from llmc.evals.report import schema
from llmc.evals.report.schema import (
    Accuracy,
    ItemsProtocol,
    Packed,
    PerItem,
    Stat,
    TaskDifference,
    TaskMetrics,
    TokenStat,
)
from llmc.evals.report.store import pack, unpack

WINDOW = 2048  # largest number of tokens fed to a model at once; items of these tasks have a few hundred

Values = dict[str, np.ndarray]
"""Values of each item: acc bool [n]; if the task has them, acc_norm bool [n] and nll float32 [n], nats."""
Ask = Callable[[np.ndarray, int], np.ndarray]
"""(ids int [n], first) -> logits float32 [n - 1 - first, vocab] that predict ids[first + 1:]."""


@dataclass(frozen=True)
class Prepared:
    """A task as token ids. requests: for each answer of each item, its ids int32 [n] and how many of the last ids are scored.
    n is at most window + 1, because the last id is not fed."""

    task: Task
    protocol: ItemsProtocol
    requests: list[list[tuple[np.ndarray, int]]]
    window: int
    cut: int
    """Number of items that lost tokens on the left."""

    @property
    def highest(self) -> int:
        return max(int(ids.max()) for item in self.requests for ids, _ in item)


# ----------------------------------------------------------------------------------------------------------- scoring


def encode(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[np.ndarray, int]:
    """Return ids int32 [n] of context + continuation, with BOS if the tokenizer adds it, and the number of ids of the
    continuation.

    White space at the end of the context belongs to the continuation, because the token of a word includes the space before
    it. The whole is encoded at once and split at the length of the encoded context.
    """
    stripped = context.rstrip()
    whole, head = tokenizer.encode(context + continuation), tokenizer.encode(stripped)
    n = len(whole) - len(head)
    if tokenizer.bos is not None:
        whole = np.concatenate([np.array([tokenizer.bos], dtype=np.int32), whole])
    return whole, n


def prepare(task: Task, tokenizer: Tokenizer, window: int) -> Prepared:
    """Tokenize a task. window: largest number of tokens that both models accept. Longer items are cut on the left.

    Raises UserError for an answer without tokens, or with more tokens than the window.
    """
    digest, cut, requests = hashlib.sha256(), 0, []
    for item in task.items:
        encoded = [encode(tokenizer, *pair) for pair in item.pairs]
        for (ids, n), (_, continuation) in zip(encoded, item.pairs, strict=True):
            if not 0 < n <= min(window, len(ids) - 1):
                raise UserError(f"{task.source}: the answer {continuation!r:.60} has {n} tokens beside its context and "
                                f"must have 1 to {window}", "leave this item out")
        cut += any(len(ids) > window + 1 for ids, _ in encoded)
        requests.append([(ids[-(window + 1) :], n) for ids, n in encoded])
        for ids, n in requests[-1]:
            digest.update(np.array([len(ids), n, *ids], dtype="<i4").tobytes())
    protocol: ItemsProtocol = {
        "task": task.name, "sha256": task.sha256, "items": len(task.items), "of": task.total, "examples": 0,
        "bos": "in front" if tokenizer.bos is not None else "none", "tokenizer_sha256": tokenizer.sha256,
        "ids_sha256": digest.hexdigest()}
    return Prepared(task, protocol, requests, window, cut)


def score(requests: Sequence[tuple[np.ndarray, int]], ask: Ask) -> tuple[np.ndarray, bool]:
    """Return log-likelihoods float64 [answers], nats, and whether greedy decoding gives the first answer.

    Answers with the same fed ids share one run. This is so for one-token answers: they differ only in the last id, which is
    not fed.
    """
    runs: dict[tuple[bytes, int], np.ndarray] = {}
    likelihoods, greedy = np.empty(len(requests)), False
    for i, (ids, n) in enumerate(requests):
        first = len(ids) - 1 - n
        key = (ids[:-1].tobytes(), n)
        if key not in runs:
            runs[key] = ask(ids, first)
        logits, targets = runs[key], ids[first + 1 :]
        likelihoods[i] = -metrics.nll(logits, targets).sum(dtype=np.float64)
        if i == 0:
            greedy = bool(np.array_equal(logits.argmax(axis=1), targets))
    return likelihoods, greedy


def judge(item: Item, likelihoods: np.ndarray, greedy: bool, measures: tuple[str, ...]) -> dict[str, Any]:
    """The values of one item (see Values) from its answers' log-likelihoods."""
    if "perplexity" in measures:
        return {"acc": greedy, "nll": -likelihoods[0]}
    out = {"acc": int(likelihoods.argmax()) == item.gold}
    if "acc_norm" in measures:
        with np.errstate(divide="ignore"):  # an empty answer has the score minus infinity and is never chosen
            out["acc_norm"] = int((likelihoods / np.array(item.lengths)).argmax()) == item.gold
    return out


def gather(values: Sequence[dict[str, Any]]) -> Values:
    """Stack the values of single items into arrays."""
    return {k: np.array([v[k] for v in values], dtype=np.float32 if k == "nll" else bool) for k in values[0]}


# ----------------------------------------------------------------------------------------------------------- metrics


def _error(stat: TokenStat) -> Stat:
    """Drop se_token. It equals se, because items are independent."""
    return {"value": stat["value"], "se": stat["se"]}


def task_metrics(values: Values) -> TaskMetrics:
    """The metrics of one model. se is s / sqrt(n), as in the harness."""
    def share(k: Accuracy) -> Stat | None:
        return _error(metrics.mean(values[k][:, None])) if k in values else None

    return {"acc": share("acc"), "acc_norm": share("acc_norm"),
            "perplexity": _error(metrics.perplexity(values["nll"][:, None])) if "nll" in values else None}


def differences(values: Values, reference: Values) -> TaskDifference:
    """`values` minus `reference`, paired by item."""
    def paired(k: Accuracy) -> Stat | None:
        return _error(metrics.mean(values[k][:, None].astype(np.float64) - reference[k][:, None])) if k in values else None

    ratio = metrics.perplexity_ratio(values["nll"][:, None], reference["nll"][:, None]) if "nll" in values else None
    return {"acc": paired("acc"), "acc_norm": paired("acc_norm"), "perplexity_ratio": _error(ratio) if ratio else None}


def section(prepared: Prepared, vocabulary: int, values: Values, base: Values | None, overlap: float) -> schema.Task:
    """The report section of a task. Later comparisons pair the values of per_item."""
    return {
        "protocol": {**prepared.protocol, "vocabulary": vocabulary}, "source": prepared.task.source,
        "window": prepared.window, "cut": prepared.cut, **task_metrics(values), "base": task_metrics(base) if base else None,
        "difference": differences(values, base) if base else None,
        "per_item": cast(PerItem, {k: pack(v) if k == "nll" else "".join("01"[int(x)] for x in v)
                                   for k, v in values.items()}),
        "calibration_overlap": overlap,
    }


def values_of(entry: schema.Task) -> Values:
    """The values that `section` stored."""
    return {k: np.array([c == "1" for c in v]) if isinstance(v, str) else unpack(cast(Packed, v))
            for k, v in entry["per_item"].items()}
