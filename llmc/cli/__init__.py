"""The command line, `llmc COMMAND …`. Each command has a module. This one handles errors, exit codes and verbosity.

Exit codes: 0 done, 1 a gate of `llmc compare` or `llmc ship` failed or nothing fits (`llmc fit`), 2 bad input or environment,
70 a bug in llmc, 130 Ctrl-C (129 SIGHUP, 143 SIGTERM).
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from contextlib import suppress
from types import TracebackType

import typer

from llmc import streams
from llmc.cli.group import Llmc
from llmc.console import set_quiet, tell, terminal
from llmc.errors import UserError

BUG = 70  # EX_SOFTWARE of sysexits.h; Python's own 1 would look like a failed gate
INTERRUPTED = 130  # what typer makes of Ctrl-C

# in errors of torch, C++, ONNX Runtime and llama.cpp
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "bad_alloc", "bad allocation",
                 "Failed to allocate memory", "failed to allocate")
MORE_MEMORY = "use a machine with more memory"
# What lowers the memory that a command needs; the others have no such option.
LESS_MEMORY = {
    **dict.fromkeys(("quantize", "transform", "prune", "imatrix"), "lower --samples or --seq-len"),
    **dict.fromkeys(("heal", "distill"), "lower --batch or --seq-len, or add --checkpointing"),
    **dict.fromkeys(("eval", "compare", "fit"), "lower --context"),
    "bench": "lower --prompt and --depth", "generate": "lower --max-tokens, or give a shorter prompt",
    "run": "use a smaller model, or lower --samples, --batch or --context of the step that failed",
    "sweep": "use a smaller model, or lower --samples, --batch or --context of the step that failed",
}

app = typer.Typer(
    name="llmc", cls=Llmc, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        print(f"llmc {version('llmc-toolkit')}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    verbose: bool = typer.Option(False, "--verbose", help="Show the warnings and logs of the libraries that llmc uses."),
    quiet: bool = typer.Option(False, "--quiet", help="Print only results, warnings and errors."),
) -> None:
    """Make an LLM fit a device: quantize it, export it, and measure the file that ships.

    \b
      llmc quantize MODEL --bits 4          (or --goal gguf: llama.cpp alone)
      llmc export --format gguf -o small.gguf
      llmc eval small.gguf --base MODEL
      llmc bench small.gguf
      llmc compare base.json small.json
    """
    set_quiet(quiet)
    if quiet or not (verbose or terminal()):  # no progress bars of libraries in a log
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not verbose:
        # read by transformers when a command imports it
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        if not sys.warnoptions:
            warnings.simplefilter("ignore")


def _explain(error: BaseException, command: str | None = None) -> UserError | None:
    """The UserError for an error of Python or a library that the user can fix; None for a bug."""
    if isinstance(error, UserError):
        return error
    text = str(error)
    # torch and safetensors raise errors of their own for both conditions: only the text tells them
    no_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if no_memory or any(words in text for words in OUT_OF_MEMORY):
        return UserError("out of memory", f"close other programs, or {LESS_MEMORY.get(command or '', MORE_MEMORY)}")
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in text:
        return UserError(f"the disk is full: {text}", "free some space or choose another disk with -o")
    if isinstance(error, PermissionError):
        return UserError(f"no permission: {text}", "check who owns it, or choose another place with -o")
    outside = (errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP)
    if isinstance(error, OSError) and error.errno in outside:
        return UserError(text, "choose another place or a shorter name")
    return None


class _Boundary:
    """Turns every exception of a command into lines on stderr and an exit code. A bug keeps its traceback."""

    code = 0

    def __init__(self, command: str | None) -> None:
        self.command = command

    def __enter__(self) -> _Boundary:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        # click turns a broken pipe, whosever it is, into an exit with 1
        cause = error.__context__ if isinstance(error, SystemExit) else error
        if isinstance(cause, OSError) and cause.filename is None and streams.output_failed():
            return True  # `streams.finish` says what there is to say: nothing, if nobody wants the rest
        if error is None or isinstance(error, SystemExit):
            return False
        if isinstance(error, KeyboardInterrupt):
            self.code = INTERRUPTED
        elif show := getattr(error, "show", None):  # a usage error of click, or of the click inside newer typers
            with suppress(OSError):
                show()
            self.code = 2
        elif (known := _explain(error, self.command)) is not None:
            tell(f"error: {known.problem}\n" + (f"next: {known.hint}\n" if known.hint else ""))
            self.code = known.exit_code
        else:
            tell("".join(traceback.format_exception(error)))
            tell("This is a bug in llmc: please report it with the lines above.\n")
            self.code = BUG
        return True


def run(args: list[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    given = sys.argv[1:] if args is None else args
    with _Boundary(next((a for a in given if not a.startswith("-")), None)) as boundary:
        # Outside standalone mode typer returns the code of typer.Exit, and turns Ctrl-C into Exit(130); commands
        # themselves return None.
        boundary.code = app(args, prog_name="llmc", standalone_mode=False) or 0
    if boundary.code == INTERRUPTED:
        boundary.code = streams.interrupted()
        tell("interrupted; no half-written artifact was left\n")
    return boundary.code


def main() -> None:
    """The `llmc` command."""
    streams.prepare()
    code = run()
    sys.exit(code if streams.finish() else code or 2)
