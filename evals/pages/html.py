"""The pieces that pages are made of: one HTML file that needs nothing else. Whatever is put in is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

COLOURS = 8  # --c0 … --c7 of page.css


def document(title: str, body: Iterable[str]) -> str:
    """The whole page of finished pieces."""
    css = resources.files("llmc.evals.pages").joinpath("page.css").read_text(encoding="utf-8")
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{css}</style></head><body><main>{''.join(body)}</main></body></html>\n")


def verdict(gates: Sequence[dict[str, Any]]) -> str:
    """'all 2 gates passed', coloured; nothing where there are none."""
    if not gates:
        return ""
    missed = sum(not g["passed"] for g in gates)
    told = f"{missed} of {len(gates)} gates missed" if missed else f"all {len(gates)} gates passed"
    return f'<p class="verdict {"bad" if missed else "good"}">{told}</p>'


def figure(title: str, caption: str, legend: str, svg: str, how: str) -> str:
    """A picture; where there is none, the command that fills it."""
    content = svg or f'<p class="empty">Not measured. It is filled by <code>{escape(how)}</code></p>'
    return (f'<figure class="card"><h2>{escape(title)}</h2><figcaption>{escape(caption)}</figcaption>{legend}{content}'
            "</figure>")


def legend(names: Iterable[tuple[int, str]]) -> str:
    """(number of the colour, name) of what a picture shows."""
    spans = (f'<span><i class="dot" style="background:var(--c{i % COLOURS})"></i>{escape(name)}</span>' for i, name in names)
    return f'<p class="legend">{"".join(spans)}</p>'


def table(title: str, note: str, rows: list[list[str]]) -> str:
    """Rows with a heading, the first one."""
    head, *rest = ["".join(f"<{tag}>{escape(c)}</{tag}>" for c in row)
                   for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)]
    body = "".join(f"<tr>{r}</tr>" for r in rest)
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return section(title, f'<p class="note">{escape(note)}</p><div class="scroll">{whole}</div>')


def pairs(items: Iterable[tuple[str, Any]]) -> str:
    """Names and values."""
    return "<dl>" + "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(words(v))}</dd>" for k, v in items) + "</dl>"


def words(value: Any) -> str:
    """A value of a report on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {words(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(words(v) for v in value)
    return "–" if value is None else str(value)


def section(title: str, content: str, folded: bool = False) -> str:
    """A card with finished content."""
    if folded:
        return f'<details class="card"><summary>{escape(title)}</summary>{content}</details>'
    return f'<section class="card"><h2>{escape(title)}</h2>{content}</section>'
