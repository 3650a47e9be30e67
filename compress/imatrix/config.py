"""The options of `llmc imatrix`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmc import options
from llmc.compress import shared_options as shared
from llmc.options import check


@dataclass(frozen=True, kw_only=True)
class ImatrixConfig:
    """The options of `llmc imatrix` and `llmc.imatrix`."""

    calibration: str = shared.calibration()
    samples: int = shared.samples("Number of calibration sequences. llama.cpp calls them chunks.")
    seq_len: int = shared.seq_len()
    seed: int = shared.seed()
    device: str = shared.device()
    threads: int | None = options.threads()
    out: Path | None = options.out("File to write.", "MODEL-imatrix.gguf")
    resume: bool = shared.resume()
    dry_run: bool = options.dry_run()

    def __post_init__(self) -> None:
        check(self, "imatrix")

    def numbers(self) -> dict[str, Any]:
        """The options that affect the result, for manifests and for the fingerprint of `--resume`."""
        deciding = asdict(self)
        for name in ("out", "resume", "dry_run"):
            del deciding[name]
        return deciding
