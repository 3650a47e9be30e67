"""The embedding and the head of a model: whether they are tied, and where the checkpoint stores the head."""

from __future__ import annotations

from llmc.compress.skeleton import Skeleton
from llmc.errors import UserError


def is_tied(skeleton: Skeleton) -> bool:
    """Whether embedding and head are one matrix."""
    return bool(getattr(skeleton.config, "tie_word_embeddings", False))


def name_of(skeleton: Skeleton, module: object) -> str:
    """The name of the weight of `module`, one of the model's modules."""
    return next(n for n, m in skeleton.model.named_modules() if m is module) + ".weight"


def stored_head(skeleton: Skeleton) -> str:
    """The checkpoint's name of an untied head. UserError if it cannot be found.

    transformers renames some heads as it loads them (GPT-NeoX's embed_out becomes lm_head). Then the head is the one matrix
    of its shape that is not the embedding.
    """
    model, checkpoint = skeleton.model, skeleton.checkpoint
    head = model.get_output_embeddings()
    if found := skeleton.names.find(name_of(skeleton, head)):
        return found
    shape, embedding = tuple(head.weight.shape), skeleton.names.find(name_of(skeleton, model.get_input_embeddings()))
    alike = [n for n in checkpoint.names() if checkpoint.shape(n) == shape and n != embedding]
    if len(alike) != 1:
        raise UserError(f"config.json of {checkpoint.folder} says that the head is a separate matrix, and {len(alike)} "
                        f"tensors could be it", "download the model again, or correct tie_word_embeddings")
    return alike[0]
