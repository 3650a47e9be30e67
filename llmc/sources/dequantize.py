"""A .gguf file as a source: it is dequantized into a Hugging Face folder, and its tokenizer is compared with llama.cpp's."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc import closure
from llmc.console import say, warn
from llmc.errors import UserError
from llmc.files import cache_folder, check_disk, sha256, work_folder, writing
from llmc.formats.chat_template import Template, by_name, set_templates
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.gguf import field, open_gguf, templates
from llmc.formats.gguf_check import MERGE, check_runnable, parts
from llmc.formats.manifest import MANIFEST
from llmc.formats.model_folder import publish
from llmc.formats.names import Names
from llmc.locks import locked
from llmc.machine import check_memory
from llmc.temporary import remove

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedModel

ANOTHER_CACHE = "name another cache with LLMC_CACHE"
GO_BACK = "start from the Hugging Face folder it was made from"
TEMPLATE_NAME = re.compile("[A-Za-z0-9_-]+")
UNUSED = 7 * 24 * 3600.0  # seconds after which a folder of older code may go: no run that reads it takes longer


def dequantized_folder(file: Path) -> Path:
    """The float16 Hugging Face folder of a .gguf file, in the cache. It is made once for each content, code of llmc and
    version of the packages that read the file."""
    if (found := len(parts(file))) > 1:
        raise UserError(f"{file} is the first of {found} parts, which transformers cannot read", MERGE)
    check_runnable(file)
    digest = sha256(file)
    made = "".join([closure.digest(__name__), *(version(p) for p in ("torch", "transformers", "gguf"))])
    key = f"{digest[:16]}-{hashlib.sha256(made.encode()).hexdigest()[:8]}"
    out = cache_folder() / "dequantized" / key / f"{file.stem}-f16"
    if not (out / MANIFEST).is_file():
        _make(file, digest, out)
    with suppress(OSError):  # a cache that others keep
        os.utime(out.parent)  # it is in use
    warn(f"the weights are dequantized from {file.name}: they keep its rounding errors")
    return out


def _make(file: Path, digest: str, out: Path) -> None:
    """Dequantize into the cache, or wait for another command that does. Folders that older code or packages made of the same
    file, and that nobody used for a week, go."""
    with writing(out, ANOTHER_CACHE), locked(out, wait=True):
        if (out / MANIFEST).is_file():
            return
        with work_folder(out, ANOTHER_CACHE) as work:
            source = {**_dequantize(file, work), "files": {file.name: digest}}
            publish(work, out, "hf", source, [{"name": "dequantize", "config": {"dtype": "float16"}}])
    for other in out.parent.parent.glob(f"{digest[:16]}-*"):
        if other != out.parent and time.time() - other.stat().st_mtime > UNUSED:
            remove(other)


def _dequantize(file: Path, work: Path) -> dict[str, Any]:
    """Write model and tokenizer of a .gguf file into `work` as float16; return the manifest's `source` without hashes."""
    import torch

    from llmc.formats.hf import quiet_transformers

    reader = open_gguf(file)
    check_disk(work, 2 * _count(reader), f"the dequantized {file.name}")
    say(f"dequantizing {file.name} into {work.parent}")
    model, tokenizer = load_gguf(file, torch.float16)
    restore_pre_tokenizer(tokenizer, field(reader, "tokenizer.ggml.pre"))
    check_tokenizer(tokenizer, file)
    with quiet_transformers():
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    _check_saved(Checkpoint.open(work), model)
    return {"name": file.name, "licence": field(reader, "general.license") or "unknown",
            "base_model": field(reader, "general.base_model.0.repo_url"), "revision": None}


