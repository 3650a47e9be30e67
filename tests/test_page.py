"""The page of `llmc compare`: it trusts nobody's names, and draws what the reports say."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reports import config, whole, write

from llmc.cli import run
from llmc.evals.compare.run import compare
from llmc.evals.pages import charts
from llmc.evals.pages.compare import page

HOSTILE = "<script>alert('x')</script>&\"|small"


class Reader(HTMLParser):
    """Collects tags and attributes, so that text cannot pass for markup unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            self.attributes.setdefault(key, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page(tmp_path: Path) -> None:
    paths = write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), whole(HOSTILE, 250_000, 5, 0.2, 30.0, layers=4),
                  whole("third", 500_000, 8, 0.1, 20.0, layers=4))
    html = page(compare(config(paths, max_kld="0.1")))
    reader = Reader()
    reader.feed(html)
    assert "script" not in reader.tags
    assert reader.text.count(HOSTILE) > 5
    assert "third" in reader.text
    assert reader.tags.count("svg") == 6
    assert "gates missed" in reader.text
    assert "damp raised in third" in reader.text
    for axis in ("file, MB", "decode, tokens/s", "KL divergence to the base, nats", "output energy lost, %", "MB of tensors"):
        assert axis in reader.text
    # nothing is fetched from anywhere
    assert not {"src", "href", "srcset"} & set(reader.attributes)
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html


def test_the_page_marks_a_bench_that_is_unstable(tmp_path: Path) -> None:
    name = "a-name-that-is-longer-than-its-label-may-be"
    shaky = whole(name, 250_000, 5, 0.2, 30.0)
    mark = "UNSTABLE"
    reports = write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), shaky)
    assert mark not in page(compare(config(reports)))
    why = ["decode is known to ±23.0% only", "prefill drifts by +12% over the repetitions"]
    shaky["speeds"]["local-cpu"]["unstable"] = why
    html = page(compare(config(write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), shaky))))
    cards, size_chart, speed_chart = html.split("<figure")[:3]
    assert re.findall(r"<dd>([^<]*)</dd>", cards)[-2] == (
        f"30.0 tokens/s (3.00x); {mark}: {why[0]}; {mark}: {why[1]}")
    assert cards.count(mark) == 2, "the baseline's bench is stable"
    assert mark not in size_chart, "its size is certain"
    assert re.findall(r'class="mark"[^>]*>([^<]*)<', speed_chart) == ["base", "a-name-that-is-longer-th… UNSTABLE"]
    assert speed_chart.count("stroke-dasharray") == 2  # a point for each of the two texts
    assert "Broken outline" in speed_chart


@pytest.mark.parametrize(("name", "by", "label"), [("heal", "kld", "KL divergence, nats"), ("distill", "loss", "loss, nats")])
def test_the_page_draws_how_a_training_went(name: str, by: str, label: str, tmp_path: Path) -> None:
    healed = whole("healed", 250_000, 5, 0.2, 30.0)
    checks = [{"step": n, by: value, "training": None} for n, value in ((0, 0.4), (2, 0.1), (4, 0.2))]
    healed["artifact"]["passes"] = [{"name": name, "curve": checks, "losses": [0.5, 0.3, 0.2, 0.3], "best_step": 2}]
    html = page(compare(config(write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), healed))))
    reader = Reader()
    reader.feed(html)
    assert label in reader.text
    assert re.findall(r"healed, held-out, \d: ([\d.]+)", reader.text) == ["0.4", "0.1", "0.2"]
    assert reader.attributes["class"].count("line thin") == 1
    # a ring around the step that was kept, just before its dot
    assert re.search(r'<circle (cx="[\d.]+" cy="[\d.]+") r="8" fill="none" [^>]+/><circle \1 [^>]+>'
                     r"<title>healed, held-out, 2: 0.1<", html)


def test_markdown_keeps_its_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), whole(HOSTILE, 250_000, 5, 0.2, 30.0))
    assert run(["compare", *map(str, paths), "--markdown", "-"]) == 0
    lines = capsys.readouterr().out.splitlines()
    blocks = [[]]
    for line in lines:
        if line.startswith("|"):
            blocks[-1].append(len(re.findall(r"(?<!\\)\|", line)))
        elif blocks[-1]:
            blocks.append([])
    assert len([b for b in blocks if b]) == 4  # size, two texts, speed
    assert all(len(set(b)) == 1 for b in blocks if b)


@pytest.mark.parametrize(("top", "expected"), [
    (1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.27, [0, 0.1, 0.2, 0.3]), (270, [0, 100, 200, 300]), (0, [0, 1]),
])
def test_ticks(top: float, expected: list[float]) -> None:
    assert charts.ticks(top) == pytest.approx(expected)


def test_points_lie_inside_their_frame_and_labels_do_not_overlap() -> None:
    points = [charts.Point(x, y, f"artifact-{i}", i, error=0.02) for i, (x, y) in enumerate(
        [(100, 0.3), (101, 0.31), (102, 0.29), (270, 0.0), (90, 0.1)])]
    svg = charts.scatter(points, "x", "y")
    circles = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert len(circles) == 5
    assert all(charts.LEFT <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT - charts.BOTTOM for x, y in circles)
    boxes = []
    for x, y, anchor, label in re.findall(r'<text class="mark" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)<', svg):
        width = len(label) * charts.LETTER
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, float(y) - 11, left + width, float(y) + 3))
    assert len(boxes) == 5
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
                   for i, a in enumerate(boxes) for b in boxes[:i])
