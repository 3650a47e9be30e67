"""Damages of files, as hypothesis draws them: other values in the tree of a file, other bytes, other things in its place.

A file is a tree of dicts, lists and values (`Form.load`), which a damage changes before it is written again (`Form.dump`).
"""

from __future__ import annotations

import base64
import copy
import csv
import io
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

DEEP = "@deep"  # stands for values that Python's json would not write
HUGE = 3 << 30  # bytes of a file that takes no room on the disk
SHOWN = 6  # of a long list or object, this many members at each end are damaged
Spot = tuple[Any, ...]  # the keys that lead to a value


@dataclass(frozen=True)
class Damage:
    """said: what was done to the file.  content: its new bytes.  place: what is there instead of a file."""

    said: str
    content: bytes = b""
    place: str = "file"

    def apply(self, path: Path) -> None:
        """Put the damaged file at `path`, in place of the good one."""
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        PLACES[self.place](path, self.content)


def _sparse(path: Path, content: bytes) -> None:
    with path.open("wb") as f:
        f.truncate(HUGE)


PLACES: dict[str, Callable[[Path, bytes], Any]] = {
    "file": Path.write_bytes, "none": lambda path, content: None, "a folder": lambda path, content: path.mkdir(),
    "a link to itself": lambda path, content: path.symlink_to(path.name),
    "a link to nothing": lambda path, content: path.symlink_to("nothing"),
    "a link to /dev/zero": lambda path, content: path.symlink_to("/dev/zero"),
    "a link to a folder": lambda path, content: path.symlink_to("."),
    "a pipe": lambda path, content: os.mkfifo(path), "3 GB of zeros": _sparse,
}

# ------------------------------------------------------------------------------------------------------------- the forms


@dataclass(frozen=True)
class Form:
    """How a kind of file is read into a tree and written. load is None for a text: then only its bytes are damaged."""

    load: Callable[[bytes], Any] | None = None
    dump: Callable[[Any], bytes] | None = None
    nasty: tuple[str, ...] = ()  # whole texts that are bad for this form


class Twice(dict[str, Any]):
    """An object that is written with one key twice."""

    def items(self) -> Any:
        found = list(super().items())
        return [*found, *found[:1]]


def _json(tree: Any) -> bytes:
    text = json.dumps(tree)
    for depth in (70, 900, 100_000):
        text = text.replace(json.dumps(f"{DEEP} {depth}"), "[" * depth + "]" * depth)
    return text.encode()


def _lines(raw: bytes) -> Any:
    return [json.loads(line) for line in raw.splitlines()]


def _toml(tree: Any) -> bytes:
    """Every value after its key. None is left out: TOML has none."""
    def value(v: Any) -> str:
        if isinstance(v, dict):
            return "{" + ", ".join(f"{json.dumps(str(k))} = {value(x)}" for k, x in v.items() if x is not None) + "}"
        if isinstance(v, list):
            return "[" + ", ".join(value(x) for x in v if x is not None) + "]"
        return _json(v).decode().replace("NaN", "nan").replace("Infinity", "inf")
    return "".join(f"{json.dumps(str(k))} = {value(v)}\n" for k, v in tree.items() if v is not None).encode()


def _read_toml(raw: bytes) -> Any:
    import tomllib

    return tomllib.loads(raw.decode())


def _read_yaml(raw: bytes) -> Any:
    import yaml

    return yaml.safe_load(raw)


def _sheet(separator: str) -> Form:
    def dump(rows: Any) -> bytes:
        out = io.StringIO()
        csv.writer(out, delimiter=separator).writerows(
            [["" if v is None else str(v) for v in r] if isinstance(r, list) else [str(r)] for r in rows])
        return out.getvalue().encode(errors="surrogatepass")
    return Form(lambda raw: list(csv.reader(io.StringIO(raw.decode()), delimiter=separator)), dump,
                ("a,b\n1\n", '"a\n', "a,a\n1,2\n", "text\n\n\n", "text\r\nx\0y\r\n", "\ufefftext\nhello\n"))


def _front_matter(raw: bytes) -> Any:
    return _read_yaml(raw.split(b"---\n")[1])


def _safetensors(raw: bytes) -> Any:
    n = struct.unpack("<Q", raw[:8])[0]
    return {"header": json.loads(raw[8 : 8 + n]), "length": n, "data": base64.b85encode(raw[8 + n :]).decode()}


def _write_safetensors(tree: Any) -> bytes:
    """A header of another length is written as it is, unless the length itself was damaged."""
    header, said = _json(tree.get("header")), tree.get("length")
    length = len(header) if isinstance(said, int) and 0 < said < 1 << 20 else said
    return _packed("Q", length) + header + _data(tree)


