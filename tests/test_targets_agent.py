"""The zip that runs on devices: complete, small, the same bytes each time."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

from llmc.runtimes.targets import agent

# Everything else of llmc on this machine is hidden: the hook of an editable install, PYTHONPATH (by -E), the working folder
IMPORT = """
import importlib, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in (getattr(f, "__module__", "") or "") + repr(f)]
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    assert importlib.import_module(name).__file__.startswith(sys.argv[1]), name
heavy = {"torch", "transformers", "psutil", "typer", "pydantic", "safetensors", "gguf"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_every_module_imports_from_the_zip_alone(tmp_path: Path) -> None:
    path = agent.write(tmp_path)
    subprocess.run([sys.executable, "-E", "-P", "-c", IMPORT, str(path), *agent.modules()], check=True, cwd=tmp_path)
    assert path.stat().st_size < 200_000


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    assert agent.build() == agent.build()
    with zipfile.ZipFile(agent.write(tmp_path)) as z:
        assert {i.date_time for i in z.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert z.namelist() == sorted(z.namelist())


def test_orders_come_by_stdin(tmp_path: Path) -> None:
    """A job longer than a command line may be."""
    order = {"module": "llmc.runtimes.on_device.needs", "job": {"ids": list(range(100_000))}}
    done = subprocess.run([sys.executable, "-E", "-P", str(agent.write(tmp_path))], input=json.dumps(order) + "\n", text=True,
                          stdout=subprocess.PIPE, check=True)
    assert json.loads(done.stdout)["packages"]["numpy"]
