"""`llmc doctor`: what is installed, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from llmc import machine
from llmc.files import cache_folder, existing
from llmc.privacy import telemetry_off
from llmc.sources.llama_cpp import PACKAGE, SETUP, find_converter

# {extra: {distribution: module that must import}}
PACKAGES = {
    "core": {"torch": "torch", "transformers": "transformers", "safetensors": "safetensors", "numpy": "numpy",
             "accelerate": "accelerate", "jinja2": "jinja2", "psutil": "psutil"},
    "gguf": {"gguf": "gguf", "llama-cpp-python": "llama_cpp", "sentencepiece": "sentencepiece",
             "protobuf": "google.protobuf"},
    "onnx": {"onnx": "onnx", "onnx-ir": "onnx_ir", "onnxruntime": "onnxruntime",
             "onnxruntime-genai": "onnxruntime_genai"},
    "distill": {"peft": "peft"},
    "trace": {"onnxscript": "onnxscript"},
    "optimum": {"optimum-onnx": "optimum.exporters.onnx"},
}
INSTALL = {"core": "pip install --force-reinstall llmc-toolkit", "gguf": "pip install 'llmc-toolkit[gguf]'",
           "onnx": "pip install 'llmc-toolkit[onnx]'", "distill": "pip install 'llmc-toolkit[distill]' (for --lora)",
           "trace": "pip install 'llmc-toolkit[trace]' (for --exporter transformers)",
           "optimum": "pip install 'llmc-toolkit[optimum]' in an environment of its own: it needs transformers 4.57"}


def examine() -> dict[str, Any]:
    """Everything that `llmc doctor` reports.

    Returns {'ok' (the core works), 'machine', 'devices', 'disk' (bytes free), 'runtimes' (None: not installed), 'packages',
    'converter' (folder of llama.cpp's converter, None: not set up), 'missing' (each {'what', 'why', 'install'})}.
    """
    telemetry_off()
    packages = {extra: {d: _package(d, module) for d, module in group.items()} for extra, group in PACKAGES.items()}
    problems = {extra: {d: p["problem"] for d, p in group.items() if p["problem"]} for extra, group in packages.items()}
    ok = not problems["core"]
    converter = find_converter()
    missing = [{"what": ", ".join(broken), "why": "; ".join(broken.values()), "install": INSTALL[extra]}
               for extra, broken in problems.items() if broken]
    if converter is None and _works(packages, PACKAGE):
        missing.append({"what": "llama.cpp's converter", "install": SETUP,
                        "why": "llama.cpp's converter, for GGUF files of architectures that llmc does not write itself"})
    runtimes = {name: look() if _works(packages, d) else None for name, (d, look) in RUNTIMES.items()}
    return {
        "ok": ok,
        "machine": {**machine.describe(), "memory_available": machine.free_memory()},
        "devices": runtimes["torch"]["devices"] if runtimes["torch"] else [],
        "disk": {"here": shutil.disk_usage(Path.cwd()).free, "cache": _free(cache_folder())},
        "runtimes": runtimes,
        "packages": packages,
        "converter": None if converter is None else str(converter),
        "missing": missing,
    }


def _package(distribution: str, module: str) -> dict[str, str | None]:
    """{'version' (None: not installed), 'problem' (why its module cannot be imported, or None)}."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return {"version": None, "problem": f"{distribution} is not installed"}
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as e:  # a shared library may be missing or made for another machine
        return {"version": version, "problem": f"{distribution} {version} does not load: {e}"}
    return {"version": version, "problem": None}


def _torch() -> dict[str, Any]:
    """The threads, CPU kernels and accelerators that torch uses."""
    import torch

    devices: list[dict[str, Any]] = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append({"device": f"cuda:{i}", "name": p.name, "memory": p.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU", "memory": torch.mps.recommended_max_memory()})
    kernels = torch.backends.cpu.get_cpu_capability()
    return {"threads": torch.get_num_threads(), "cpu_kernels": kernels, "devices": devices}


def _llama_cpp() -> dict[str, Any]:
    """The build of llama.cpp: whether it can use a GPU, and the features it was built with."""
    import llama_cpp

    build = re.findall(r"(\w+) = 1", llama_cpp.llama_print_system_info().decode())
    return {"gpu": bool(llama_cpp.llama_supports_gpu_offload()), "build": build}


def _onnxruntime() -> dict[str, Any]:
    from llmc.runtimes.onnx_session import library

    return {"providers": library().get_available_providers()}


# {runtime: (distribution that it needs, function that describes it)}
RUNTIMES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "torch": ("torch", _torch), "llama.cpp": ("llama-cpp-python", _llama_cpp), "onnxruntime": ("onnxruntime", _onnxruntime),
}


def _works(packages: dict[str, dict[str, dict[str, str | None]]], distribution: str) -> bool:
    return any(distribution in group and group[distribution]["problem"] is None for group in packages.values())


def _free(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist."""
    return shutil.disk_usage(existing(folder)).free


def describe(report: dict[str, Any]) -> str:
    """The report as a page of plain text."""
    from llmc.console import size

    m, disk = report["machine"], report["disk"]
    lines = [
        f"machine    {m['cpu']}, {m['system']}",
        f"cores      {m['physical_cores']}, {m['logical_cores']} logical, {m['usable_cores']} used by default",
        f"features   {' '.join(m['cpu_features']) or 'unknown on this system'}",
        f"memory     {size(m['memory'])}, {size(m['memory_available'])} available",
        f"disk       {size(disk['here'])} free here, {size(disk['cache'])} free for the cache",
    ]
    for d in report["devices"]:
        lines.append(f"device     {d['device']}: {d['name']}, {size(d['memory'])}")
    if not report["devices"]:
        lines.append("device     cpu only: torch finds neither CUDA nor MPS")
    for name, runtime in report["runtimes"].items():
        lines.append(f"runtime    {name}: " + (_one_line(runtime) if runtime else "not installed"))
    lines.append(f"converter  {report['converter'] or 'not set up'}")
    for extra, group in report["packages"].items():
        found = [f"{d} {p['version']}" for d, p in group.items() if not p["problem"]]
        lines.append(f"{extra:<10} {', '.join(found) or 'nothing'}")
    for absent in report["missing"]:
        lines.append(f"missing    {absent['why']}\n           next: {absent['install']}")
    lines.append("the core works" if report["ok"] else "the core does not work: see what is missing")
    return "\n".join(lines)


def _one_line(runtime: dict[str, Any]) -> str:
    texts = {k: " ".join(v) if isinstance(v, list) else v for k, v in runtime.items() if k != "devices"}
    return ", ".join(f"{k} {v}" for k, v in texts.items())
