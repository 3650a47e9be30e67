"""The streams and signals of a process that runs `llmc`: closed and narrow outputs, a terminal that goes away, `kill`."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import select
import signal
import sys
from types import FrameType
from typing import TextIO

from llmc.console import tell
from llmc.machine import WINDOWS

_received = 0  # the signal that stops this process; 0: none


def prepare() -> None:
    """Make stdout and stderr usable whatever they are, and let SIGHUP and SIGTERM stop the work as Ctrl-C does."""
    _open_closed()
    import codecs

    codecs.register_error("json", _as_json)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Windows code page lacks ± and →; llmc reads its files as UTF-8
            stream.reconfigure(encoding="utf-8" if WINDOWS and stream is sys.stdout else None, errors="json")
    for name in ("SIGHUP", "SIGTERM"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP: that stays
            signal.signal(number, _stop)


def interrupted() -> int:
    """The exit code of an interrupted command, as shells count: 128 and the number of the signal."""
    return 128 + (_received or signal.SIGINT)


def finish() -> bool:
    """Write what is still held back. False if it cannot be written. It is no error if nobody reads it (`llmc … | head`)."""
    whole = True
    for stream in _outputs():
        try:
            stream.flush()
        except OSError as e:
            if not reader_left(e):
                tell(f"error: the output cannot be written: {e.strerror}\n")
                whole = False
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python would complain at its own last flush
    return whole


def _outputs() -> list[TextIO]:
    """stdout and stderr, and what click puts in their place when a pipe breaks."""
    found = (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__)
    return list({id(s): s for s in found if s is not None}.values())


def reader_left(error: BaseException) -> bool:
    """Whether an error can say that nobody reads an output any more."""
    gone = (errno.EPIPE, errno.EIO, *([errno.EINVAL] if WINDOWS else []))  # EIO: the terminal was closed
    return isinstance(error, OSError) and error.errno in gone and error.filename is None


def output_failed() -> bool:
    """Whether stdout or stderr cannot be written any more."""
    for stream in _outputs():
        try:
            stream.flush()
        except OSError:
            return True
        with contextlib.suppress(OSError, ValueError):  # a stream without a file, in tests
            if hasattr(select, "poll"):  # what could not be written is no longer held back: ask the pipe itself
                asked = select.poll()
                asked.register(stream.fileno(), 0)
                if any(event & select.POLLERR for _, event in asked.poll(0)):
                    return True
    return False


def _stop(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
    for name in ("SIGHUP", "SIGTERM"):  # a second one, while a command cleans up, changes nothing
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    raise KeyboardInterrupt


def _open_closed() -> None:
    """Put /dev/null where a stream is closed (`llmc … >&-`): else the next file that is opened would get its number, and what
    a library prints would be written into it."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the whole process
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _as_json(error: UnicodeError) -> tuple[str, int]:
    """A character that an output's encoding lacks, as JSON writes it: the JSON that a command prints stays as it was."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start:error.end])[1:-1], error.end
