"""`llmc fit --profiles`: every device profile, with the sources of its values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llmc.evals.fit.estimate import OTHER, rates_of_profile
from llmc.runtimes.targets.profile import FIGURES, profile_ids, read_profile


def profiles_json() -> dict[str, Any]:
    """Return {id: the profile, and the rates computed from it}. Rates are [low, mid, high], in bytes/s and flop/s."""
    out = {}
    for id in profile_ids():
        profile = read_profile(id)
        rates = rates_of_profile(profile)
        out[id] = {**asdict(profile), "rates": {"read": rates.read[OTHER], "flops": rates.flops.get(OTHER)}}
    return out


def profile_lines() -> str:
    """The profiles as text for a terminal."""
    lines = []
    for id in profile_ids():
        p = read_profile(id)
        r = rates_of_profile(p)
        low, mid, high = (v / 1e9 for v in r.read[OTHER])
        lines.append(f"{id}  {p.name}: reads ~{mid:.3g} GB/s of weights ({low:.3g} to {high:.3g})")
        if r.flops:
            low, mid, high = (v / 1e9 for v in r.flops[OTHER])
            lines.append(f"  prefill at ~{mid:.3g} Gflop/s ({low:.3g} to {high:.3g})")
        for name in FIGURES:
            if (f := getattr(p, name)) is not None:
                lines.append(f"  {name} {f.value:g}: {f.says}\n    {f.url}")
        lines.append(f"  features {', '.join(p.features)}\n    {p.features_url}")
        lines += [f"  {m.model} {m.type}: {m.says}\n    {m.url}" for m in p.measured]
    return "\n".join(lines)
