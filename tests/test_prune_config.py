"""Options of `llmc prune` that contradict each other or the model."""

from __future__ import annotations

from pathlib import Path

import pytest
from pruning import prune
from tiny import build

from llmc.errors import UserError

BAD = {
    "sparsity out of range": ({"sparsity": 1.5}, "between 0 and 1"),
    "both": ({"sparsity": 0.5, "pattern": "2:4"}, "give one of them"),
    "unknown pattern": ({"pattern": "1:4"}, "2:4 or 4:8"),
    "drop missing": ({"method": "depth"}, "needs --drop"),
    "too many layers": ({"method": "depth", "drop": 2}, "has 2 layers"),
    "drop with a mask": ({"drop": 1}, "goes with --method depth"),
    "sparsity with depth": ({"method": "depth", "drop": 1, "sparsity": 0.5}, "goes with --method magnitude or wanda"),
    "nothing to narrow": ({"method": "width"}, "needs --ffn"),
    "heads between groups": ({"method": "width", "heads": 0.75}, "share 2 key and value heads"),
    "too few neurons": ({"method": "width", "ffn": 0.05}, "no multiple of 32"),
    "unknown order": ({"method": "depth", "drop": 1, "by": "chance"}, "kl or influence"),
    "unknown method": ({"method": "lottery"}, "must be one of"),
    "one sample": ({"samples": 1}, "at least 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_clear_error(case: str, tmp_path: Path, text: Path) -> None:
    options, message = BAD[case]
    base = build("llama", tmp_path / "base")
    with pytest.raises(UserError, match=message) as e:
        prune(base, text, tmp_path / "out", **options)
    assert e.value.hint
    assert e.value.exit_code == 2
    assert not list(tmp_path.glob("*out*"))
