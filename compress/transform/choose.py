"""`llmc quantize --transform`: make the transform, and for auto measure and choose one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmc.compress import forward as measure
from llmc.compress.ends import is_tied
from llmc.compress.quantize.assignment import type_for
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.skeleton import Skeleton
from llmc.compress.text import Calibration, held_out
from llmc.compress.transform.config import CALIBRATED, TARGET, TransformConfig
from llmc.compress.transform.roles import family_of
from llmc.compress.transform.run import make
from llmc.compress.unfinished import fingerprint
from llmc.console import say
from llmc.errors import UserError
from llmc.files import read_note, write_sealed
from llmc.formats.manifest import passes_of
from llmc.formats.source import hash_source
from llmc.machine import torch_device
from llmc.temporary import remove

HELD_SHARE, HELD_MOST = 8, 16  # an eighth of the calibration sequences is held out, at most 16
CANDIDATES = ("none", "scaling", "rotate", "rotate+scaling")


@dataclass(frozen=True)
class Choice:
    """folder: the float model to quantize.  passes: its transforms, for the manifest.  record: {'asked', 'taken', 'why',
    'rotation', 'measured' (with auto {candidate: {'kld', 'se'}}, else None)}."""

    folder: Path
    passes: list[dict[str, Any]]
    record: dict[str, Any]


def choose(source: Path, skeleton: Skeleton, config: QuantizeConfig, calibration: Calibration, threads: int,
           work: Path) -> Choice:
    """Make the transform of config.transform in the folder `work`. With config.resume, finished folders there are used again.
    UserError if the architecture is unknown."""
    family_of(skeleton.config)  # raises UserError
    if not config.resume:
        remove(work)
    rotation, reason = free_rotation(skeleton)
    maker = _Maker(source, config, threads, work, rotation)
    record: dict[str, Any] = {"asked": config.transform, "rotation": rotation}
    if config.transform != "auto":
        name, why = config.transform, "as asked" if config.transform == "scaling" else f"as asked; {rotation}: {reason}"
        maker.make(name, calibration)
        return maker.choice(name, {**record, "taken": name, "why": why, "measured": None})
    say(f"rotation {rotation}: {reason}")
    learn, held = split(calibration)
    measured = maker.measure(learn, held)
    taken = min(measured, key=lambda n: measured[n]["kld"])
    figures = ", ".join(f"{n} {m['kld']:.4g}" for n, m in measured.items())
    why = (f"lowest KL divergence from the base when rounded to {config.type or type_for(config, 0).name}, on "
           f"{held.sequences.shape[0]} held-out calibration sequences: {figures}")
    say(f"--transform auto takes {taken}: {why}")
    for name in set(CANDIDATES) - {taken}:
        remove(work / name)
    return maker.choice(taken, {**record, "taken": taken, "why": why, "measured": measured})


def free_rotation(skeleton: Skeleton) -> tuple[str, str]:
    """Returns (the rotation that adds no bytes to the file, the reason)."""
    family = family_of(skeleton.config)
    if family.unrotatable:
        return "r2", f"the residual stream cannot be rotated, {family.unrotatable}"
    if is_tied(skeleton):
        return "r2", "rotating the residual stream would untie the head from the embedding"
    return "r1r2", "the head is already a separate matrix"


def split(calibration: Calibration) -> tuple[Calibration, Calibration]:
    """Returns (the sequences for the search, the held-out sequences). The latter are evenly spaced over the text."""
    n = calibration.sequences.shape[0]
    if n < 2:
        raise UserError("--transform auto holds out a part of the calibration text, and there is only one sequence",
                        "use --samples 16 or more")
    count = min(HELD_MOST, max(1, n // HELD_SHARE))
    held = held_out(n, count)
    rest = [i for i in range(n) if i not in held]

    def part(rows: list[int]) -> Calibration:
        sequences = calibration.sequences[rows]
        return Calibration(sequences, {**calibration.origin, "samples": len(rows), "tokens": sequences.numel(),
                                       "of_samples": n})

    return part(rest), part(held)


class _Maker:
    """Makes candidates in the folder `work` and measures them. A resumed run uses both again."""

    def __init__(self, source: Path, config: QuantizeConfig, threads: int, work: Path, rotation: str) -> None:
        self.source, self.config, self.threads, self.work, self.rotation = source, config, threads, work, rotation

    def make(self, name: str, calibration: Calibration) -> Path:
        """Make the folder of a candidate. 'rotate+scaling' starts from the folder of 'rotate'."""
        folder, c = self.work / name, self.config
        same = {n: getattr(c, n) for n in (*TARGET, *CALIBRATED, "seed", "device", "threads")}
        same["bits"], same["resume"] = c.code_bits, True  # without --resume, `choose` has emptied the folder
        if name == "none":
            return self.source
        if name == "rotate":
            make(self.source, folder, TransformConfig(scaling="none", rotate=self.rotation, **same), None, self.threads)
        else:
            start = self.make("rotate", calibration) if name == "rotate+scaling" else self.source
            make(start, folder, TransformConfig(scaling="awq", rotate="none", **same), calibration, self.threads)
        return folder

    def choice(self, name: str, record: dict[str, Any]) -> Choice:
        folder = self.source if name == "none" else self.work / name
        passes = [] if name == "none" else passes_of(folder)[len(passes_of(self.source)):]
        return Choice(folder, passes, record)

    def measure(self, learn: Calibration, held: Calibration) -> dict[str, dict[str, Any]]:
        """{candidate: {'kld', 'se' (standard error of the mean over sequences)}} of the model, rounded to nearest in the
        target type."""
        path = self.work / "figures.json"
        key = fingerprint(__name__, self.config.numbers(), self.threads, hash_source(self.source), held)
        found = read_note(path)
        measured: dict[str, dict[str, Any]] = found["measured"] if found.get("key") == key else {}
        base: measure.Run | None = None
        device, ids = str(torch_device(self.config.device)), held.sequences
        for name in (n for n in CANDIDATES if n not in measured):
            base = base or measure.run(self.source, ids, device, None, "the base")
            rounded = measure.run(self.make(name, learn), ids, device, partial(type_for, self.config), name)
            values = measure.kld(base, rounded)
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
            measured[name] = {"kld": mean, "se": (variance / len(values)) ** 0.5 if len(values) > 1 else None}
            write_sealed(path, {"key": key, "measured": measured})
        return {n: measured[n] for n in CANDIDATES}
