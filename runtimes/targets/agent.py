"""The agent: a zip of the few modules of llmc that measure on a device. Python runs the zip directly.

They need numpy and the artifact's runtime (llama-cpp-python, or onnxruntime and onnx), but none of llmc's other packages.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import zipfile
from pathlib import Path

from llmc import closure
from llmc.runtimes import on_device, open
from llmc.runtimes.on_device import main

NOT_THERE = ("llmc.runtimes.torch_model",)  # a device has no torch


def modules() -> list[str]:
    """The names of the agent's modules, sorted: those that `Device.start` runs, the runtimes, and their imports."""
    runtimes = set(closure.imports(open.__name__)) - set(NOT_THERE)
    return closure.closure([*closure.modules(on_device.__name__)[1:], *runtimes], nested=False)


def build() -> bytes:
    """The bytes of the zip. They are the same for the same sources: sorted names, no times, no compression."""
    wanted = modules()
    packages = {name.rsplit(".", n)[0] for name in wanted for n in range(1, name.count(".") + 1)}
    files = {f"{p.replace('.', '/')}/__init__.py": b"" for p in packages}
    files |= {f"{m.replace('.', '/')}.py": closure.source(m).read_bytes() for m in wanted}
    files["__main__.py"] = closure.source(main.__name__).read_bytes()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        for name, data in sorted(files.items()):
            z.writestr(zipfile.ZipInfo(name), data)  # ZipInfo's default time is always 1 January 1980
    return out.getvalue()


def write(folder: Path | None = None) -> Path:
    """Write the zip, named by its sha256, into `folder` or a new temporary folder; return its path."""
    data = build()
    path = (folder or Path(tempfile.mkdtemp(prefix="llmc-agent-"))) / f"{hashlib.sha256(data).hexdigest()[:16]}.zip"
    path.write_bytes(data)
    return path
