"""What can be asked of `llmc generate`. The command line takes its names and defaults from here."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.errors import UserError


@dataclass(frozen=True)
class GenerateConfig:
    """`llmc generate`."""

    max_tokens: int = 64
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    seed: int = 0
    chat: bool = False
    """Put the prompt through the chat template; otherwise it is continued as it is."""
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens {self.max_tokens} is out of range: at least 1", "try --max-tokens 64")
        if not 0 <= self.temperature <= 10:
            raise UserError(f"--temperature {self.temperature} is out of range: 0 to 10", "try --temperature 0.7")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads {self.threads} is out of range: at least 1", "try --threads 1")
        if self.device not in ("cpu", "gpu"):
            raise UserError(f"--device {self.device!r} is not known", "choose cpu or gpu")
