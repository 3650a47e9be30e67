"""`llmc models`: what llmc can do with each model family, from the tables that its commands use.

`proved.json` beside the tables has what the project's tests last proved (`make test-models` writes it).
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llmc.export.onnx.builder import known
from llmc.families import FAMILIES
from llmc.families.row import Family
from llmc.sources.llama_cpp import converter_architectures

PROOFS = Path(__file__).parents[1] / "families" / "proved.json"
PROVED, UNTESTED, NO = "proved", "untested", "no"
PRUNING = ("masks", "depth", "width")


def models(converter: Path | None = None) -> dict[str, Any]:
    """The table. converter: the folder of llama.cpp's converter, None if it is not known.

    Returns {'packages' (of the proofs), 'families': [{'family', 'architecture', 'quantize', 'transform', 'rotation', 'prune',
    'gguf', 'onnx', 'why_not', 'proofs'}], 'converted': {model_type of another family: largest figures of its GGUF files}}. A
    cell is 'proved', 'untested' or 'no'; 'gguf' is {'own', 'converter' (None: not known)}; 'why_not' has the reasons;
    'proofs' are the largest figures of the tests.
    """
    proved = json.loads(PROOFS.read_text(encoding="utf-8"))
    registered = None if converter is None else converter_architectures(converter)
    return {"packages": proved["packages"],
            "families": [_row(f, proved["families"].get(f.model_type, {}), registered) for f in FAMILIES.values()],
            "converted": proved.get("converted", {})}


def _row(family: Family, proofs: dict[str, Any], registered: frozenset[str] | None) -> dict[str, Any]:
    def cell(what: str, can: bool = True) -> str:
        return NO if not can else PROVED if what in proofs else UNTESTED

    can_turn = not (family.unmapped or family.unrotatable)
    reasons = {"transform": family.unmapped, "rotation": family.unrotatable, "width": family.unnarrowable}
    return {
        "family": family.model_type, "architecture": family.architecture,
        "quantize": cell("quantize"),
        "transform": cell("transform", not family.unmapped),
        "rotation": NO if family.unmapped else "r1r2" if can_turn else "r2",
        "prune": {"masks": cell("masks"), "depth": cell("depth"), "width": cell("width", not family.unnarrowable)},
        "gguf": {"own": cell("gguf", bool(family.gguf.name)),
                 "converter": None if registered is None else family.architecture in registered},
        "onnx": cell("onnx", not known() or family.architecture in known()),
        "why_not": {what: why for what, why in reasons.items() if why},
        "proofs": proofs,
    }


CONVERTED = "GGUF is proved for these families too, through llama.cpp's converter or as the text model of a multimodal one:"
WORDS = {PROVED: "yes", UNTESTED: "untested", NO: "-"}
HEADINGS = ("family", "quantize", "transform", "prune", "GGUF", "ONNX")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the printed table, in the order of HEADINGS."""
    able = [(what, word) for what, word in row["prune"].items() if word != NO]
    prune = ", ".join(what for what, word in able if word == PROVED) or UNTESTED
    turn = f", {row['rotation']}" if row["transform"] == PROVED else ""
    own, other = row["gguf"]["own"], row["gguf"]["converter"]
    gguf = "converter" if own == NO and other else WORDS[own]
    return row["family"], WORDS[row["quantize"]], WORDS[row["transform"]] + turn, prune, gguf, WORDS[row["onnx"]]


def describe(table: dict[str, Any]) -> str:
    """The table as text, with what its words mean."""
    rows = [HEADINGS, *(cells(row) for row in table["families"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    others = textwrap.fill(f"{CONVERTED} {', '.join(table['converted'])}.", 128, break_on_hyphens=False)
    return "\n".join([*lines, "", *([others, ""] if table["converted"] else []), *legend(table)])


def legend(table: dict[str, Any]) -> list[str]:
    """What the words of the table mean, one line each."""
    made = ", ".join(f"{name} {version}" for name, version in table["packages"].items())
    return ["yes: the project's tests proved it on tiny models. untested: they did not. -: llmc cannot, and says why.",
            "transform: channels can be scaled; r2, r1r2: the largest rotation that keeps the output.",
            "GGUF: llmc's own writer; converter: llama.cpp's converter knows it.",
            f"proved with {made}."]


def markdown(table: dict[str, Any]) -> str:
    """The table as a page of the documentation."""
    def line(values: Iterable[str]) -> str:
        return f"| {' | '.join(values)} |"

    rows = [line(HEADINGS), line("---" for _ in HEADINGS), *(line(cells(row)) for row in table["families"])]
    figures = ("kld", "kld_4_bits")
    others = [line(("family", "as floats", "at 4 bits")), line(["---"] * 3),
              *(line((name, *(f"{v[key]:.0e}" for key in figures))) for name, v in table["converted"].items())]
    return "\n".join([*rows, "", *(f"* {text}" for text in legend(table)), "", f"{CONVERTED[:-1]}. Mean KL divergence of "
                      "the files' logits from torch's on tiny models, in nats:", "", *others])


def summary(table: dict[str, Any]) -> str:
    """The families that each command takes, as a list for README.md."""
    def names(keep: Callable[[dict[str, Any]], bool]) -> str:
        return ", ".join(row["family"] for row in table["families"] if keep(row))

    lines = (f"* `llmc export` writes GGUF by itself for {names(lambda row: row['gguf']['own'] != NO)}.",
             f"* `llmc export --format onnx` works for {names(lambda row: row['onnx'] != NO)}.",
             f"* `llmc transform` works for {names(lambda row: row['transform'] != NO)}. The residual stream can be rotated "
             f"(`--rotate r1r2`) for {names(lambda row: row['rotation'] == 'r1r2')}.",
             f"* `llmc prune --method width` works for {names(lambda row: row['prune']['width'] != NO)}.")
    return "\n".join(textwrap.fill(line, 128, subsequent_indent="  ", break_on_hyphens=False) for line in lines)
