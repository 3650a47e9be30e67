"""Device profiles: what is known of a device that is not at hand, each figure with its public source.

One TOML file a device, in `profiles/`. A figure is `{value, url, says}`; a `[[measured]]` table is a speed that somebody
measured on the device and published. Rates are not written down: they are what those points achieved (`achieved`).
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
    """A number, where it stands, and what is said there."""

    value: float
    url: str
    says: str


@dataclass(frozen=True)
class Measured:
    """A published measurement. decode, prefill: tokens/s. token_bytes: weights that a decoded token reads.

    type: the file's prevailing weight type, as GGUF names it.  prefill_parameters: weights that every prompt token meets
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
    """A device. ram in bytes, bandwidth in bytes/s, layer_seconds: what a layer costs a decoded token beyond its bytes.

    like: the id of the device whose achieved rates stand in, scaled by the bandwidths, where none of its own are known.
    """

    id: str
    name: str
    unit: str
    """'cpu' or 'gpu': what computes."""
    cores: Figure
    ram: Figure
    bandwidth: Figure
    layer_seconds: Figure | None
    features: tuple[str, ...]
    features_url: str
    measured: tuple[Measured, ...]
    like: str | None = None

    def achieved(self) -> list[tuple[Measured, float]]:
        """Bytes of weights read per second in each measured decoding, the layers' own cost taken off."""
        cost = self.layer_seconds.value if self.layer_seconds else 0.0
        return [(m, m.token_bytes / (1 / m.decode - m.layers * cost)) for m in self.measured if m.decode and m.token_bytes]

    def matmul(self) -> list[tuple[Measured, float]]:
        """Floating point operations per second in each measured prefill (attention, 1-2 % at these lengths, left out)."""
        return [(m, 2.0 * m.prefill_parameters * m.prefill) for m in self.measured if m.prefill and m.prefill_parameters]


def profile_ids() -> list[str]:
    """The profiles that are shipped."""
    folder = resources.files("llmc.runtimes.targets").joinpath("profiles")
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def read_profile(id: str) -> Profile:
    """The shipped profile of that id."""
    if id not in profile_ids():
        raise UserError(f"no device profile is named {id!r}", f"choose one of {', '.join(profile_ids())}")
    path = resources.files("llmc.runtimes.targets").joinpath("profiles", f"{id}.toml")
    return parse(id, tomllib.loads(path.read_text(encoding="utf-8")))


def parse(id: str, content: dict[str, Any]) -> Profile:
    """A profile of a TOML file's content; every figure must have its source."""
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
                        f"write {name} = {{ value = …, url = \"https://…\", says = \"…\" }}")
    return Figure(float(given["value"]), given["url"], given["says"])
