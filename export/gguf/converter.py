"""Export of architectures that llmc does not know: llama.cpp's converter lays out the file, llmc inserts the codes.

The converter reads a float copy of the model, with quantized matrices dequantized exactly, and writes float32. llmc then
searches the matrices of that file for every row of every quantized linear, by value. This works because the converter may
permute, fuse, split or stack matrices, but it moves whole rows. A matrix whose rows are found is written from their codes.
Other matrices stay float.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType, GGUFWriter, ReaderTensor
from safetensors.torch import save_file

from llmc.console import progress, say
from llmc.errors import UserError
from llmc.export.gguf import blocks, tokenizer
from llmc.export.gguf.blocks import Kind
from llmc.export.gguf.config import GgufExportConfig
from llmc.export.gguf.plan import Plan, Types
from llmc.export.gguf.writer import GgufTensor, Source
from llmc.families.names import is_layer_matrix
from llmc.files import check_disk, work_folder, write_json
from llmc.formats import pretokenizers, quantized
from llmc.formats.checkpoint import INDEX, Checkpoint
from llmc.formats.gguf import field, open_gguf
from llmc.formats.gguf_header import read_header
from llmc.formats.tokenizer_files import copy_tokenizer_files

SCRIPT = "convert_hf_to_gguf.py"
SHARD = 1_000_000_000
PATIENCE = 600  # seconds that the converter may take, beside those for its weights
SLOWEST = 5_000_000  # bytes of weights per second
TAIL = 65536  # bytes of its messages that are read
# what llama.cpp needs in float32: routers, position tables, short convolutions, and small ones of RWKV and Gemma 3n
ALWAYS_FLOAT = re.compile(
    r"ffn_gate_inp(_shexp)?\.|^(position_embd|token_types)\.|(ssm_conv1d\w*|shortconv\.conv)\.|attn_rel_b\."
    r"|time_mix_(?!key|value|receptance|gate|output)|altup_(correct|predict)_coef\.")
NO_WAY = "llmc cannot write the codes of this architecture into GGUF"
OURS = ("general.architecture", "general.type", "general.name", "general.size_label", "general.license",
        "general.quantized_by", "general.base_model.", "general.file_type", "general.quantization_version",
        "tokenizer.chat_template", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "GGUF.")
# Runs the converter's script with the pre-tokenizer that llmc found, if the checkout allows it. The converter identifies
# tokenizers by a hash of their output, and one added token changes that hash. llmc verifies the choice afterwards.
LAUNCHER = """
import os, runpy, sys
script, pre, sys.argv = sys.argv[1], sys.argv[2], sys.argv[1:2] + sys.argv[3:]
here = os.path.dirname(script)
sys.path[:0] = [os.path.join(here, "gguf-py"), here]
if pre:
    try:
        from conversion.base import TextModel
        TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    except (ImportError, AttributeError):
        pass
