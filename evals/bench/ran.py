"""A short record of what ran (nodes, layers, instruction sets), from the runtime's own description."""

from __future__ import annotations

from llmc.evals.report.schema import Ran, RuntimeFacts


def ran(runtime: RuntimeFacts) -> Ran:
    """Return the keys of `Ran` that the runtime knows. They differ by runtime, see `Ran`."""
    if "nodes" in runtime:
        return {"nodes": {provider: sum(operators.values()) for provider, operators in runtime["nodes"].items()}}
    build: dict[str, str] = runtime.get("build", {})
    if "offloaded_layers" in runtime:
        # these keys are libraries and options, not instruction sets
        sets = [k for k, v in build.items() if v == "1" and k not in ("LLAMAFILE", "OPENMP", "REPACK", "ACCELERATE")]
        return {"offloaded_layers": runtime["offloaded_layers"], "layers": runtime.get("layers"),
                "buffers": runtime.get("buffers", {}), "instruction_sets": sets}
    return {"device": runtime.get("device"), "instruction_sets": [str(v) for v in build.values()]}
