"""The torch runtime: transformers' own logits, and GPTQ folders as their dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_tensors
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from llmc.errors import UserError
from llmc.formats import gptq
from llmc.formats.hf import load_tokenizer, load_torch_model
from llmc.formats.types import IntegerType, QuantizedTensor
from llmc.runtimes.torch_model import TorchModel

IDS = np.arange(3, 40, dtype=np.int32) * 11 % tiny.VOCAB


def reference(folder: Path, ids: np.ndarray = IDS) -> np.ndarray:
    # transformers 4.57's default attention leaves out Gemma 2's soft cap; the spelled-out one never does
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)[None]).logits[0].numpy()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_are_transformers_logits(family: str, tmp_path: Path) -> None:
    folder = tiny.build(family, tmp_path / family)
    expected = reference(folder)
    runtime = TorchModel(folder, context=64, threads=1)
    np.testing.assert_allclose(runtime.logits(IDS, start=20), expected[20:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(runtime.prefill(IDS[:30]), expected[29], rtol=1e-4, atol=1e-4)
    for i in range(30, len(IDS)):  # the cache holds what came before, and nothing of the earlier call
        np.testing.assert_allclose(runtime.decode(int(IDS[i])), expected[i], rtol=1e-3, atol=1e-3)


def quantize_folder(folder: Path, version: str, qtype: IntegerType) -> tuple[Path, torch.nn.Module]:
    """Turn a float folder into a GPTQ one with random codes, by hand; also the float model with the same weights."""
    generator = torch.Generator().manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    for name, module in model.named_modules():
        conv = isinstance(module, Conv1D)
        if not (conv or isinstance(module, torch.nn.Linear)) or f"{name}.weight" not in tensors or "head" in name:
            continue
        out, n = module.weight.shape[::-1] if conv else module.weight.shape
        q = QuantizedTensor(
            qtype, torch.randint(0, qtype.max_code + 1, (out, n), generator=generator).to(torch.uint8),
            (torch.rand(out, n // qtype.group_size, generator=generator) * 0.02 + 0.01).to(torch.float16),
            None if qtype.symmetric else torch.randint(1, qtype.max_code, (out, n // qtype.group_size),
                                                      generator=generator).to(torch.uint8))
        module.weight.data = q.dequantize().t().contiguous() if conv else q.dequantize()
        parts = gptq.encode(q)
        if version == "gptq_v2":
            zeros = q.zeros if q.zeros is not None else torch.full_like(q.scales, qtype.zero, dtype=torch.uint8)
            parts["qzeros"] = gptq.pack(zeros.contiguous(), qtype.bits).t().contiguous()
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": t for part, t in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {**gptq.config(qtype, 0.01, True, None), "checkpoint_format": version, "format": version}
    tiny.edit_config(folder, quantization_config=quantization)
    return folder, model


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("qtype", [IntegerType(4, 32), IntegerType(8, 32), IntegerType(4, 64, symmetric=False)],
                         ids=lambda t: t.name)
def test_gptq_folder_runs_its_dequantized_weights(family: str, version: str, qtype: IntegerType, tmp_path: Path) -> None:
    folder, model = quantize_folder(tiny.build(family, tmp_path / "m"), version, qtype)
    with torch.no_grad():
        expected = model(torch.tensor(IDS, dtype=torch.long)[None]).logits[0].numpy()
    np.testing.assert_allclose(TorchModel(folder, 64, 1).logits(IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
def test_names_without_the_base_models_prefix(quantized: bool, tmp_path: Path) -> None:
    folder = tiny.build("gpt2", tmp_path / "m")
    expected = reference(folder)
    if quantized:
        folder, model = quantize_folder(folder, "gptq", IntegerType(4, 32))
        with torch.no_grad():
            expected = model(torch.tensor(IDS, dtype=torch.long)[None]).logits[0].numpy()
    tensors = load_file(folder / "model.safetensors")
    save_file({k.removeprefix("transformer."): v for k, v in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    np.testing.assert_allclose(TorchModel(folder, 64, 1).logits(IDS), expected, rtol=1e-4, atol=1e-4)


def test_a_lacking_tensor_is_an_error_and_no_random_weight(tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path / "m")
    with edit_tensors(folder) as tensors:
        del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_torch_model(folder)


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path / "m")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    tiny.edit_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(UserError, match="cannot load"):
        load_torch_model(folder)
    assert not (tmp_path / "ran").exists()


def test_too_many_tokens_and_no_gpu(tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path / "m")
    runtime = TorchModel(folder, context=10_000, threads=1)
    assert runtime.context == tiny.COMMON["max_position_embeddings"]
    with pytest.raises(UserError, match="257 tokens do not fit"):
        runtime.logits(np.zeros(257, dtype=np.int32))
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="no GPU"):
            TorchModel(folder, 64, 1, device="gpu")


def test_every_end_of_text_is_known(tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert TorchModel(folder, 64, 1).end_tokens == {1, 7, 9}  # </s> of tokenizer and config, two of generation_config


def test_describe_says_what_ran(tmp_path: Path) -> None:
    d = TorchModel(tiny.build("llama", tmp_path / "m"), 64, threads=1).describe()
    assert d["runtime"] == "torch"
    assert (d["device"], d["threads"], d["dtype"], d["version"]) == ("cpu", 1, "float32", torch.__version__)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(("family", "older", "newer"), [
    ("llama", {"rope_theta": 77.0}, {"rope_theta": 77.0, "rope_type": "default"}),
    ("qwen2", {"rope_theta": 77.0, "rope_scaling": LINEAR}, {"rope_theta": 77.0, **LINEAR}),
    ("gpt_neox", {"rotary_emb_base": 77.0, "rotary_pct": 0.5},
     {"rope_theta": 77.0, "rope_type": "default", "partial_rotary_factor": 0.5}),
    ("gemma3_text", {"rope_theta": 77.0, "rope_local_base_freq": 55.0, "rope_scaling": LINEAR},
     {"full_attention": {"rope_theta": 77.0, **LINEAR},
      "sliding_attention": {"rope_theta": 55.0, "rope_type": "default"}})])
def test_either_spelling_of_rotary_embeddings(family: str, older: dict, newer: dict, tmp_path: Path) -> None:
    """transformers 4 writes rope_theta and 5 rope_parameters. 4 would read the latter as its defaults."""
    folder = tiny.build(family, tmp_path / family)
    names = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "rotary_emb_base", "rotary_pct",
             "partial_rotary_factor")
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in names}
    logits = {}
    for spelling, values in (("none", {}), ("older", older), ("newer", {"rope_parameters": newer})):
        (folder / "config.json").write_text(json.dumps({**config, **values}))
        logits[spelling] = TorchModel(folder, context=64, threads=1).logits(IDS)
    np.testing.assert_array_equal(logits["older"], logits["newer"])
    assert np.abs(logits["older"] - logits["none"]).max() > 0.1


def test_the_soft_cap_of_attention_is_computed(tmp_path: Path) -> None:
    folder = tiny.build("gemma2", tmp_path / "gemma2", attn_logit_softcapping=0.5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor(IDS, dtype=torch.long)[None]).logits[0].numpy()
    np.testing.assert_allclose(TorchModel(folder, 64, 1).logits(IDS), expected, rtol=1e-4, atol=1e-4)
    tiny.edit_config(folder, attn_logit_softcapping=None)
    assert np.abs(TorchModel(folder, 64, 1).logits(IDS) - expected).max() > 0.1


def test_a_tokenizer_as_either_transformers_writes_it(tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path / "llama")
    path = folder / "tokenizer_config.json"
    before = json.loads(path.read_text())
    found = []
    for name in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        values = {k: v for k, v in before.items() if k not in ("extra_special_tokens", "additional_special_tokens")}
        extra = {"extra_special_tokens": ["<s>", "</s>"]} if name == "TokenizersBackend" else {
            "additional_special_tokens": ["<s>", "</s>"]}
        path.write_text(json.dumps({**values, **extra, "tokenizer_class": name}))
        tok = load_tokenizer(folder)
        found.append((tok("a river's level")["input_ids"], tok.eos_token_id, set(tok.all_special_ids)))
    assert found[0] == found[1]
