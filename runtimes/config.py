"""The options of `llmc generate`."""

from __future__ import annotations

from dataclasses import dataclass

from llmc import options
from llmc.options import RUN, Wrong, check, option


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The options of `llmc generate` and `llmc.generate`."""

    max_tokens: int = option(64, help="Largest number of tokens to generate.", low=1)
    temperature: float = option(0.0, help="Sampling temperature. 0 takes the most likely token each time.", low=0, high=10)
    seed: int = option(0, help="Seed of sampling, for a temperature above 0.")
    chat: bool = option(
        False, help="Put the prompt into the model's chat template (--chat), or continue it as it is (--raw).",
        flags=("--chat/--raw",))
    threads: int | None = options.threads()
    device: str = option("cpu", help="Device to run on.", choices=("cpu", "gpu"), group=RUN)

    def __post_init__(self) -> None:
        check(self, "generate", word=Wrong.out_of_range)