def _data(tree: Any) -> bytes:
    try:
        return base64.b85decode(tree["data"])
    except (KeyError, ValueError, TypeError):
        return b""


def _packed(code: str, value: Any) -> bytes:
    """A number as a file holds it, whatever the value is."""
    size = struct.calcsize(f"<{code}")
    try:
        return struct.pack(f"<{code}", value)
    except struct.error:
        try:
            return (int(value) % (1 << 8 * size)).to_bytes(size, "little")
        except (ValueError, OverflowError, TypeError):
            return b"\xff" * size


SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _gguf(raw: bytes) -> Any:
    """The header of a GGUF file as a tree; the bytes of its tensors stay as they are."""
    at = 4

    def number(code: str) -> Any:
        nonlocal at
        at += struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", raw, at - struct.calcsize(f"<{code}"))[0]

    def text() -> str:
        nonlocal at
        n = number("Q")
        at += n
        return raw[at - n : at].decode("latin-1")

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind != 9:
            return number(SCALARS[kind])
        inner, count = number("I"), number("Q")
        return {"inner": inner, "count": count, "values": [value(inner) for _ in range(count)]}

    version, n_tensors, n_fields = number("I"), number("Q"), number("Q")
    fields = {}
    for _ in range(n_fields):
        key, kind = text(), number("I")
        fields[key] = {"kind": kind, "value": value(kind)}
    tensors = {text(): {"shape": [number("Q") for _ in range(number("I"))], "kind": number("I"), "offset": number("Q")}
               for _ in range(n_tensors)}
    start = -(-at // 32) * 32
    return {"version": version, "n_tensors": n_tensors, "n_fields": n_fields, "fields": fields, "tensors": tensors,
            "data": base64.b85encode(raw[start:]).decode()}


def _write_gguf(tree: Any) -> bytes:
    """Counts that a damage made wrong by leaving something out are corrected; counts that it changed are kept."""
    def text(t: Any) -> bytes:
        raw = (t if isinstance(t, str) else str(t)).encode("latin-1", errors="replace")
        return struct.pack("<Q", len(raw)) + raw

    def value(kind: Any, v: Any) -> bytes:
        if kind == 8:
            return text(v)
        if kind != 9 or not isinstance(v, dict):
            return _packed(SCALARS.get(kind, "I") if isinstance(kind, int) else "I", v)
        values = v.get("values")
        values = values if isinstance(values, list) else [values]
        inner, count = v.get("inner"), v.get("count")
        count = len(values) if isinstance(count, int) and abs(count - len(values)) <= 1 else count
        return _packed("I", inner) + _packed("Q", count) + b"".join(value(inner, x) for x in values)

    def tensor(name: Any, t: Any) -> bytes:
        t = t if isinstance(t, dict) else {}
        shape = t.get("shape")
        shape = shape if isinstance(shape, list) else [shape]
        return text(name) + struct.pack("<I", len(shape)) + b"".join(_packed("Q", n) for n in shape) + _packed(
            "I", t.get("kind")) + _packed("Q", t.get("offset"))

    fields, tensors = (list(t.items()) if isinstance(t := tree.get(k), dict) else [] for k in ("fields", "tensors"))
    counts = [len(found) if isinstance(tree.get(k), int) and abs(tree[k] - len(found)) <= 1 else tree.get(k)
              for k, found in (("n_tensors", tensors), ("n_fields", fields))]
    head = b"GGUF" + _packed("I", tree.get("version")) + b"".join(_packed("Q", n) for n in counts)
    for key, f in fields:
        f = f if isinstance(f, dict) else {}
        head += text(key) + _packed("I", f.get("kind")) + value(f.get("kind"), f.get("value"))
    head += b"".join(tensor(name, t) for name, t in tensors)
    return head + b"\0" * (-len(head) % 32) + _data(tree)


def _onnx(raw: bytes) -> Any:
    import onnx
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(onnx.ModelProto.FromString(raw))


def _write_onnx(tree: Any) -> bytes:
    """A value that protobuf cannot hold is left out."""
    import onnx
    from google.protobuf.json_format import ParseDict

    def fitting(message: Any, key: str, value: Any) -> bool:
        try:
            ParseDict({key: value}, message())
        except Exception:  # protobuf has many; half a character is a SystemError
            return False
        return True

    tree = tree if isinstance(tree, dict) else {}
    graph = tree.get("graph")
    if isinstance(graph, dict):
        graph = {k: [x for x in v if fitting(onnx.GraphProto, k, [x])] if isinstance(v, list) else v
                 for k, v in graph.items()}
        tree = {**tree, "graph": {k: v for k, v in graph.items() if fitting(onnx.GraphProto, k, v)}}
    model = onnx.ModelProto()
    ParseDict({k: v for k, v in tree.items() if fitting(onnx.ModelProto, k, v)}, model)
    return model.SerializeToString()


YAML = ("a: &a [x, x]\nb: [*a, *a]\n", "<<: {a: 1}\n", "!!python/object:os.system {}\n", "? [a]\n: b\n", "--- a\n--- b\n",
        "a: 2024-13-40\n", "a: 0x_\n", "? {a: b}\n: c\n", "a: !!binary ///\n", "%YAML 9.9\n---\na\n", "a: |\n\tb\n",
        "[]: []\n", "a: 12:34:56\n", "null: ~\n", "- " * 3000)
TEMPLATES = (
    "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ 'a' * 10**10 }}", "{{ raise_exception('no') }}", "{{ messages[99].content.x.y }}", "{% if %}", "{{", "{{ 1 / 0 }}",
    "{% include 'x' %}", "{% extends 'x' %}", "{{ ''.__class__.__mro__ }}", "{{ messages | tojson(indent='x') }}",
    "\ufeff{{ 1 }}", "{{ (1).__add__ }}", "{{ messages | map(attribute='content') | join | format(1, 2) }}",
    "{{ range(10**12) | list }}",
)
JSON = Form(json.loads, _json)
LINES = Form(_lines, lambda rows: b"\n".join(map(_json, rows)) if isinstance(rows, list) else _json(rows))
TOML = Form(_read_toml, _toml, ("a = [", "a = 1979-13-01", "[a]\n[a]\n", "a.b = 1\na = 2\n", "a = " + "9" * 5000))
YAML_FORM = Form(_read_yaml, _json, YAML)  # JSON is YAML
CARD = Form(_front_matter, lambda tree: b"---\n" + _json(tree) + b"\n---\n",
            ("---\n", "---\n---\n", *(f"---\n{t}---\n" for t in YAML)))
TEXT = Form(nasty=("\r" * 1000, "\u2028" * 50, "a" * 200_000, "\0" * 1000, "<s></s>" * 200, "\ufeff", " \n \n ",
                   "\u202e\u0301" * 99))
TEMPLATE = Form(nasty=TEMPLATES)
CSV, TSV = _sheet(","), _sheet("\t")
SAFETENSORS = Form(_safetensors, _write_safetensors)
GGUF = Form(_gguf, _write_gguf)
ONNX = Form(_onnx, _write_onnx)

# ----------------------------------------------------------------------------------------------------------- the damages

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 63, 1 << 64, 10**30, 0.5, 1e308, -1e308, 1e-320, float("nan"),
    float("inf"), "", "x", "1", "None", "\ud800", "\0", "a\0b", "a\nb", "a" * 5000, "..", "../x", "/dev/zero", "/", "~",
    "~nobody-here", "-x", "{{ 1 }}", "\u202e", "%s %d {0}", "\x1b[31m", [], [None], [0], ["x"], [[]],
    [1, "x"], {}, {"a": 1}, {"": None}, {"x": {}},
    f"{DEEP} 70", f"{DEEP} 900", f"{DEEP} 100000",
)
CHANGES: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("in a list", lambda v: [v]), ("in an object", lambda v: {"x": v}), ("as text", str), ("negative", lambda v: -_number(v)),
    ("and one", lambda v: _number(v) + 1), ("doubled", lambda v: v + v if isinstance(v, str | list) else _number(v) * 2),
    ("a million times", lambda v: _number(v) * 10**6), ("as a fraction", lambda v: float(_number(v))),
    ("cut", lambda v: v[: len(v) // 2] if isinstance(v, str | list) else _number(v) // 2),
    ("turned", lambda v: v[::-1] if isinstance(v, str | list) else not v),
    ("with a key twice", lambda v: Twice(v) if isinstance(v, dict) else [v, v]),
    ("with more", lambda v: {**v, "more": 1} if isinstance(v, dict) else [*v, v] if isinstance(v, list) else f"{v} more"),
)


def _number(value: Any) -> Any:
    return value if isinstance(value, int | float) else len(value) if isinstance(value, str | list | dict) else 0


def spots(tree: Any) -> list[Spot]:
    """The keys that lead to each value; of long lists and objects, to some at both ends."""
    found: list[Spot] = [()]
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    for key in keys if len(keys) <= 4 * SHOWN else [*keys[:SHOWN], *keys[-SHOWN:]]:
        found += [(key, *rest) for rest in spots(tree[key])]
    return found


def _at(tree: Any, spot: Spot) -> Any:
    for key in spot:
        tree = tree[key]
    return tree


@st.composite
def changed_trees(draw: Any, form: Form, good: bytes) -> Damage:
    """One to three values are left out, replaced or changed."""
    assert form.load is not None
    assert form.dump is not None
    tree, said = copy.deepcopy(form.load(good)), []
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        deep: dict[int, list[Spot]] = {}
        for spot in spots(tree)[1:]:
            deep.setdefault(len(spot), []).append(spot)
        if not deep:
            break
        *way, last = spot = draw(st.sampled_from(deep[draw(st.sampled_from(sorted(deep)))]))
        name = ".".join(map(str, spot))[:100]
        parent, how = _at(tree, tuple(way)), draw(st.sampled_from(("replaced", "replaced", "changed", "left out", "renamed")))
        if how == "replaced":
            parent[last] = copy.deepcopy(draw(st.sampled_from(ODD)))  # the next damage may be inside it
            said.append(f"{name} is {str(parent[last])[:40]!r}")
        elif how == "changed":
            what, change = draw(st.sampled_from(CHANGES))
            try:
                parent[last] = change(parent[last])
            except OverflowError:
                parent[last] = float("inf")
            said.append(f"{name} {what}")
        elif how == "renamed" and isinstance(parent, dict):
            other = draw(st.sampled_from(("x", "", "\ud800", "a\0b", "__class__", "../x", str(last).upper(), f"{last} ")))
            parent[other] = parent.pop(last)
            said.append(f"{name} named {other!r}")
        else:
            del parent[last]
            said.append(f"{name} left out")
    return Damage("; ".join(said), form.dump(tree))


@st.composite
def changed_bytes(draw: Any, good: bytes) -> Damage:
    """Other bytes, wherever they are."""
    how = draw(st.sampled_from(("cut", "flipped", "flipped", "put in", "left out", "random", "twice", "coded", "whole")))
    at = draw(st.one_of(st.integers(0, max(0, min(len(good), 64) - 1)), st.integers(0, max(0, len(good) - 1))))
    if how == "cut":
        return Damage(f"cut at byte {at}", good[:at])
    if how == "flipped" and good:
        bit = draw(st.integers(1, 255))
        return Damage(f"byte {at} ^ {bit}", good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
    if how == "put in":
        more = draw(st.sampled_from((b"\0", b"\xff", b"\xed\xa0\x80", b"{", b"\n", b"\r", b"\\u0000", b"\x1a", b"'",
                                     "\u2028".encode())))
        return Damage(f"{more!r} at byte {at}", good[:at] + more + good[at:])
    if how == "left out":
        count = draw(st.integers(1, 100))
        return Damage(f"{count} bytes from {at} left out", good[:at] + good[at + count :])
    if how == "random":
        raw = draw(st.binary(max_size=64))
        return Damage(f"random {raw!r}", raw)
    if how == "coded":
        coding = draw(st.sampled_from(("utf-8-sig", "utf-16", "utf-32", "latin-1")))
        return Damage(f"as {coding}", good.decode("utf-8", errors="replace").encode(coding, errors="replace"))
    name, raw = draw(st.sampled_from((
        ("empty", b""), ("nothing but zeros", b"\0" * 4096), ("deep lists", b"[" * 100_000),
        ("deep objects", b'{"a":' * 100_000), ("a text", b'"x"'), ("null", b"null"), ("a list", b"[]"), ("an object", b"{}"),
        ("a number", b"1" * 5000), ("NaN", b"NaN"),
        ("a web page", b"<!DOCTYPE html><html><body>404: not found</body></html>"),
        ("a pointer of git", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"),
        ("a long text", b'"' + b"x" * (9 << 20) + b'"'))))
    return Damage(f"twice, then {name}" if how == "twice" else name, good + good + raw if how == "twice" else raw)


def damages(form: Form, good: bytes) -> st.SearchStrategy[Damage]:
    """Damages of a file that holds `good`: of its tree, if it has one, more often than of its bytes."""
    tree = [changed_trees(form, good)] * 4 if form.load else []
    whole = [st.sampled_from(form.nasty).map(lambda t: Damage(f"whole: {t[:50]!r}", t.encode()))] if form.nasty else []
    places = st.sampled_from([p for p in PLACES if p != "file"]).map(lambda place: Damage(place, place=place))
    return st.one_of(*tree, changed_bytes(good), changed_bytes(good), *whole, places)
