"""What an ONNX decoder keeps of the tokens before: keys and values, and the states of convolutions and linear attention, in
buffers that onnxruntime reads and writes in place, so that nothing is copied."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.formats.onnx_folder import OnnxFolder
from llmc.formats.onnx_proto import attributes

HOW = "export it with `llmc export --format onnx`, or with onnxruntime-genai's model builder"
FEEDS = ("input_ids", "attention_mask", "position_ids")
TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int8)": "int8", "tensor(uint8)": "uint8",
         "tensor(int64)": "int64", "tensor(int32)": "int32"}


@dataclass(frozen=True)
class Slot:
    """The keys or the values of one layer: [1, heads, tokens, width]."""

    past: str
    present: str
    heads: int
    width: int
    dtype: str
    window: int
    """Rows of a sliding cache (GroupQueryAttention's sliding_window_cache); 0 if the cache holds every token."""


@dataclass(frozen=True)
class State:
    """A state of one layer that has the same shape after every token, and is zero before the first."""

    past: str
    present: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a decoder. feeds: {name: numpy type} of FEEDS; logits: numpy type."""

    feeds: dict[str, str]
    streams: int
    """Copies of the positions that the graph takes, [streams, 1, n], as multimodal models do; 0: one, [1, n]."""
    slots: list[Slot]
    states: list[State]
    logits: str
    vocab: int
    shareable: bool
    """True if past and present may share one buffer in every layer: GroupQueryAttention writes all of them."""


def read_signature(source: OnnxFolder, session: Any) -> Signature:
    """The signature of a session; raises UserError, with the reason, if it is not a decoder that llmc can run."""
    inputs, outputs = ({v.name: v for v in values} for values in (session.get_inputs(), session.get_outputs()))
    feeds = {name: inputs.pop(name) for name in FEEDS if name in inputs}
    past = {n: v for n, v in inputs.items() if re.fullmatch(r"past_key_values\.\d+\.(key|value)", n)}
    fixed = {n: v for n, v in inputs.items() if re.fullmatch(r"past\.\d+\.\w+", n)}
    pairs = {n: re.sub(r"^past(_key_values)?\.", "present.", n) for n in (*past, *fixed)}
    lacking = [n for n in ("input_ids", "logits") if n not in feeds and n not in outputs]
    lacking += [n for n in pairs.values() if n not in outputs] + ([] if pairs else ["past_key_values.0.key"])
    if lacking or len(inputs) > len(pairs):
        odd = sorted(inputs.keys() - pairs.keys())
        raise UserError(f"{source.model} is not a decoder with KV cache that llmc can run: "
                        + "; ".join(f"{what} {', '.join(names[:4])}" for what, names in
                                    (("it lacks", lacking), ("it has the unknown inputs", odd)) if names), HOW)
    grown = {pairs[n] for n in past}
    writers = {out: node for node in source.proto.graph.node for out in node.output if out in grown}
    windows = {out: _window(source, node) for out, node in writers.items()}
    decoder = source.genai.get("model", {}).get("decoder", {})
    slots = [Slot(n, pairs[n], _number(source, v.shape[1], n, decoder.get("num_key_value_heads")),
                  _number(source, v.shape[3], n, decoder.get("head_size")), _type(source, v), windows.get(pairs[n], 0))
             for n, v in past.items()]
    states = [State(n, pairs[n], (1, *(_number(source, d, n, None) for d in v.shape[1:])), _type(source, v))
              for n, v in fixed.items()]
    logits, positions = outputs["logits"], feeds.get("position_ids")
    streams = positions.shape[0] if positions is not None and len(positions.shape) == 3 else 0
    return Signature(
        {n: _type(source, v) for n, v in feeds.items()}, streams, slots, states, _type(source, logits),
        _number(source, logits.shape[-1], "logits", source.genai.get("model", {}).get("vocab_size")),
        len(writers) == len(slots) and all(n.op_type == "GroupQueryAttention" for n in writers.values()))


def _window(source: OnnxFolder, node: Any) -> int:
    """The rows of a sliding cache: the window plus the slack in genai_config.json; 0 if the cache does not slide."""
    found = attributes(node)
    if not found.get("sliding_window_cache"):
        return 0
    slack = source.genai.get("model", {}).get("decoder", {}).get("sliding_window", {}).get("cache_slack", 0)
    return int(found["local_window_size"]) + int(slack)


def _number(source: OnnxFolder, declared: Any, name: str, configured: Any) -> int:
    """A dimension from the graph, else from genai_config.json."""
    found = declared if isinstance(declared, int) else configured
    if not isinstance(found, int):
        raise UserError(f"neither the graph nor genai_config.json in {source.folder} has the sizes of {name}", HOW)
    return found


def _type(source: OnnxFolder, value: Any) -> str:
    if value.type not in TYPES:
        raise UserError(f"{value.name} of {source.model} is a {value.type}; llmc feeds and reads {', '.join(TYPES)}", HOW)
    return TYPES[value.type]


class KvCache:
    """Buffers for at most `rows` tokens, in onnxruntime's memory `device` ('cpu', 'cuda').

    shared: past and present of keys and values are one buffer of full length, and the operator writes the new rows into it.
    Otherwise there are two buffers for each slot: a step reads one and writes the other, and the graph sees only the rows in
    use. States always have two buffers.
    """

    def __init__(self, ort: Any, slots: list[Slot], states: list[State], rows: int, device: str, shared: bool) -> None:
        self.slots, self.states, self.rows, self.device, self.shared = slots, states, rows, device, shared

        def buffer(shape: list[int], dtype: str) -> Any:
            return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device, 0)

        def rows_of(slot: Slot) -> Any:
            return buffer([1, slot.heads, slot.window or rows, slot.width], slot.dtype)

        self._buffers = [(b := rows_of(slot), b if shared else rows_of(slot)) for slot in slots]
        self._fixed = [(buffer(list(s.shape), s.dtype), buffer(list(s.shape), s.dtype)) for s in states]
        self._bound: Any = None

    def bind(self, binding: Any, past: int, new: int) -> None:
        """Bind the caches of a run that adds `new` tokens to `past`. The cache that it writes is the next run's past."""
        self._bind_states(binding, past)
        if self.shared and binding is self._bound:  # binding 60 for every token took 7 % of a 135 M model's time
            return
        self._bound = binding
        for i, (slot, (old, fresh)) in enumerate(zip(self.slots, self._buffers, strict=True)):
            whole = slot.window or (self.rows if self.shared else 0)
            for name, give, value, length in ((slot.past, binding.bind_input, old, whole or past),
                                              (slot.present, binding.bind_output, fresh, whole or past + new)):
                give(name, self.device, 0, slot.dtype, [1, slot.heads, length, slot.width], value.data_ptr())
            self._buffers[i] = fresh, old

    def _bind_states(self, binding: Any, past: int) -> None:
        for i, (state, (old, fresh)) in enumerate(zip(self.states, self._fixed, strict=True)):
            if past == 0:
                old.update_inplace(np.zeros(state.shape, state.dtype))
            binding.bind_input(state.past, self.device, 0, state.dtype, list(state.shape), old.data_ptr())
            binding.bind_output(state.present, self.device, 0, state.dtype, list(state.shape), fresh.data_ptr())
            self._fixed[i] = fresh, old

    @property
    def nbytes(self) -> int:
        grown = sum(b.tensor_size_in_bytes() for pair in self._buffers for b in pair[: 1 if self.shared else 2])
        return grown + sum(b.tensor_size_in_bytes() for pair in self._fixed for b in pair)
