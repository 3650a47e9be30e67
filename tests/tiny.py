"""Tiny random models of every family, with real tokenizers trained here on CPython's own help text."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from llmc.formats.hf import load_torch_model

VOCAB = 512
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 32, "num_hidden_layers": 3,
                    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": None},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 256},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neox": {"rotary_pct": 0.25},
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
SLIDING = {"sliding_window": 32, "num_hidden_layers": 4}
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
# the other families of llmc's table, each in its usual form and in another: {name of the test: (family, values)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "smollm3_yarn": ("smollm3", {"num_hidden_layers": 5, "rope_parameters": YARN,
                                 "tie_word_embeddings": False}),
    "ministral3": ("ministral3", {"head_dim": 32, "rope_parameters": {
        **YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1}}),
    "granite": ("granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3,
                            "logits_scaling": 0.25, "tie_word_embeddings": True}),
    "granite_bias": ("granite", {"embedding_multiplier": 2.0, "logits_scaling": 0.5, "attention_bias": True, "mlp_bias": True,
                                 "rope_parameters": LLAMA3, "attention_multiplier": 0.3}),
    "seed_oss": ("seed_oss", {"head_dim": 32, "num_key_value_heads": 1, "attention_bias": True, "attention_out_bias": False}),
    "ernie4_5": ("ernie4_5", {"head_dim": 32, "use_bias": False, "tie_word_embeddings": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "dynamic", "alpha": 100.0, "rope_theta": 10000.0, "factor": 1.0}}),
    "hunyuan_plain": ("hunyuan_v1_dense", {"head_dim": 16}),
    "gemma": ("gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    "arcee": ("arcee", {"rope_parameters": YARN}),
    "arcee_llama3": ("arcee", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 32}),
    "apertus": ("apertus", {"rope_parameters": LLAMA3, "hidden_act": "xielu"}),
    "olmo2": ("olmo2", {"num_key_value_heads": 4}),
    "olmo2_tied": ("olmo2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "olmo3": ("olmo3", {**SLIDING, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": YARN}}),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": LLAMA3,
                            "tie_word_embeddings": True}),
    "exaone4_window": ("exaone4", {"sliding_window": 32, "num_hidden_layers": 64, "hidden_size": 32,
                                   "intermediate_size": 32}),
    "glm4": ("glm4", {"head_dim": 32, "attention_bias": True}),
    "stablelm": ("stablelm", {"num_key_value_heads": 4, "use_qkv_bias": True, "tie_word_embeddings": False}),
    "stablelm_parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", {"tie_word_embeddings": True}),
    "starcoder2_window": ("starcoder2", {"sliding_window": 160}),
    "nemotron": ("nemotron", {"head_dim": 16}),
    "nemotron_bias": ("nemotron", {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "cohere": ("cohere", {"logit_scale": 1.5}),
    "cohere2": ("cohere2", {**SLIDING, "logit_scale": 0.7}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "gpt_neox_sequential": ("gpt_neox", {"rotary_pct": 1.0, "use_parallel_residual": False, "num_key_value_heads": None}),
    "falcon": ("falcon", {"multi_query": True}),
    "falcon_grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**MIXTURE, "shared_expert_intermediate_size": 96}),
    "qwen3_moe": ("qwen3_moe", {**MIXTURE, "head_dim": 32, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {**MIXTURE, "intermediate_size": 32, "num_key_value_heads": 4}),
    "lfm2": ("lfm2", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}),
}


def family_of(name: str) -> str:
    """The model_type of an entry of FAMILIES or MODELS; others are one."""
    return MODELS[name][0] if name in MODELS and name not in FAMILIES else name


def values_of(name: str) -> dict[str, Any]:
    """What the config of an entry states."""
    return {**COMMON, **(FAMILIES[name] if name in FAMILIES else MODELS[name][1] if name in MODELS else {})}


# one entry for each family
EACH = {family_of(name): name for name in reversed([*FAMILIES, *MODELS])}


@functools.cache
def corpus() -> str:
    """The help text that ships inside CPython: the only text the tests need."""
    return "\n\n".join(topics[k] for k in sorted(topics))


def write_text(path: Path, length: int = 60_000) -> Path:
    """A file with the beginning of the corpus, to calibrate and to train on; returns its path."""
    path.write_text(corpus()[:length], encoding="utf-8")
    return path


def write_rows(path: Path, *rows: Any) -> Path:
    """A .jsonl file of items, or of lines that are written as they are; returns its path."""
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    return path


# Qwen's splitting: transformers gives it to every tokenizer of a Qwen 2 model, whatever tokenizer.json says
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_STEPS = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": QWEN}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
# GPT-2's own splitting: llama.cpp knows it as pre-tokenizer "gpt-2"
GPT2_STEPS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@functools.cache
def _trained(steps: str) -> str:
    """A byte-level BPE that splits text by the pre-tokenizer `steps` (JSON of tokenizer.json)."""
    empty = json.loads(Tokenizer(models.BPE()).to_str())
    tok = Tokenizer.from_str(json.dumps({**empty, "pre_tokenizer": json.loads(steps)}))
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        [corpus()[:200_000]],
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<s>", "</s>"], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    return tok.to_str()


@functools.cache
def _sentencepiece(leading_space: bool) -> str:
    """A BPE with byte fallback in SentencePiece's manner (Llama 2 with a leading space, Gemma without).

    As in a converted SentencePiece model, every pair of pieces that makes a piece is a merge, in the pieces' order.
    """
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if leading_space else "never")
    tok.train_from_iterator([corpus()[:200_000]], trainers.BpeTrainer(
        vocab_size=VOCAB - 259, limit_alphabet=80, show_progress=False))
    trained = json.loads(tok.to_str())
    pieces = sorted(trained["model"]["vocab"], key=trained["model"]["vocab"].get)
    special = ["<unk>", "<s>", "</s>"]
    vocab = {t: i for i, t in enumerate([*special, *(f"<0x{i:02X}>" for i in range(256)), *pieces])}
    known = set(pieces)
    merges = [[p[:i], p[i:]] for p in pieces for i in range(1, len(p)) if p[:i] in known and p[i:] in known]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = [{"type": "Prepend", "prepend": "▁"}] if leading_space else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if leading_space else []
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps({
        **trained, "added_tokens": [{"id": i, "content": t, **flags} for i, t in enumerate(special)],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, spaces]}, "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, text],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            *strip]},
        "model": {**trained["model"], "vocab": vocab, "merges": merges, "unk_token": "<unk>", "byte_fallback": True,
                  "fuse_unk": True},
    })


def tokenizer(style: str = "gpt2") -> PreTrainedTokenizerFast:
    """style: 'gpt2' or 'qwen2' (byte-level BPE), 'llama' or 'gemma' (in SentencePiece's manner)."""
    if style in ("gpt2", "qwen2"):
        text = _trained(json.dumps(QWEN_STEPS if style == "qwen2" else GPT2_STEPS))
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_sentencepiece(style == "llama")),
                                   bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def config(family: str, **overrides: Any) -> Any:
    return AutoConfig.for_model(family_of(family), **{**values_of(family), **overrides})


