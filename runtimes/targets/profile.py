"""Device profiles: facts about a device that is not available here. Each figure has its public source.

There is one TOML file for each device, in `profiles/`. A figure is `{value, url, says}`. A `[[measured]]` table is a
published measurement of speed on the device. The files have no rates: `achieved` computes them from those measurements.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from llmc.errors import UserError

FIGURES = ("cores", "ram", "bandwidth", "layer_seconds")


@dataclass(frozen=True)
class Figure:
    """A number, the address of its source, and the statement of the source."""

    value: float
    url: str
    says: str


@dataclass(frozen=True)
class Measured:
    """A published measurement. decode, prefill: tokens/s. token_bytes: weights that a decoded token reads.

    type: GGUF's name of the most frequent weight type in the file. prefill_parameters: weights used by every prompt token
    (without embedding and head).
    """

    model: str
    type: str
    url: str
    says: str
    token_bytes: int | None = None
    prefill_parameters: int | None = None
    layers: int = 0
    prompt: int | None = None
    prefill: float | None = None
    decode: float | None = None


@dataclass(frozen=True)
class Profile:
    """A device. ram in bytes, bandwidth in bytes/s, layer_seconds: a layer's overhead for a decoded token.

    like: the id of a device whose rates, scaled by the bandwidths, are used if this device has no measurements.
    """

    id: str
    name: str
    unit: str
    """'cpu' or 'gpu': the unit that computes."""
    cores: Figure
    ram: Figure
    bandwidth: Figure
    layer_seconds: Figure | None
    features: tuple[str, ...]
    features_url: str
    measured: tuple[Measured, ...]
    like: str | None = None

    def achieved(self) -> list[tuple[Measured, float]]:
        """The bytes of weights read per second in each decoding measurement, without the overhead of the layers."""
        cost = self.layer_seconds.value if self.layer_seconds else 0.0
        return [(m, m.token_bytes / (1 / m.decode - m.layers * cost)) for m in self.measured if m.decode and m.token_bytes]

    def matmul(self) -> list[tuple[Measured, float]]:
        """The flop per second in each prefill measurement, without attention (1-2 % at these lengths)."""
        return [(m, 2.0 * m.prefill_parameters * m.prefill) for m in self.measured if m.prefill and m.prefill_parameters]


def profile_ids() -> list[str]:
    """The ids of the shipped profiles."""
    folder = resources.files("llmc.runtimes.targets").joinpath("profiles")
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def read_profile(id: str) -> Profile:
    """The shipped profile with that id."""
    if id not in profile_ids():
        raise UserError(f"there is no device profile {id!r}", f"choose one of {', '.join(profile_ids())}")
    path = resources.files("llmc.runtimes.targets").joinpath("profiles", f"{id}.toml")
    return parse(id, tomllib.loads(path.read_text(encoding="utf-8")))


def parse(id: str, content: dict[str, Any]) -> Profile:
    """The profile in a TOML file's content; raises UserError for a figure without a source."""
    figures = {name: _figure(id, name, content[name]) for name in FIGURES if name in content}
    known = {f.name for f in fields(Profile)} - {"id"}
    if unknown := set(content) - known:
        raise UserError(f"profile {id}: unknown {', '.join(sorted(unknown))}", f"a profile has {', '.join(sorted(known))}")
    points = tuple(Measured(**m) for m in content.get("measured", []))
    for p in points:
        if not p.url.startswith("https://") or not p.says:
            raise UserError(f"profile {id}: {p.model} has no source", "give url and says")
    if not points and "like" not in content:
        raise UserError(f"profile {id} has no measured point", "give [[measured]], or `like` another profile")
    return Profile(id=id, **{"layer_seconds": None, **content, **figures, "features": tuple(content["features"]),
                             "measured": points})


def _figure(id: str, name: str, given: Any) -> Figure:
    if not isinstance(given, dict) or set(given) != {"value", "url", "says"} or not given["url"].startswith("https://"):
        raise UserError(f"profile {id}: {name} has no source",
                        f"write {name} = {{ value = NUMBER, url = \"https://ADDRESS\", says = \"TEXT\" }}")
    return Figure(float(given["value"]), given["url"], given["says"])
