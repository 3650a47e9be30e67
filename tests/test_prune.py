"""`llmc prune` from a folder to a folder: every method on every family, what comes after, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import kill_9
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, build, corpus, edit_config, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

import llmc
from llmc.compress.prune import width
from llmc.compress.prune.config import PruneConfig
from llmc.compress.quantize.assignment import linears_of
from llmc.compress.skeleton import Skeleton
from llmc.errors import UserError
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint

WIDTHS = [f for f in FAMILIES if f in width.FAMILIES]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "calibration.txt"
    path.write_text(corpus()[:60_000], encoding="utf-8")
    return str(path)


def prune(base: Path, text: str, out: Path | None = None, **options: Any) -> dict[str, Any]:
    return llmc.prune(base, **{"calibration": text, "samples": 16, "seq_len": 64, "threads": 2, "out": out, **options})


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def some_ids() -> torch.Tensor:
    return tokenizer()(corpus()[100_000:104_000], return_tensors="pt").input_ids[:, :192].view(2, 96)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(some_ids()).logits
    return found


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    """Where the linears of the decoder layers are zero, [out, in], by module name."""
    checkpoint = Checkpoint.open(folder)
    skeleton = Skeleton(checkpoint, "cpu")
    found = {}
    for _, name, module in linears_of(skeleton):
        stored = str(skeleton.names.find(f"{name}.weight"))
        weight = checkpoint.tensor(stored)
        found[stored.removesuffix(".weight")] = (weight if isinstance(module, nn.Linear) else weight.t()) == 0
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_on_every_family(family: str, tmp_path: Path, text: str) -> None:
    """The zeros are exact and as many as asked for in every linear, nothing else changes, and what was measured is true."""
    base = build(family, tmp_path / "base", dtype=torch.bfloat16)
    done = prune(base, text, tmp_path / "out", method="sparsegpt", pattern="2:4")
    found = zeros(tmp_path / "out")
    assert all(int(z.view(len(z), -1, 4).sum(-1).min()) == 2 for z in found.values())
    assert done["fallbacks"] == 0
    assert done["sparsity"] == pytest.approx(0.5, abs=1e-3)
    before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
    assert sorted(before.names()) == sorted(after.names())
    for name in set(before.names()) - {f"{n}.weight" for n in found}:
        assert torch.equal(before.tensor(name), after.tensor(name)), name
    assert {after.dtype(n) for n in after.names()} == {"BF16"}
    assert (tmp_path / "out/config.json").read_text() == json.dumps(before.config, indent=2, ensure_ascii=False) + "\n"
    (entry,) = json.loads((tmp_path / "out/llmc.json").read_text())["passes"]
    assert entry["name"] == "prune"
    assert entry["quality"]["kld"]["value"] == done["quality"]["kld"]["value"] > 0
    assert len(entry["layers"][0]["linears"]) == len(found) // len(entry["layers"])
    assert llmc.verify(tmp_path / "out")["problems"] == []


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_shares_of_every_method(method: str, tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base")
    done = prune(base, text, tmp_path / "out", method=method, sparsity=0.25)
    for z in zeros(tmp_path / "out").values():
        assert int(z.sum()) == z.numel() // 4
        if method == "wanda":
            assert bool((z.sum(1) == z.shape[1] // 4).all())
    assert done["nonzero"] == done["parameters"] - sum(int(z.sum()) for z in zeros(tmp_path / "out").values())
    if method != "sparsegpt":  # the weights that stay are those of the source
        before, after = Checkpoint.open(base), Checkpoint.open(tmp_path / "out")
        for name in before.names():
            kept = after.tensor(name) != 0
            assert torch.equal(before.tensor(name)[kept], after.tensor(name)[kept])


def test_the_figures_are_those_of_whole_models_in_memory(tmp_path: Path, text: str) -> None:
    from llmc.compress.prune.quality import split
    from llmc.compress.text import load_calibration

    base = build("gemma2", tmp_path / "base")
    found = prune(base, text, tmp_path / "out", method="magnitude", samples=24)["quality"]
    held = load_calibration(text, tokenizer(), 3, 64).sequences  # magnitude looks at none
    with torch.no_grad():
        p, q = (torch.log_softmax(load(f)(held).logits[:, 32:-1].double(), -1) for f in (base, tmp_path / "out"))
    nll = -q.gather(-1, held[:, 33:, None]).mean()
    assert found["perplexity"]["value"] == pytest.approx(float(nll.exp()), rel=1e-4)
    assert found["kld"]["value"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    seen, judged = split(torch.arange(24)[:, None], 3)
    assert sorted([*seen.flatten().tolist(), *judged.flatten().tolist()]) == list(range(24))


# ---------------------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_reloads_with_the_logits_of_the_model_without_those_layers(family: str, tmp_path: Path, text: str) -> None:
    """In memory the dropped layers hand their input through, and keep every other layer's number."""
    more: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]}
    layers = {"num_hidden_layers": 4, **({"n_layer": 4} if family == "gpt2" else {})}
    base = build(family, tmp_path / "base", **layers, **(more if family.startswith("gemma") else {}))
    done = prune(base, text, tmp_path / "out", method="depth", drop=2)
    dropped, model, tuples = done["dropped"], load(base), []
    assert len(set(dropped)) == 2
    listed: Any = model.get_submodule(Skeleton(Checkpoint.open(base), "cpu").layers_name)
    listed[0].register_forward_hook(lambda _m, _args, out: tuples.append(isinstance(out, tuple)))
    logits(model)
    for i in dropped:
        listed[i].forward = lambda states, *_args, **_kwargs: (states,) if tuples[0] else states
    pruned = load(tmp_path / "out")
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-5, atol=1e-5)
    assert pruned.config.num_hidden_layers == 2
    if kinds := getattr(pruned.config, "layer_types", None):
        assert kinds == [k for i, k in enumerate(model.config.layer_types) if i not in dropped]


