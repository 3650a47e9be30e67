"""Every calibrated command checks its numbers, names its own help, and says all problems at once."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.compress.distill.config import DistillConfig
from llmc.compress.heal.config import HealConfig
from llmc.compress.imatrix.config import ImatrixConfig
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.transform.config import TransformConfig
from llmc.errors import UserError

CONFIGS = {"quantize": QuantizeConfig, "transform": TransformConfig, "imatrix": ImatrixConfig, "heal": HealConfig,
           "distill": DistillConfig}
TAUGHT = ("heal", "distill")
COUNTS = dict.fromkeys(TAUGHT, ("steps", "batch", "held_out", "check_every", "patience"))
SHARES = {**dict.fromkeys(TAUGHT, ("lr",)), "quantize": ("damp",)}


@pytest.mark.parametrize("command", CONFIGS)
def test_every_number_out_of_range_is_named_at_once(command: str) -> None:
    bad: dict[str, Any] = dict.fromkeys((*COUNTS.get(command, ("samples",)), "threads"), 0)
    if command == "quantize":
        bad["samples"] = -1  # 0 lets llmc choose
    bad |= dict.fromkeys(SHARES.get(command, ()), 1.5) | {"seq_len": 15}
    given = {"teacher": "base", **bad} if command in TAUGHT else bad
    with pytest.raises(UserError) as error:
        CONFIGS[command](**given)
    for name in bad:
        assert f"--{name.replace('_', '-')} {bad[name]}: must" in error.value.problem
    assert error.value.problem.count(": must") == len(bad)
    assert f"llmc {command} --help" in str(error.value.hint)


@pytest.mark.parametrize("command", CONFIGS)
@pytest.mark.parametrize("seq_len", [16, 32768])
def test_the_ends_of_the_range_are_allowed(command: str, seq_len: int) -> None:
    given: dict[str, Any] = {"teacher": "base"} if command in TAUGHT else {"samples": 1}
    assert CONFIGS[command](**given, seq_len=seq_len, threads=1).seq_len == seq_len
