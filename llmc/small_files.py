"""One reader for the small files that come from outside: JSON, YAML and TOML with limits on size and depth.

Errors name the file and, with `expect`, the key, its value and what is allowed.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.errors import UserError

MEGABYTE = 1 << 20
SMALL = 8 * MEGABYTE  # config files and such
LARGE = 256 * MEGABYTE  # tokenizer.json, indexes, reports with a value for each token
DEEPEST = 64  # levels of nesting
DASHES = re.compile(rf"(?:[-?] +){{{DEEPEST}}}")  # YAML's lists in lists on one line
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # JSON can write half of a character of two parts; no other text can hold it
AGAIN = "correct it, or download it again"
DELETE = "delete it: llmc makes it again"  # the hint for a note of llmc's own


def check_file(path: Path, limit: int = SMALL, hint: str = AGAIN) -> None:
    """Raise UserError unless the path is a regular file of at most `limit` bytes."""
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else None
            raise UserError(f"{path} {what}, not a file to read" if what else f"there is no file {path}", hint)
        length = path.stat().st_size
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        raise UserError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}", hint) from e
    if length > limit:
        raise UserError(f"{path} is larger than {limit // MEGABYTE:,} MB, too large for a file of this kind", hint)


def read_bytes(path: Path, limit: int = SMALL, hint: str = AGAIN) -> bytes:
    """The bytes of a regular file, at most `limit`."""
    check_file(path, limit, hint)
    try:
        return path.read_bytes()
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", hint) from e


def read_text(path: Path, limit: int = SMALL, hint: str = AGAIN) -> str:
    """The text of a regular file in UTF-8 of at most `limit` bytes."""
    raw = read_bytes(path, limit, hint)
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start:,})", hint) from e


def read_json(path: Path, limit: int = SMALL, hint: str = AGAIN) -> Any:
    """The value in a JSON file."""
    text = read_text(path, limit, hint)
    try:
        found = json.loads(text)
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}", hint) from e
    except RecursionError as e:
        raise UserError(f"{path} is nested too deeply", hint) from e
    if _deeper(found, DEEPEST):
        raise UserError(f"{path} is nested more than {DEEPEST} levels deep", hint)
    if HALF.search(text) and (half := _half(found)) is not None:
        raise UserError(f"{path} holds half a character (a lone surrogate) in the text {half!a:.80}", hint)
    return found


def read_json_object(path: Path, limit: int = SMALL, hint: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file."""
    found = read_json(path, limit, hint)
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object, but {_named(found)}", hint)
    return found


def read_toml(path: Path, hint: str = AGAIN) -> dict[str, Any]:
    """The tables of a TOML file."""
    text = read_text(path, hint=hint)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # ValueError: of the format, and for a number of thousands of digits
        raise UserError(f"{path} is not TOML: {str(e) or 'it is nested too deeply'}", hint) from e


def parse_yaml(text: str, where: str, hint: str = AGAIN) -> Any:
    """The value of a YAML text. Aliases are refused: a few of them can stand for millions of values."""
    import yaml

    refuse_aliases(text, where)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # ValueError: a date that does not exist
        raise UserError(f"{where} is not valid YAML: {str(e) or 'it is nested too deeply'}", hint) from e


def refuse_aliases(text: str, where: str) -> None:
    """Raise UserError for a YAML text with aliases, or with brackets or dashes in each other without end: reading these takes
    time that grows with the square of their number. Another text that is no YAML passes: its reader tells what is wrong."""
    import yaml

    depth = 0
    for bracket in re.findall(r"[\[{\]}]", text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > DEEPEST:
            raise UserError(f"{where} is not valid YAML: it is nested too deeply", AGAIN)
    if DASHES.search(text):
        raise UserError(f"{where} is not valid YAML: it is nested too deeply", AGAIN)
    try:
        found = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError:
        return
    if found:
        raise UserError(f"{where} uses aliases (*name), which llmc does not read", "write the values out")


@dataclass(frozen=True)
class Kind:
    """What a value must be. types: its Python types. low, high: bounds of a number; of each number of a list too. within: the
    texts that are allowed; (): all."""

    said: str
    types: tuple[type, ...]
    low: float = -math.inf
    high: float = math.inf
    listed: bool = False  # a list of such values is allowed too
    within: tuple[str, ...] = ()

    def allows(self, value: Any) -> bool:
        if self.listed and isinstance(value, list):
            return all(self.allows(v) for v in value)
        if not isinstance(value, self.types) or (isinstance(value, bool) and bool not in self.types):
            return False
        if isinstance(value, str):
            return not self.within or value in self.within
        return not isinstance(value, int | float) or bool(self.low <= value <= self.high)


TEXT, OBJECT, YES_NO = Kind("a text", (str,)), Kind("an object", (dict,)), Kind("true or false", (bool,))


def expect(path: Path, values: Mapping[str, Any], kinds: Mapping[str, Kind], hint: str = AGAIN) -> None:
    """Raise UserError for the first known key with a value of another kind. null and unknown keys pass."""
    for key, kind in kinds.items():
        value = values.get(key)
        if value is not None and not kind.allows(value):
            shown = json.dumps(value, default=str)[:80]
            raise UserError(f"{path}: {key} is {shown}, {_named(value)}; it must be {kind.said}", hint)


def _named(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number",
             float: "a number with a fraction", type(None): "null"}
    return names[type(value)]


def _half(value: Any) -> str | None:
    """The first text or key that UTF-8 cannot hold."""
    if isinstance(value, str):
        return value if any("\ud800" <= c <= "\udfff" for c in value) else None
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next((found for v in inner if (found := _half(v)) is not None), None)


def _deeper(value: Any, left: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return left == 0 or any(_deeper(v, left - 1) for v in (value.values() if isinstance(value, dict) else value))
