"""Export of architectures that llmc does not know: llama.cpp's converter lays out the file, llmc inserts the codes.

The converter reads a float copy of the model, with quantized matrices dequantized exactly, and writes float32. llmc then
searches that file for the codes' values (carry.py), and writes the file with the codes in their place. Other matrices get the
type that the options ask for, unless llama.cpp needs another one: the converter says which.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType, GGUFWriter, ReaderTensor
from safetensors.torch import save_file

from llmc.console import progress
from llmc.export.gguf import blocks, carry, tokenizer
from llmc.export.gguf.blocks import BLOCK, Kind
from llmc.export.gguf.carry import Carried
from llmc.export.gguf.config import GgufExportConfig
from llmc.export.gguf.plan import EMBEDDING, OUTPUT, Plan, Types
from llmc.export.gguf.projector import convert
from llmc.export.gguf.routing import scoring
from llmc.export.gguf.run_converter import Conversion, run
from llmc.export.gguf.writer import GgufTensor, Source
from llmc.export.text_model import config_of
from llmc.files import check_disk, work_folder, write_json
from llmc.formats import pretokenizers, quantized
from llmc.formats.checkpoint import INDEX, Checkpoint
from llmc.formats.gguf import field, open_gguf
from llmc.formats.hf import empty_model
from llmc.formats.mixture import is_transposed
from llmc.formats.names import Names
from llmc.formats.tokenizer_files import copy_tokenizer_files

SHARD = 1_000_000_000
BESIDE = ("generation_config.json", "preprocessor_config.json", "processor_config.json")  # what the converter may read
EMBEDDINGS = (EMBEDDING, "per_layer_token_embd.weight")  # tables of rows, of one type as in llama-quant.cpp
OURS = ("general.architecture", "general.type", "general.name", "general.size_label", "general.license",
        "general.quantized_by", "general.base_model.", "general.file_type", "general.quantization_version",
        "tokenizer.chat_template", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "GGUF.")


@contextmanager
def converted(config: GgufExportConfig, script: Path, whole: Checkpoint, ckpt: Checkpoint, tok: Any,
              types: Types) -> Iterator[Plan]:
    """Yield the plan of a file with the layout of llama.cpp's converter. What the converter wrote is deleted at the end.

    script: the converter's. ckpt: what is written, the whole checkpoint or the text model in it."""
    parent = (config.out or Path("x")).absolute().parent
    while not parent.exists():
        parent = parent.parent
    linears = quantized.linears(ckpt)
    packed = {name for linear in linears for name in quantized.parts(linear)}
    shapes = [ckpt.shape(name) for name in ckpt.names() if name not in packed]
    weights = sum(int(np.prod(shape)) for shape in [*shapes, *(quantized.shape(ckpt, linear) for linear in linears)])
    copies = 2 if linears or ckpt is not whole else 1
    check_disk(parent, 4 * weights * copies, "the float copies that llama.cpp's converter reads and writes")
    with work_folder(parent / f"{ckpt.folder.resolve().name}-converted") as work:
        name = ckpt.folder.resolve().name
        folder = _write_skeleton(ckpt, work / name) if copies > 1 else ckpt.folder
        file, projector = work / "float.gguf", None
        if config.mmproj:
            (work / "whole").mkdir()
            both = folder if ckpt is whole else _write_skeleton(whole, work / "whole" / name) if linears else whole.folder
            projector = convert(script, both, work / "mmproj.gguf", config.mmproj)
        # with q8_0 the converter says of each matrix whether llama.cpp allows blocks in it
        made = run(script, folder, file, "--outtype", "q8_0", pre=_pre(config, ckpt.folder, tok),
                   scoring=scoring(config_of(ckpt)))
        plan = _plan(config, ckpt, tok, types, open_gguf(file), made)
        plan.projector = projector
        yield plan


