"""The runtime of Hugging Face folders: transformers runs a float model as it is, a quantized one dequantized.

Evaluation runs in float32. So it measures the codes and scales of a quantized folder and not the rounding of a kernel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmc.errors import UserError
from llmc.formats.chat_template import render
from llmc.formats.hf import load_tokenizer, load_torch_model
from llmc.machine import torch_device
from llmc.runtimes.base import TOO_LONG


class TorchModel:
    """A runtime (see runtimes/base.py) with the model of `load_torch_model`."""

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
        return out[start - len(ids) :].float().cpu().numpy()  # OPT in transformers 4.57 ignores logits_to_keep

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
        rows = self.model.get_input_embeddings().weight.shape[0]
        if (highest := int(ids.max())) >= rows:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(f"the text has token {highest} ({token}), and the embedding of {self.folder} has {rows} rows",
                            "leave this token out of the text")
        return torch.from_numpy(np.asarray(ids, dtype=np.int64))[None].to(self.device)

    @property
    def tokenizer(self) -> Any:
        """The folder's own tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.folder)
        return self._tokenizer

    def tokenize(self, text: str, special: bool = True) -> np.ndarray:
        return np.array(self.tokenizer(text, add_special_tokens=special)["input_ids"], dtype=np.int32)

    def detokenize(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def chat(self, user: str) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(f"{self.folder} has no chat template", "leave out --chat: the prompt is continued as it is")
        messages = [{"role": "user", "content": user}]
        return render(self.tokenizer, messages, str(self.folder), add_generation_prompt=True)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Every end token in config, generation config and tokenizer."""
        ids: set[int] = set()
        for source in (self.model.config, self.model.generation_config, self.tokenizer):
            found = getattr(source, "eos_token_id", None)
            ids.update(found if isinstance(found, list) else [] if found is None else [found])
        return frozenset(ids)

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        from llmc.machine import cpu_features

        return {"runtime": self.name, "version": version("torch"), "transformers": version("transformers"),
                "device": str(self.device), "threads": self.threads, "dtype": str(self.dtype).removeprefix("torch."),
                "kv_type": self.kv_type,
                "build": {"cpu_capability": torch.backends.cpu.get_cpu_capability()}, "cpu_features": cpu_features()}

    def close(self) -> None:
        self.model = None
        self._cache = None


def tokenize(folder: Path, text: str) -> np.ndarray:
    """The ids of a text, int [n], from a folder's tokenizer, without loading the model."""
    return np.array(load_tokenizer(folder)(text)["input_ids"])