def _check_saved(written: Checkpoint, model: PreTrainedModel) -> None:
    """Check that transformers wrote the model: equal tensors under the model's names, and the same total number of weights.

    transformers may rename or split tensors when it writes them, and leaves out the second name of a tied tensor."""
    import torch

    names, values = Names.of(written, model), model.state_dict()
    for stored in written.names():
        value, found = values.get(names.find_own(stored) or ""), written.tensor(stored)
        if value is not None and not (found.dtype == value.dtype and torch.equal(found, value)):
            raise RuntimeError(f"the written {stored} differs from the model's")
    weights = sum(v.numel() for v in {v.data_ptr(): v for v in values.values()}.values())
    if sum(math.prod(written.shape(n)) for n in written.names()) != weights:
        raise RuntimeError(f"{written.folder} does not hold the {weights} weights of the model")


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """The dequantized model in a .gguf file, and the tokenizer that transformers makes from the file's vocabulary.

    transformers undoes llama.cpp's row permutations. Raises UserError for anything that it would drop or leave at random.
    """
    import torch
    import transformers

    from llmc.formats.hf import quiet_transformers

    reader = open_gguf(file)
    arch = str(field(reader, "general.architecture"))
    if field(reader, f"{arch}.rope.scaling.type") not in (None, "none") or any(
        t.name.startswith("rope_f") for t in reader.tensors
    ):
        raise UserError(f"{file} has a scaled rotary embedding, which transformers cannot read from a GGUF file", GO_BACK)
    # first float32, then dtype
    check_memory((4 + dtype.itemsize) * _count(reader), f"dequantizing {file.name}", GO_BACK)
    # newer versions may keep blocks packed by default; older ones always unpack them and have no GgufConfig
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config else {}
    with quiet_transformers(), _reading_back(file):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True, local_files_only=True, **unpack)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{file} lacks {len(missing)} tensors, first {missing[0]}", "download it again")
    for name, t in model.state_dict().items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise UserError(f"{name} of {file} holds values that {dtype} cannot hold", GO_BACK)
    with quiet_transformers(), _reading_back(file):
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    restore_bos(tokenizer, field(reader, "tokenizer.ggml.add_bos_token"))
    restore_templates(tokenizer, templates(reader, file), file)
    return model.eval(), tokenizer


@contextmanager
def _reading_back(file: Path) -> Iterator[None]:
    """Turn the errors of transformers (unknown architecture or tokenizer, missing key) into a UserError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError) as e:
        raise UserError(f"{file} cannot be read back into a Hugging Face model: {e!r}", GO_BACK) from e


def restore_pre_tokenizer(tokenizer: Any, name: str | None) -> None:
    """Set the pre-tokenizer of a byte-level tokenizer, in place, to the one that llama.cpp calls `name`.

    transformers restores it for some names (5.23, `gguf_tokenizer_mapping.py`) and uses GPT-2's for the others. Then numbers,
    spaces and newlines become other tokens than in training.
    """
    from tokenizers import Regex, pre_tokenizers

    from llmc.formats.pretokenizers import TABLE

    found = [(steps, names.index(name)) for steps, names in TABLE.items() if name in names]
    if name is None or not found:
        return
    made: dict[str, Any] = {
        "words": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "digit": lambda: pre_tokenizers.Digits(individual_digits=True),
    }
    steps, whole_words = found[0]
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        made[step]() if step in made else pre_tokenizers.Split(Regex(step), "isolated") for step in steps])
    if whole_words:
        backend.model.ignore_merges = True


def restore_bos(tokenizer: Any, wanted: bool | None) -> None:
    """Set whether texts begin with BOS, as the file requires. transformers 4.57 always adds BOS for a Llama."""
    if wanted is not None and wanted != (tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]):
        tokenizer.add_bos_token = wanted


def restore_templates(tokenizer: Any, found: Template | None, file: Path) -> None:
    """Give the tokenizer every chat template of the file. transformers reads the default alone. Names become file names."""
    if odd := sorted(name for name in by_name(found) if not TEMPLATE_NAME.fullmatch(name)):
        raise UserError(f"{file} has a chat template with the name {odd[0]!r}, which cannot be a file's", GO_BACK)
    set_templates(tokenizer, found)


def check_tokenizer(tokenizer: Any, file: Path) -> None:
    """Raise UserError unless the tokenizer and llama.cpp, from the file, give the same ids for the check text."""
    from llmc.formats.check_text import CHECK_TEXT
    from llmc.runtimes.llamacpp import LlamaCpp

    runtime = LlamaCpp(file, context=8, threads=1, extra_buffers=False)
    try:
        expected = runtime.tokenize(CHECK_TEXT, special=False).tolist()
    finally:
        runtime.close()
    got = list(tokenizer(CHECK_TEXT, add_special_tokens=False)["input_ids"])
    if got != expected:
        at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected)))
        raise UserError(
            f"the tokenizer in {file} cannot be rebuilt: after {tokenizer.decode(expected[max(0, at - 8):at])!r} it gives "
            f"{tokenizer.convert_ids_to_tokens(got[at:at + 3])}, llama.cpp gives "
            f"{tokenizer.convert_ids_to_tokens(expected[at:at + 3])}", GO_BACK)


def _count(reader: GGUFReader) -> int:
    return sum(int(t.n_elements) for t in reader.tensors)