def _write_skeleton(ckpt: Checkpoint, folder: Path) -> Path:
    """Write the float model as a Hugging Face folder, one shard of about a gigabyte at a time; return the folder."""
    folder.mkdir()
    linears = quantized.linears(ckpt)
    copy_tokenizer_files(ckpt.folder, folder)
    for file in BESIDE:
        if (ckpt.folder / file).is_file():
            shutil.copy(ckpt.folder / file, folder)
    write_json(folder / "config.json", {k: v for k, v in ckpt.config.items() if k != "quantization_config"})
    packed = {name for linear in linears for name in quantized.parts(linear)}
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    names = Names.of(ckpt, model := empty_model(config_of(ckpt)), linears)
    stacks: dict[str, dict[int, torch.Tensor]] = {}  # experts that the files of the source have in one tensor
    with progress("dequantizing tensor", len(linears)) as p:
        for name in [n for n in ckpt.names() if n not in packed] + [f"{linear}.weight" for linear in linears]:
            linear = name.removesuffix(".weight")
            if name in ckpt:
                shard[name] = ckpt.tensor(name)
            elif (whole := names.stack_name(linear)) is not None and (place := names.stack_of(linear)) is not None:
                parameter, number = place
                owner = model.get_submodule(parameter.rpartition(".")[0])
                values = quantized.read(ckpt, linear).dequantize()
                stack = stacks.setdefault(whole, {})
                stack[number] = values.t() if is_transposed(owner) else values
                if len(stack) == model.get_parameter(parameter).shape[0]:
                    shard[whole] = torch.stack([stack[i] for i in range(len(stack))])
                    del stacks[whole]
                p.step(linear)
            else:
                shard[name] = quantized.read(ckpt, linear).dequantize()
                p.step(linear)
            if sum(t.nbytes for t in shard.values()) > SHARD:
                flush()
        flush()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def _pre(config: GgufExportConfig, folder: Path, tok: Any) -> str:
    """llama.cpp's name of the pre-tokenizer; '' if llmc finds none and the converter must find it."""
    if config.pre:
        return config.pre
    spec = tokenizer.tokenizer_spec(folder, tok)
    return pretokenizers.known_pre(spec.get("pre_tokenizer"), bool(spec["model"].get("ignore_merges"))) or ""


def _plan(config: GgufExportConfig, ckpt: Checkpoint, tok: Any, types: Types, reader: GGUFReader,
          made: Conversion) -> Plan:
    """The plan of the converter's file, with codes in place of the float values of quantized linears.

    made: what the converter said when it was asked for a file of Q8_0."""
    kinds = made.kinds
    exact = {name for name, kind in kinds.items() if kind == "F32"}
    carried = carry.carry(ckpt, reader, exact)
    is_head = all(t.name != OUTPUT for t in reader.tensors)
    entries = []
    for t in reader.tensors:
        shape = tuple(int(n) for n in reversed(t.shape))
        if t.name in carried.found:
            entries.append(_code_entry(t.name, shape, ckpt, carried))
        else:
            kind = _kind(t, shape, types, kinds, t.name in carried.rounded, is_head)
            entries.append(GgufTensor(t.name, shape, kind, partial(_values, t)))
    arch = str(field(reader, "general.architecture"))
    writer = GGUFWriter(None, arch)
    vocabulary = _copy_metadata(config, ckpt.folder, tok, reader, writer, made.vocabulary)
    return Plan(writer, entries, vocabulary, int(field(reader, f"{arch}.context_length") or 512),
                [*_notes(carried, len(entries)), *vocabulary.notes], carried.by_blocks, len(carried.lost))


def _notes(c: Carried, tensors: int) -> list[str]:
    notes = [f"llama.cpp's converter laid out the file; {len(c.linears) - len(c.lost)} quantized linears were found by value "
             f"in {len(c.found)} of its {tensors} tensors"]
    if c.lost:
        notes.append(f"{len(c.lost)} quantized linears (first {c.lost[0]}) have 8 bits in the file: llama.cpp's converter "
                     f"transposes them or changes their values; they are in {len(c.rounded)} tensors "
                     f"(first {min(c.rounded)})")
    return notes


