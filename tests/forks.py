"""Runs `llmc` many times, each time in a fork of one process that has imported its packages, and watches how it ends.

`python forks.py` is that process: it reads a list of orders as one line of JSON and answers with a list of ends. It has no
threads when it forks: a fork of a process in which OpenMP ran would hang.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "safetensors.torch", "numpy", "gguf", "llama_cpp", "onnx", "onnxruntime", "tokenizers",
            "yaml", "tomlkit", "jinja2", "transformers.models.llama.modeling_llama", "transformers.pytorch_utils",
            "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto")
AT_ONCE = 2
SECONDS = 60.0
MEMORY = 2 << 30  # bytes that a command may hold
ROOM = 3 << 30  # bytes of addresses that it may take: this machine outlives it


@dataclass(frozen=True)
class Order:
    """A command line for `llmc`, and its working folder. Its output goes to FOLDER.out. call: the function that is run."""

    folder: str
    arguments: tuple[str, ...]
    call: str = "llmc.cli:main"
    seconds: float = SECONDS


@dataclass(frozen=True)
class End:
    """How a command ended. signal: what ended it, 0: nothing.  memory: peak, in bytes.  late: it was stopped."""

    code: int
    signal: int
    memory: int
    seconds: float
    late: bool


def run(orders: list[Order]) -> list[End]:
    """Run them, AT_ONCE at a time."""
    ends: dict[int, End] = {}
    begun: dict[int, tuple[int, float]] = {}  # process -> number of the order, and when
    late: set[int] = set()
    while len(ends) < len(orders):
        while len(begun) < AT_ONCE and len(begun) + len(ends) < len(orders):
            number = len(begun) + len(ends)
            begun[_start(orders[number])] = (number, time.monotonic())
        process, status, usage = os.wait4(-1, os.WNOHANG)
        if process:
            number, since = begun.pop(process)
            code, by = os.waitstatus_to_exitcode(status), 0
            if code < 0:
                code, by = 0, -code
            _import(Path(f"{orders[number].folder}.modules"))
            ends[number] = End(code, by, usage.ru_maxrss * 1024, time.monotonic() - since, process in late)
            _end(process)  # its children
            continue
        for process, (number, since) in begun.items():
            spent, most = time.monotonic() - since, orders[number].seconds
            if spent > most and spent - _waited(process) > most:
                late.add(process)
                _end(process)
        time.sleep(0.003)
    return [ends[i] for i in range(len(orders))]


def _waited(process: int) -> float:
    """Seconds that a process was ready and other ones had the processors: on a busy machine that is no hang."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except OSError:  # a kernel that does not count it
        return 0.0


def _import(found: Path) -> None:
    """Import what a command imported, so that the next ones need not. Commands import half of what they use when they use it,
    and that took a quarter of their time."""
    if not found.exists():
        return
    for name in found.read_text(encoding="utf-8").split():
        with suppress(Exception):  # a module that can be imported only after something else was done
            importlib.import_module(name)
    found.unlink()
    _settle()


def _settle() -> None:
    """What is in memory now stays as it is in each fork: it is not collected, and not taken apart at the end."""
    gc.freeze()
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]  # there is no public list
        finalizer.atexit = False


def _end(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _start(order: Order) -> int:
    """Fork. The child never returns."""
    if child := os.fork():
        os.setpgid(child, child)
        return child
    os.setpgid(0, 0)
    os.chdir(order.folder)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(f"{order.folder}.out", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    for number, file in enumerate((nothing, out, out)):
        os.dup2(file, number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = ["llmc", *order.arguments]
    known = set(sys.modules)
    module, _, name = order.call.partition(":")
    code: Any = 0
    try:
        getattr(importlib.import_module(module), name)()
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    if new := [n for n in sys.modules if n not in known and code in (0, 2)]:
        Path(f"{order.folder}.modules").write_text("\n".join(new), encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # to take all modules apart would last longer than most commands


# ---------------------------------------------------------------------------------------- ends that a test of the suite needs


def die() -> None:
    """As native code dies."""
    os.abort()


def wait() -> None:
    time.sleep(60)


def forget() -> None:
    raise KeyError("x")


def hold() -> None:
    """Take more memory than is allowed."""
    kept = b"x" * (MEMORY + (100 << 20))
    sys.exit(2 if kept else 0)


class Forks:
    """The process that forks, and what is asked of it."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                            "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen([sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=env)

    def run(self, orders: list[Order]) -> list[End]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([asdict(o) for o in orders]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the process that forks ended with {self.process.wait()}"
        return [End(**e) for e in json.loads(answer)]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from llmc.privacy import telemetry_off

    telemetry_off()  # before onnxruntime is imported
    from llmc.closure import imports, modules

    for name in (*PACKAGES, *(m for m in modules() if not m.endswith("__main__") and ".on_device" not in m)):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    for name in modules():
        imports(name)  # cached: a fingerprint parses them
    _settle()
    for line in sys.stdin:
        orders = [Order(**{**o, "arguments": tuple(o["arguments"])}) for o in json.loads(line)]
        print(json.dumps([asdict(e) for e in run(orders)]), flush=True)


if __name__ == "__main__":
    main()
