"""Places of a layer that a scaling may go through, on every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, build
from transforming import LEFT_ALONE, layers_of, load

from llmc.compress.transform import scaling
from llmc.compress.transform.roles import map_layer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_holds_or_is_named(family: str, tmp_path: Path) -> None:
    model = load(build(family, tmp_path / "m"))
    found = map_layer(model.config, layers_of(model)[0])
    assert len(found.norms) == 2
    assert (found.up is None) == (family in LEFT_ALONE)
    assert [word for word in found.left if LEFT_ALONE.get(family, "-") in word] == list(found.left)


def test_grouped_queries_share_their_values_factor(tmp_path: Path) -> None:
    """4 query heads on 2 value heads of 16: a factor for each of 32 channels, seen by two heads' columns."""
    model = load(build("llama", tmp_path / "m"))
    place = map_layer(model.config, layers_of(model)[0]).value
    assert place.channels == 32
    assert place.columns.view(4, 16)[:, 0].tolist() == [0, 0, 16, 16]
    moments = torch.arange(64.0)
    s = scaling.activation_factors(moments, place)
    mean = torch.stack([moments[:16] + moments[16:32], moments[32:48] + moments[48:]]).flatten().double() / 2
    torch.testing.assert_close(s / s[5], (mean / mean[5]).sqrt())


def test_opts_norms_after_the_sum_are_left(tmp_path: Path) -> None:
    model = load(build("opt", tmp_path / "m", do_layer_norm_before=False))
    found = map_layer(model.config, layers_of(model)[0])
    assert found.norms == ()
    assert all("after the sum" in line for line in found.left)
    gelu = load(build("opt", tmp_path / "g", activation_function="gelu"))
    assert map_layer(gelu.config, layers_of(gelu)[0]).up is None
