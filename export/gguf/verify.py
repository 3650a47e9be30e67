"""Verification of a GGUF file. No part of it can be skipped.

1. Every tensor is read back and compared with its source: codes and scales bit for bit, floats in their type.
2. llama.cpp opens the file. It must give the model's token ids, know every end token, and give torch's logits.
3. It generates 16 tokens for the user to read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader
from gguf.quants import dequantize

from llmc.console import progress
from llmc.errors import UserError
from llmc.export import token_proof
from llmc.export.gguf import blocks
from llmc.export.gguf.arithmetic import Kinds, LikeLlamaCpp
from llmc.export.gguf.blocks import Kind
from llmc.export.gguf.layers import EXPERTS, PREFIX, Layers, in_order
from llmc.export.gguf.rope import as_computed
from llmc.export.gguf.tokenizer import Vocabulary, tokenizer_spec
from llmc.export.gguf.writer import GgufTensor, Source
from llmc.export.parity import GENERATED, PLEASE_REPORT, PROMPT, check_ids, compare_logits, first_difference, show
from llmc.export.reference import reference_logits
from llmc.export.windows import window_of
from llmc.formats import packing
from llmc.formats.check_text import CHECK_TEXT, MARKS
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.gguf_check import check_runnable
from llmc.formats.hf import load_config
from llmc.formats.pretokenizers import WITHOUT_MARKS
from llmc.formats.quantized import Quantized, as_blocks, rows_of
from llmc.formats.tokenizer_json import TOKENIZER, open_tokenizer_json
from llmc.formats.types import BlockTensor
from llmc.runtimes.amx import use_extra_buffers
from llmc.runtimes.llamacpp import LlamaCpp, check_loads
from llmc.temporary import final_name

FLOATS = {Kind.F32, Kind.F16, Kind.BF16}
# Relative squared error of a matrix rounded at export: Q2_K has about 0.07; of types below 2 bits TQ1_0 and IQ1_S about 0.24
MOST_LOST, MOST_LOST_BELOW_2_BITS = 0.25, 0.4


def _most_lost(kind: Kind) -> float:
    block, size = GGML_QUANT_SIZES[kind]
    return MOST_LOST_BELOW_2_BITS if 8 * size / block < 2 else MOST_LOST


def tensors(path: Path, entries: list[GgufTensor], kinds: Kinds | None = None) -> dict[str, int]:
    """Read every tensor back; return the number of tensors and weights compared, in total and of those copied as codes.

    kinds: notes the types of the matrices."""
    stored = {t.name: t for t in GGUFReader(path).tensors}
    if stored.keys() != {e.name for e in entries}:
        raise _damaged(path, "it does not hold the planned tensors")
    counts = {"tensors": 0, "weights": 0, "code_tensors": 0, "code_weights": 0}
    with progress("reading back tensor", len(entries)) as p:
        for e in entries:
            t = stored[e.name]
            if t.tensor_type != e.kind or tuple(int(n) for n in reversed(t.shape)) != e.shape:
                raise _damaged(path, f"{e.name} has the type {t.tensor_type.name} and shape {list(t.shape)}")
            _compare(path, e, t.data.view(np.uint8).reshape(-1, blocks.nbytes(e.kind, e.shape[-1:])),
                     None if len(e.shape) == 1 or e.role == "embedding" else kinds)
            for prefix in ("", "code_")[: 1 + e.codes]:
                counts[f"{prefix}tensors"] += 1
                counts[f"{prefix}weights"] += int(np.prod(e.shape))
            p.step(e.name)
    return counts


def header(path: Path, ckpt: Checkpoint, arch: str) -> None:
    """Raise UserError if llama.cpp would refuse the file, or abort at its metadata, before the weights are written."""
    try:
        check_runnable(path)
        check_loads(path)
    except UserError as e:
        reason = e.problem.removeprefix(f"{path}: ")
        layers = ckpt.config.get("num_hidden_layers") or ckpt.config.get("n_layer")
        raise UserError(
            f"{ckpt.folder} does not fit llama.cpp's architecture {arch!r}: {reason}",
            f"check that config.json ({layers} layers) belongs to the weights; if the model has tensors that llama.cpp's "
            f"{arch} does not have, such as biases of attention, export it with --format onnx") from e


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{final_name(path)} does not read back as it was written: {what}",
                     f"check the disk and export again; if the error stays, {PLEASE_REPORT}")


def _compare(path: Path, e: GgufTensor, data: np.ndarray, kinds: Kinds | None) -> None:
    """Compare a tensor of the file, data uint8 [rows, bytes per row], with its sources; raise UserError if they differ."""
    for source, part in zip(e.sources, np.array_split(data, len(e.sources)), strict=True):
        _compare_part(path, e, source(), part, kinds)


def _compare_part(path: Path, e: GgufTensor, source: Source, data: np.ndarray, kinds: Kinds | None) -> None:
    if isinstance(source, torch.Tensor) and source.dtype == torch.uint8:
        if not np.array_equal(data, source.numpy()):
            raise _damaged(path, f"{e.name} has other bytes")
        return
    if isinstance(source, torch.Tensor):
        if not np.array_equal(data, blocks.encode_float(e.name, source, e.kind)):
            raise _damaged(path, f"{e.name} differs from its source in {e.kind.name}")
        if e.kind not in FLOATS and (lost := _lost(e, data, source)) > _most_lost(e.kind):
            raise UserError(f"{e.name} has a relative squared error of {lost:.0%} as {e.kind.name}", PLEASE_REPORT)
        if kinds is not None:
            kinds.add(source.reshape(-1, e.shape[-1]).to(torch.float32).numpy(), e.kind, exact=e.kind == Kind.F32)
        return
    if not np.array_equal(data, packing.pack(as_blocks(source))):
        raise _damaged(path, f"{e.name} has other {_differing(data, source)}")
    step = max(1, blocks.CHUNK // e.shape[-1])
    for i in range(0, len(data), step):  # the gguf package must decode the blocks to the source's values too
        part = slice(i, i + step)
        values = rows_of(source, part).dequantize().numpy()
        if not np.array_equal(dequantize(data[part], e.kind), values):
            raise _damaged(path, f"{e.name} has other values")
        if kinds is not None:
            kinds.add(values, e.kind, exact=True)


def _lost(e: GgufTensor, data: np.ndarray, source: torch.Tensor) -> float:
    """The relative squared error of a float tensor in its type: |decoded - source|² / |source|². The gguf package decodes."""
    flat, error, energy = source.reshape(-1, e.shape[-1]), 0.0, 0.0
    step = max(1, blocks.CHUNK // e.shape[-1])
    for i in range(0, len(data), step):
        x = flat[i : i + step].to(torch.float32).numpy()
        error += float(np.square(dequantize(data[i : i + step], e.kind) - x, dtype=np.float64).sum())
        energy += float(np.square(x, dtype=np.float64).sum())
    return error / energy if energy else 0.0


def _in_file(rows: torch.Tensor, kind: Kind) -> torch.Tensor:
    """The values of float rows in a type of the file."""
    flat = rows.reshape(-1, rows.shape[-1])
    return torch.from_numpy(dequantize(blocks.encode_float("a matrix", flat, kind), kind)).view(rows.shape)


def end_matrices(path: Path) -> dict[str, torch.Tensor]:
    """The values of 'embedding' and 'head' in the file, float32 [vocab, hidden]. A tied file has one matrix for both."""
    stored = {t.name: t for t in GGUFReader(path).tensors if t.name in ("token_embd.weight", "output.weight")}

    def values(name: str) -> torch.Tensor:
        t = stored[name]
        width, rows = (int(n) for n in t.shape)
        raw = np.array(t.data).view(np.uint8).reshape(rows, -1)
        return torch.from_numpy(dequantize(raw, t.tensor_type)).view(rows, width)

    embedding = values("token_embd.weight")
    return {"embedding": embedding, "head": values("output.weight") if "output.weight" in stored else embedding}


def _differing(data: np.ndarray, source: Quantized) -> str:
    """The part that differs from the source: blocks, or for GPTQ types codes, scales or minima."""
    if isinstance(source, BlockTensor):
        return "blocks"
    wanted = as_blocks(source)
    found = packing.unpack(data, wanted.type)
    if not torch.equal(found.codes, wanted.codes):
        return "codes"
    return "scales" if not torch.equal(found.d, wanted.d) else "minima"


# The largest relative error of llama.cpp's logits: RMS of the difference / RMS of the logits, both centred for each token.
# Torch rounds inputs of products as llama.cpp does (arithmetic.py), so these hold for files of every type. What is left comes
# from roundings that fall the other way because of float32's last bits, and from llama.cpp's float16 tables of activations.
BOUNDS: dict[str, float] = {"F32": 1e-3, "F16": 5e-3, "quantized": 0.03}
TRANSPOSED = 0.05  # where the file has quantized matrices transposed: llama.cpp multiplies them in another order than torch
COARSE = 0.3  # where a model cannot be compared layer by layer


def bound_of(entries: list[GgufTensor], transposed: bool) -> float:
    """The bound for the coarsest type in the file. transposed: it has linears whose codes could not be carried."""
    if transposed:
        return TRANSPOSED
    kinds = {e.kind for e in entries if len(e.shape) > 1}
    return BOUNDS["quantized" if kinds - FLOATS else "F16" if kinds - {Kind.F32} else "F32"]


def logits(runtime: LlamaCpp, ckpt: Checkpoint, ids: np.ndarray, bound: float, ends: dict[str, torch.Tensor],
           kinds: Kinds) -> dict[str, Any]:
    """Compare the logits of torch and llama.cpp for the same ids; return the figures, raise UserError beyond the bound.

    Where roundings add up over many layers of a file that is not F32, each layer must keep the bound by itself. That needs a
    runtime that records PREFIX. With one that records EXPERTS, near ties of experts fall as llama.cpp's do."""
    found = runtime.logits(ids)
    orders = [order.view(np.int32).reshape(len(ids), -1) for order in in_order(runtime.recorded, EXPERTS)]
    config = as_computed(load_config(ckpt.folder))
    with LikeLlamaCpp(kinds, _in_file, orders):
        expected = reference_logits(ckpt, ids, ends, config=config)[:, : found.shape[1]]
    relative, kld, top1 = compare_logits(expected, found)
    report = {"tokens": len(ids), "relative_error": relative, "max_relative_error": bound, "mean_kld": kld,
              "top1_agreement": top1}
    if relative <= bound:
        return report
    where = ""
    if relative <= COARSE and bound > BOUNDS["F32"]:  # NaN is not
        with LikeLlamaCpp(kinds, _in_file, orders), Layers(runtime.recorded) as layers:
            last = compare_logits(reference_logits(ckpt, ids, ends, config=config)[:, : found.shape[1]], found)[0]
        if not layers.comparable:
            return {**report, "max_relative_error": COARSE}
        errors = [*layers.errors, last]
        worst = int(np.argmax(errors))
        if errors[worst] <= bound:
            return {**report, "max_relative_error": COARSE, "layers": len(layers.errors), "worst_layer_error": errors[worst],
                    "max_layer_error": bound}
        where = f"; {'the head' if worst == len(layers.errors) else f'layer {worst}'} alone differs by {errors[worst]:.3g}"
    raise UserError(
        f"llama.cpp's logits are not torch's: relative error {relative:.3g} (at most {bound:g}), mean KL divergence "
        f"{kld:.3g}, top-1 agreement {top1:.0%}{where}", PLEASE_REPORT)


