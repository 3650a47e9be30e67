"""Calibration text sampled from the model, if there is no text and no network.

Liu et al., "LLM-QAT: Data-Free Quantization Aware Training", 2023 (arXiv:2305.17888), section 2.1: sampled text covers what
the model has learned. Each sequence starts with the model's start token and one token drawn uniformly from the vocabulary, so
that the sequences differ. The rest is sampled at temperature 1.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from llmc.console import progress
from llmc.formats.kv import bytes_at, shape_of_config

PROCESS = 500_000_000  # bytes of Python, torch and transformers


def sampling_bytes(config: Any, parameters: int, seq_len: int, batch: int) -> int:
    """The peak of memory for `sample_from_model` on the CPU: the whole model in bfloat16, the KV cache of a batch, the logits
    of a batch. config: a Hugging Face config. parameters: number of weights."""
    text = config.get_text_config()
    shape = shape_of_config(text.to_dict())
    each = bytes_at(shape, seq_len, "f16") if shape else 4 * text.hidden_size * text.num_hidden_layers * seq_len
    return 2 * parameters + batch * (each + 16 * text.vocab_size) + PROCESS


@torch.no_grad()
def sample_from_model(model: nn.Module, tokenizer: Any, samples: int, seq_len: int, seed: int, batch: int) -> torch.Tensor:
    """Sample int64 [samples, seq_len] on the CPU, `batch` sequences at a time, with the model's cache if it has one.

    The result is reproducible for the same model, seed, batch and thread count, because the generator is local.
    """
    from transformers import Cache

    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = embedding.weight.shape[0]
    vocabulary = min(len(tokenizer), rows)  # a tokenizer may have added tokens that the model does not know
    ordinary = torch.ones(vocabulary)
    ordinary[special[special < vocabulary]] = 0
    # A Cache that a model returns under the name of one of its arguments: past_key_values, in Mamba cache_params. (RWKV's
    # state is no Cache: in transformers 5.23 it is right for one sequence, and mixes those of a batch.)
    takes = set(inspect.signature(model.forward).parameters)
    done = []
    with progress("sampling calibration text, token", seq_len * -(-samples // batch)) as p:
        for first in range(0, samples, batch):
            n = min(batch, samples - first)
            ids = torch.multinomial(ordinary, n, replacement=True, generator=generator)[:, None]
            if tokenizer.bos_token_id is not None:
                ids = torch.cat([torch.full((n, 1), tokenizer.bos_token_id), ids], dim=1)
            feed, cache = ids, dict[str, Any]()
            p.step(n=ids.shape[1])
            while ids.shape[1] < seq_len:
                out = model(feed.to(device), use_cache=True, **cache)
                cache = {name: out[name] for name in out if name in takes and isinstance(out[name], Cache)}
                probabilities = torch.softmax(out.logits[:, -1].float().cpu(), dim=-1)
                probabilities[:, vocabulary:] = 0  # padding rows of the head are not tokens
                chosen = torch.multinomial(probabilities, 1, generator=generator)
                ids = torch.cat([ids, chosen], dim=1)
                feed = chosen if cache else ids
                p.step()
            done.append(ids[:, :seq_len])
    return torch.cat(done)
