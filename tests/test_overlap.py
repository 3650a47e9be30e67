"""The calibration text's sketch tells how much of it occurs elsewhere; eval warns."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tiny import build, corpus, write_text

from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.quantize.run import quantize
from llmc.evals.quality.config import EvalConfig
from llmc.evals.quality.run import evaluate
from llmc.overlap import NGRAM, overlap, sketch


def test_the_estimate_is_near_the_share_of_common_runs() -> None:
    rng = random.Random(0)
    words = [f"w{rng.randrange(10_000)}" for _ in range(8000)]
    text = " ".join(words)
    assert overlap(sketch(text), text) == 1.0
    assert overlap(sketch(text), " ".join(reversed(words))) == 0.0
    for share in (0.25, 0.5, 0.75):
        assert overlap(sketch(text), " ".join(words[: int(share * len(words))])) == pytest.approx(share, abs=0.1)


def test_short_or_empty_text_never_overlaps() -> None:
    assert overlap(sketch("a few words"), "a few words") == 0.0
    assert overlap([], corpus()) == 0.0
    assert len(sketch(" ".join(str(i) for i in range(NGRAM)))) == 1


def test_eval_warns_of_the_text_that_was_calibrated_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build("llama", tmp_path / "base")
    seen, other = tmp_path / "seen.txt", tmp_path / "other.txt"
    write_text(seen, 20_000)
    other.write_text(corpus()[60_000:80_000])
    quantize(base, QuantizeConfig(calibration=str(seen), samples=16, seq_len=64, threads=2, out=tmp_path / "q"))
    report = evaluate(EvalConfig(str(tmp_path / "q"), base=str(base), text=str(seen), second_text=str(other), context=64,
                                 chunks=2, threads=2))
    shares = [t["calibration_overlap"] for t in report["quality"]["texts"]]
    assert shares[0] > 0.25  # sequences are cut from the text: runs across their ends are not in it
    assert shares[1] < 0.02
    err = capsys.readouterr().err
    assert "calibration text occurs in seen.txt" in err
    assert "other.txt: its figures" not in err