def tokens(runtime: LlamaCpp, tokenizer: Any, folder: Path, v: Vocabulary) -> dict[str, Any]:
    """Check that tokenizer.json, transformers and llama.cpp give the same ids, also of chat prompts, and that llama.cpp knows
    every added token and every end token. Returns the counts; raises UserError."""
    ids = list(tokenizer(CHECK_TEXT, add_special_tokens=False)["input_ids"])
    path = folder / TOKENIZER
    if path.is_file():
        plain = open_tokenizer_json(folder).encode(CHECK_TEXT, add_special_tokens=False).ids
        if at := first_difference(plain, ids):
            raise UserError(f"transformers does not tokenize as {path} does: {show(at[0], plain, ids, tokenizer)}",
                            "every tool that uses transformers gets wrong tokens: try another version of it")
    for text in (CHECK_TEXT, MARKS):
        expected = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        found = runtime.tokenize(text, special=False).tolist()
        if (at := first_difference(expected, found)) and not (text is MARKS and v.pre in WITHOUT_MARKS):
            raise UserError(f"llama.cpp does not tokenize as the model does (pre-tokenizer {v.pre!r}): "
                            f"{show(at[0], expected, found, tokenizer)}",
                            "give the right pre-tokenizer with --pre NAME, if you know it")
    whole = list(tokenizer(PROMPT)["input_ids"])
    if runtime.tokenize(PROMPT).tolist() != whole:
        raise UserError(f"llama.cpp and the model begin or end a text with different tokens: {whole} in transformers, "
                        f"{runtime.tokenize(PROMPT).tolist()} in llama.cpp", PLEASE_REPORT)
    added = {i: t for t, i in tokenizer.get_added_vocab().items() if i < len(v.tokens)}
    for i in added:
        text = v.tokens[i]
        if (got := runtime.tokenize(text, special=False).tolist()) != [i]:
            raise UserError(f"llama.cpp does not find the added token {text!r} (id {i}) in a text: it gives {got}",
                            PLEASE_REPORT)
    ends = runtime.end_tokens
    if missing := [i for i in v.ends if i not in ends]:
        raise UserError(f"llama.cpp would not stop at {', '.join(repr(v.tokens[i]) for i in missing)}, which ends a "
                        "generation of this model", "try a newer llama-cpp-python")
    alike = {text: runtime.tokenize(text, special=False).tolist()
             == list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (MARKS, " a")}
    side = token_proof.Side("llama.cpp", lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
                            lambda text: runtime.tokenize(text, special=False).tolist(),
                            "export it as ONNX (--format onnx), or leave the template out (--chat-template drop)")
    prompts = token_proof.chats(side, tokenizer, v.template)
    spec = tokenizer_spec(folder, tokenizer)
    known = [{**t, "content": v.tokens[t["id"]]} for t in spec.get("added_tokens", []) if t["id"] < len(v.tokens)]
    beside = token_proof.added(side, tokenizer, spec, known)
    return {"text_tokens": len(ids), "added_tokens": len(added), "chat_tokens": prompts, "around_added_tokens": beside,
            "end_tokens": sorted(ends),
            "combining_marks_alike": alike[MARKS], "leading_space_alike": alike[" a"]}


