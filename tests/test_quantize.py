"""`llmc quantize` from a folder to a folder, on every family and on bad input."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killing import Command, interrupted, resumed
from quantizing import settings
from tiny import FAMILIES, build, divergence, edit_config, edit_tensors, poison, tokenizer
from transformers import AutoModelForCausalLM

import llmc
from llmc.compress import calibration
from llmc.compress.memory import sampling, weights_of
from llmc.compress.quantize.config import QuantizeConfig
from llmc.compress.quantize.run import quantize
from llmc.compress.skeleton import Skeleton
from llmc.errors import UserError
from llmc.formats import gptq as gptq_format
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import load_torch_model
from llmc.formats.kv import bytes_at
from llmc.formats.manifest import hash_folder
from llmc.memory import PROCESS, Step


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gptq_beats_rtn_and_everything_else_is_untouched(family: str, tmp_path: Path, text: Path) -> None:
    base = build(family, tmp_path / "base")
    results = {m: quantize(base, settings(text, tmp_path / m, method=m)) for m in ("gptq", "rtn")}
    assert results["gptq"]["fallbacks"] == 0
    assert divergence(tmp_path / "gptq", base) < divergence(tmp_path / "rtn", base)

    source, made = Checkpoint.open(base), Checkpoint.open(tmp_path / "gptq")
    linears = gptq_format.quantized_linears(made)
    model = AutoModelForCausalLM.from_pretrained(base)
    inside = [n for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.ndim == 2 and ".0." in n]
    assert sorted(n for n in linears if ".0." in n) == sorted(inside)
    for name in set(source.names()) - {f"{n}.weight" for n in linears}:
        assert torch.equal(made.tensor(name), source.tensor(name)), name


def test_checkpoint_is_what_readers_of_the_format_expect(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", dtype=torch.float16)
    quantize(base, settings(text, tmp_path / "q"))
    made = Checkpoint.open(tmp_path / "q")
    name = "model.layers.1.mlp.down_proj"
    shapes = {p: (made.dtype(f"{name}.{p}"), made.shape(f"{name}.{p}")) for p in gptq_format.PARTS}
    assert shapes == {"qweight": ("I32", (16, 64)), "qzeros": ("I32", (4, 8)), "scales": ("F16", (4, 64)),
                      "g_idx": ("I32", (128,))}
    assert bool((made.tensor(f"{name}.qzeros") == 0x77777777).all())
    assert made.tensor(f"{name}.g_idx").tolist() == [i // 32 for i in range(128)]
    config = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "q/quantize_config.json").read_text())
    assert config["checkpoint_format"] == config["format"] == "gptq"
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, True, False)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "q" / file).read_bytes() == (base / file).read_bytes()
    manifest = json.loads((tmp_path / "q/llmc.json").read_text())
    assert manifest["outputs"] == hash_folder(tmp_path / "q")
    assert manifest["passes"][0]["calibration"]["tokens"] == 24 * 64
    assert llmc.verify(tmp_path / "q")["problems"] == []


def test_dequantized_by_the_formats_own_rule(tmp_path: Path, text: Path) -> None:
    """A reader written from the format's description alone: w = scale * (code - (stored zero + 1))."""
    base = build("llama", tmp_path / "base")
    for options in ({}, {"bits": 8}, {"sym": False}, {"group_size": 64}):
        quantize(base, settings(text, tmp_path / "q", **options))
        made, bits = Checkpoint.open(tmp_path / "q"), options.get("bits", 4)
        name, mask = "model.layers.0.self_attn.o_proj", (1 << options.get("bits", 4)) - 1
        qweight, qzeros = made.tensor(f"{name}.qweight"), made.tensor(f"{name}.qzeros")
        scales, g_idx = made.tensor(f"{name}.scales").float(), made.tensor(f"{name}.g_idx")
        expected = torch.empty(64, 64)
        per = 32 // bits
        for i in range(64):
            for o in range(64):
                code = (int(qweight[i // per, o]) >> (bits * (i % per))) & mask
                zero = ((int(qzeros[g_idx[i], o // per]) >> (bits * (o % per))) & mask) + 1
                expected[o, i] = scales[g_idx[i], o] * (code - zero)
        loaded = load_torch_model(tmp_path / "q").get_submodule(name).weight
        assert torch.equal(loaded, expected)


def test_eight_bits_lose_far_less_than_four(tmp_path: Path, text: Path) -> None:
    base = build("qwen3", tmp_path / "base")
    for bits in (4, 8):
        quantize(base, settings(text, tmp_path / str(bits), bits=bits))
    assert divergence(tmp_path / "8", base) < 0.02 * divergence(tmp_path / "4", base)


def test_same_input_seed_and_threads_give_the_same_bytes(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    config = {"calibration": "self", "samples": 4, "seq_len": 32, "threads": 2}
    hashes = [quantize(base, QuantizeConfig(**config, out=tmp_path / f"q{i}"))["weights_sha256"] for i in range(2)]
    assert hashes[0] == hashes[1]
    other = quantize(base, QuantizeConfig(**config, seed=1, out=tmp_path / "other"))["weights_sha256"]
    assert other != hashes[0]


@pytest.mark.parametrize("calibration", ["file", "self"])
def test_resume_after_kill_9_gives_the_same_bytes(calibration: str, tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", num_hidden_layers=8)
    spec = str(text) if calibration == "file" else "self"
    command = Command("quantize", base, "--calibration", spec, "--samples", 16, "--seq-len", 64, "--threads", 2, "--json")
    done = resumed(command, tmp_path, lambda out: command.kill(out, ".killed.unfinished/layers/0001.json"),
                   left=".killed.unfinished/state.json")
    whole, again = (json.loads(d.stdout) for d in done)
    assert again["weights_sha256"] == whole["weights_sha256"]


def test_resume_refuses_other_settings(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base")
    with interrupted(calibration.Workspace, "commit"):
        quantize(base, settings(text, tmp_path / "q"))
    with pytest.raises(UserError, match=r"cannot resume.* differs in damp\n"):
        quantize(base, settings(text, tmp_path / "q", damp=0.5, resume=True))
    assert quantize(base, settings(text, tmp_path / "q", damp=0.5))["out"] == str(tmp_path / "q"), "begins anew"


def test_shards_are_read_wherever_they_lie(tmp_path: Path, text: Path) -> None:
    one, many = build("llama", tmp_path / "one"), tmp_path / "many"
    AutoModelForCausalLM.from_pretrained(one).save_pretrained(many, max_shard_size="100KB")
    tokenizer().save_pretrained(many)
    assert len(list(many.glob("*.safetensors"))) > 2
    hashes = [quantize(f, settings(text, tmp_path / f"q-{f.name}")) for f in (one, many)]
    a, b = (Checkpoint.open(Path(r["out"])) for r in hashes)
    assert sorted(a.names()) == sorted(b.names())
    assert all(torch.equal(a.tensor(n), b.tensor(n)) for n in a.names())


def test_a_layer_that_cannot_be_factored_is_rounded_counted_and_named(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    from llmc.compress.quantize import gptq

    base = build("llama", tmp_path / "base")
    factor = gptq.inverse_factor
    monkeypatch.setattr(gptq, "inverse_factor", lambda h, order: None if h.shape[0] == 128 else factor(h, order))
    result = quantize(base, settings(text, tmp_path / "q"))
    assert result["fallbacks"] == 2
    layer = json.loads((tmp_path / "q/llmc.json").read_text())["passes"][0]["layers"][0]
    assert layer["linears"]["mlp.down_proj"]["method"] == "rtn"
    assert layer["linears"]["mlp.up_proj"]["method"] == "gptq"
    assert "model.layers.0.mlp.down_proj: rounded to nearest" in capsys.readouterr().err


def test_sampling_counts_in_the_plan_of_memory(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of the model's own needs the whole model, its KV cache and logits: what does not fit is refused before work."""
    base = build("llama", tmp_path / "m", vocab_size=40_000)
    plans = {c: quantize(base, QuantizeConfig(calibration=c, samples=2, seq_len=64, dry_run=True, out=tmp_path / "q"))
             for c in (str(text), "self")}
    skeleton, cache = Skeleton(Checkpoint.open(base), "cpu"), artifact_at(base).kv_shape()
    assert cache is not None
    parts = {"the whole model in bfloat16": 2 * weights_of(skeleton), "KV cache": 2 * bytes_at(cache, 64, "bf16"),
             "logits": 2 * 16 * 40_000}
    step = sampling(skeleton, 64, 2)
    assert {k: v for k, v in step.terms.items() if k != PROCESS} == parts
    layers = plans[str(text)]["memory_bytes"]
    assert plans["self"]["memory_bytes"] == max(layers, step.peak)
    large = Step(step.name, {PROCESS: 0, "the whole model": layers + 10**9})
    monkeypatch.setattr("llmc.compress.quantize.memory.sampling", lambda *a: large)
    asked = QuantizeConfig(calibration="self", samples=2, seq_len=64, out=tmp_path / "q")
    assert quantize(base, replace(asked, dry_run=True))["memory_bytes"] == layers + 10**9
    monkeypatch.setattr("llmc.machine.free_memory", lambda: layers + 10**9 - 1)
    with pytest.raises(UserError, match=r"quantizing on text that the whole model writes .* needs .*\n.*--calibration FILE"):
        quantize(base, asked)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_dry_run_writes_nothing_and_predicts_the_size(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", dtype=torch.float16)
    plan = quantize(base, settings(text, tmp_path / "q", dry_run=True))
    assert not (tmp_path / "q").exists()
    assert not list(tmp_path.glob(".q*"))
    made = quantize(base, settings(text, tmp_path / "q"))
    # g_idx and zero points are the format's own overhead, and the header
    assert plan["out_bytes"] < made["bytes"] < 1.4 * plan["out_bytes"]


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def as_awq(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "awq"})
    with edit_tensors(folder) as tensors:
        tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(64, 16, dtype=torch.int32)


BAD_MODELS = {
    "NaN": (lambda f: poison(f, "model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight .* NaN"),
    "half a download": (truncate, "the download is incomplete"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
    "unknown architecture": (lambda f: edit_config(f, model_type="wonder"), "wonder"),
    "other shapes": (lambda f: edit_config(f, intermediate_size=96), "shape"),
    "quantized already": (as_awq, "quantized already"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_one_clear_error(case: str, tmp_path: Path, text: Path) -> None:
    spoil, message = BAD_MODELS[case]
    base = build("llama", tmp_path / "base")
    spoil(base)
    with pytest.raises(UserError, match=message) as e:
        quantize(base, settings(text, tmp_path / "q"))
    assert e.value.hint
    assert not (tmp_path / "q").exists()


def test_rows_that_do_not_divide(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", intermediate_size=96)
    with pytest.raises(UserError, match=r"rows of 64 .* groups of 128") as e:
        quantize(base, settings(text, tmp_path / "q", group_size=128))
    assert "--group-size 32" in e.value.hint


@pytest.mark.parametrize(("content", "message"), [
    ("", "is empty"), ("a few words", r"has \d+ tokens"), (None, "there is no text file")])
def test_bad_calibration_text(content: str | None, message: str, tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        quantize(base, settings(path, tmp_path / "q"))
    assert not (tmp_path / "q").exists()


def test_a_full_disk_is_refused_up_front(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    base = build("llama", tmp_path / "base")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(UserError, match="of disk at its peak"):
        quantize(base, settings(text, tmp_path / "q"))


def test_ctrl_c_leaves_no_artifact_and_can_be_resumed(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", num_hidden_layers=8)
    command = Command("quantize", base, "--calibration", text, "--samples", 16, "--seq-len", 64)
    code, err = command.kill(Path("q"), ".q.unfinished/layers/0001.json", by=signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    assert not Path("q").exists()
    command(Path("q"), resume=True)
    assert Path("q/model.safetensors").exists()


def test_the_number_of_sequences_follows_the_widest_matrix(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", num_hidden_layers=1, intermediate_size=2048)
    plan = quantize(base, QuantizeConfig(calibration=str(text), seq_len=64, dry_run=True))
    assert plan["tokens"] == 8 * 2048
    assert plan["tokens_per_column"] == {64: 256.0, 2048: 8.0}
    plan = quantize(base, QuantizeConfig(calibration=str(text), seq_len=512, dry_run=True))
    assert plan["tokens"] == 128 * 512, "never fewer than 128 sequences"
    assert quantize(base, settings(text, tmp_path / "q", dry_run=True))["tokens"] == settings(text, "x").samples * 64


def test_a_short_text_is_taken_whole_unless_a_number_is_asked_for(tmp_path: Path, text: Path) -> None:
    base = build("llama", tmp_path / "base", num_hidden_layers=1)
    short = tmp_path / "short.txt"
    short.write_text(text.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    quantize(base, replace(settings(short, tmp_path / "q"), samples=0))
    entry = json.loads((tmp_path / "q/llmc.json").read_text())["passes"][-1]
    assert 1 < entry["config"]["samples"] == entry["calibration"]["samples"] < 128
    with pytest.raises(UserError, match=f"use --samples {entry['config']['samples']}, "):
        quantize(base, replace(settings(short, tmp_path / "r"), samples=128))
