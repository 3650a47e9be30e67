"""Whether plain data is what a TypedDict says: the same keys and kinds of values, all the way down."""

from __future__ import annotations

import types
from functools import cache
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict


@cache
def keys_of(kind: Any) -> dict[str, Any]:
    """{key: its type, NotRequired included} of a TypedDict."""
    return get_type_hints(kind, include_extras=True)  # __required_keys__ knows no NotRequired that is written as text


def differences(value: object, kind: Any, where: str = "it", more: bool = False) -> list[str]:
    """Every place where `value`, as read from JSON, is not of `kind`. Any is what nothing is said of.

    more: keys that a TypedDict does not know are allowed, as in a file of another version."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or kind is object:
        return []
    if is_typeddict(kind):
        return _of_typed_dict(value, kind, where, more)
    if origin in (Union, types.UnionType):
        found = [differences(value, k, where, more) for k in inner]
        return [] if [] in found else min(found, key=len)
    if origin is Literal:
        return [] if value in inner else [f"{where} is {value!r}"]
    if origin is list:
        return [d for i, v in enumerate(value) for d in differences(v, inner[0], f"{where}[{i}]", more)] \
            if isinstance(value, list) else [f"{where} is no list"]
    if origin is dict:
        return [d for k, v in value.items() for d in (*differences(k, inner[0], f"the key {k} of {where}", more),
                                                      *differences(v, inner[1], f"{where}[{k!r}]", more))] \
            if isinstance(value, dict) else [f"{where} is no dict"]
    fits = isinstance(value, (int, float) if kind is float else kind or type(None)) \
        and (kind is bool or not isinstance(value, bool))
    return [] if fits else [f"{where} is {value!r}, no {kind}"]


def _of_typed_dict(value: object, kind: Any, where: str, more: bool) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where} is no {kind.__name__}"]
    hints = keys_of(kind)
    found = [] if more else [f"{where}[{k!r}] is not in {kind.__name__}" for k in value if k not in hints]
    for key, hint in hints.items():
        optional = get_origin(hint) is NotRequired or not kind.__total__
        hint = get_args(hint)[0] if get_origin(hint) is NotRequired else hint
        if key in value:
            found += differences(value[key], hint, f"{where}[{key!r}]", more)
        elif not optional:
            found.append(f"{where}[{key!r}] is missing")
    return found