def quiet_layer(folder: Path, layer: int, share: float) -> None:
    """Make what a layer adds to the stream `share` times as large."""
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.{layer}.{name}.weight"] *= share
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("by", ["kl", "influence"])
def test_layers_that_do_nothing_go_first(by: str, tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base", num_hidden_layers=5)
    quiet_layer(base, 1, 0.02)
    quiet_layer(base, 3, 0.01)
    done = prune(base, text, tmp_path / "out", method="depth", drop=2, by=by)
    assert sorted(done["dropped"]) == [1, 3]
    assert done["quality"]["kld"]["value"] < 0.05
    assert "small enough" in done["advice"]


def test_kl_sees_what_influence_cannot(tmp_path: Path, text: str) -> None:
    """Layer 1 turns the stream further, in directions that the head and every linear are blind to; layer 2 turns it less and
    matters. Influence drops 2, the measured divergence drops 1."""
    base = build("llama", tmp_path / "base", num_hidden_layers=3, tie_word_embeddings=False)
    tensors = load_file(base / "model.safetensors")
    blind = slice(0, 16)
    for name, t in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight",
                          "lm_head.weight")):
            t[:, blind] = 0
        if name.startswith("model.layers.1.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            t[16:] = 0
            t[blind] *= 0.7
        if name == "model.embed_tokens.weight":
            t[:, blind] = 0
        if name.startswith("model.layers.2.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            t *= 0.3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    done = {by: prune(base, text, tmp_path / by, method="depth", drop=1, by=by) for by in ("kl", "influence")}
    assert done["influence"]["dropped"] == [2]
    assert done["kl"]["dropped"] == [1]
    assert done["kl"]["quality"]["kld"]["value"] < done["influence"]["quality"]["kld"]["value"]


def test_block_influence_is_one_minus_the_mean_cosine(tmp_path: Path, text: str) -> None:
    base = build("qwen3", tmp_path / "base", num_hidden_layers=3)
    prune(base, text, tmp_path / "out", method="depth", drop=0, by="influence", samples=4, seq_len=32)
    measured = json.loads((tmp_path / "out/llmc.json").read_text())["passes"][0]["layers"]
    from llmc.compress.prune.quality import split
    from llmc.compress.text import load_calibration

    seen, _ = split(load_calibration(text, tokenizer(), 4, 32).sequences, 1)
    with torch.no_grad():
        states = load(base).model(seen, output_hidden_states=True).hidden_states
        last: list[torch.Tensor] = []
        model = load(base)
        model.model.layers[2].register_forward_hook(
            lambda _m, _a, out: last.append(out[0] if isinstance(out, tuple) else out))
        model(seen)
    for i, after in enumerate([*states[1:3], last[0]]):  # the last of hidden_states is normed
        expected = 1 - float(torch.cosine_similarity(states[i], after, dim=-1).mean())
        assert measured[i]["influence"] == pytest.approx(expected, rel=0.02, abs=2e-3)  # the loop may run in bf16


# ---------------------------------------------------------------------------------------------------------------- width


def sliced(family: str, model: Any, new: Any, ffn: list[list[int]], groups: list[list[int]], hidden: list[int]) -> None:
    """Fill `new` with what stays of `model`, by transformers' own names: written apart from the code that is tested."""
    c = model.config
    head, per = new.config.head_dim, c.num_attention_heads // c.num_key_value_heads
    state, out = model.state_dict(), {}
    for name, t in state.items():
        i = int(name.split(".")[2]) if ".layers." in name else 0
        kv = [g * head + j for g in groups[i] for j in range(head)]
        q = [(g * per + h) * head + j for g in groups[i] for h in range(per) for j in range(head)]
        nq, nkv, inner = c.num_attention_heads * head, c.num_key_value_heads * head, c.intermediate_size
        rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "qkv_proj": [*q, *(nq + x for x in kv), *(nq + nkv + x for x in kv)],
                "gate_proj": ffn[i], "up_proj": ffn[i], "gate_up_proj": [*ffn[i], *(inner + x for x in ffn[i])],
                "o_proj": hidden, "down_proj": hidden}
        columns = {"o_proj": q, "down_proj": ffn[i]}
        part = name.split(".")[-2]
        if part in rows:
            t = t[rows[part]]
            if name.endswith("weight"):
                t = t[:, columns.get(part, hidden)]
        elif part not in ("q_norm", "k_norm"):
            t = t[..., hidden]
        out[name] = t
    new.load_state_dict(out)
    if family.startswith("gemma"):  # the embedding's own factor stays what it was for the old width
        for module in new.modules():
            if hasattr(module, "embed_scale"):
                module.embed_scale.fill_(c.hidden_size**0.5)


def kept_columns(old: torch.Tensor, new: torch.Tensor) -> list[int]:
    """Which columns of `old` those of `new` are."""
    return [int((old == column[:, None]).all(0).nonzero()) for column in new.t()]


@pytest.mark.parametrize("family", WIDTHS)
def test_width_reloads_with_the_logits_of_the_model_cut_in_memory(family: str, tmp_path: Path, text: str) -> None:
    base = build(family, tmp_path / "base", num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    done = prune(base, text, tmp_path / "out", method="width", ffn=0.75, heads=0.667, hidden=0.667)
    (entry,) = json.loads((tmp_path / "out/llmc.json").read_text())["passes"]
    pruned, model = load(tmp_path / "out"), load(base)
    c = pruned.config
    assert (c.intermediate_size, c.num_attention_heads, c.num_key_value_heads) == (96, 4, 2)
    assert c.hidden_size == done["shape"]["hidden"] == 64
    expected, channels = type(pruned)(c).eval(), entry["channels"]
    neurons = [kept_columns(old.mlp.down_proj.weight[channels], new.mlp.down_proj.weight)
               for old, new in zip(model.model.layers, pruned.model.layers, strict=True)]
    sliced(family, model, expected, neurons, [x["groups"] for x in entry["layers"]], channels)
    torch.testing.assert_close(logits(pruned), logits(expected), rtol=2e-4, atol=2e-4)


def test_width_keeps_what_is_used(tmp_path: Path, text: str) -> None:
    """Neurons, groups and channels that nothing comes out of are those that go: the model computes what it did."""
    base = build("llama", tmp_path / "base", num_attention_heads=6, num_key_value_heads=3, hidden_size=96)
    tensors = load_file(base / "model.safetensors")
    for i, dead in enumerate((slice(0, 32), slice(64, 96))):
        tensors[f"model.layers.{i}.mlp.up_proj.weight"][dead] = 0
        tensors[f"model.layers.{i}.self_attn.v_proj.weight"][(1 + i) * 16 : (2 + i) * 16] = 0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    done = prune(base, text, tmp_path / "out", method="width", ffn=0.75, heads=0.667)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(load(base)), rtol=1e-4, atol=1e-4)
    assert done["quality"]["kld"]["value"] < 1e-6
    layers = json.loads((tmp_path / "out/llmc.json").read_text())["passes"][0]["layers"]
    assert [x["groups"] for x in layers] == [[0, 2], [0, 1]]


def test_neurons_come_in_multiples_of_256_where_they_can_and_it_is_said(tmp_path: Path) -> None:
    from tiny import config as tiny_config

    wide = tiny_config("llama", intermediate_size=1536)
    for share, neurons, step in ((0.75, 1280, 256), (0.95, 1472, 32), (0.1, 160, 32)):
        shape, notes = width.narrowed(wide, PruneConfig(method="width", ffn=share))
        assert shape.ffn == neurons
        assert f"multiple of {step}" in notes[0]


# --------------------------------------------------------------------------------------------------------- what follows


@pytest.mark.parametrize("options", [{"method": "gptq"}, {"method": "rtn"}, {"method": "gptq", "type": "q5_0"},
                                     {"method": "gptq", "sym": False}, {"method": "gptq", "transform": "scaling"}])
def test_quantizing_keeps_the_zeros(options: dict[str, Any], tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base", dtype=torch.float16)
    prune(base, text, tmp_path / "sparse", method="wanda")
    done = llmc.quantize(tmp_path / "sparse", **options, calibration=text, samples=16, seq_len=64, threads=2, out="small")
    made = Checkpoint.open(Path("small"))
    for name, zero in zeros(tmp_path / "sparse").items():
        assert bool((quantized.read(made, name).dequantize()[zero] == 0).all()), name
    assert done["fallbacks"] == 0
    passes = json.loads(Path("small/llmc.json").read_text())["passes"]
    assert [p["name"] for p in passes if p["name"] != "scaling"] == ["prune", "quantize"]
    assert passes[-1]["zeros_kept"]


def test_gptq_with_the_mask_loses_less_than_rounding(tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base")
    prune(base, text, tmp_path / "sparse")
    klds = []
    for method in ("gptq", "rtn"):
        llmc.quantize(tmp_path / "sparse", method=method, calibration=text, samples=16, seq_len=64, threads=2, out=method)
        p, q = (torch.log_softmax(logits(llmc_model(f)).double(), -1) for f in (tmp_path / "sparse", Path(method)))
        klds.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert klds[0] < klds[1]


def llmc_model(folder: Path) -> Any:
    from llmc.formats.hf import load_torch_model

    return load_torch_model(folder)


def test_healing_keeps_the_zeros(tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base")
    prune(base, text, tmp_path / "sparse")
    llmc.quantize(tmp_path / "sparse", method="rtn", out="small", threads=2)
    llmc.heal("small", tmp_path / "sparse", calibration=text, steps=3, batch=2, seq_len=64, held_out=2, sampled=0, threads=2,
              out="healed")
    made, before = Checkpoint.open(Path("healed")), Checkpoint.open(Path("small"))
    changed = 0
    for name, zero in zeros(tmp_path / "sparse").items():
        weight = quantized.read(made, name).dequantize()
        assert bool((weight[zero] == 0).all())
        changed += not torch.equal(weight, quantized.read(before, name).dequantize())
    assert changed


@pytest.mark.parametrize(("options", "message"), [
    ({"type": "q4_1"}, "q4_1 has no code for the value 0"), ({"type": "iq4_nl"}, "iq4_nl"), ({"preset": "q4_1"}, "q4_1"),
    ({"type": "q3_k"}, "iq4_nl"), ({"transform": "rotate"}, "mix its columns")])
def test_what_cannot_keep_zeros_is_refused_or_said(options: dict[str, Any], message: str, tmp_path: Path, text: str,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    base = build("llama", tmp_path / "base")
    prune(base, text, tmp_path / "sparse", method="magnitude")
    with pytest.raises(UserError, match=message) as e:
        llmc.quantize(tmp_path / "sparse", **options, dry_run=True)
    assert "--lose-zeros" in e.value.hint
    plan = llmc.quantize(tmp_path / "sparse", **options, lose_zeros=True, dry_run=True)
    assert not plan["zeros_kept"]
    assert "not kept" in capsys.readouterr().err


def test_transform_refuses_to_rotate_zeros_away(tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base")
    prune(base, text, tmp_path / "sparse", method="magnitude")
    with pytest.raises(UserError, match="mask"):
        llmc.transform(tmp_path / "sparse", rotate="r2", scaling="none")


def test_a_budget_chooses_among_types_that_keep_zeros(tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=256)
    prune(base, text, tmp_path / "sparse", method="magnitude")
    options = {"target_bpw": 4.6, "method": "rtn", "calibration": text, "threads": 2, "dry_run": True}
    kept = llmc.quantize(tmp_path / "sparse", **options)
    assert kept["zeros_kept"]
    assert set(kept["types"]) <= {"q3_k", "q4_0", "q5_0", "q6_k", "q8_0"}
    free = llmc.quantize(tmp_path / "sparse", **options, lose_zeros=True)
    assert not set(free["types"]) <= {"q3_k", "q4_0", "q5_0", "q6_k", "q8_0"}


SMALLER = {"sparsegpt": {"sparsity": 0.5}, "depth": {"drop": 1}, "width": {"ffn": 0.75, "heads": 0.5, "hidden": 0.5}}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("method", SMALLER)
def test_the_result_quantizes_and_exports_to_gguf(method: str, family: str, tmp_path: Path, text: str) -> None:
    """The export proves the file in llama.cpp against the folder's own logits."""
    base = build(family, tmp_path / "base", dtype=torch.float16)
    prune(base, text, tmp_path / "pruned", method=method, **SMALLER[method])
    llmc.export(tmp_path / "pruned", format="gguf", out="float.gguf")
    llmc.quantize(tmp_path / "pruned", method="rtn", out="small", threads=2)
    llmc.export("small", format="gguf", out="small.gguf")
    report = llmc.evaluate("float.gguf", base=tmp_path / "pruned", context=64, chunks=4)
    assert report["quality"]["texts"][0]["kld"]["value"] < 1e-3


@pytest.mark.parametrize("method", SMALLER)
def test_the_result_exports_to_onnx(method: str, tmp_path: Path, text: str) -> None:
    pytest.importorskip("onnxruntime_genai")
    base = build("llama", tmp_path / "base", dtype=torch.float16)
    prune(base, text, tmp_path / "pruned", method=method, **SMALLER[method])
    llmc.quantize(tmp_path / "pruned", method="rtn", out="small", threads=2)
    llmc.export("small", format="onnx", out="onnx")
    assert Path("onnx/model.onnx").is_file()


# ------------------------------------------------------------------------------------------------- long runs, bad input


@pytest.mark.parametrize("method", ["sparsegpt", "depth"])
def test_resume_after_kill_9_gives_the_same_bytes(method: str, tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base", num_hidden_layers=8)
    more = ["--drop", "6"] if method == "depth" else []
    command = [sys.executable, "-m", "llmc", "prune", str(base), "--method", method, *more, "--calibration", text,
               "--samples", "16", "--seq-len", "64", "--threads", "2", "--json", "-o"]
    whole = json.loads(subprocess.run([*command, "whole"], check=True, capture_output=True).stdout)

    kill_9([*command[3:], "killed"], tmp_path, ".killed.unfinished/layers/0001.json")
    assert not Path("killed").exists()
    assert Path(".killed.unfinished/state.json").exists()

    done = subprocess.run([*command, "killed", "--resume"], check=True, capture_output=True, text=True)
    resumed = json.loads(done.stdout)
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["quality"] == whole["quality"]
    assert not list(Path().glob(".killed*"))


@pytest.mark.parametrize("options", [{}, {"method": "wanda", "pattern": "2:4"}, {"method": "depth", "drop": 1},
                                     {"method": "width", "ffn": 0.75}])
def test_dry_run_writes_nothing(options: dict[str, Any], tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base")
    before = sorted(tmp_path.rglob("*"))
    plan = prune(base, text, tmp_path / "out", dry_run=True, **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert plan["memory_bytes"] > 0
    assert plan["whole_model_in_memory"] == (options.get("method") == "depth")


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
def test_bad_options_are_one_clear_error(case: str, tmp_path: Path, text: str) -> None:
    options, message = BAD[case]
    base = build("llama", tmp_path / "base")
    with pytest.raises(UserError, match=message) as e:
        prune(base, text, tmp_path / "out", **options)
    assert e.value.hint
    assert e.value.exit_code == 2
    assert not list(tmp_path.glob("*out*"))


def test_rows_that_a_pattern_does_not_divide(tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base", intermediate_size=126)
    with pytest.raises(UserError, match=r"rows of 126 weights .*down_proj.* do not divide into runs of 4"):
        prune(base, text, tmp_path / "out", pattern="2:4")


def test_head_counts_that_transformers_would_not_load_are_refused_before_any_work(tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base", num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(UserError, match="64 channels are no multiple of 6 query heads") as e:
        prune(base, text, tmp_path / "out", method="width", heads=0.75)
    assert e.value.hint == "use --heads 0.25 or 0.5 or 1"


def test_width_refuses_families_that_it_does_not_know_by_name(tmp_path: Path, text: str) -> None:
    base = build("gpt2", tmp_path / "base")
    with pytest.raises(UserError, match="gpt2"):
        prune(base, text, tmp_path / "out", method="width", ffn=0.75)


def test_layers_that_depend_on_their_number_are_not_renumbered(tmp_path: Path, text: str) -> None:
    base = build("gpt2", tmp_path / "base", num_hidden_layers=3, n_layer=3, scale_attn_by_inverse_layer_idx=True)
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if ".h.0." in name and "c_proj" in name:  # the first layer does nothing, so it goes and the others get new numbers
            tensors[name] *= 0.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="depend on their number"):
        prune(base, text, tmp_path / "out", method="depth", drop=1)
    assert not (tmp_path / "out").exists()


def test_quantized_folders_are_refused(tmp_path: Path, text: str) -> None:
    base = build("llama", tmp_path / "base")
    edit_config(base, quantization_config={"quant_method": "awq"})
    with pytest.raises(UserError, match="quantized already"):
        prune(base, text, tmp_path / "out")


def test_a_layer_that_cannot_be_factored_is_pruned_by_wanda_counted_and_named(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    from llmc.compress.quantize import gptq

    base = build("llama", tmp_path / "base")
    factor = gptq.inverse_factor
    monkeypatch.setattr(gptq, "inverse_factor", lambda h, order: None if h.shape[0] == 128 else factor(h, order))
    done = prune(base, text, tmp_path / "out")
    assert done["fallbacks"] == 2
    layer = json.loads((tmp_path / "out/llmc.json").read_text())["passes"][0]["layers"][0]
    assert layer["linears"]["mlp.down_proj"]["method"] == "wanda"
    assert layer["linears"]["mlp.up_proj"]["method"] == "sparsegpt"
    assert "mlp.down_proj: pruned by Wanda" in capsys.readouterr().err


def test_the_command_line_says_what_was_lost_and_what_to_do(tmp_path: Path, text: str) -> None:
    build("llama", tmp_path / "base", num_hidden_layers=3)
    command = [sys.executable, "-m", "llmc", "prune", "base", "--method", "depth", "--drop", "2", "--calibration", text,
               "--samples", "8", "--seq-len", "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "went, in this order" in done.stdout
    assert "KL divergence" in done.stdout
    assert Path("base-depth-2/llmc.json").is_file()
    bad = subprocess.run([*command, "--sparsity", "0.5"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert "goes with --method magnitude" in bad.stderr


def test_per_layer_lists_are_trimmed_and_rules_of_the_layers_number_spelled_out() -> None:
    from tiny import config as tiny_config

    from llmc.compress.prune.depth import shortened

    kinds = ["sliding_attention", "full_attention"] * 2
    config = tiny_config("gemma2", num_hidden_layers=4, layer_types=kinds)
    raw = {"num_hidden_layers": 4, "layer_types": None, "eos_token_id": [1, 2, 3, 4], "sliding_window_pattern": 2,
           "max_window_layers": 3, "architectures": ["A", "B", "C", "D"], "hidden_size": 64}
    assert shortened(raw, config, [1, 2]) == {
        "num_hidden_layers": 2, "layer_types": [kinds[0], kinds[3]], "eos_token_id": [1, 2, 3, 4], "max_window_layers": 1,
        "architectures": ["A", "B", "C", "D"], "hidden_size": 64}
