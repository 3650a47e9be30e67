"""Chat templates that loop, recurse or explode are stopped. Jinja's sandbox keeps them from the system, not from taking time
and memory."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmc.errors import UserError

SECONDS = 10.0
MEMORY = 1 << 30  # bytes that a rendering may take
MOST = 4_000_000, 20  # characters of the result: this many, and this many times the messages
HINT = "give another template (--chat-template FILE of `llmc export`), or leave the template out"


class SlowTemplateError(Exception):
    """Raised inside a rendering that takes too long."""


def render_within_limits(render: Callable[[], str], given: int, where: str) -> str:
    """What `render` returns. Raises UserError if it fails, takes too much time or memory, or makes too long a result.

    given: characters of the messages. where: what the error names.
    """
    from jinja2 import TemplateError

    try:
        with _limited_memory(), _limited_time():
            text = render()
    except SlowTemplateError as e:
        raise UserError(f"{where}: the chat template was stopped after {SECONDS:g} seconds", HINT) from e
    except OverflowError as e:  # jinja's own limit on range()
        raise UserError(f"{where}: the chat template was stopped: {e}", HINT) from e
    except MemoryError as e:
        raise UserError(f"{where}: the chat template was stopped: it needs more than {MEMORY >> 20:,} MB", HINT) from e
    except RecursionError as e:
        raise UserError(f"{where}: the chat template was stopped: it calls itself without end", HINT) from e
    except (TemplateError, TypeError, KeyError, IndexError, ValueError, AttributeError, ArithmeticError) as e:
        raise UserError(f"{where}: the model's chat template refused the messages: {e}", "check roles and contents") from e
    if len(text) > MOST[0] + MOST[1] * given:
        raise UserError(f"{where}: the chat template made {len(text):,} characters of {given:,}", HINT)
    return text


@contextmanager
def _limited_time() -> Iterator[None]:
    """Raise SlowTemplateError in this thread after SECONDS, between two steps of Python."""
    thread = ctypes.c_ulong(threading.get_ident())
    lock, over, fired, raised = threading.Lock(), False, False, False

    def stop() -> None:
        nonlocal fired
        with lock:
            if not over:
                fired = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(SlowTemplateError))

    timer = threading.Timer(SECONDS, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except SlowTemplateError:
        raised = True
        raise
    finally:
        timer.cancel()
        with lock:
            over = True
        # One on its way is let arrive. Taking it back would leave Python's mark that something is pending set for good: it
        # is slower then, and Python 3.11 hangs under a tracer.
        with suppress(SlowTemplateError):
            while fired and not raised:
                time.sleep(0.001)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """A limit on the addresses of this process, where the system has one (Linux)."""
    status = Path("/proc/self/statm")
    try:
        import resource

        used = int(status.read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [n for n in (soft, hard, used + MEMORY) if n != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
