"""Text generation with an artifact, token by token, in any runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.machine import physical_cores
from llmc.runtimes.base import Runtime
from llmc.runtimes.config import GenerateConfig
from llmc.runtimes.open import open_runtime
from llmc.runtimes.trial import try_first

TEMPLATE_ROOM = 1024  # tokens that a chat template may put around the prompt


def generate(artifact: Path, prompt: str, config: GenerateConfig,
             show: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Continue `prompt`; call `show` with each new piece of text. The same seed gives the same text.

    Returns {text, tokens, prompt_tokens, stopped: 'end of text' or 'max tokens', first_token_s, tokens_per_second}.
    """
    room = len(prompt.encode()) + TEMPLATE_ROOM + config.max_tokens  # a token is at least a byte
    try_first(artifact)
    runtime = open_runtime(artifact, room, config.threads or physical_cores(), config.device)
    try:
        return _generate(runtime, prompt, config, show)
    finally:
        runtime.close()


def _generate(runtime: Runtime, prompt: str, config: GenerateConfig, show: Callable[[str], None]) -> dict[str, Any]:
    text = _chat(runtime, prompt) if config.chat else prompt
    ids = runtime.tokenize(text, special=not config.chat)  # a template writes its own BOS
    if len(ids) == 0:
        raise UserError("the prompt is empty and this tokenizer adds no token before it", "give a prompt")
    end, rng = runtime.end_tokens, np.random.default_rng(config.seed)
    start = perf_counter()
    token = choose(runtime.prefill(ids), config.temperature, rng)
    first = perf_counter()
    prefix = ids.tolist()
    known = runtime.detokenize(prefix)
    out: list[int] = []
    shown = 0
    while token not in end:
        out.append(token)
        # detokenized together with the prompt, since some tokenizers drop the space before the first word
        written = runtime.detokenize(prefix + out)[len(known):]
        if not written.endswith("\ufffd"):  # an incomplete character: wait for its other bytes
            show(written[shown:])
            shown = len(written)
        if len(out) == config.max_tokens:
            break
        token = choose(runtime.decode(token), config.temperature, rng)
    seconds = perf_counter() - first
    written = runtime.detokenize(prefix + out)[len(known):]
    show(written[shown:])
    return {"text": written, "tokens": len(out), "prompt_tokens": len(ids),
            "stopped": "max tokens" if len(out) == config.max_tokens else "end of text",
            "first_token_s": first - start, "tokens_per_second": (len(out) - 1) / seconds if len(out) > 1 else None}


def _chat(runtime: Runtime, prompt: str) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return runtime.chat(prompt)
    except (TemplateError, TypeError, KeyError, IndexError, ValueError, AttributeError, ArithmeticError) as e:
        # TemplateError: the sandbox's SecurityError too
        raise UserError(f"the artifact's chat template cannot be rendered: {e}",
                        "leave out --chat: the prompt is continued as it is") from e


def choose(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """The most likely token at temperature 0, else a sample from softmax(logits / temperature); logits [vocab]."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    # Gumbel trick: argmax of logits plus Gumbel noise is a sample from their softmax
    return int((scaled + rng.gumbel(size=len(scaled))).argmax())
