"""The embedding and the head of a model: whether they are tied, and where the checkpoint stores the head."""

from __future__ import annotations

from llmc.compress.skeleton import Skeleton


def is_tied(skeleton: Skeleton) -> bool:
    """Whether embedding and head are one matrix."""
    return skeleton.ends.says_tied


def name_of(skeleton: Skeleton, module: object) -> str:
    """The name of the weight of `module`, one of the model's modules."""
    return next(n for n, m in skeleton.model.named_modules() if m is module) + ".weight"


def stored_head(skeleton: Skeleton) -> str:
    """The checkpoint's name of an untied head."""
    assert skeleton.ends.head is not None, "the head is tied"
    return skeleton.ends.head
