"""Sessions of onnxruntime: opening one, its errors, and the nodes that ran."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.formats.genai_config import AGAIN, QDQ_LEVEL
from llmc.formats.onnx_folder import INSTALL, OnnxFolder
from llmc.privacy import telemetry_off

CPU = "CPUExecutionProvider"
GPUS = {  # in order of preference, with the memory that onnxruntime lets Python bind
    "CUDAExecutionProvider": "cuda", "MIGraphXExecutionProvider": "cpu", "ROCMExecutionProvider": "cpu",
    "WebGpuExecutionProvider": "cpu", "DmlExecutionProvider": "cpu", "CoreMLExecutionProvider": "cpu",
}
OPTIONS = {"graph_optimization_level": "ORT_ENABLE_ALL", "execution_mode": "ORT_SEQUENTIAL", "inter_op_num_threads": 1}
DATA_FOLDER = "session.model_external_initializers_file_folder_path"  # needed if the graph is given as bytes


def library() -> Any:
    """The package onnxruntime, with its telemetry off. Every module of llmc that needs it imports it here."""
    telemetry_off()
    try:
        import onnxruntime
    except (ImportError, OSError) as e:  # not installed, or its shared library does not load here
        raise UserError(f"running an ONNX folder needs the package `onnxruntime` ({e})", INSTALL) from e
    onnxruntime.disable_telemetry_events()  # builds for Windows do not read the environment
    return onnxruntime


def genai_library() -> Any:
    """The package onnxruntime-genai, with its telemetry off."""
    library()  # it loads onnxruntime too
    import onnxruntime_genai

    if hasattr(onnxruntime_genai, "disable_telemetry_events"):  # from 0.18 on
        onnxruntime_genai.disable_telemetry_events()
    return onnxruntime_genai


def moe_activations() -> list[str]:
    """The activations that the documentation of the operator for quantized experts names."""
    library()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    schema = next(s for s in state.get_all_operator_schema() if s.name == "QMoE")
    return re.findall(r"[a-z]+", schema.attributes["activation_type"].description.partition("from")[2].partition(".")[0])


def gpu_provider() -> str:
    """The GPU execution provider of the installed onnxruntime."""
    available = library().get_available_providers()
    for provider in GPUS:
        if provider in available:
            return provider
    raise UserError(f"--device gpu: the installed onnxruntime has only {', '.join(available)}",
                    "use --device cpu, or install a build for your GPU, such as onnxruntime-gpu")


def open_session(source: OnnxFolder, provider: str, threads: int, profile: Path) -> Any:
    """A session that profiles its runs, until end_profiling, into a file whose name begins with `profile`.

    Of the folder's session options it uses only the accuracy level of DequantizeLinear and MatMul: no other option changes
    the results."""
    ort = library()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = OPTIONS["inter_op_num_threads"]
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, str(OPTIONS["graph_optimization_level"]))
    options.execution_mode = getattr(ort.ExecutionMode, str(OPTIONS["execution_mode"]))
    options.add_session_config_entry(QDQ_LEVEL, str(source.qdq_level))
    options.log_severity_level = 3  # errors only; they are also raised
    options.enable_profiling, options.profile_file_prefix = True, str(profile)
    graph: str | bytes = str(source.model)
    if source.edited:
        graph = source.proto.SerializeToString()
        options.add_session_config_entry(DATA_FOLDER, str(source.folder))
    try:
        return ort.InferenceSession(graph, options, providers=list(dict.fromkeys([provider, CPU])))
    except errors() as e:
        raise UserError(f"onnxruntime cannot load {source.model}: {first_line(e)}", AGAIN) from e


def ran(profile: Path) -> dict[str, dict[str, int]]:
    """The nodes that ran according to an onnxruntime profile, after graph optimization.

    Returns {execution provider: {operator: number of nodes}}."""
    events = [e for e in json.loads(profile.read_text(encoding="utf-8"))
              if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    counts = {p: Counter(e["args"]["op_name"] for e in events if e["args"]["provider"] == p)
              for p in sorted({e["args"]["provider"] for e in events})}
    return {p: dict(sorted(c.items())) for p, c in counts.items()}


def errors() -> tuple[type[Exception], ...]:
    """onnxruntime's exception classes. They have no common base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception))


def first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0]
