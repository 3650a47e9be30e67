"""A run that is stopped on the way and goes on writes the same bytes as one that nothing stopped.

`interrupted` stops a run in this process, `Command.kill` one in a process of its own. `resumed` is the whole check.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from llmc.cli import run
from llmc.formats.manifest import hash_folder


@dataclass
class Said:
    """What a command that went well printed."""

    stdout: str
    stderr: str


class Command:
    """`llmc ARGUMENTS -o OUT`: run in this process, or killed in one of its own."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = [*map(str, arguments), "-o"]

    def __call__(self, out: Path, resume: bool = False) -> Said:
        with redirect_stdout(StringIO()) as stdout, redirect_stderr(StringIO()) as stderr:
            code = run([*self.arguments, str(out), *["--resume"] * resume])
        assert code == 0, stderr.getvalue()
        return Said(stdout.getvalue(), stderr.getvalue())

    def kill(self, out: Path, sign: str, by: int = signal.SIGKILL, seconds: float = 300) -> tuple[int, str]:
        """Run it and send a signal as soon as `out`'s folder holds something like the pattern `sign`.

        By default nothing of the process gets to clean up, as after a power cut. Returns its exit code and stderr.
        """
        with tempfile.TemporaryFile() as err:
            process = subprocess.Popen([sys.executable, "-P", "-m", "llmc", *self.arguments, str(out)],
                                       stdout=subprocess.DEVNULL, stderr=err)
            try:
                deadline = time.monotonic() + seconds
                while not any(out.parent.glob(sign)):
                    assert process.poll() is None, "it ended before it could be killed"
                    assert time.monotonic() < deadline, f"no {sign} after {seconds} s"
                    time.sleep(0.002)
                process.send_signal(by)
                process.wait(seconds)
            finally:
                process.kill()
                process.wait()
            err.seek(0)
            return process.returncode, err.read().decode()


HOLD = """
import pathlib, sys
from llmc.locks import locked
with locked(pathlib.Path(sys.argv[1]), inside=len(sys.argv) > 2):
    print(flush=True)
    input()
"""


@contextmanager
def holding(path: Path, inside: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock of `path` until it reads a line."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path), *["inside"] * inside], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "\n"
        yield other
        other.kill()


@contextmanager
def interrupted(owner: Any, name: str, layer: int | None = None) -> Iterator[None]:
    """The run in this block must end in a KeyboardInterrupt, which the first call of `owner.name` raises.

    owner: a module or a class. layer: only the call of a method with this number as its first argument raises.
    """
    real = getattr(owner, name)

    def stop(*args: Any, **options: Any) -> Any:
        if layer is None or args[1] == layer:
            raise KeyboardInterrupt
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            yield


def contents(artifact: Path) -> bytes | dict[str, str]:
    """What two equal artifacts share: a file's bytes, or the SHA-256 of each file of a folder but the manifest."""
    return artifact.read_bytes() if artifact.is_file() else hash_folder(artifact)


def resumed(make: Callable[..., Any], folder: Path, stop: AbstractContextManager[None] | Callable[[Path], Any],
            suffix: str = "", left: str | None = None) -> tuple[Any, Any]:
    """Make an artifact in one go, and another that is stopped and resumed: both must have the same bytes.

    make: makes the artifact `out`, and goes on with it if `resume` is given. Its two results are returned.
    folder: where `whole` and `killed`, with `suffix`, are written.
    stop: `interrupted`, around `make`, or what starts and kills a run that makes the path it is given.
    left: a file of `folder` that must be there between the two.
    """
    whole, killed = folder / f"whole{suffix}", folder / f"killed{suffix}"
    first = make(out=whole)
    if isinstance(stop, AbstractContextManager):
        with stop:
            make(out=killed)
    else:
        stop(killed)
    assert not killed.exists()
    assert left is None or (folder / left).exists()
    again = make(out=killed, resume=True)
    assert contents(killed) == contents(whole)
    assert not list(folder.glob(".killed*"))
    return first, again