def generate(runtime: LlamaCpp) -> str:
    """A greedy continuation of PROMPT: 16 tokens, or fewer if an end token comes."""
    token = int(runtime.prefill(runtime.tokenize(PROMPT)).argmax())
    made: list[int] = []
    ends = runtime.end_tokens
    while len(made) < GENERATED and token not in ends:
        made.append(token)
        token = int(runtime.decode(token).argmax())
    return PROMPT + runtime.detokenize(made) if made else PROMPT


def in_llama_cpp(path: Path, ckpt: Checkpoint, tokenizer: Any, v: Vocabulary, entries: list[GgufTensor],
                 context_length: int, threads: int, kinds: Kinds, transposed: bool = False) -> dict[str, Any]:
    """Open the file in llama.cpp and run the checks of tokens, logits and generation; return their figures."""
    weights = sum(int(np.prod(e.shape)) for e in entries)
    window = (window_of(load_config(ckpt.folder)) or (0, 0))[0]
    ids = check_ids(tokenizer, weights, context_length, window)
    ends = end_matrices(path)
    head = next((e.kind for e in entries if e.name == "output.weight"), None)
    kinds.add(ends["head"].numpy(), head or next(e.kind for e in entries if e.name == "token_embd.weight"), exact=True)
    runtime = LlamaCpp(path, context=max(len(ids), 64), threads=threads, flash_attention=False, kv_type="f32",
                       extra_buffers=use_extra_buffers(), record=(PREFIX, EXPERTS))
    if window and runtime.window == 0:  # llama.cpp has none for this architecture: the exporter notes it
        ids = check_ids(tokenizer, weights, min(context_length, window))
    try:
        return {
            "token_ids": tokens(runtime, tokenizer, ckpt.folder, v),
            "logits": logits(runtime, ckpt, ids, bound_of(entries, transposed), ends, kinds),
            "generated": generate(runtime),
            "window": runtime.window,
        }
    finally:
        runtime.close()
