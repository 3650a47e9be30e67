"""`--target-size`, `--target-bpw`, `--target-kld`: measured sensitivities, and a file that keeps its budget."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from quantizing import settings
from tiny import build, divergence
from torch import nn

import llmc
from llmc.cli import run
from llmc.compress.quantize import sensitivity
from llmc.compress.quantize.budget import rounded_up
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.quantize.run import quantize as on_all_threads
from llmc.console import size
from llmc.errors import UserError
from llmc.formats.hf import load_torch_model
from llmc.formats.types import BLOCK_TYPES


@pytest.fixture(autouse=True)
def _few_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of a type are learned from fewer weights: for time."""
    monkeypatch.setattr(sensitivity, "SAMPLED", 1 << 11)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_running_from_the_changed_layer_is_running_the_whole_model(family: str, tmp_path: Path) -> None:
    base = build(family, tmp_path / "base", num_hidden_layers=3)
    model = load_torch_model(base)
    layers = {"gpt2": "transformer.h", "opt": "model.decoder.layers"}.get(family, "model.layers")
    ids = torch.randint(2, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probe = sensitivity.Probe(model, layers, ids)
        assert probe.divergence(0) == pytest.approx(0, abs=1e-6)
        for index, layer in enumerate(model.get_submodule(layers).children()):
            weight = next(p for p in layer.parameters() if p.ndim == 2)
            before = weight.data.clone()
            weight.data *= 1.1
            whole = probe.divergence(0)
            assert whole > 1e-5
            assert probe.divergence(index) == pytest.approx(whole, rel=1e-4)
            weight.data.copy_(before)


def test_sensitivity_predicts_what_rounding_costs(tmp_path: Path) -> None:
    """Theorem 1 on a tiny model: the sum over matrices against the divergence with all of them rounded."""
    base = build("llama", tmp_path / "base")
    model = load_torch_model(base)
    ids = torch.randint(2, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        probe = sensitivity.Probe(model, "model.layers", ids)
        predicted = 0.0
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
        kept = {n: m.weight.data.clone() for n, m in linears.items()}
        for name, m in linears.items():
            a = probe.sensitivity([m.weight.data], int(name.split(".")[2]), generator)
            predicted += a * sensitivity.errors([m.weight.data], ["q5_0"])["q5_0"]
            assert torch.equal(m.weight.data, kept[name])
        for m in linears.values():
            m.weight.data.copy_(sensitivity.rtn(m.weight.data, sensitivity.type_called("q5_0")).dequantize())
        measured = probe.divergence(0)
    assert predicted == pytest.approx(measured, rel=0.5)


def test_errors_fall_as_bits_rise() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    found = sensitivity.errors([w], sensitivity.candidates(256))
    order = ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0"]
    assert all(found[b] < found[a] for a, b in itertools.pairwise(order))
    assert "q4_k" not in sensitivity.candidates(64)


def quantize(base: Path, config: QuantizeConfig) -> dict[str, Any]:
    """On one thread: tiny products gain nothing from more."""
    return on_all_threads(base, dataclasses.replace(config, threads=1))


def plan(base: Path, text: Path, **target: Any) -> dict[str, Any]:
    found: dict[str, Any] = quantize(base, settings(text, Path("p"), dry_run=True, method="rtn", **target))["plan"]
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_keeps_its_size_and_more_room_predicts_less_loss(tied: bool, tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256, tie_word_embeddings=tied)
    floor = plan(base, text, target_kld=1e9)["file_bytes"]
    top = plan(base, text, target_size="1GB")["file_bytes"]
    plans = [plan(base, text, target_size=f"{floor + i * (top - floor) // 8}B") for i in range(9)]
    losses = [p["predicted_kld"] for p in plans]
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert losses[-1] < losses[0] / 10
    target = floor + 3 * (top - floor) // 8
    result = quantize(base, settings(text, tmp_path / "q", target_size=f"{target}B"))
    assert len(set(result["types"])) > 1
    llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf", threads=1)
    assert (tmp_path / "q.gguf").stat().st_size == result["plan"]["file_bytes"] <= target
    found = llmc.inspect(tmp_path / "q.gguf")
    assert found["weights"]["bits_per_weight"] == pytest.approx(result["plan"]["bits_per_weight"], rel=1e-3)
    assert set(result["end_types"]) == ({"embedding"} if tied else {"embedding", "head"})
    entry = json.loads((tmp_path / "q/llmc.json").read_text())["passes"][-1]
    assert entry["plan"]["predicted_kld"] == result["plan"]["predicted_kld"]


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma3_text", "phi3", "gpt2"])
def test_the_planned_size_is_the_files_to_the_byte(family: str, tmp_path: Path, text: Path) -> None:
    """Biases, position tables, fused linears, extra norms; rows that 256 does not divide, blocks that leave gaps."""
    odd = {} if family == "qwen2" else {"vocab_size": 513}  # its class in transformers adds a token 512 of its own
    base = build(family, tmp_path / "base", **odd)
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: someone/tiny\n---\n")
    bpw = 9.5 if family == "gpt2" else 6.5  # its position table stays F32
    result = quantize(base, settings(text, tmp_path / "q", target_bpw=bpw, method="rtn"))
    llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf", threads=1)
    assert (tmp_path / "q.gguf").stat().st_size == result["plan"]["file_bytes"]
    assert sum(result["plan"]["bytes_by_class"].values()) == result["plan"]["file_bytes"]
    weights = llmc.inspect(tmp_path / "q.gguf")["weights"]
    assert weights["bits_per_weight"] == pytest.approx(result["plan"]["bits_per_weight"], rel=1e-9)
    assert weights["bits_per_weight"] <= bpw


def test_types_with_codebooks_are_chosen_only_where_they_are_named(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256)
    floor = plan(base, text, target_kld=1e9)
    assert not any(BLOCK_TYPES[t].codebook for t in {tensor["type"] for tensor in floor["tensors"]})
    named = plan(base, text, target_size="as:iq3_m")
    assert named["file_bytes"] <= named["peer"]["file_bytes"]
    asked = plan(base, text, target_kld=1e9, type_of="down_proj=iq3_s")
    assert {t["type"] for t in asked["tensors"] if "down_proj" in t["name"]} == {"iq3_s"}


def test_embedding_and_head_are_chosen_too_among_the_types_that_fit(tmp_path: Path, text: Path) -> None:
    assert set(sensitivity.candidates(576)) == {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4"}
    base = build("llama", tmp_path / "base", tie_word_embeddings=False)  # rows of 64 and 128
    ends: dict[str, set[str]] = {"embedding": set(), "head": set()}
    for bpw in (4.6, 5.0, 5.5, 6.0, 7.0, 9.0):
        types = {t["name"]: t["type"] for t in plan(base, text, target_bpw=bpw)["tensors"]}
        assert set(types.values()) <= set(sensitivity.candidates(64))
        for end, seen in ends.items():
            seen.add(types[end])
    assert all("q8_0" in seen and len(seen) > 1 for seen in ends.values())


@pytest.mark.parametrize(("preset", "tied"), [("q4_k_m", True), ("q3_k_m", False), ("q4_0", True)])
def test_no_larger_than_a_presets_file_and_predicted_no_worse(preset: str, tied: bool, tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256, tie_word_embeddings=tied)
    quantize(base, settings(text, tmp_path / "theirs", preset=preset, method="rtn"))
    ours = quantize(base, settings(text, tmp_path / "ours", target_size=f"as:{preset}", method="rtn"))
    sizes = {n: llmc.export(tmp_path / n, format="gguf", out=tmp_path / f"{n}.gguf", threads=1)["bytes"]
             for n in ("theirs", "ours")}
    promise = ours["plan"]
    assert sizes == {"theirs": promise["peer"]["file_bytes"], "ours": promise["file_bytes"]}
    assert sizes["ours"] <= sizes["theirs"]
    assert promise["peer"]["preset"] == preset
    assert promise["predicted_kld"] <= promise["peer"]["predicted_kld"]
    assert ours["type"] == f"target-size as:{preset}"


def test_a_goal_is_the_budget_of_llama_cpps_mix(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256)
    plans = [quantize(base, settings(text, tmp_path / "q", method="rtn", dry_run=True, **options))
             for options in ({"goal": "gguf"}, {"target_size": "as:q4_k_m"})]
    assert plans[0]["plan"]["peer"]["preset"] == "q4_k_m"
    assert plans[0]["plan"]["tensors"] == plans[1]["plan"]["tensors"]
    assert plans[0]["plan"]["target"] == "--goal gguf"


def test_predicted_against_measured_is_on_page_and_report(tmp_path: Path, text: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    base = build("llama", tmp_path / "base")
    made = quantize(base, settings(text, tmp_path / "q", target_size="as:q4_0"))["plan"]
    llmc.export(tmp_path / "q", format="gguf", out=tmp_path / "q.gguf", threads=1)
    llmc.export(base, format="gguf", out=tmp_path / "f.gguf", threads=1)
    args = ["--base", str(base), "--text", str(text), "--chunks", "4", "--context", "64", "--threads", "1"]
    for name in ("f", "q"):
        assert run(["eval", str(tmp_path / f"{name}.gguf"), *args, "-o", f"{name}.json"]) == 0
    assert f"predicted        {made['predicted_kld']:.4f} nats" in capsys.readouterr().out
    reports = [json.loads(Path(f"{name}.json").read_text()) for name in ("f", "q")]
    assert "budget" not in reports[0]
    kld = reports[1]["quality"]["texts"][0]["kld"]
    assert reports[1]["budget"] == {
        "target": "--target-size as:q4_0", "planned_bytes": made["file_bytes"], "file_bytes": made["file_bytes"],
        "predicted_kld": made["predicted_kld"], "peer": made["peer"], "healed": False,
        "measured": [{"text": "calibration.txt", "kld": kld["value"], "se": kld["se"],
                      "ratio": kld["value"] / made["predicted_kld"]}]}
    assert run(["compare", "f.json", "q.json"]) == 0
    printed, html = capsys.readouterr().out, Path("compare.html").read_text(encoding="utf-8")
    cells = ["q.gguf", "--target-size as:q4_0", size(made["file_bytes"]), size(made["file_bytes"]),
             f"{made['predicted_kld']:.4f}", "calibration.txt", f"{kld['value']:.4f} ± {kld['se']:.4f}",
             f"{kld['value'] / made['predicted_kld']:.2f}x"]
    assert "".join(f"<td>{c}</td>" for c in cells) in html
    assert f"(predicted {made['predicted_kld']:.4f})" in html
    assert all(c in printed for c in cells)
    assert "f.gguf" not in html.split("<h2>Budget</h2>")[1].split("</table>")[0]


def test_bits_per_weight_and_divergence_as_budgets(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256)
    by_bits = plan(base, text, target_bpw=4.5)
    assert 4.3 < by_bits["bits_per_weight"] <= 4.5
    by_loss = plan(base, text, target_kld=by_bits["predicted_kld"])
    assert by_loss["file_bytes"] <= by_bits["file_bytes"]
    assert by_loss["predicted_kld"] <= by_bits["predicted_kld"]
    err = capsys.readouterr().err
    assert err.count("using the sensitivities of an earlier run") == 1  # the second plan measured nothing
    sums = sum(t["kld"] for t in by_bits["tensors"]), sum(t["bytes"] for t in by_bits["tensors"])
    assert sums[0] == pytest.approx(by_bits["predicted_kld"])
    classes = by_bits["bytes_by_class"]
    assert sums[1] == sum(classes[k] for k in ("embedding", "attention", "mlp"))
    assert sum(classes.values()) == by_bits["file_bytes"]


def test_a_budget_beats_one_type_of_the_same_size(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256)
    uniform = quantize(base, settings(text, tmp_path / "u", preset="iq4_xs", method="rtn"))
    llmc.export(tmp_path / "u", format="gguf", out=tmp_path / "u.gguf", threads=1)
    nbytes = (tmp_path / "u.gguf").stat().st_size
    mixed = quantize(base, settings(text, tmp_path / "m", target_size=f"{nbytes}B", method="rtn"))
    assert mixed["types"] != uniform["types"]
    llmc.export(tmp_path / "m", format="gguf", out=tmp_path / "m.gguf", threads=1)
    results = [llmc.evaluate(tmp_path / f"{n}.gguf", base=base, text=str(text), chunks=8, context=128) for n in "um"]
    kld = [r["quality"]["texts"][0]["kld"]["value"] for r in results]
    assert kld[1] < kld[0]
    assert divergence(tmp_path / "m", base) > 0


@pytest.mark.parametrize(("target", "words"), [
    ({"target_size": "20kB"}, "--target-size 20kB cannot be reached: the smallest types give"),
    ({"target_bpw": 1.5}, "--target-bpw 1.5 cannot be reached: the smallest types give .* bits per weight"),
    ({"target_kld": 1e-9}, "--target-kld 1e-09 cannot be reached: the lowest predicted KL divergence is"),
])
def test_what_cannot_be_reached_names_what_can(target: dict[str, Any], words: str, tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    with pytest.raises(UserError, match=words) as error:
        plan(base, text, **target)
    option, least = re.match(r"use --(\S+) (\S+) or more", error.value.hint).groups()
    reached = plan(base, text, **{option.replace("-", "_"): least if option == "target-size" else float(least)})
    if option == "target-size":
        assert f"{reached['file_bytes']}B" == least
        with pytest.raises(UserError, match="cannot be reached"):
            plan(base, text, target_size=f"{reached['file_bytes'] - 1}B")


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.floats(1e-6, 100))
def test_what_is_named_as_possible_is_possible(value: float) -> None:
    assert value <= rounded_up(value) <= 1.002 * value


@pytest.mark.parametrize(("options", "words"), [
    ({"target_size": "90MB", "target_bpw": 4.0}, "give one target"),
    ({"goal": "gguf", "target_bpw": 4.0}, "--goal gguf and --target-bpw: give one target"),
    ({"goal": "gguf", "bits": 8}, "leave out --bits"),
    ({"goal": "onnx"}, "must be gguf"),
    ({"target_size": "90MB", "preset": "q4_k_m"}, "leave out --type and --preset"),
    ({"target_bpw": 4.0, "bits": 8}, "leave out --bits"),
    ({"target_size": "90"}, "give bytes with a unit"),
    ({"target_size": "as:q9_k"}, "the preset after as: must be one of q2_k"),
    ({"target_size": "like:q4_k_m"}, "give bytes with a unit, .* or as:PRESET"),
    ({"target_kld": -1.0}, "must be above 0"),
])
def test_contradictions_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        QuantizeConfig(**options)
