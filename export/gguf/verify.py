"""Proof that the file is what it should be. None of it can be skipped.

1. Every tensor is read back and held against its source: codes and scales bit for bit, floats in their type.
2. llama.cpp opens the file and must make the token ids of the model's own tokenizer, know every end token, and give the
   logits that torch gives. 3. It generates 16 tokens, for a person to look at.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from llmc.console import progress
from llmc.errors import UserError
from llmc.export.gguf import blocks
from llmc.export.gguf.blocks import Kind
from llmc.export.gguf.tokenizer import Vocabulary
from llmc.export.gguf.writer import Entry
from llmc.export.parity import GENERATED, PROMPT, REPORT, check_ids, compare_logits, first_difference, show
from llmc.export.reference import reference_logits
from llmc.formats import packing
from llmc.formats.check_text import CHECK_TEXT, MARKS
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.pretokenizers import WITHOUT_MARKS
from llmc.formats.quantized import Quantized, as_blocks, rows_of
from llmc.formats.types import BlockTensor
from llmc.runtimes.amx import use_extra_buffers
from llmc.runtimes.llamacpp import LlamaCpp

FLOATS = {Kind.F32, Kind.F16, Kind.BF16}
MOST_LOST = 0.25  # of a matrix rounded at the export; Q2_K, the coarsest type, loses about 0.07


def tensors(path: Path, entries: list[Entry]) -> dict[str, int]:
    """Read every tensor back. Returns how many tensors and weights were compared, in all and those carried as codes."""
    stored = {t.name: t for t in GGUFReader(path).tensors}
    if stored.keys() != {e.name for e in entries}:
        raise _damaged(path, "holds other tensors than were planned")
    counts = {"tensors": 0, "weights": 0, "code_tensors": 0, "code_weights": 0}
    with progress("reading back tensor", len(entries)) as p:
        for e in entries:
            t = stored[e.name]
            if t.tensor_type != e.kind or tuple(int(n) for n in reversed(t.shape)) != e.shape:
                raise _damaged(path, f"{e.name} has the type {t.tensor_type.name} and shape {list(t.shape)}")
            _compare(path, e, t.data.view(np.uint8).reshape(-1, blocks.nbytes(e.kind, e.shape[-1:])))
            for prefix in ("", "code_")[: 1 + e.codes]:
                counts[f"{prefix}tensors"] += 1
                counts[f"{prefix}weights"] += int(np.prod(e.shape))
            p.step(e.name)
    return counts


def _damaged(path: Path, what: str) -> UserError:
    name = path.name.removeprefix(".").removesuffix(".partial")
    return UserError(f"{name} does not read back as it was written: {what}",
                     f"check the disk and export again; if it stays, {REPORT}")


def _compare(path: Path, e: Entry, data: np.ndarray) -> None:
    """data: uint8 [rows, bytes of a row] of the file."""
    source = e.source()
    if isinstance(source, torch.Tensor):
        if not np.array_equal(data, blocks.encode_float(e.name, source, e.kind)):
            raise _damaged(path, f"{e.name} differs from its source in {e.kind.name}")
        if e.kind not in FLOATS and (lost := _lost(e, data, source)) > MOST_LOST:
            raise UserError(f"{e.name} lost {lost:.0%} of its energy as {e.kind.name}", REPORT)
        return
    if not np.array_equal(data, packing.pack(as_blocks(source))):
        raise _damaged(path, f"{e.name} has other {_differing(data, source)}")
    step = max(1, blocks.CHUNK // e.shape[-1])
    for i in range(0, len(data), step):  # and gguf's own reading of the blocks gives the source's values
        part = slice(i, i + step)
        if not np.array_equal(dequantize(data[part], e.kind), rows_of(source, part).dequantize().numpy()):
            raise _damaged(path, f"{e.name} has other values")


def _lost(e: Entry, data: np.ndarray, source: torch.Tensor) -> float:
    """Squared error of a float tensor in its type, as gguf reads it, over the tensor's own square."""
    flat, error, energy = source.reshape(-1, e.shape[-1]), 0.0, 0.0
    step = max(1, blocks.CHUNK // e.shape[-1])
    for i in range(0, len(data), step):
        x = flat[i : i + step].to(torch.float32).numpy()
        error += float(np.square(dequantize(data[i : i + step], e.kind) - x, dtype=np.float64).sum())
        energy += float(np.square(x, dtype=np.float64).sum())
    return error / energy if energy else 0.0


def tables(path: Path) -> dict[str, torch.Tensor]:
    """The values that the file holds as 'embedding' and 'head', float32; a tied file has one matrix for both."""
    stored = {t.name: t for t in GGUFReader(path).tensors if t.name in ("token_embd.weight", "output.weight")}

    def values(name: str) -> torch.Tensor:
        t = stored[name]
        width, rows = (int(n) for n in t.shape)
        raw = np.array(t.data).view(np.uint8).reshape(rows, -1)
        return torch.from_numpy(dequantize(raw, t.tensor_type)).view(rows, width)

    embedding = values("token_embd.weight")
    return {"embedding": embedding, "head": values("output.weight") if "output.weight" in stored else embedding}


def _differing(data: np.ndarray, source: Quantized) -> str:
    """What differs from a source: of GPTQ's types the part."""
    if isinstance(source, BlockTensor):
        return "blocks"
    wanted = as_blocks(source)
    found = packing.unpack(data, wanted.type)
    if not torch.equal(found.codes, wanted.codes):
        return "codes"
    return "scales" if not torch.equal(found.d, wanted.d) else "minima"


@dataclass(frozen=True)
class Bound:
    """How far llama.cpp's logits may lie from torch's.

    relative: root mean square of the difference over that of the logits, both centred for each token.
    kld: mean Kullback-Leibler divergence from torch's distribution to llama.cpp's, in nats.
    """

    relative: float
    kld: float

    @classmethod
    def of(cls, entries: list[Entry]) -> Bound:
        """By the coarsest type in the file. llama.cpp rounds activations to the type that a matrix asks for: 8 bits for
        quantized ones (relative errors of 0.02 to 0.15 were seen, the most with untrained weights and with experts),
        bfloat16 for BF16, float16 for F16; its GELU comes from a float16 table. A wrong layout gives about 1."""
        kinds = {e.kind for e in entries}
        if kinds - FLOATS:
            return cls(0.3, 0.15)
        return cls(0.05, 0.01) if Kind.BF16 in kinds else cls(0.01, 1e-3)


def logits(runtime: LlamaCpp, ckpt: Checkpoint, ids: np.ndarray, bound: Bound,
           held: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Run the same ids in torch and in llama.cpp; beyond the bound is an error."""
    theirs = runtime.logits(ids)
    ours = reference_logits(ckpt, ids, held)[:, : theirs.shape[1]]
    relative, kld, top1 = compare_logits(ours, theirs)
    if not (relative <= bound.relative and kld <= bound.kld):  # NaN must fail too
        raise UserError(
            f"llama.cpp's logits are not torch's: relative error {relative:.3g} (at most {bound.relative:g}), mean KL "
            f"divergence {kld:.3g} (at most {bound.kld:g}), top-1 agreement {top1:.0%}", REPORT)
    return {"tokens": len(ids), "relative_error": relative, "max_relative_error": bound.relative, "mean_kld": kld,
            "max_mean_kld": bound.kld, "top1_agreement": top1}


def tokens(runtime: LlamaCpp, tokenizer: Any, folder: Path, v: Vocabulary) -> dict[str, Any]:
    """The same ids from tokenizer.json, from transformers and from llama.cpp; every added token; every end token."""
    ids = list(tokenizer(CHECK_TEXT, add_special_tokens=False)["input_ids"])
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        plain = Tokenizer.from_file(str(path)).encode(CHECK_TEXT, add_special_tokens=False).ids
        if at := first_difference(plain, ids):
            raise UserError(f"transformers does not tokenize as {path} says: {show(at[0], plain, ids, tokenizer)}",
                            "every tool that uses transformers sees wrong tokens: try another version of it")
    for text in (CHECK_TEXT, MARKS):
        expected = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        found = runtime.tokenize(text, special=False).tolist()
        if (at := first_difference(expected, found)) and not (text is MARKS and v.pre in WITHOUT_MARKS):
            raise UserError(f"llama.cpp does not tokenize as the model does (pre-tokenizer {v.pre!r}): "
                            f"{show(at[0], expected, found, tokenizer)}",
                            "give another with --pre NAME, if you know one")
    whole = list(tokenizer(PROMPT)["input_ids"])
    if runtime.tokenize(PROMPT).tolist() != whole:
        raise UserError(f"llama.cpp begins or ends a text with other tokens than the model: {whole} in transformers, "
                        f"{runtime.tokenize(PROMPT).tolist()} in llama.cpp", REPORT)
    added = {i: t for t, i in tokenizer.get_added_vocab().items() if i < len(v.tokens)}
    for i in added:
        text = v.tokens[i]
        if (got := runtime.tokenize(text, special=False).tolist()) != [i]:
            raise UserError(f"llama.cpp does not see the added token {text!r} (id {i}) in a text: it makes {got}",
                            REPORT)
    ends = runtime.end_tokens
    if missing := [i for i in v.ends if i not in ends]:
        raise UserError(f"llama.cpp would not stop at {', '.join(repr(v.tokens[i]) for i in missing)}, which ends a "
                        "generation of this model", "try a newer llama-cpp-python")
    alike = {text: runtime.tokenize(text, special=False).tolist()
             == list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (MARKS, " a")}
    return {"text_tokens": len(ids), "added_tokens": len(added), "end_tokens": sorted(ends),
            "combining_marks_alike": alike[MARKS], "leading_space_alike": alike[" a"]}


def generate(runtime: LlamaCpp) -> str:
    """Greedy continuation of PROMPT, 16 tokens or up to an end token."""
    token = int(runtime.prefill(runtime.tokenize(PROMPT)).argmax())
    made: list[int] = []
    ends = runtime.end_tokens
    while len(made) < GENERATED and token not in ends:
        made.append(token)
        token = int(runtime.decode(token).argmax())
    return PROMPT + runtime.detokenize(made) if made else PROMPT


def in_llama_cpp(path: Path, ckpt: Checkpoint, tokenizer: Any, v: Vocabulary, entries: list[Entry],
                 context_length: int, threads: int) -> dict[str, Any]:
    """Open the file and make every check that needs it to run."""
    weights = sum(int(np.prod(e.shape)) for e in entries)
    ids = check_ids(tokenizer, weights, context_length)
    runtime = LlamaCpp(path, context=max(len(ids), 64), threads=threads, flash_attention=False, kv_type="f32",
                       extra_buffers=use_extra_buffers())
    try:
        return {
            "token_ids": tokens(runtime, tokenizer, ckpt.folder, v),
            "logits": logits(runtime, ckpt, ids, Bound.of(entries), tables(path)),
            "generated": generate(runtime),
        }
    finally:
        runtime.close()
