"""The options of `llmc bench`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from llmc import options
from llmc.errors import UserError
from llmc.evals import shared_options as shared
from llmc.options import ADVANCED, Wrong, check, fitting, option


@dataclass(frozen=True)
class BenchConfig:
    """The options of `llmc bench`. Several artifacts are measured in turns (A B A B), so that a drift of the machine affects
    all of them equally."""

    artifacts: tuple[str, ...] = option(
        help="Model or ONNX folders, .gguf files or hub ids. Several are measured in turns.", argument=True,
        metavar="ARTIFACT")
    _: KW_ONLY
    prompt: tuple[int, ...] = option(
        (512,), help="Number of tokens in the prompt. The main results of a report are those of the first number.", low=1,
        metavar="N,...")
    depth: tuple[int, ...] = option(
        (), help="Number of tokens in the KV cache when decoding begins.", low=0, metavar="N,...", shown="the first --prompt")
    generate: int = option(64, help="Number of tokens to decode.", low=1)
    repetitions: int = option(5, help="Number of measured repetitions.", low=5, group=ADVANCED)
    max_repetitions: int = option(
        15, help="Largest number of repetitions. More than --repetitions are run while the medians are uncertain.",
        group=ADVANCED)
    warmup: int = option(2, help="Number of repetitions before the measured ones.", low=0, group=ADVANCED)
    threads: int | None = options.threads()
    thread_sweep: bool = option(False, help="Also try other numbers of threads, and show the best.", group=ADVANCED)
    device: str = shared.device()
    kv: str | None = shared.kv()
    target: tuple[str, ...] = option(
        (), help="Device to measure on (see `llmc target`). The option may be repeated.", metavar="NAME", shown="local-cpu")
    targets: Path | None = options.targets()
    outputs: tuple[Path, ...] = option(
        (), help="Report to write, one for each artifact. If it holds the same artifact already, the results are added.",
        flags=("--out", "-o"), metavar="FILE")

    def __post_init__(self) -> None:
        for name in ("prompt", "depth"):
            object.__setattr__(self, name, _lengths(f"--{name}", getattr(self, name)))
        object.__setattr__(self, "depth", self.depth or self.prompt[:1])
        object.__setattr__(self, "target", fitting(tuple[str, ...], self.target))
        if self.device == "gpu" and "local-cpu" in self.target:
            raise UserError("--device gpu cannot be combined with --target local-cpu", "use --target local-gpu")
        object.__setattr__(self, "target", self.target or (f"local-{self.device}",))
        below = self.max_repetitions < self.repetitions
        check(self, "bench", [f"--max-repetitions {self.max_repetitions} is out of range: at least --repetitions "
                              f"{self.repetitions}"] if below else [], Wrong.out_of_range)
        if not self.artifacts:
            raise UserError("no artifact to measure", "give a model folder or a .gguf file")
        if self.outputs and len(self.outputs) != len(self.artifacts):
            raise UserError(f"{len(self.artifacts)} artifacts and {len(self.outputs)} report files were given",
                            "give one -o for each artifact, in the same order, or none")


def _lengths(option: str, given: object) -> tuple[int, ...]:
    """Return (128, 512) for '128,512', or for a sequence of such texts or numbers. Duplicates are removed."""
    parts: list[object] = []
    for item in given if isinstance(given, tuple | list) else (given,):
        parts += str(item).split(",")
    try:
        return tuple(dict.fromkeys(int(str(p)) for p in parts))
    except ValueError as e:
        raise UserError(f"{option} {','.join(map(str, parts))} is not a list of token counts",
                        f"write it like {option} 128,512") from e