def build(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, style: str | None = None,
          **overrides: Any) -> Path:
    """Write a tiny model of `family` with its tokenizer as an ordinary Hugging Face folder; returns the folder.

    style: of the tokenizer (see `tokenizer`); None: what transformers makes of the family's tokenizers anyhow.
    Weights are drawn wide enough (std 0.15) that logits are far from uniform and a wrong permutation or scale shows.
    """
    torch.manual_seed(seed)
    style = style or ("qwen2" if family == "qwen2" else "gpt2")
    if style in ("llama", "gemma"):
        overrides = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, **overrides}
    made = config(family, **overrides)
    auto = AutoModelForCausalLM if made.get_text_config() is made else AutoModelForImageTextToText
    model = randomized(auto.from_config(made))
    model.to(dtype).save_pretrained(folder, max_shard_size=overrides.get("max_shard_size", "5GB"))
    tokenizer(style).save_pretrained(folder)
    return folder


@torch.no_grad()
def randomized(model: Any) -> Any:
    """Draw the weights of a model."""
    for name, p in model.eval().named_parameters():
        if p.ndim >= 2:
            p.normal_(0.0, 0.15)
        elif "norm" in name or "ln" in name:
            p.add_(torch.randn_like(p) * 0.1)
        else:
            p.normal_(0.0, 0.1)
    model.tie_weights()
    return model


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(values)
    path.write_text(json.dumps(config))


@contextmanager
def edit_tensors(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a folder by name; what the block makes of them is stored in their place."""
    tensors = load_file(folder / "model.safetensors")
    yield tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """`edit_tensors` as a call, for tables of damages."""
    with edit_tensors(folder) as tensors:
        change(tensors)


def poison(folder: Path, name: str) -> None:
    """A NaN into one tensor of a folder."""
    with edit_tensors(folder) as tensors:
        tensors[name].view(-1)[5] = float("nan")


def unseen() -> torch.Tensor:
    """Token ids [8, 64] of text that `write_text` leaves out."""
    ids: torch.Tensor = tokenizer()(corpus()[100_000:110_000], return_tensors="pt").input_ids
    return ids[:, : 8 * 64].view(8, 64)


@torch.no_grad()
def divergence(folder: Path, base: Path) -> float:
    """Mean KL divergence to the base on `unseen` text, nats."""
    p, q = (torch.log_softmax(load_torch_model(f)(unseen()).logits.double(), -1) for f in (base, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


class Letters:
    """A tokenizer of one id a byte."""

    sha256 = "0" * 64

    def __init__(self, bos: int | None = None) -> None:
        self.bos = bos

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        return bytes(ids.astype(np.uint8)).decode(errors="replace")
