"""The runtime of .gguf files: llama.cpp through the low-level (ctypes) interface of llama-cpp-python.

The high-level class of that package keeps the logits of the last token only, or of every token at twice the memory. Here a
batch requests exactly the rows that it needs.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.formats.template_limits import render_within_limits
from llmc.runtimes.base import TOO_LONG, NoTokenizerError

BATCH = 512  # tokens run at once, llama.cpp's own default for a micro-batch
LOGITS_BYTES = 128 << 20  # largest memory for the logits of one batch
INSTALL = "pip install 'llmc-toolkit[gguf]'"
OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
BUFFERS = re.compile(r"(\S+) model buffer size *= *([\d.]+) MiB")
NO_VOCABULARY = 0  # LLAMA_VOCAB_TYPE_NONE in llama.h
ERROR = 4  # GGML_LOG_LEVEL_ERROR in ggml.h
GPU_TYPES = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU in ggml-backend.h

_log: deque[tuple[int, str]] = deque(maxlen=10_000)  # (level, text), cleared once a model is loaded
_log_callback: Any = None  # llama.cpp keeps a raw pointer to it, so it must live as long as the process


def _remember(level: int, text: bytes, _: object) -> None:
    _log.append((level, text.decode(errors="replace")))


def _library() -> Any:
    """llama-cpp-python's ctypes module; its log is captured and not printed."""
    global _log_callback
    try:
        from llama_cpp import llama_cpp as lib
    except (ImportError, OSError, RuntimeError) as e:  # not installed, or its shared library does not load here
        raise UserError(f"running a .gguf file needs the package `llama-cpp-python` ({e})", INSTALL) from e
    if _log_callback is None:
        _log_callback = lib.llama_log_callback(_remember)
        lib.llama_log_set(_log_callback, ctypes.c_void_p(0))
        lib.llama_backend_init()
    return lib


def build() -> dict[str, str]:
    """The instruction sets and options that llama.cpp was built with and that this machine has."""
    return dict(re.findall(r"(\w+) = (\w+)", _library().llama_print_system_info().decode()))


def gpu_devices() -> list[dict[str, Any]]:
    """The GPUs that this build of llama.cpp can use here: [{name, driver, backend: 'llama.cpp NAME'}]."""
    lib = _library()
    registry, base = _ggml(lib, "ggml"), _ggml(lib, "ggml-base")
    if registry is None or base is None:
        return []
    registry.ggml_backend_dev_count.restype = ctypes.c_size_t
    registry.ggml_backend_dev_get.restype, registry.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    for call in (base.ggml_backend_dev_name, base.ggml_backend_dev_description, base.ggml_backend_dev_type):
        call.restype, call.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_backend_dev_type.restype = ctypes.c_int
    devices = [registry.ggml_backend_dev_get(i) for i in range(registry.ggml_backend_dev_count())]
    return [{"name": base.ggml_backend_dev_description(d).decode(), "driver": None,
             "backend": f"llama.cpp {base.ggml_backend_dev_name(d).decode()}"}
            for d in devices if base.ggml_backend_dev_type(d) in GPU_TYPES]


def _ggml(lib: Any, name: str) -> Any:
    """A library of ggml, for functions that llama-cpp-python does not bind: it is beside the one that it loads. Or None."""
    file = next(iter(sorted(Path(lib._base_path).glob(f"*{name}.*"))), None)
    return None if file is None else ctypes.CDLL(str(file))


def _errors() -> str:
    """The last error in llama.cpp's log, one line: the cause of a failure, without the general "failed to load model"."""
    lines = [text.strip() for level, text in _log if level == ERROR and "failed to load model" not in text]
    return lines[-1] if lines else "no reason given"


def tokenize(path: Path, text: str) -> np.ndarray:
    """Token ids int32 from a .gguf file's own tokenizer, without reading any weight."""
    lib = _library()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise UserError(f"llama.cpp cannot load {path}: {_errors()}", "export or download it again")
    try:
        return _tokenize(lib, lib.llama_model_get_vocab(model), path, text, True)
    finally:
        lib.llama_model_free(model)


