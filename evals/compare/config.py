"""The options of `llmc compare`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from llmc import options
from llmc.options import ADVANCED, Wrong, check, fitting, option


@dataclass(frozen=True)
class CompareConfig:
    """The options of `llmc compare`. Gates are texts with a unit: '5%', '0.1', '80%', '2x'."""

    reports: tuple[Path, ...] = option(
        help="Reports of `llmc eval` and `llmc bench`. The first is the baseline.", argument=True, metavar="REPORT")
    _: KW_ONLY
    max_ppl_increase: str | None = option(
        None, help="Gate: largest increase of perplexity over the baseline.", metavar="5%")
    max_kld: str | None = option(None, help="Gate: largest mean KL divergence to the base, in nats.", metavar="0.1")
    max_kld_p99: str | None = option(
        None, help="Gate: largest KL divergence that 99 % of the tokens may reach, in nats.", metavar="1")
    max_kld_p999: str | None = option(
        None, help="Gate: largest KL divergence that 99.9 % of the tokens may reach, in nats.", metavar="3")
    min_top1: str | None = option(None, help="Gate: smallest top-1 agreement with the base.", metavar="80%")
    min_decode_speedup: str | None = option(
        None, help="Gate: smallest decode speed, relative to the baseline.", metavar="2x")
    page: Path = option(Path("compare.html"), help="HTML page to write.", metavar="FILE")
    target: tuple[str, ...] = option(
        (), help="Target or device profile. Speeds that were not measured on it are estimated. The option may be repeated.",
        metavar="NAME", group=ADVANCED)
    targets: Path | None = options.targets()
    context: int = option(2048, help="Number of tokens in the KV cache, for estimates.", low=8, group=ADVANCED)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", fitting(tuple[str, ...], self.target))
        check(self, "compare", word=Wrong.out_of_range)
