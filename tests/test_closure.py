"""One digest of code: what a pass calls is in it, what it does not call is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc import closure
from llmc.recipes.commands import COMMANDS

QUANTIZE = COMMANDS["quantize"].code


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """A function: the digest of some modules when the source of one module has one more line."""
    def digest_with(module: str, *entries: str) -> str:
        copy = tmp_path / f"{module}.py"
        copy.write_bytes(closure.source(module).read_bytes() + b"# changed\n")
        real = closure.source
        with monkeypatch.context() as m:
            m.setattr(closure, "source", lambda name: copy if name == module else real(name))
            return str(closure.digest.__wrapped__(*entries))
    return digest_with


@pytest.mark.parametrize("module", [
    "llmc.compress.quantize.gptq", "llmc.rounding.scales", "llmc.rounding.block_factors", "llmc.rounding.levels",
    "llmc.compress.states", "llmc.compress.quantize.sensitivity", "llmc.formats.packing", "llmc.formats.gptq",
    "llmc.formats.shards", "llmc.formats.quantized", "llmc.compress.sampling", "llmc.compress.text",
    "llmc.compress.skeleton"])
def test_what_quantize_calls_decides_its_result(module: str, changed) -> None:  # type: ignore[no-untyped-def]
    assert changed(module, *QUANTIZE) != closure.digest(*QUANTIZE)


@pytest.mark.parametrize("module", ["llmc.evals.pages.compare", "llmc.evals.pages.charts", "llmc.cli.quantize",
                                    "llmc.compress.prune.width", "llmc.recipes.page", "llmc.runtimes.targets.ssh"])
def test_what_quantize_does_not_call_does_not(module: str, changed) -> None:  # type: ignore[no-untyped-def]
    assert changed(module, *QUANTIZE) == closure.digest(*QUANTIZE)


def test_a_page_changes_what_compare_writes_and_no_figure(changed) -> None:  # type: ignore[no-untyped-def]
    page = "llmc.evals.pages.charts"
    assert changed(page, *COMMANDS["compare"].code) != closure.digest(*COMMANDS["compare"].code)
    for name in ("eval", "bench"):
        assert changed(page, *COMMANDS[name].code) == closure.digest(*COMMANDS[name].code)


def test_measured_sensitivities_know_the_code_that_made_them(changed) -> None:  # type: ignore[no-untyped-def]
    budget = "llmc.compress.quantize.budget"
    for module in ("llmc.rounding.block_factors", "llmc.rounding.search", "llmc.compress.quantize.sensitivity", budget):
        assert changed(module, budget) != closure.digest(budget)


def test_imports_are_found_where_they_stand() -> None:
    assert "llmc.rounding.rtn" in closure.imports("llmc.compress.quantize.sensitivity")
    inside = set(closure.imports("llmc.runtimes.open")) - set(closure.imports("llmc.runtimes.open", nested=False))
    assert {"llmc.runtimes.llamacpp", "llmc.runtimes.torch_model"} <= inside
    assert closure.closure(["llmc.errors"]) == ["llmc.errors"]
    with pytest.raises(LookupError, match=r"llmc\.nothing"):
        closure.source("llmc.nothing")


def test_every_module_is_found_where_it_lies() -> None:
    found = closure.modules()
    assert {"llmc", "llmc.cli.quantize", "llmc.compress.quantize.gptq", "llmc.runtimes.on_device.bench"} <= set(found)
    assert all(closure.source(m).is_file() for m in found)
