"""Files with text: plain text, and rows of JSON, JSON Lines, CSV, TSV or Parquet.

The ending of the name decides, in any capitals. Every other file is plain text. A file is read whole, so its size is limited.
"""

from __future__ import annotations

import csv
import functools
import importlib
import io
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmc.console import warn
from llmc.errors import UserError

JSON, LINES, SHEETS, PARQUET = (".json",), (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}, (".parquet",)
TABLES = (*JSON, *LINES, *SHEETS, *PARQUET)
MOST_BYTES = 2 << 30  # of a file, and of the text in it
MOST_LINE = 64 << 20  # characters of one row
LATER = "cut a smaller file from it"

Rows = Iterator[tuple[Any, str]]
warn_once = functools.cache(warn)  # several steps of a command read one file


def is_table(path: Path) -> bool:
    """Whether a file has rows. Otherwise it is plain text."""
    return path.suffix.lower() in TABLES


def read_plain(path: Path) -> str:
    """The text of a file: UTF-8, without a byte order mark, with \\n as the end of each line."""
    _check(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except PermissionError as e:
        raise UserError(f"the text file {path} cannot be read: {e.strerror}", "allow it, or give another file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"the text file {path} is not UTF-8 text (byte {e.start})", "save it as UTF-8") from e
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(path: Path) -> Rows:
    """(a row, where it is) for each row of a file with rows. A row of CSV, TSV and Parquet is {column: value}."""
    ending = path.suffix.lower()
    if ending in PARQUET:
        return _parquet(path)
    text = read_plain(path)
    return _json(text, path) if ending in JSON else _lines(text, path) if ending in LINES else _sheet(text, path)


def _check(path: Path) -> None:
    """Raise UserError unless the path is a regular file of a size that can be read."""
    try:
        status = path.stat()
    except (OSError, ValueError) as e:
        raise UserError(f"there is no text file {path}", "give a text, .json, .jsonl, .csv, .tsv or .parquet file") from e
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket"
        raise UserError(f"{path} is {kind}, not a text file", "give a regular file")
    if status.st_size > MOST_BYTES:
        raise UserError(f"the text file {path} has {status.st_size:,} bytes, and at most {MOST_BYTES:,} are read", LATER)


def _lines(text: str, path: Path) -> Rows:
    """The rows of JSON Lines. A line ends at \\n alone: other line ends of Unicode may stand inside a text."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if len(line) > MOST_LINE:
            raise UserError(f"{where} has {len(line):,} characters, and at most {MOST_LINE:,} are read", "split this row")
        yield _parse(line, where, "each line must be one JSON value"), where


def _json(text: str, path: Path) -> Rows:
    value = _parse(text, str(path), "write a list of rows, [{\"text\": \"...\"}, ...]")
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield row, f"{path}, row {number}"


def _parse(text: str, where: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        reason = "it is nested too deeply" if isinstance(e, RecursionError) else e
        raise UserError(f"{where} is not JSON: {reason}", hint) from e


def _sheet(text: str, path: Path) -> Rows:
    """The rows of CSV or TSV. The first row has the names of the columns."""
    csv.field_size_limit(MOST_LINE)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=SHEETS[path.suffix.lower()], strict=True)
    names: list[str] | None = None
    try:
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if names is None:
                names = values
            elif values:
                if len(values) != len(names):
                    raise UserError(f"{where} has {len(values)} values, and the first row names {len(names)} columns",
                                    'put a value with a comma, a quote or a line end into "quotes", and write a quote twice')
                yield dict(zip(names, values, strict=True)), where
    except csv.Error as e:
        raise UserError(f"{path}, line {reader.line_num} is not {path.suffix[1:].upper()}: {e}",
                        'put a value with a comma, a quote or a line end into "quotes", and write a quote twice') from e


def _parquet(path: Path) -> Rows:
    _check(path)
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        errors = importlib.import_module("pyarrow").ArrowException
    except ImportError as e:
        raise UserError(f"reading {path} needs the package pyarrow", "pip install pyarrow, or save the rows as .jsonl") from e
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}, row {number}"
    except (errors, OSError) as e:
        raise UserError(f"{path} cannot be read as Parquet: {str(e).splitlines()[0]}", "make the file again") from e


def warn_of_columns(path: Path, row: Any, used: tuple[str, ...]) -> None:
    """Say which columns of a file with rows are not read. row: its first."""
    if isinstance(row, dict) and (left := [str(name) for name in row if name not in used]):
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        warn_once(f"{path}: of each row {', '.join(map(repr, left[:5]))}{more} is not read")