def check_loads(path: Path) -> None:
    """Raise UserError unless llama.cpp knows the architecture and every tensor of a .gguf file. The weights are not used."""
    lib = _library()
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.use_mmap, params.use_extra_bufts = 0, True, False
    no_devices = (ctypes.c_void_p * 1)(None)
    params.devices = ctypes.cast(no_devices, ctypes.c_void_p)
    _log.clear()
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise UserError(f"llama.cpp does not load it: {_errors()}", "try a newer llama-cpp-python")
    lib.llama_model_free(model)


def _tokenize(lib: Any, vocab: Any, path: Path, text: str, special: bool) -> np.ndarray:
    if lib.llama_vocab_type(vocab) == NO_VOCABULARY:  # llama.cpp would abort
        raise NoTokenizerError(path)
    raw = text.encode()
    size = len(raw) + 8
    buffer = (ctypes.c_int32 * size)()
    n = lib.llama_tokenize(vocab, raw, len(raw), buffer, size, special, True)
    if n < 0:
        raise UserError(f"llama.cpp cannot tokenize this text with {path}", "export the file again")
    return np.array(buffer[:n], dtype=np.int32)


class LlamaCpp:
    """A runtime (see runtimes/base.py) with one llama.cpp context of `context` tokens.

    flash_attention: None lets llama.cpp choose. kv_type: 'f16' (llama.cpp's default), 'q8_0' or 'f32'.
    Parity checks against torch use False and 'f32'.
    extra_buffers: let llama.cpp repack weights for this CPU. It is faster, but crashes in some builds: see
    `amx.use_extra_buffers`.
    record: keep the tensors whose names begin with one of these: {name: parts in one axis} in `recorded`. They must have 4
    bytes a number; they are float32 for the reader, who knows which are int32.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, context: int, threads: int, device: str = "cpu",
                 flash_attention: bool | None = None, kv_type: str = "f16",
                 extra_buffers: bool = False, record: tuple[str, ...] = ()) -> None:
        if not path.is_file():
            raise UserError(f"there is no file {path}", "give a .gguf file")
        if device not in ("cpu", "gpu"):
            raise UserError(f"the llama.cpp runtime does not know the device {device!r}", "choose cpu or gpu")
        self._lib = lib = _library()
        self.path, self.threads, self.device, self.kv_type = path, threads, device, kv_type
        self._model = self._ctx = None
        self._given: Any = None  # the batch
        self.offloaded = self.layers = 0
        self.buffers: dict[str, float] = {}
        self.extra_buffers = extra_buffers
        _log.clear()
        self._load_model(device)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size = int(lib.llama_vocab_n_tokens(self._vocab))
        params = lib.llama_context_default_params()
        self.context = min(context, int(lib.llama_model_n_ctx_train(self._model)) or context)
        self._batch = min(BATCH, self.context)
        params.n_ctx = self.context
        params.n_batch = params.n_ubatch = self._batch
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = getattr(lib, f"GGML_TYPE_{kv_type.upper()}")
        if flash_attention is not None:
            params.flash_attn_type = int(flash_attention)  # LLAMA_FLASH_ATTN_TYPE_DISABLED = 0, _ENABLED = 1
        self.recorded: dict[str, list[np.ndarray]] = {}
        if record:
            prefixes = tuple(prefix.encode() for prefix in record)
            params.cb_eval = self._on_tensor = lib.ggml_backend_sched_eval_callback(self._recorder(prefixes))
        if device == "cpu":
            params.offload_kqv = params.op_offload = False
        self._ctx = lib.llama_init_from_model(self._model, params)
        if not self._ctx:
            self.close()
            kv = f" and a KV cache in {kv_type}" if kv_type == "q8_0" else ""
            raise UserError(f"llama.cpp cannot make a context of {self.context} tokens{kv} for {path}: {_errors()}",
                            "leave out --kv" if kv else "choose a smaller context")
        self._used = 0
        self._prepare_batch()
        _log.clear()

    def _recorder(self, prefixes: tuple[bytes, ...]) -> Any:
        """llama.cpp's callback for each tensor of the graph: whether it is wanted, then what is in it."""
        base = _ggml(self._lib, "ggml-base")
        base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        base.ggml_nbytes.restype, base.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        base.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        base.ggml_backend_tensor_get.restype = None

        def on_tensor(tensor: int, ask: bool, _: object) -> bool:
            name = base.ggml_get_name(tensor)
            if not ask:
                data = np.empty(base.ggml_nbytes(tensor) // 4, np.float32)
                base.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
                self.recorded.setdefault(name.decode(), []).append(data)
                return True
            return bool(name.startswith(prefixes))

        return on_tensor

    def _prepare_batch(self) -> None:
        """Make llama_decode's argument once. Making it for each token would take 1 % of a small model's time."""
        self._given = batch = self._lib.llama_batch_init(self._batch, 0, 1)
        self._token, self._pos, self._wanted = (np.ctypeslib.as_array(p, shape=(self._batch,))
                                                for p in (batch.token, batch.pos, batch.logits))
        for i in range(self._batch):
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0

    def _load_model(self, device: str) -> None:
        lib = self._lib
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = self.extra_buffers
        if device == "cpu":
            self._no_devices = (ctypes.c_void_p * 1)(None)  # an empty NULL-terminated list: no GPU is used
            params.devices = ctypes.cast(self._no_devices, ctypes.c_void_p)
        else:
            params.n_gpu_layers = 1_000_000
            if not lib.llama_supports_gpu_offload():
                raise UserError("--device gpu: this llama-cpp-python was built without a GPU backend",
                                "install a build for your GPU (CUDA, Metal, Vulkan), or use --device cpu")
        self._model = lib.llama_model_load_from_file(str(self.path).encode(), params)
        if not self._model:
            raise UserError(f"llama.cpp cannot load {self.path}: {_errors()}", "export or download it again")
        self.layers = int(lib.llama_model_n_layer(self._model)) + 1  # the head counts as one
        self.buffers |= {m[1]: float(m[2]) for _, t in _log if (m := BUFFERS.search(t))}
        self.offloaded = max((int(m[1]) for _, t in _log if (m := OFFLOADED.search(t))), default=0)
        if device == "gpu" and self.offloaded == 0:
            self.close()
            raise UserError("--device gpu: llama.cpp found no GPU, so no layer runs on one",
                            "check the driver with `llmc doctor`, or use --device cpu")

    def logits(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        self._clear()
        out = np.empty((len(ids) - start, self.vocab_size), dtype=np.float32)
        self._run(ids[:start], None)
        rows = max(1, min(self._batch, LOGITS_BYTES // (4 * self.vocab_size)))
        for i in range(start, len(ids), rows):
            self._run(ids[i : i + rows], out[i - start : i - start + rows])
        return out

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        self._clear()
        whole = (len(ids) - 1) // self._batch * self._batch
        self._run(ids[:whole], None)
        rest = ids[whole:]
        out = np.empty((1, self.vocab_size), dtype=np.float32)
        self._decode(rest, [0] * (len(rest) - 1) + [1], out)
        return out[0]

    def decode(self, token: int) -> np.ndarray:
        out = np.empty((1, self.vocab_size), dtype=np.float32)
        self._decode(np.array([token]), [1], out)
        return out[0]

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._ctx), True)
        self._used = 0

    def _run(self, ids: np.ndarray, out: np.ndarray | None) -> None:
        """Run `ids` in batches; write the logits of every token into `out` [len(ids), vocab], if given."""
        for i in range(0, len(ids), self._batch):
            part = ids[i : i + self._batch]
            self._decode(part, [int(out is not None)] * len(part), None if out is None else out[i : i + self._batch])

    def _decode(self, ids: np.ndarray, wanted: list[int], out: np.ndarray | None) -> None:
        """Call llama_decode once; write the logits of the tokens whose `wanted` is 1 into `out`, in order."""
        lib, n = self._lib, len(ids)
        if self._used + n > self.context:
            raise UserError(f"{self._used + n} tokens do not fit {self.path}'s context of {self.context}", TOO_LONG)
        self._token[:n], self._wanted[:n] = ids, wanted
        self._pos[:n] = range(self._used, self._used + n)
        self._given.n_tokens = n
        code = lib.llama_decode(self._ctx, self._given)
        if code:
            raise UserError(f"llama.cpp could not run {n} tokens of {self.path} (code {code}): {_errors()}",
                            "choose a smaller context, or close other programs if memory is short")
        self._used += n
        if out is not None:
            pointer = lib.llama_get_logits(self._ctx)  # waits for the computation to end
            logits: Any = (ctypes.c_float * out.size).from_address(ctypes.addressof(pointer.contents))
            np.copyto(out, np.frombuffer(logits, np.float32).reshape(out.shape))

    def tokenize(self, text: str, special: bool = True) -> np.ndarray:
        """Token ids int32 from llama.cpp; `special` adds BOS and EOS if the file's metadata require it."""
        return _tokenize(self._lib, self._vocab, self.path, text, special)

    def detokenize(self, ids: list[int]) -> str:
        if self._lib.llama_vocab_type(self._vocab) == NO_VOCABULARY:
            raise NoTokenizerError(self.path)
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        size = 64 + 32 * len(ids)
        n = -1
        while n < 0:  # a negative result is minus the size that it needs
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_detokenize(self._vocab, tokens, len(ids), buffer, size, True, False)
            size = max(size, -n)
        return buffer.raw[:n].decode(errors="replace")

    def chat(self, user: str) -> str:
        template = self.metadata.get("tokenizer.chat_template")
        if template is None:
            raise UserError(f"{self.path} has no chat template", "leave out --chat: the prompt is continued as it is")
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # in jinja2's immutable sandbox
        lib, v = self._lib, self._vocab
        special = {name: (lib.llama_vocab_get_text(v, i) or b"").decode() if i >= 0 else "" for name, i in
                   (("bos_token", lib.llama_vocab_bos(v)), ("eos_token", lib.llama_vocab_eos(v)))}
        messages = [{"role": "user", "content": user}]
        return render_within_limits(lambda: str(render(
            [messages], chat_template=template, add_generation_prompt=True, **special)[0][0]), len(user), str(self.path))

    @property
    def end_tokens(self) -> frozenset[int]:
        """Every id that ends a generation according to the file (EOS, EOT, EOM and others)."""
        if self._lib.llama_vocab_type(self._vocab) == NO_VOCABULARY:
            return frozenset()
        return frozenset(i for i in range(self.vocab_size) if self._lib.llama_vocab_is_eog(self._vocab, i))

    @property
    def window(self) -> int:
        """Tokens of the sliding window that llama.cpp applies; 0 if it applies none, whatever the file says."""
        return int(self._lib.llama_model_n_swa(self._model))

    @property
    def metadata(self) -> dict[str, str]:
        """The file's key-value pairs as llama.cpp prints them (it leaves out long arrays)."""
        lib, m = self._lib, self._model

        def read(call: Any, i: int) -> str:
            buffer = ctypes.create_string_buffer(n := 1 + max(0, call(m, i, ctypes.create_string_buffer(1), 1)))
            call(m, i, buffer, n)
            return buffer.value.decode(errors="replace")

        return {read(lib.llama_model_meta_key_by_index, i): read(lib.llama_model_meta_val_str_by_index, i)
                for i in range(lib.llama_model_meta_count(m))}

    def describe(self) -> dict[str, Any]:
        from importlib.metadata import version

        from llmc.machine import cpu_features

        return {"runtime": self.name, "version": version("llama-cpp-python"), "device": self.device,
                "offloaded_layers": self.offloaded, "layers": self.layers, "buffers": self.buffers,
                "threads": self.threads, "kv_type": self.kv_type,
                "extra_buffers": self.extra_buffers, "build": build(), "cpu_features": cpu_features()}

    def close(self) -> None:
        if self._given:
            self._lib.llama_batch_free(self._given)
        if self._ctx:
            self._lib.llama_free(self._ctx)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._ctx = self._model = self._given = None
