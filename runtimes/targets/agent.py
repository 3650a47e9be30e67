"""What of llmc runs on a device: a zip of the few modules that measure there, which Python runs as it is.

They need numpy and the runtime of the artifact (llama-cpp-python, or onnxruntime and onnx), none of llmc's other packages.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import tempfile
import zipfile
from pathlib import Path

# What `Device.start` may run there, and what these import only when they need it. Their imports at module level come along.
ENTRIES = (
    "llmc.runtimes.on_device.bench", "llmc.runtimes.llamacpp", "llmc.runtimes.onnx_model", "llmc.runtimes.on_device.logits",
    "llmc.runtimes.on_device.needs", "llmc.runtimes.on_device.probe", "llmc.runtimes.on_device.facts",
    "llmc.machine",
)
MAIN = "llmc.runtimes.on_device.main"  # becomes the zip's __main__.py


def source(module: str) -> Path:
    """The file of one of llmc's modules, which is not imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin)


def modules() -> list[str]:
    """ENTRIES and all of llmc that they import at module level, sorted."""
    found: set[str] = set()
    todo = list(ENTRIES)
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += _imports(module)
    return sorted(found)


def _imports(module: str) -> list[str]:
    """Modules of llmc (packages left out) that a module imports when it is imported itself."""
    names: list[str] = []
    for node in ast.parse(source(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
    return [n for n in names if n.startswith("llmc.") and _is_module(n)]


def _is_module(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a name inside a module: its parent is no package
        return False
    return spec is not None and spec.submodule_search_locations is None


def build() -> bytes:
    """The zip, the same bytes for the same sources: names sorted, no times, nothing compressed."""
    wanted = modules()
    packages = {name.rsplit(".", n)[0] for name in wanted for n in range(1, name.count(".") + 1)}
    files = {f"{p.replace('.', '/')}/__init__.py": b"" for p in packages}
    files |= {f"{m.replace('.', '/')}.py": source(m).read_bytes() for m in wanted}
    files["__main__.py"] = source(MAIN).read_bytes()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        for name, data in sorted(files.items()):
            z.writestr(zipfile.ZipInfo(name), data)  # ZipInfo's own time is the first of 1980
    return out.getvalue()


def write(folder: Path | None = None) -> Path:
    """The zip as a file named by its sha256, in `folder` or a fresh temporary one."""
    data = build()
    path = (folder or Path(tempfile.mkdtemp(prefix="llmc-agent-"))) / f"{hashlib.sha256(data).hexdigest()[:16]}.zip"
    path.write_bytes(data)
    return path