def _kind(t: ReaderTensor, shape: tuple[int, ...], types: Types, kinds: dict[str, str], rounded: bool,
          is_head: bool) -> Kind:
    """The type of a tensor without codes. rounded: it holds linears whose codes were not found.  is_head: the embedding is
    the head too."""
    if t.tensor_type != Kind.F32:
        return t.tensor_type  # what the converter wrote in its own type: numbers of experts, blocks of MXFP4
    chosen = Kind[kinds.get(t.name, "F32")]
    if t.name in EMBEDDINGS:
        if is_head and t.name == EMBEDDING:
            kind = types.of_both(shape)
        else:  # 8 bits: with 4 the logits of DeepSeek V3 and Gemma 4 (a second table) differ from torch's
            kind = Kind.Q8_0 if types.embedding is None else types.embedding
    elif t.name == OUTPUT:
        kind = types.of(OUTPUT, shape)
    elif chosen == Kind.F32 or len(shape) == 1:
        return Kind.F32
    elif chosen != Kind.Q8_0 and shape[-1] % BLOCK == 0:
        return chosen  # the architecture needs this very type
    else:
        kind = Kind.Q8_0 if rounded else types.matrix
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            kind = Kind.F16  # as llama.cpp's converter does; e.g. narrow projections of state-space layers
    blocks.check_rows(t.name, shape, kind)
    return kind


def _values(t: ReaderTensor) -> torch.Tensor:
    """The values of a tensor; of other types than F32 its bytes, uint8 [rows, bytes of a row]."""
    data = np.array(t.data)
    if t.tensor_type == Kind.F32:
        return torch.from_numpy(data)
    return torch.from_numpy(data.view(np.uint8).reshape(-1, blocks.nbytes(t.tensor_type, (int(t.shape[0]),))))


def _code_entry(name: str, shape: tuple[int, ...], ckpt: Checkpoint, carried: Carried) -> GgufTensor:
    found, linears = carried.found[name], carried.linears
    kind = blocks.kind_of_type(quantized.type_of(ckpt, linears[int(found.pieces[0, 0])]))
    blocks.check_rows(name, shape, kind)

    def source() -> Source:
        return carry.gather(ckpt, linears, found, int(np.prod(shape[:-1])))

    return GgufTensor(name, shape, kind, source, codes=True)


def _copy_metadata(config: GgufExportConfig, folder: Path, tok: Any, reader: GGUFReader,
                   writer: GGUFWriter, unread: str) -> tokenizer.Vocabulary:
    """Copy every key that llmc does not write itself; return the vocabulary that the converter wrote.

    unread: why it wrote none, '' if it did. Then llmc writes one; the proof of the tokens finds whether it is right."""
    for key, f in reader.fields.items():
        if not key.startswith(OURS) and not (f.types[0] == GGUFValueType.ARRAY and len(f.types) == 1):
            writer.add_key_value(key, f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None)
    if unread:
        rows = next(int(t.shape[1]) for t in reader.tensors if t.name == EMBEDDINGS[0])
        v = tokenizer.read_vocabulary(folder, tok, rows, config.pre, config.chat_template)
        tokenizer.add_vocabulary(writer, v)
        v.notes.append(f"llama.cpp's converter does not read this tokenizer ({unread}): llmc wrote the vocabulary")
        return v
    v = tokenizer.Vocabulary(
        str(field(reader, "tokenizer.ggml.model")), str(field(reader, "tokenizer.ggml.pre") or "default"),
        list(field(reader, "tokenizer.ggml.tokens") or []), list(field(reader, "tokenizer.ggml.token_type") or []))
    tokenizer.complete(v, folder, tok, config.chat_template)
    tokenizer.add_behaviour(writer, v, present=set(reader.fields))
    return v
