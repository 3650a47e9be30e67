"""One mapping between parameters and stored tensors: round trips both ways, tied heads, quantized linears, what lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, build
from transformers import AutoModelForCausalLM

from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.names import Names, Stored, missing

FOLDER = Path("folder")
PART = st.text("abcdef_0123456789", min_size=1, max_size=6)
PATHS = st.lists(PART, min_size=1, max_size=4).map(".".join)
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def spelled(parameter: str, prefix: str, change: str) -> str:
    """What files call a parameter of the model."""
    return {"as it is": parameter, "left out": parameter.removeprefix(f"{prefix}."), "added": f"{prefix}.{parameter}"}[change]


@given(paths=st.sets(PATHS, min_size=1), prefix=PART, change=st.sampled_from(["as it is", "left out", "added"]))
def test_there_and_back(paths: set[str], prefix: str, change: str) -> None:
    own = [f"{prefix}.body.{p}.weight" for p in paths] if change == "left out" else [f"body.{p}.weight" for p in paths]
    files = {p: spelled(p, prefix, change) for p in own}
    names = Names(FOLDER, files.values(), prefix, own)
    assert {p: names.stored(p) for p in own} == files
    assert {s: names.own(s) for s in files.values()} == {s: p for p, s in files.items()}
    assert all(names.locate(p) == Stored(s, False) for p, s in files.items())


@given(paths=st.sets(PATHS, min_size=1), prefix=PART, change=st.sampled_from(["as it is", "left out", "added"]))
def test_there_and_back_for_quantized_linears(paths: set[str], prefix: str, change: str) -> None:
    own = [f"{prefix}.body.{p}" for p in paths] if change == "left out" else [f"body.{p}" for p in paths]
    files = {p: spelled(p, prefix, change) for p in own}
    tensors = [f"{linear}.qweight" for linear in files.values()]
    names = Names(FOLDER, tensors, prefix, [*own, *(f"{p}.weight" for p in own)], files.values())
    for module, linear in files.items():
        assert names.find(f"{module}.weight") is None  # codes are no weight
        assert names.locate(f"{module}.weight") == Stored(linear, True)
        assert names.own(linear) == module
        assert names.locate(f"{module}.bias") is None


def test_a_name_as_it_is_comes_first() -> None:
    names = Names(FOLDER, ["model.a.weight", "a.weight"], "model", ["model.a.weight", "a.weight"])
    assert names.stored("a.weight") == names.own("a.weight") == "a.weight"
    assert names.stored("model.a.weight") == names.own("model.a.weight") == "model.a.weight"


def test_no_prefix_changes_nothing() -> None:
    names = Names(FOLDER, ["a.weight"], "")
    assert names.stored("a.weight") == "a.weight"
    assert names.find("model.a.weight") is None


def test_a_tied_head_lies_where_its_table_lies() -> None:
    files, own = ["embed_tokens.weight"], [HEAD, TABLE]
    assert Names(FOLDER, files, "model", own).locate(HEAD) is None
    names = Names(FOLDER, files, "model", own, tied={HEAD: TABLE})
    assert names.locate(HEAD) == names.locate(TABLE) == Stored("embed_tokens.weight", False)
    assert names.find(HEAD) is None  # no tensor of its own
    assert Names(FOLDER, [*files, HEAD], "model", own, tied={HEAD: TABLE}).locate(HEAD) == Stored(HEAD, False)


def test_what_is_missing_is_named() -> None:
    names = Names(FOLDER, ["a.weight"], "model", ["a.weight"])
    with pytest.raises(UserError, match=r"^folder has no tensor b\.weight"):
        names.stored("b.weight")
    with pytest.raises(UserError, match=r"b\.weight of folder is not part of the model"):
        names.own("b.weight")
    assert names.find("b.weight") is names.find_own("b.weight") is None
    assert str(missing(FOLDER, "x", "y", "z")).startswith("folder has no tensor x and 2 more")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Every tensor of the files has a parameter and is found again from it; what has no tensor is a tied head."""
    checkpoint = Checkpoint.open(build(family, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    names = Names.of(checkpoint, model)
    if family != "gpt_neox":  # transformers renames its head as it loads
        assert all(names.stored(names.own(t)) == t for t in checkpoint.names())
        lost = [n for n, _ in model.named_parameters(remove_duplicate=False) if names.find(n) is None]
        assert lost in ([], [HEAD])
