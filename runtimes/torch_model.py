"""A Hugging Face folder run by transformers: a float model as it is, a quantised one with its weights dequantised.

Evaluation runs in float32, so what is measured of a quantised folder is its codes and scales and not some kernel's
rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llmc.checkpoint import Checkpoint
from llmc.errors import UserError
from llmc.export import quantized
from llmc.export.texts import read_json
from llmc.runtimes.base import TOO_LONG


class TorchModel:
    """A runtime (see runtimes/base.py) over `load_torch_model`."""

    name = "torch"

    def __init__(self, folder: Path, context: int, threads: int, device: str = "cpu",
                 dtype: torch.dtype = torch.float32) -> None:
        torch.set_num_threads(threads)
        self.folder, self.threads, self.dtype = folder, threads, dtype
        self.device = torch_device(device)
        self.model = load_torch_model(folder, str(self.device), dtype)
        self.context = min(context, getattr(self.model.config, "max_position_embeddings", None) or context)
        self.vocab_size = int(self.model.get_output_embeddings().weight.shape[0])
        self._cache: Any = None
        self._used = 0
        self._tokenizer: Any = None

    @property
    def kv_type(self) -> str:
        return {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[self.dtype]

    @torch.inference_mode()
    def logits(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        self._fit(len(ids))
        out = self.model(self._batch(ids), use_cache=False, logits_to_keep=len(ids) - start).logits[0]
        return out[start - len(ids) :].float().cpu().numpy()  # OPT of transformers 4.57 keeps all of them

    @torch.inference_mode()
    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self._cache, self._used = None, 0
        return self._step(ids)

    @torch.inference_mode()
    def decode(self, token: int) -> np.ndarray:
        return self._step(np.array([token]))

    def _step(self, ids: np.ndarray) -> np.ndarray:
        self._fit(self._used + len(ids))
        out = self.model(self._batch(ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._used = out.past_key_values, self._used + len(ids)
        return out.logits[0, -1].float().cpu().numpy()

    def _fit(self, tokens: int) -> None:
        if tokens > self.context:
            raise UserError(f"{tokens} tokens do not fit {self.folder}'s context of {self.context}", TOO_LONG)

    def _batch(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(ids, dtype=np.int64))[None].to(self.device)

    @property
    def tokenizer(self) -> Any:
        """The folder's own tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder)
        return self._tokenizer

    def tokenise(self, text: str, special: bool = True) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=special)["input_ids"], dtype=np.int32)

    def detokenise(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def chat(self, user: str) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.folder} has no chat template", "leave out --chat: the prompt is continued as it is")
        messages = [{"role": "user", "content": user}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    @property
    def end_tokens(self) -> frozenset[int]:
        """Every id that config, generation config or tokenizer calls the end of a text."""
        ids: set[int] = set()
        for source in (self.model.config, self.model.generation_config, self.tokenizer):
            found = getattr(source, "eos_token_id", None)
            ids.update(found if isinstance(found, list) else [] if found is None else [found])
        return frozenset(ids)

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        from llmc.runtimes.targets.this_machine import cpu_features

        return {"runtime": self.name, "version": version("torch"), "transformers": version("transformers"),
                "device": str(self.device), "threads": self.threads, "dtype": str(self.dtype).removeprefix("torch."),
                "kv_type": self.kv_type,
                "build": {"cpu_capability": torch.backends.cpu.get_cpu_capability()}, "cpu_features": cpu_features()}

    def close(self) -> None:
        self.model = None
        self._cache = None


def torch_device(device: str) -> torch.device:
    """'cpu', or 'gpu' for whatever accelerator torch sees; a torch device name is taken as it is."""
    if device != "gpu":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise UserError("--device gpu: torch sees no GPU here", "use --device cpu, or install a torch built for your GPU")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. No code from the folder is run."""
    import transformers

    auto: Any = transformers.AutoTokenizer
    more: dict[str, Any] = {}
    if not hasattr(transformers, "TokenizersBackend"):  # 4.57 does not know two things that 5 writes
        values = read_json(folder / "tokenizer_config.json")
        if values.get("tokenizer_class") == "TokenizersBackend":
            auto = transformers.PreTrainedTokenizerFast
        if isinstance(extra := values.get("extra_special_tokens"), list):
            more = {"extra_special_tokens": {}, "additional_special_tokens": extra}
    try:
        with quiet_transformers():
            return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **more)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{folder} has no tokenizer that transformers can read: {str(e).splitlines()[0]}",
                        "copy the base model's tokenizer files into it") from e


def load_config(folder: Path) -> Any:
    """transformers' reading of config.json, without `quantization_config`. No code from the folder is run."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if hasattr(config, "rope_theta") and not hasattr(type(config), "rope_parameters"):
        _respell_rope(config)
    if getattr(config, "attn_logit_softcapping", None):  # Gemma 2: 4.57 would use sdpa, which leaves the soft cap out
        config._attn_implementation = "eager"
    return config


def _respell_rope(config: Any) -> None:
    """`rope_parameters`, as transformers 5 writes it, in the words of 4.57, which would take its defaults in silence."""
    kinds = getattr(config, "rope_parameters", None) or {}
    found, local = kinds.get("full_attention", kinds), kinds.get("sliding_attention", {})
    if any(isinstance(v, dict) for v in found.values()) or (local and not hasattr(config, "rope_local_base_freq")):
        raise UserError(f"config.json gives {config.model_type} rotary embeddings that this transformers does not know: "
                        f"{', '.join(kinds)}", "use a newer transformers")
    values = {k: v for k, v in found.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if found:
        config.rope_scaling = None if values.get("rope_type", "default") == "default" else values
    for key, names in (("rope_theta", ("rope_theta",)), ("partial_rotary_factor", ("partial_rotary_factor", "rotary_pct"))):
        for name in names:
            if key in found:
                setattr(config, name, found[key])
    if "rope_theta" in local:
        config.rope_local_base_freq = local["rope_theta"]


def load_torch_model(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model (an nn.Module in eval mode) in `folder`, float or quantised.

    Quantised weights are dequantised exactly in float32, then cast to `dtype`. Safetensors only, and no code from the
    folder is run. A tensor that the architecture needs and the folder lacks is an error, not a random weight.
    """
    from transformers import AutoModelForCausalLM

    ckpt = Checkpoint.open(folder)
    auto: Any = AutoModelForCausalLM  # its annotations leave out output_loading_info
    kwargs: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    try:
        with quiet_transformers():
            config = load_config(folder)
            if not quantized.is_quantized(ckpt):
                model, info = auto.from_pretrained(folder, config=config, use_safetensors=True, local_files_only=True,
                                                   trust_remote_code=False, **kwargs)
            else:
                with torch.device("meta"):
                    skeleton = auto.from_config(config)
                weights = _dequantized(ckpt, skeleton, dtype)
                model, info = type(skeleton).from_pretrained(None, config=config, state_dict=weights, **kwargs)
    except (ValueError, KeyError, OSError) as e:
        raise UserError(f"transformers cannot load {folder}: {str(e).splitlines()[0]}",
                        "llmc runs causal language models whose code is part of transformers") from e
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{folder} lacks {len(missing)} tensors of its architecture, first {missing[0]}",
                        "download or make it again")
    return model.eval().to(device)


def _dequantized(ckpt: Checkpoint, skeleton: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict of a quantised checkpoint as a float model would have it.

    transformers stores the weights of GPT-2's Conv1D modules as [in, out]; what is quantised is always [out, in].
    """
    from transformers.pytorch_utils import Conv1D

    modules = dict(skeleton.named_modules())
    prefix = getattr(skeleton, "base_model_prefix", "") + "."
    linears = quantized.linears(ckpt)
    packed = {name for linear in linears for name in quantized.parts(linear)}
    weights = {name: ckpt.tensor(name).to(dtype) for name in ckpt.names() if name not in packed}
    for linear in linears:
        w = quantized.read(ckpt, linear).dequantize()
        module = modules.get(linear) or modules.get(prefix + linear)
        if isinstance(module, Conv1D):
            w = w.t().contiguous()
        expected = getattr(module, "weight", w)  # transformers may stack or rename what it loads
        if expected.shape != w.shape:
            raise UserError(f"{linear} of {ckpt.folder} has shape {list(w.shape)}, config.json says "
                            f"{list(expected.shape)}", "the checkpoint and its config.json do not belong together")
        weights[f"{linear}.weight"] = w.to(dtype)
    return weights


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no load report from transformers inside the block (errors still show)."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
