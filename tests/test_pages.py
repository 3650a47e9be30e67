"""Pages trust nobody's names: whatever comes from a file or a user is text, never markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_compare import whole, write

from llmc.evals.compare.config import CompareConfig
from llmc.evals.compare.run import compare, without_arrays
from llmc.evals.pages.compare import page as compare_page
from llmc.evals.pages.svg import element
from llmc.recipes.page import page as recipe_page
from llmc.recipes.sweep_page import page as sweep_page

HOSTILE = "<script src='x'>alert(1)</script>\" onload=x & {{ 7 * 7 }} {% raw %}"
OURS = {"heal", "distill", "measured", "--max-kld"}  # words by which llmc decides what is drawn


def soiled(value: Any) -> Any:
    """The same with HOSTILE behind every text, and behind the names of targets and packages."""
    if isinstance(value, dict):
        return {k + HOSTILE if k in ("local-cpu", "llmc") else k: soiled(v) for k, v in value.items()}
    if isinstance(value, list):
        return [soiled(v) for v in value]
    return value + HOSTILE if isinstance(value, str) and value not in OURS else value


def comparison(folder: Path) -> dict[str, Any]:
    small = whole("small", 250_000, 5, 0.2, 30.0, layers=3)
    small["artifact"]["passes"].append({"name": "heal", "curve": [{"step": 2, "kld": 0.1}], "losses": [0.2, 0.1],
                                        "best_step": 2, "about": "a pass"})
    small["speeds"]["local-cpu"]["unstable"] = ["drifts"]
    reports = write(folder, whole("base", 1000_000, 1, 0.0, 10.0), small)
    return without_arrays(compare(CompareConfig(tuple(reports), max_kld="0.1")))


def chain(compared: dict[str, Any]) -> dict[str, Any]:
    step = {"job": "healing", "command": "heal", "from": ["base"], "teacher": "base", "options": {"note": "an option"},
            "seconds": 2.0, "resumed": False, "curve": {"losses": [0.2], "curve": [{"step": 1, "kld": 0.1}]}}
    provenance = {"source": {"name": "a source"}, "passes": [{"name": "prune", "config": {"by": "a config"}}]}
    artifacts = [{"name": a["name"], "kind": "gguf", "path": "a/path", "bytes": 1000, "from": "base", "report": a["report"],
                  "provenance": provenance} for a in compared["artifacts"]]
    return {"recipe": {"name": "r", "about": "about it", "text": "steps: []"}, "steps": [step], "artifacts": artifacts,
            "comparisons": [{"job": "a job", "page": "run/compare.html"}], "gates": compared["gates"],
            "versions": {"llmc": "0.0"}}


def variants(compared: dict[str, Any]) -> dict[str, Any]:
    point = {"name": "small", "variant": "a=b", "bytes": 1000, "text": "wiki", "perplexity": {"value": 9.0, "se": 0.1},
             "kld": {"value": 0.1, "se": 0.01}, "decode": 3.0, "unstable": True, "front": True}
    variant = {"variant": "a=b", "failed": ["an error"], "seconds": 1.0, "gates": compared["gates"]}
    return {"recipe": "r", "artifacts": [point], "variants": [variant], "versions": {"llmc": "0.0"}}


class Reader(HTMLParser):
    """All tags, names of attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {key for key, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(("kind", "told"), [
    ("compare", ["base", "small", "out/small", "wiki", "local-cpu", "drifts", "A CPU", "damp raised in small", "a pass",
                 "mit"]),
    ("recipe", ["r", "about it", "steps: []", "healing", "an option", "a/path", "a source", "a config", "a job", "local-cpu",
                "0.0"]),
    ("sweep", ["r", "small", "a=b", "an error", "wiki", "llmc", "0.0"]),
])
def test_whatever_comes_from_outside_is_escaped(kind: str, told: list[str], tmp_path: Path) -> None:
    compared = comparison(tmp_path)
    html = {"compare": lambda: compare_page(soiled(compared)), "sweep": lambda: sweep_page(soiled(variants(compared))),
            "recipe": lambda: recipe_page(soiled(chain(compared)), Path("run"))}[kind]()
    reader = Reader(html)
    assert "script" not in reader.tags
    assert not {"src", "onload"} & reader.attributes, "a name has left its attribute"
    assert [text for text in told if text + HOSTILE not in reader.text] == []
    assert not re.search(r"&amp;(amp|lt|gt|quot|#\d+);", html), "nothing is escaped twice"


def test_an_svg_element_escapes_its_attributes_and_content() -> None:
    made = element("text", "<b>", element("tspan", "&"), class_='"><i', text_anchor="end", x=1.25, r=8)
    assert made == ('<text class="&#34;&gt;&lt;i" text-anchor="end" x="1.2" r="8">&lt;b&gt;<tspan>&amp;</tspan></text>')
