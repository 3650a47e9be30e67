"""An ONNX folder run by onnxruntime: the graph as it ships, with its own KV cache, through IO binding."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.onnx_folder import AGAIN, INSTALL, open_onnx
from llmc.runtimes.base import TOO_LONG
from llmc.runtimes.onnx_kv import KvCache, read_signature

BATCH = 512  # tokens run at once
LOGITS_BYTES = 128 << 20  # most memory for the logits of one run: a graph gives those of every token
CPU = "CPUExecutionProvider"
GPUS = {  # by preference, with the memory that onnxruntime lets Python bind for it
    "CUDAExecutionProvider": "cuda", "MIGraphXExecutionProvider": "cpu", "ROCMExecutionProvider": "cpu",
    "WebGpuExecutionProvider": "cpu", "DmlExecutionProvider": "cpu", "CoreMLExecutionProvider": "cpu",
}
OPTIONS = {"graph_optimization_level": "ORT_ENABLE_ALL", "execution_mode": "ORT_SEQUENTIAL", "inter_op_num_threads": 1}
# What inputs of fused DequantizeLinear + MatMul are rounded to; onnxruntime's own default is 4, int8. Of the folder's session
# options it is the only one that decides what is computed, and the only one that is taken from there
QDQ_LEVEL, QDQ_DEFAULT = "session.qdq_matmulnbits_accuracy_level", "4"


def _library() -> Any:
    try:
        import onnxruntime
    except (ImportError, OSError) as e:  # not installed, or its shared library does not load here
        raise UserError(f"running an ONNX folder needs the package `onnxruntime` ({e})", INSTALL) from e
    return onnxruntime


class OnnxModel:
    """A runtime (see runtimes/base.py) over one onnxruntime session.

    share: past and present in one buffer; None: wherever the graph's attention allows it. Opening runs one token under
    onnxruntime's profiler, so that what is said about execution providers is what ran.
    """

    name = "onnxruntime"

    def __init__(self, folder: Path, context: int, threads: int, device: str = "cpu", share: bool | None = None) -> None:
        if device not in ("cpu", "gpu"):
            raise UserError(f"device {device!r} is not known to onnxruntime's runtime", "choose cpu or gpu")
        self._ort = ort = _library()
        self.folder, self.threads, self.device = folder, threads, device
        self._source = source = open_onnx(folder)
        told = source.genai.get("model", {}).get("decoder", {}).get("session_options", {})
        self.qdq_level = str(told.get(QDQ_LEVEL, QDQ_DEFAULT))
        self.provider = _gpu(ort) if device == "gpu" else CPU
        self.context = min(context, source.context or context)
        with tempfile.TemporaryDirectory() as work:
            self._session = self._open(Path(work) / "profile")
            self.signature = s = read_signature(source, self._session)
            self.vocab_size = s.vocab
            memory = GPUS.get(self.provider, "cpu")
            direct = memory != "cpu" or self.provider == CPU  # the buffers are where the operators work
            self._cache: Any = KvCache(ort, s.slots, self.context, memory, s.shareable and direct if share is None else share)
            self._batch = max(1, min(BATCH, self.context, LOGITS_BYTES // (s.vocab * np.dtype(s.logits).itemsize)))
            self._rows = np.empty((self._batch, s.vocab), s.logits)
            self._binding = self._session.io_binding()
            self._used = 0
            self._tokenizer: Any = None
            self._run(np.zeros(1, np.int64))
            self.nodes = ran(Path(self._session.end_profiling()))
        self._used = 0
        if self.provider not in self.nodes:
            raise UserError(f"--device gpu: no node of {source.model} ran on {self.provider}, all on {', '.join(self.nodes)}",
                            "use --device cpu, or export the model for that device")

    def _open(self, profile: Path) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = OPTIONS["inter_op_num_threads"]
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, str(OPTIONS["graph_optimization_level"]))
        options.execution_mode = getattr(ort.ExecutionMode, str(OPTIONS["execution_mode"]))
        options.add_session_config_entry(QDQ_LEVEL, self.qdq_level)
        options.log_severity_level = 3  # errors only: they are raised as well
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
        try:
            return ort.InferenceSession(str(self._source.model), options, providers=list(dict.fromkeys([self.provider, CPU])))
        except _errors() as e:
            raise UserError(f"onnxruntime cannot load {self._source.model}: {_first_line(e)}", AGAIN) from e

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

    def _run(self, ids: np.ndarray) -> np.ndarray:
        """Add ids [n] to the cache; their logits [n, vocab], valid until the next run."""
        past, n, binding = self._used, len(ids), self._binding
        if past + n > self.context:
            raise UserError(f"{past + n} tokens do not fit {self.folder}'s context of {self.context}", TOO_LONG)
        if (highest := int(ids.max())) >= self.vocab_size:
            raise UserError(f"token {highest} is not in the vocabulary of {self.folder}: {self.vocab_size} tokens",
                            "its tokenizer belongs to another model: export it again")
        values = {"input_ids": ids, "attention_mask": np.ones(past + n), "position_ids": np.arange(past, past + n)}
        for name, dtype in self.signature.feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(values[name], dtype)[None])
        self._cache.bind(binding, past, n)
        binding.bind_output("logits", "cpu", 0, self.signature.logits, [1, n, self.vocab_size], self._rows.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except _errors() as e:
            raise UserError(f"onnxruntime could not run {n} tokens of {self.folder}: {_first_line(e)}",
                            "choose a smaller context, or export the model again") from e
        self._used += n
        return self._rows[:n]

    @property
    def tokenizer(self) -> Any:
        """The folder's tokenizer.json, read by `tokenizers` itself: no class of transformers comes between."""
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            path = self.folder / "tokenizer.json"
            if not path.is_file():
                raise UserError(f"{self.folder} has no tokenizer.json", "copy the base model's tokenizer files into it")
            self._tokenizer = Tokenizer.from_file(str(path))
        return self._tokenizer

    def tokenise(self, text: str, special: bool = True) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=special).ids, dtype=np.int32)

    def detokenise(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def chat(self, user: str) -> str:
        from llmc.runtimes.torch_model import load_tokenizer

        tokenizer = load_tokenizer(self.folder)
        if not tokenizer.chat_template:
            raise UserError(f"{self.folder} has no chat template", "leave out --chat: the prompt is continued as it is")
        messages = [{"role": "user", "content": user}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    @property
    def end_tokens(self) -> frozenset[int]:
        """Every id that the folder's configurations or its tokenizer call the end of a text."""
        ids: set[int] = set()
        for name in ("generation_config.json", "tokenizer_config.json"):
            path = self.folder / name
            told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            ids |= _ids(told.get("eos_token_id"))
            token = told.get("eos_token")
            ids |= _ids(self.tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token or ""))
        return frozenset(ids | _ids(self._source.genai.get("model", {}).get("eos_token_id"))
                         | _ids(self._source.config.get("eos_token_id")))

    def describe(self) -> dict[str, Any]:
        from llmc.runtimes.targets.this_machine import cpu_features

        return {"runtime": self.name, "version": self._ort.__version__, "device": self.device, "threads": self.threads,
                "accuracy_levels": self._accuracy_levels(),
                "session": {**OPTIONS, "intra_op_num_threads": self.threads, QDQ_LEVEL: self.qdq_level}, "nodes": self.nodes,
                "kv": {"shared": self._cache.shared, "bytes": self._cache.nbytes,
                       "types": sorted({s.dtype for s in self.signature.slots})},
                "build": self._ort.get_build_info(), "cpu_features": cpu_features()}

    def _accuracy_levels(self) -> list[int]:
        """Of the graph's MatMulNBits, and of those that onnxruntime made of DequantizeLinear and MatMul when it loaded it."""
        written = self._source.matmul_nbits()
        run = sum(operators.get("MatMulNBits", 0) for operators in self.nodes.values())
        fused = {int(self.qdq_level)} if run > sum(b["matrices"] for b in written) else set()
        return sorted({b["accuracy_level"] for b in written} | fused)

    def close(self) -> None:
        self._binding = self._cache = self._session = None


def ran(profile: Path) -> dict[str, dict[str, int]]:
    """{execution provider: {operator: nodes}} of what a profile of onnxruntime says was run, after its optimisations."""
    events = [e for e in json.loads(profile.read_text(encoding="utf-8"))
              if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    counts = {p: Counter(e["args"]["op_name"] for e in events if e["args"]["provider"] == p)
              for p in sorted({e["args"]["provider"] for e in events})}
    return {p: dict(sorted(c.items())) for p, c in counts.items()}


def _gpu(ort: Any) -> str:
    """The GPU execution provider of the installed onnxruntime."""
    there = ort.get_available_providers()
    for provider in GPUS:
        if provider in there:
            return provider
    raise UserError(f"--device gpu: the installed onnxruntime has only {', '.join(there)}",
                    "use --device cpu, or install a build for your GPU, such as onnxruntime-gpu")


def _errors() -> tuple[type[Exception], ...]:
    """onnxruntime's exceptions, which share no class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(e for e in vars(state).values() if isinstance(e, type) and issubclass(e, Exception))


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0]


def _ids(value: Any) -> set[int]:
    return set(value) if isinstance(value, list) else set() if value is None else {value}
