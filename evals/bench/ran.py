"""What really ran, in few words, of what a runtime says of itself."""

from __future__ import annotations

from typing import Any


def ran(runtime: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp: {'offloaded_layers', 'layers', 'buffers' (MiB of weights by backend), 'instruction_sets'}; onnxruntime:
    {'nodes': {execution provider: how many}}; torch: {'device', 'instruction_sets'}."""
    if "nodes" in runtime:
        return {"nodes": {provider: sum(operators.values()) for provider, operators in runtime["nodes"].items()}}
    build = runtime.get("build", {})
    if "offloaded_layers" in runtime:
        # what is no instruction set is a library or an option
        sets = [k for k, v in build.items() if v == "1" and k not in ("LLAMAFILE", "OPENMP", "REPACK", "ACCELERATE")]
        return {"offloaded_layers": runtime["offloaded_layers"], "layers": runtime.get("layers"),
                "buffers": runtime.get("buffers", {}), "instruction_sets": sets}
    return {"device": runtime.get("device"), "instruction_sets": [str(v) for v in build.values()]}


def words(found: dict[str, Any]) -> str:
    """'31 of 31 layers offloaded; AVX2 AVX512', '120 nodes on CPUExecutionProvider'."""
    if "nodes" in found:
        return ", ".join(f"{n} nodes on {provider}" for provider, n in found["nodes"].items())
    parts = []
    if "offloaded_layers" in found:
        parts.append(f"{found['offloaded_layers']} of {found['layers']} layers offloaded")
        parts += [f"{mib:.0f} MiB in {name}" for name, mib in found["buffers"].items()]
    else:
        parts.append(str(found["device"]))
    return "; ".join([*parts, " ".join(found["instruction_sets"])]).rstrip("; ")
