"""Targets as text, for `llmc target ls` and `llmc target show`."""

from __future__ import annotations

from llmc.console import size
from llmc.runtimes.targets.target import Target


def row(target: Target) -> list[str]:
    """A line of `llmc target ls`."""
    f = target.facts
    return [target.name, target.address, f.get("cpu", "–"), str(f.get("usable_cores", "–")),
            size(f["memory"]) if "memory" in f else "–", f"{size(f['read_bandwidth'])}/s" if "read_bandwidth" in f else "–",
            f.get("probed", "never")[:10]]


def lines(target: Target) -> str:
    """The text of `llmc target show`."""
    f = target.facts
    settings = {k: v for k, v in target.as_dict().items() if k not in ("name", "facts") and v is not None}
    found = [target.name, *(f"  {k:<13} {v}" for k, v in settings.items())]
    if not f:
        return "\n".join([*found, f"  not probed: `llmc target probe {target.name}` measures it"])
    gpus = [f"{g['name']} ({g['backend']})" for g in f.get("gpus", [])]
    power = f"power {f['power']}" if f.get("power") else ""
    heat = f"{f['temperature_c']:.0f} °C" if f.get("temperature_c") is not None else ""
    governor = f"governor {f['governor']}" if f.get("governor") else ""
    facts = {
        "system": f["system"], "CPU": f["cpu"],
        "cores": f"{f['physical_cores']}, {f['logical_cores']} logical, {f['usable_cores']} used by default",
        "features": " ".join(f["cpu_features"]), "memory": size(f["memory"]),
        "GPU": ", ".join(gpus) or "none that a runtime can use",
        "state": ", ".join(filter(None, (governor, heat, power))),
        "reads": "", "multiplies": "", "probed": f["probed"],
    }
    if "read_bandwidth" in f:  # not measured on Android
        facts["reads"] = f"{size(f['read_bandwidth'])}/s of weights with {f['usable_cores']} threads"
        facts["multiplies"] = f"{f['matmul_flops'] / 1e9:.0f} Gflop/s in float32"
    return "\n".join([*found, *(f"  {k:<13} {v}" for k, v in facts.items() if v)])