runpy.run_path(script, run_name="__main__")
"""


@contextmanager
def converted(config: GgufExportConfig, ckpt: Checkpoint, tok: Any, types: Types) -> Iterator[Plan]:
    """Yield the plan of a file with the layout of llama.cpp's converter. The converter's float file is deleted at the end."""
    assert config.converter is not None
    script = config.converter.expanduser() / SCRIPT
    if not script.is_file():
        raise UserError(f"{config.converter} has no {SCRIPT}", "give the folder of a llama.cpp checkout")
    parent = (config.out or Path("x")).absolute().parent
    while not parent.exists():
        parent = parent.parent
    linears = quantized.linears(ckpt)
    packed = {name for linear in linears for name in quantized.parts(linear)}
    shapes = [ckpt.shape(name) for name in ckpt.names() if name not in packed]
    weights = sum(int(np.prod(shape)) for shape in [*shapes, *(quantized.shape(ckpt, linear) for linear in linears)])
    copies = 2 if linears else 1
    check_disk(parent, 4 * weights * copies, "the float copies that llama.cpp's converter reads and writes")
    with work_folder(parent / f"{ckpt.folder.resolve().name}-converted") as work:
        folder = _write_skeleton(ckpt, linears, work / ckpt.folder.resolve().name) if linears else ckpt.folder
        float_file = work / "float.gguf"
        _run(script, folder, float_file, _pre(config, ckpt.folder, tok))
        yield _plan(config, ckpt, tok, types, open_gguf(float_file))


def _write_skeleton(ckpt: Checkpoint, linears: list[str], folder: Path) -> Path:
    """Write the float model as a Hugging Face folder, one shard of about a gigabyte at a time; return the folder."""
    folder.mkdir()
    copy_tokenizer_files(ckpt.folder, folder)
    if (ckpt.folder / "generation_config.json").is_file():
        shutil.copy(ckpt.folder / "generation_config.json", folder)
    write_json(folder / "config.json", {k: v for k, v in ckpt.config.items() if k != "quantization_config"})
    packed = {name for linear in linears for name in quantized.parts(linear)}
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    with progress("dequantizing tensor", len(linears)) as p:
        for name in [n for n in ckpt.names() if n not in packed] + [f"{linear}.weight" for linear in linears]:
            linear = name.removesuffix(".weight")
            if name in ckpt:
                shard[name] = ckpt.tensor(name)
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


def _run(script: Path, folder: Path, out: Path, pre: str) -> None:
    """Run the converter as a child: it may abort, hang or print without end. Raises UserError unless it wrote a
    whole file."""
    say(f"running {script}")
    limit = PATIENCE + sum(p.stat().st_size for p in folder.glob("*.safetensors")) / SLOWEST
    with tempfile.TemporaryFile() as printed:
        try:
            code = subprocess.run(
                [sys.executable, "-c", LAUNCHER, str(script.resolve()), pre, str(folder.resolve()), "--outfile", str(out),
                 "--outtype", "f32"],
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=printed, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired as e:
            raise UserError(f"llama.cpp's converter did not end on {folder.name} in {limit:,.0f} seconds",
                            f"`python {script} {folder.name}` shows what it does") from e
        printed.seek(max(0, printed.tell() - TAIL))
        lines = [line for line in printed.read().decode(errors="replace").splitlines() if line.strip()]
    if code or not out.is_file():
        how = f"code {code}" if code >= 0 else f"signal {-code}"
        raise UserError(
            f"llama.cpp's converter failed on {folder.name} ({how}): {lines[-1].strip() if lines else 'it printed nothing'}",
            f"`python {script} {folder.name}` shows its full output; a newer checkout may support the architecture")
    try:
        read_header(out)
    except UserError as e:
        raise UserError(f"llama.cpp's converter wrote a damaged file: {e.problem.rpartition(f'{out} ')[2]}",
                        f"`python {script} {folder.name}` shows its full output") from e


# ------------------------------------------------------------------------------------------------------ matching rows


@dataclass(frozen=True)
class Row:
    """A row of a quantized linear: the index of the linear and of the row."""

    linear: int
    row: int


class RowIndex:
    """Finds the rows of quantized linears by their float32 values."""

    def __init__(self) -> None:
        self.rows: dict[bytes, list[Row]] = {}
        self.types: dict[int, str] = {}
        self.widths: set[int] = set()
        self.left: set[Row] = set()

    def add(self, linear: int, values: np.ndarray, qtype: str) -> None:
        """Add a linear. values: float32 [out, in]. qtype: the name of its quantization type."""
        self.widths.add(values.shape[1])
        self.types[linear] = qtype
        for i, key in enumerate(_keys(values)):
            row = Row(linear, i)
            self.rows.setdefault(key, []).append(row)
            self.left.add(row)

    def find(self, name: str, values: np.ndarray) -> list[Row] | None:
        """The source of each row of a matrix float32 [rows, in]; None if no row comes from a quantized linear.

        Zero rows do not count as evidence. Among equal rows, one that is not placed yet is preferred, then one of the same
        linear as the row before. All rows have one quantization type, as a tensor of the file has one type.
        """
        if values.shape[1] not in self.widths:
            return None
        keys = _keys(values)
        known = [key in self.rows for key in keys]
        nonzero_known = [bool(k) for k, row in zip(known, values, strict=True) if row.any()]
        if not any(nonzero_known):
            return None
        if not all(known):
            raise UserError(f"{known.count(False)} of the {len(known)} rows of {name} are in no quantized linear, the other "
                            "rows are: the converter mixed them with float weights, or scaled some",
                            NO_WAY)
        qtype = self._type(name, keys)
        found: list[Row] = []
        for key in keys:
            candidates = [r for r in self.rows[key] if self.types[r.linear] == qtype]
            before = found[-1].linear if found else -1
            row = max(candidates, key=lambda r: (r in self.left, r.linear == before, -r.row))
            self.left.discard(row)
            found.append(row)
        return found

    def _type(self, name: str, keys: list[bytes]) -> str:
        """The quantization type that all rows of a matrix can have. Equal rows may occur in linears of several types."""
        possible = [{self.types[r.linear] for r in self.rows[key]} for key in keys]
        if common := set.intersection(*possible):
            return min(common)
        names = ", ".join(sorted(set.union(*possible)))
        raise UserError(f"{name} consists of linears of different types ({names}), and a tensor has one type",
                        "give these linears the same type when you quantize")


def _keys(values: np.ndarray) -> list[bytes]:
    """A digest for each row."""
    positive_zeros = values + np.float32(0)  # -0.0 becomes 0.0
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in positive_zeros]


def _plan(config: GgufExportConfig, ckpt: Checkpoint, tok: Any, types: Types, reader: GGUFReader) -> Plan:
    """The plan of the converter's file, with codes in place of the float values of quantized linears."""
    linears = quantized.linears(ckpt)
    index = RowIndex()
    with progress("indexing linear", len(linears)) as p:
        for i, linear in enumerate(linears):
            values = quantized.read(ckpt, linear).dequantize().numpy()
            index.add(i, values, quantized.type_name(ckpt, linear))
            p.step(linear)
    entries, placed = [], 0
    for t in reader.tensors:
        shape = tuple(int(n) for n in reversed(t.shape))
        rows = None
        if linears and t.tensor_type == Kind.F32 and len(shape) > 1:
            rows = index.find(t.name, t.data.reshape(-1, shape[-1]))
        if rows is None:
            entries.append(_float_entry(t, shape, types))
        else:
            placed += 1
            entries.append(_code_entry(t.name, shape, ckpt, linears, rows))
    if index.left:
        names = sorted({linears[row.linear] for row in index.left})
        raise UserError(f"{len(index.left)} rows of {len(names)} quantized linears (first {names[0]}) are not in the file "
                        "of llama.cpp's converter: it changed their values", NO_WAY)
    arch = str(field(reader, "general.architecture"))
    writer = GGUFWriter(None, arch)
    vocabulary = _copy_metadata(config, ckpt.folder, tok, reader, writer)
    note = (f"llama.cpp's converter laid out the file; {len(linears)} quantized linears were found by value in {placed} "
            f"of its {len(entries)} tensors")
    return Plan(writer, entries, vocabulary, int(field(reader, f"{arch}.context_length") or 512),
                [note, *vocabulary.notes])


