"""llama.cpp's importance matrix as a GGUF file: statistics of the inputs of each weight matrix, by column.

For a matrix `blk.0.attn_q.weight` the file holds `blk.0.attn_q.weight.in_sum2`, float32 [in], the sum of x_j^2 over all
tokens, and `….counts`, float32 [1], the number of tokens. An expert matrix has one row and one count per expert:
float32 [experts, in] and [experts, 1].
Source: tools/imatrix/imatrix.cpp (save_imatrix) and common/imatrix-loader.cpp of llama.cpp.

The names are llama.cpp's tensor names. llama.cpp permutes rows of a matrix (Q and K), never columns. A fused matrix (GPT-2,
Phi-3) is one entry because it has one input.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.small_files import check_file

KIND = "imatrix"  # general.type
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"
LEGACY = "convert it first: llama-imatrix -m MODEL.gguf --in-file OLD.dat --output-format gguf -o NEW.gguf"
AGAIN = "download it again, or make it again with `llmc imatrix`"


@dataclass(frozen=True)
class InputSums:
    """Input statistics of one matrix. sums: float32 [experts, in], of x_j^2.  counts: float32 [experts], tokens."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def unseen(self) -> bool:
        """Whether no token reached the matrix."""
        return not bool(self.counts.any())


@dataclass(frozen=True)
class Imatrix:
    """entries: {name of the matrix: sums}.  datasets: names of the calibration texts.
    chunk_count: number of sequences.  chunk_size: tokens of a sequence."""

    entries: dict[str, InputSums]
    datasets: list[str]
    chunk_count: int
    chunk_size: int


def is_imatrix(reader: Any) -> bool:
    """Whether an open GGUF file says that it is an importance matrix."""
    from llmc.formats.gguf import field

    return bool(field(reader, "general.type") == KIND)


def read_imatrix(file: Path) -> Imatrix:
    """An importance matrix of llmc or llama.cpp. Raises UserError for the older .dat format."""
    from llmc.formats.gguf import field, open_gguf

    try:
        check_file(file, 1 << 50)
        with file.open("rb") as f:
            magic = f.read(4)
    except (OSError, UserError) as e:
        why = e.problem if isinstance(e, UserError) else e.strerror
        raise UserError(f"the importance matrix {file} cannot be read: {why}",
                        "give a file that `llmc imatrix` or llama-imatrix made") from e
    if magic != b"GGUF":
        raise UserError(f"{file} is not a GGUF file; llmc does not read importance matrices in "
                        "llama.cpp's old .dat format", LEGACY)
    reader = open_gguf(file)
    if not is_imatrix(reader):
        raise UserError(f"{file} is a GGUF file of type {field(reader, 'general.type') or 'model'}, not an importance matrix",
                        "make one with `llmc imatrix` or llama-imatrix")
    values = {t.name: np.asarray(t.data, dtype=np.float32) for t in reader.tensors if t.tensor_type.name == "F32"}
    names = sorted(n.removesuffix(SUMS) for n in values if n.endswith(SUMS))
    entries = {name: _input_sums(file, name, values) for name in names}
    if not entries:
        raise UserError(f"{file} holds no {SUMS} of any matrix in F32", AGAIN)
    datasets, count, size = field(reader, DATASETS) or [], field(reader, CHUNK_COUNT) or 0, field(reader, CHUNK_SIZE) or 0
    if not isinstance(datasets, list) or not all(isinstance(d, str) for d in datasets):
        raise UserError(f"{file}: {DATASETS} is {datasets!r:.100}, not a list of texts", AGAIN)
    for key, value in ((CHUNK_COUNT, count), (CHUNK_SIZE, size)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
            raise UserError(f"{file}: {key} is {value!r:.100}, not a whole number", AGAIN)
    return Imatrix(entries, datasets, count, size)


def _input_sums(file: Path, name: str, values: dict[str, np.ndarray]) -> InputSums:
    sums, counts = values[name + SUMS], values.get(name + COUNTS)
    if counts is None or not counts.size or sums.size % counts.size:
        raise UserError(f"{file} has no {name}{COUNTS} that matches its {name}{SUMS}", AGAIN)
    entry = InputSums(sums.reshape(counts.size, -1), counts.reshape(-1))
    if not (np.isfinite(sums).all() and np.isfinite(counts).all() and (sums >= 0).all() and (counts >= 0).all()):
        raise UserError(f"{name} in {file} holds values that are not sums of squares (NaN, infinity or below 0)", AGAIN)
    return entry


def write_imatrix(file: Path, matrix: Imatrix) -> None:
    """Write the file as llama-imatrix does: the same keys, the same order of tensors."""
    from gguf import GGUFWriter

    class Writer(GGUFWriter):
        def add_architecture(self) -> None:
            """Write nothing: an importance matrix has no architecture."""

    writer = Writer(file, "")
    writer.add_type(KIND)
    writer.add_array(DATASETS, matrix.datasets)
    writer.add_uint32(CHUNK_COUNT, matrix.chunk_count)
    writer.add_uint32(CHUNK_SIZE, matrix.chunk_size)
    for name, entry in sorted(matrix.entries.items()):
        many = len(entry.counts) > 1
        writer.add_tensor(name + SUMS, entry.sums if many else entry.sums.reshape(-1))
        writer.add_tensor(name + COUNTS, entry.counts[:, None] if many else entry.counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
