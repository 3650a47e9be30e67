"""The options of `llmc fit`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from llmc import options
from llmc.errors import UserError
from llmc.options import ADVANCED, Wrong, check, fitting, option


@dataclass(frozen=True)
class FitConfig:
    """The options of `llmc fit`. Sizes and shares are texts: '2GB', '90MB', '80%'. A limit of None is not checked."""

    items: tuple[Path, ...] = option(
        (), help=".gguf files, ONNX folders, and reports of `llmc eval` and `llmc bench`.", argument=True,
        metavar="ARTIFACT-or-REPORT")
    target: tuple[str, ...] = option(
        (), help="Name of a target or of a device profile (pi5, m2). The option may be repeated.", metavar="NAME",
        shown="local-cpu")
    _: KW_ONLY
    min_decode: float | None = option(None, help="Smallest decode speed at --context, in tokens per second.", metavar="TOK/S")
    max_first_token: float | None = option(
        None, help="Longest time to the first token after --prompt tokens, in seconds.", metavar="S")
    max_kld: float | None = option(
        None, help="Largest mean KL divergence to the base, on the worst text, in nats.", metavar="NATS")
    max_kld_p99: float | None = option(
        None, help="Largest KL divergence that 99 % of the tokens may reach, on the worst text, in nats.", metavar="NATS")
    max_kld_p999: float | None = option(
        None, help="Largest KL divergence that 99.9 % of the tokens may reach, on the worst text, in nats.", metavar="NATS")
    min_top1: str | None = option(None, help="Smallest top-1 agreement with the base.", metavar="80%")
    max_ram: str | None = option(None, help="Largest amount of memory at --context.", metavar="2GB")
    max_size: str | None = option(None, help="Largest size of the file.", metavar="90MB")
    context: int = option(
        2048, help="Number of tokens in the KV cache. Memory and decode speed are estimated for it.", low=8, group=ADVANCED)
    prompt: int = option(512, help="Number of tokens in the prompt.", low=1, group=ADVANCED)
    targets: Path | None = options.targets()

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(Path(i) for i in self.items))
        object.__setattr__(self, "target", fitting(tuple[str, ...], self.target))
        check(self, "fit", word=Wrong.out_of_range)
        if not self.items:
            raise UserError("no artifact to check", "give .gguf files, ONNX folders or reports")