def _float_entry(t: ReaderTensor, shape: tuple[int, ...], types: Types) -> GgufTensor:
    """A float tensor: layer matrices, embedding and lm_head get their type from `types`, all others stay float32."""
    if t.tensor_type not in (Kind.F32, Kind.F16, Kind.BF16):
        raise UserError(f"llama.cpp's converter wrote {t.name} as {t.tensor_type.name}", "this model cannot be converted")
    is_end = t.name in ("token_embd.weight", "output.weight")
    kind = types.of(t.name, shape) if is_end or _is_matrix(t.name, shape) else Kind.F32
    if not is_end and not is_layer_matrix(t.name) and shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = Kind.F16  # as llama.cpp's converter does; e.g. narrow projections of state-space layers
    blocks.check_rows(t.name, shape, kind)

    def source() -> Source:
        data = np.array(t.data)
        if t.tensor_type == Kind.BF16:
            return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(data)

    return GgufTensor(t.name, shape, kind, source)


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp's converter would write a tensor in the type of matrices (prepare_tensors of its ModelBase)."""
    return len(shape) > 1 and name.endswith(".weight") and not name.endswith("_norm.weight") and not ALWAYS_FLOAT.search(name)


def _code_entry(name: str, shape: tuple[int, ...], ckpt: Checkpoint, linears: list[str], rows: list[Row]) -> GgufTensor:
    """A tensor with rows from one or more quantized linears of one type."""
    linear = np.array([r.linear for r in rows])
    row = np.array([r.row for r in rows])
    kind = blocks.kind_of_type(quantized.type_of(ckpt, linears[rows[0].linear]))
    blocks.check_rows(name, shape, kind)

    def source() -> Source:
        gathered: dict[str, torch.Tensor] = {}
        for i in np.unique(linear):
            q = quantized.read(ckpt, linears[i])
            here, there = torch.from_numpy(np.flatnonzero(linear == i)), torch.from_numpy(row[linear == i])
            for part, t in quantized.tensors_of(q).items():
                gathered.setdefault(part, t.new_empty(len(rows), t.shape[1]))[here] = t[there]
        return quantized.with_tensors(q, gathered)

    return GgufTensor(name, shape, kind, source, codes=True)


def _copy_metadata(config: GgufExportConfig, folder: Path, tok: Any, reader: GGUFReader,
                   writer: GGUFWriter) -> tokenizer.Vocabulary:
    """Copy every key that llmc does not write itself; return the vocabulary that the converter wrote."""
    for key, f in reader.fields.items():
        if not key.startswith(OURS) and not (f.types[0] == GGUFValueType.ARRAY and len(f.types) == 1):
            writer.add_key_value(key, f.contents(), f.types[0], f.types[-1] if len(f.types) > 1 else None)
    v = tokenizer.Vocabulary(
        str(field(reader, "tokenizer.ggml.model")), str(field(reader, "tokenizer.ggml.pre") or "default"),
        list(field(reader, "tokenizer.ggml.tokens") or []), list(field(reader, "tokenizer.ggml.token_type") or []))
    tokenizer.complete(v, folder, tok, config.chat_template)
    tokenizer.add_behaviour(writer, v, present=set(reader.fields))
    return v
