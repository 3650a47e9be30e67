"""Runs llama.cpp's converter as a child process: it may abort, hang or print without end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmc.console import say
from llmc.errors import UserError
from llmc.formats.gguf_header import read_header

LAUNCHER = Path(__file__).with_name("launcher.py")
PATIENCE = 600  # seconds that the converter may take, beside those for its weights
SLOWEST = 5_000_000  # bytes of weights per second
TAIL = 65536  # bytes of its messages that are read
BARE = re.compile(r"\w+(Error|Exception)?:?\s*")  # an error without a message


@dataclass(frozen=True)
class Conversion:
    """What the converter said. kinds: the type that it chose for each float tensor. vocabulary: why it could not read the
    tokenizer, and wrote none; '' if it wrote one."""

    kinds: dict[str, str]
    vocabulary: str


def run(script: Path, folder: Path, out: Path, *options: str, pre: str = "", raw: bool = False,
        scoring: str = "") -> Conversion:
    """Convert `folder` to the file `out`.

    pre: the name of the pre-tokenizer; '': the converter finds it. raw: write the tensors in these types, not in float32.
    scoring: what makes scores of a router's outputs, where config.json does not say it; '': the converter's own choice.
    Raises UserError unless the converter wrote a whole file."""
    say(f"running {script}")
    limit = PATIENCE + sum(p.stat().st_size for p in folder.glob("*.safetensors")) / SLOWEST
    spec, found = out.with_suffix(".spec.json"), out.with_suffix(".found.json")
    arguments = [str(folder.resolve()), "--outfile", str(out), *options]
    spec.write_text(json.dumps({"arguments": arguments, "pre": pre, "raw": raw, "scoring": scoring, "found": str(found)}),
                    encoding="utf-8")
    with tempfile.TemporaryFile() as printed:
        try:
            # -P: do not import what lies beside the launcher
            code = subprocess.run(
                [sys.executable, "-P", str(LAUNCHER), str(script.resolve()), str(spec)],
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=printed, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired as e:
            raise UserError(f"llama.cpp's converter did not end on {folder.name} in {limit:,.0f} seconds",
                            f"`python {script} {folder.name}` shows what it does") from e
        printed.seek(max(0, printed.tell() - TAIL))
        lines = [line.strip() for line in printed.read().decode(errors="replace").splitlines() if line.strip()]
    if code or not out.is_file():
        how = f"code {code}" if code >= 0 else f"signal {-code}"
        raise UserError(
            f"llama.cpp's converter failed on {folder.name} ({how}): {_reason(lines)}",
            f"`python {script} {folder.name}` shows its full output; a newer checkout may support the architecture")
    try:
        read_header(out)
    except UserError as e:
        raise UserError(f"llama.cpp's converter wrote a damaged file: {e.problem.rpartition(f'{out} ')[2]}",
                        f"`python {script} {folder.name}` shows its full output") from e
    return Conversion(**json.loads(found.read_text(encoding="utf-8")))


def _reason(lines: list[str]) -> str:
    """The last line that was printed; of an error without a message also the line of code before it."""
    if not lines:
        return "it printed nothing"
    last = lines[-1].removeprefix("ERROR:hf-to-gguf:").rstrip(":")
    code = [line for line in lines[-4:-1] if not line.startswith(("File ", "^", "~"))]
    return f"{last} at `{code[-1]}`" if BARE.fullmatch(last) and code else last
