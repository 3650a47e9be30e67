"""The runtime of ONNX folders: onnxruntime runs the unchanged graph with its own cache, through IO binding."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.formats.config_json import read_generation, read_tokenizer_config
from llmc.formats.genai_config import QDQ_LEVEL
from llmc.formats.onnx_folder import OnnxFolder, open_onnx
from llmc.formats.tokenizer_json import open_tokenizer_json
from llmc.runtimes import onnx_session
from llmc.runtimes.base import TOO_LONG
from llmc.runtimes.onnx_kv import KvCache, read_signature
from llmc.runtimes.onnx_session import CPU, OPTIONS, first_line

BATCH = 512  # tokens run at once
# the operators that take most of a decoder's time
PRODUCTS = ("MatMul", "MatMulNBits", "MatMulInteger", "Gemm", "MoE", "QMoE", "GroupQueryAttention", "MultiHeadAttention",
            "Attention", "LinearAttention")
NAMES = {"float32": "f32", "float16": "f16"}
LOGITS_BYTES = 128 << 20  # largest memory for the logits of one run: a graph returns those of every token


class OnnxModel:
    """A runtime (see runtimes/base.py) with one onnxruntime session.

    folder: a path, or a folder that is already open and perhaps edited. share: past and present in one buffer; None: if the
    graph's attention allows it. The first use runs one token under onnxruntime's profiler. So the reported execution
    providers are those that ran.
    """

    name = "onnxruntime"

    def __init__(self, folder: Path | OnnxFolder, context: int, threads: int, device: str = "cpu",
                 share: bool | None = None) -> None:
        if device not in ("cpu", "gpu"):
            raise UserError(f"the onnxruntime runtime does not know the device {device!r}", "choose cpu or gpu")
        self._ort = ort = onnx_session.library()
        self._source = source = folder if isinstance(folder, OnnxFolder) else open_onnx(folder)
        self.folder, self.threads, self.device = source.folder, threads, device
        self.provider = onnx_session.gpu_provider() if device == "gpu" else CPU
        self.context = min(context, source.context or context)
        self._work = tempfile.TemporaryDirectory()
        self._session = onnx_session.open_session(source, self.provider, threads, Path(self._work.name) / "profile")
        self.signature = s = read_signature(source, self._session)
        self.vocab_size = s.vocab
        memory = onnx_session.GPUS.get(self.provider, "cpu")
        direct = memory != "cpu" or self.provider == CPU  # the buffers are in the memory of the operators' device
        self._cache: Any = KvCache(ort, s.slots, s.states, self.context, memory,
                                   s.shareable and direct if share is None else share)
        self._batch = max(1, min(BATCH, self.context, LOGITS_BYTES // (s.vocab * np.dtype(s.logits).itemsize)))
        self._rows = np.empty((self._batch, s.vocab), s.logits)
        self._binding = self._session.io_binding()
        self._used = 0
        self._nodes: dict[str, dict[str, int]] | None = None
        self._proved = False
        self._tokenizer: Any = None

    @property
    def nodes(self) -> dict[str, dict[str, int]]:
        """The nodes that run, {execution provider: {operator: number of nodes}}."""
        return self._prove()

    def _prove(self) -> dict[str, dict[str, int]]:
        """Find `nodes` with one token before all others; raise UserError if too little runs on the requested device."""
        if self._nodes is None:
            self._step(np.zeros(1, np.int64))
            self._used = 0
            self._nodes = onnx_session.ran(Path(self._session.end_profiling()))
            self._work.cleanup()
        if self._proved:
            return self._nodes
        if self.provider not in self._nodes:
            raise UserError(f"--device gpu: no node of {self._source.model} ran on {self.provider}, all on "
                            f"{', '.join(self._nodes)}", "use --device cpu, or export the model for that device")
        heavy, left = (sum(n for op, n in operators.items() if op in PRODUCTS)
                       for operators in (self._source.operators(), self._nodes.get(CPU, {})))
        if self.provider != CPU and 2 * left > heavy:
            raise UserError(f"--device gpu: {left} of the {heavy} matrix products of {self._source.model} ran on {CPU}, not "
                            f"on {self.provider}", "use --device cpu, or export the model for that device")
        self._proved = True
        return self._nodes

    @property
    def kv_type(self) -> str:
        return " and ".join(sorted({NAMES.get(s.dtype, s.dtype) for s in self.signature.slots}))

    def logits(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        self._used = 0
        out = np.empty((len(ids) - start, self.vocab_size), np.float32)
        for i in range(0, len(ids), self._batch):
            rows = self._run(ids[i : i + self._batch])
            skip = max(0, start - i)
            out[max(0, i - start) : max(0, i - start + len(rows))] = rows[skip:]
        return out

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self._used = 0
        for i in range(0, len(ids), self._batch):
            rows = self._run(ids[i : i + self._batch])
        return rows[-1].astype(np.float32)

    def decode(self, token: int) -> np.ndarray:
        return self._run(np.array([token]))[-1].astype(np.float32)

    def values(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """ids int [n] from an empty cache -> {name: float32 [n, ..]}: 'logits' and the folder's watched values."""
        self._used = 0
        names = self._source.watched
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("logits", *names)}
        for i in range(0, len(ids), self._batch):
            parts["logits"].append(self._run(ids[i : i + self._batch]).astype(np.float32))
            for name, value in zip(names, self._binding.get_outputs()[-len(names):] if names else [], strict=True):
                parts[name].append(value.numpy()[0])  # bound last
        return {name: np.concatenate(p) for name, p in parts.items()}

    def _run(self, ids: np.ndarray) -> np.ndarray:
        """Add ids [n] to the cache; return their logits [n, vocab], valid until the next run."""
        self._prove()
        return self._step(ids)

    def _step(self, ids: np.ndarray) -> np.ndarray:
        past, n, binding = self._used, len(ids), self._binding
        if past + n > self.context:
            raise UserError(f"{past + n} tokens do not fit {self.folder}'s context of {self.context}", TOO_LONG)
        if (highest := int(ids.max())) >= self.vocab_size:
            raise UserError(f"token {highest} is not in the vocabulary of {self.folder}: {self.vocab_size} tokens",
                            "its tokenizer belongs to another model: export it again")
        values = {"input_ids": ids, "attention_mask": np.ones(past + n), "position_ids": np.arange(past, past + n)}
        for name, dtype in self.signature.feeds.items():
            value = np.ascontiguousarray(values[name], dtype)[None]
            if name == "position_ids" and self.signature.streams:
                value = np.repeat(value[None], self.signature.streams, 0)
            binding.bind_cpu_input(name, value)
        self._cache.bind(binding, past, n)
        binding.bind_output("logits", "cpu", 0, self.signature.logits, [1, n, self.vocab_size], self._rows.ctypes.data)
        for name in self._source.watched:
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except onnx_session.errors() as e:
            raise UserError(f"onnxruntime could not run {n} tokens of {self.folder}: {first_line(e)}",
                            "choose a smaller context, or export the model again") from e
        self._used += n
        return self._rows[:n]

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer.json, read by the `tokenizers` package without transformers."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer_json(self.folder)
        return self._tokenizer

    def tokenize(self, text: str, special: bool = True) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=special).ids, dtype=np.int32)

    def detokenize(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def chat(self, user: str) -> str:
        from llmc.formats.chat_template import render
        from llmc.formats.hf import load_tokenizer

        tokenizer = load_tokenizer(self.folder)
        if not tokenizer.chat_template:
            raise UserError(f"{self.folder} has no chat template", "leave out --chat: the prompt is continued as it is")
        messages = [{"role": "user", "content": user}]
        return render(tokenizer, messages, str(self.folder), add_generation_prompt=True)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Every end token in the folder's configurations and its tokenizer."""
        ids: set[int] = set()
        for values in (read_generation(self.folder), read_tokenizer_config(self.folder)):
            ids |= _ids(values.get("eos_token_id"))
            token = values.get("eos_token") or ""
            ids |= _ids(self.tokenizer.token_to_id(token if isinstance(token, str) else token.get("content", "")))
        return frozenset(ids | _ids(self._source.genai.get("model", {}).get("eos_token_id"))
                         | _ids(self._source.config.get("eos_token_id")))

    def describe(self) -> dict[str, Any]:
        from llmc.machine import cpu_features

        return {"runtime": self.name, "version": self._ort.__version__, "device": self.device, "threads": self.threads,
                "accuracy_levels": self._accuracy_levels(),
                "session": {**OPTIONS, "intra_op_num_threads": self.threads, QDQ_LEVEL: str(self._source.qdq_level)},
                "nodes": self.nodes, "kv_type": self.kv_type,
                "kv": {"shared": self._cache.shared, "bytes": self._cache.nbytes,
                       "types": sorted({s.dtype for s in self.signature.slots})},
                "build": self._ort.get_build_info(), "cpu_features": cpu_features()}

    def _accuracy_levels(self) -> list[int]:
        """The accuracy levels of MatMulNBits: of those in the graph, and of those that onnxruntime fused on loading."""
        written = self._source.matmul_nbits()
        run = sum(operators.get("MatMulNBits", 0) for operators in self.nodes.values())
        fused = {self._source.qdq_level} if run > sum(b["matrices"] for b in written) else set()
        return sorted({b["accuracy_level"] for b in written} | fused)

    def close(self) -> None:
        self._binding = self._cache = self._session = None
        self._work.cleanup()


def tokenize(folder: Path, text: str) -> np.ndarray:
    """The ids of a text, int [n], from a folder's tokenizer, without loading the model."""
    return np.array(open_tokenizer_json(folder).encode(text).ids)


def _ids(value: Any) -> set[int]:
    return set(value) if isinstance(value, list) else set() if value is None else {value}
