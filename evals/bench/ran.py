"""What really ran, in few words, of what a runtime says of itself."""

from __future__ import annotations

from llmc.evals.report.schema import Ran, RuntimeFacts


def ran(runtime: RuntimeFacts) -> Ran:
    """By the runtime's kind: see the comments of `Ran`."""
    if "nodes" in runtime:
        return {"nodes": {provider: sum(operators.values()) for provider, operators in runtime["nodes"].items()}}
    build: dict[str, str] = runtime.get("build", {})
    if "offloaded_layers" in runtime:
        # what is no instruction set is a library or an option
        sets = [k for k, v in build.items() if v == "1" and k not in ("LLAMAFILE", "OPENMP", "REPACK", "ACCELERATE")]
        return {"offloaded_layers": runtime["offloaded_layers"], "layers": runtime.get("layers"),
                "buffers": runtime.get("buffers", {}), "instruction_sets": sets}
    return {"device": runtime.get("device"), "instruction_sets": [str(v) for v in build.values()]}
