"""The first run of an artifact from elsewhere, in a child process: `python -m llmc.runtimes.trial ARTIFACT`.

llama.cpp and onnxruntime are native code: a damaged file can make them abort, and then no Python code runs any more. A child
that dies is one clear error. What can be checked in the metadata is checked before (llmc/formats/gguf_check.py).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from llmc.errors import UserError
from llmc.files import sha256
from llmc.formats.artifacts.table import artifact_at, format_of
from llmc.formats.manifest import read_manifest
from llmc.runtimes.llamacpp import LlamaCpp, check_loads
from llmc.runtimes.open import open_runtime
from llmc.temporary import final_name

CONTEXT = 8
SLOWEST = 20_000_000  # bytes per second of a slow disk
PATIENCE = 60  # seconds, beside the time to read the file
LOAD, RUN = "load", "run"  # what is done with a file without its name
HASHED = 1 << 30  # a larger file is tried without a look at its hash


def try_first(artifact: Path) -> None:
    """Raise UserError if the artifact's runtime dies of it. Artifacts that llmc made, or that torch runs, are not tried."""
    kind = format_of(artifact)
    if kind is None or not kind.packages or not artifact.exists() or _ours(artifact):
        return
    _try(artifact, artifact, sum(p.stat().st_size for p in artifact_at(artifact).weight_files()))


def try_unfinished(path: Path, run: bool) -> None:
    """Raise UserError if llama.cpp dies of a .gguf file that has a temporary name. run: also run it, with its weights."""
    _try(final_name(path), path, path.stat().st_size, RUN if run else LOAD)


def _try(artifact: Path | str, opened: Path, size: int, *words: str) -> None:
    """Run this module on the file `opened` of `size` bytes. artifact: its name in errors. words: further arguments."""
    try:
        # -P: do not import a folder called llmc in the working folder
        child = subprocess.run([sys.executable, "-P", "-m", __name__, str(opened), *words], stdin=subprocess.DEVNULL,
                               capture_output=True, timeout=PATIENCE + size / SLOWEST, check=False)
    except subprocess.TimeoutExpired as e:
        raise UserError(f"the runtime of {artifact} did not answer in {e.timeout:.0f} seconds",
                        "download or export it again") from e
    if child.returncode < 0 or child.returncode > 255:  # Windows gives numbers above 0xC0000000
        lines = [line for line in child.stderr.decode(errors="replace").splitlines() if "llmc" not in line and line.strip()]
        raise UserError(f"the runtime died of {artifact}: {_name(child.returncode)}"
                        + (f" ({lines[-1].strip()[:200]})" if lines else ""),
                        "the file is damaged or its runtime does not support it: download or export it again")


def _ours(artifact: Path) -> bool:
    """Whether llmc made the artifact and it is unchanged: then its export has run it."""
    manifest = read_manifest(artifact)
    outputs = (manifest or {}).get("outputs")
    files = artifact_at(artifact).deciding_files()
    if not isinstance(outputs, dict) or sum(p.stat().st_size for p in files) > HASHED:
        return False
    return {sha256(p) for p in files} <= set(map(str, outputs.values()))


def _name(code: int) -> str:
    if code > 0:
        return f"exception 0x{code:X}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


def main() -> None:
    """Open the artifact, tokenize and run one token. An error that Python can tell is told by the parent: exit code 0."""
    try:
        path, unfinished = Path(sys.argv[1]), sys.argv[2:]
        if unfinished == [LOAD]:
            check_loads(path)
            return
        runtime = LlamaCpp(path, CONTEXT, 1) if unfinished else open_runtime(path, CONTEXT, 1)
        runtime.prefill(np.zeros(1, np.int32))
        sorted(runtime.end_tokens)
        runtime.detokenize(runtime.tokenize("a b").tolist())
        runtime.close()
    except UserError as e:
        print(json.dumps({"problem": e.problem}))


if __name__ == "__main__":
    main()
