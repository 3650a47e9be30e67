"""Folders of block types: how inspect and verify read them, and damaged ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ggml import blocks_folder
from gguf_files import export, logits
from tiny import change_tensors, edit_config

import llmc
from llmc.errors import UserError
from llmc.files import write_json
from llmc.formats import quantized
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.manifest import hash_folder, manifest_path, new_manifest
from llmc.formats.quantized import linears, parts


def sign(folder: Path) -> None:
    """Give a folder the manifest that `llmc quantize` would write."""
    source = {"name": "base", "licence": "mit", "base_model": None, "revision": None, "files": {}}
    write_json(manifest_path(folder), new_manifest("blocks", source, [], outputs=hash_folder(folder)))


def test_inspect_and_verify(wide_base, tmp_path):
    blocks_folder(wide_base("llama"), tmp_path / "q", "q4_k", "iq4_nl")
    sign(tmp_path / "q")
    report = llmc.inspect(tmp_path / "q")
    assert report["format"] == "Hugging Face folder, llmc-blocks"
    assert report["type"] == "iq4_nl + q4_k"
    w = report["weights"]
    assert w["decoder_bits_per_weight"] == 4.5
    assert w["parameters"] == llmc.inspect(wide_base("llama"))["weights"]["parameters"]
    assert w["classes"]["mlp"]["types"] == w["classes"]["attention"]["types"] == ["IQ4_NL", "Q4_K"]
    assert w["classes"]["mlp"]["bytes"] == w["types"]["Q4_K"] + w["types"]["IQ4_NL"] - w["classes"]["attention"]["bytes"]
    assert llmc.verify(tmp_path / "q")["problems"] == []


def test_it_is_not_quantized_again(wide_base, tmp_path):
    blocks_folder(wide_base("llama"), tmp_path / "q", "q4_k")
    with pytest.raises(UserError, match=r"is quantized already \(llmc-blocks\)"):
        llmc.quantize(tmp_path / "q", method="rtn", out=tmp_path / "again")


def test_float_and_gptq_folders_read_as_before(made):
    assert linears(Checkpoint.open(made.base)) == []
    ckpt = Checkpoint.open(made.gptq)
    linear = linears(ckpt)[0]
    assert quantized.is_quantized(ckpt)
    assert quantized.type_name(ckpt, linear) == "int4-sym-g32"
    assert quantized.shape(ckpt, linear) == quantized.read(ckpt, linear).shape
    assert {n for n in ckpt.names() if n.startswith(f"{linear}.")} <= set(parts(linear))


Q = "model.layers.0.self_attn.q_proj"


def edit_quantization(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config=config | values)


def edit_types(folder: Path, **values: str | int | None) -> None:
    types = json.loads((folder / "config.json").read_text())["quantization_config"]["types"] | values
    edit_quantization(folder, types={k: v for k, v in types.items() if v is not None})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.blocks"][5, :2] = torch.tensor([0x00, 0x7C])  # the first block's d


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown type": (lambda f: edit_types(f, **{Q: "q7_k"}), f"gives {Q} the type 'q7_k'"),
    "another type's bytes": (lambda f: edit_types(f, **{Q: "q6_k"}), rf"{Q}\.blocks of .* is U8 \[256, 144\]"),
    "cut rows": (lambda f: change_tensors(f, lambda t: t.update({f"{Q}.blocks": t[f"{Q}.blocks"][:, :-1].contiguous()})),
                 rf"{Q}\.blocks of .* is U8 \[256, 143\]"),
    "other numbers": (lambda f: change_tensors(f, lambda t: t.update({f"{Q}.blocks": t[f"{Q}.blocks"].to(torch.int32)})),
                      rf"{Q}\.blocks of .* is I32"),
    "half a file": (truncate, "the download is incomplete"),
    "no tensor": (lambda f: change_tensors(f, lambda t: t.pop(f"{Q}.blocks")),
                  rf"1 linears that have no tensor, first {Q}\.blocks"),
    "no type": (lambda f: edit_types(f, **{Q: None}), rf"names no type for {Q}\.blocks"),
    "no types": (lambda f: edit_quantization(f, types=None), "no table `types`"),
    "a number": (lambda f: edit_types(f, **{Q: 4}), f"gives {Q} the type 4"),
    "a later version": (lambda f: edit_quantization(f, version=2), "version 2; this llmc reads 'llmc-blocks', version"),
    "infinite factors": (lambda f: change_tensors(f, infinite), rf"{Q}\.blocks of .* NaN or infinite"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_error(what, wide_base, tmp_path):
    damage, message = DAMAGE[what]
    folder = tmp_path / "q"
    blocks_folder(wide_base("llama"), folder, "q4_k")
    damage(folder)
    sign(folder)
    for use in (export, logits):
        with pytest.raises(UserError, match=message):
            use(folder)
    (problem,) = llmc.verify(folder)["problems"]
    assert re.search(message, problem)
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize(("change", "shape"), [(lambda b: b[:128].contiguous(), r"\[128, 256\]"),
                                               (lambda b: torch.cat([b, b], dim=1), r"\[256, 512\]")])
def test_blocks_of_another_shape_than_the_models(change, shape, wide_base, tmp_path):
    blocks_folder(wide_base("llama"), tmp_path / "q", "q4_k")
    change_tensors(tmp_path / "q", lambda t: t.update({f"{Q}.blocks": change(t[f"{Q}.blocks"])}))
    with pytest.raises(UserError, match=rf"{Q} of .* has shape {shape}, config\.json says \[256, 256\]"):
        logits(tmp_path / "q")
    with pytest.raises(UserError, match=r"attn_q\.weight"):  # llama.cpp refuses the file
        export(tmp_path / "q")
    assert not list(tmp_path.glob("*.gguf"))


def test_a_missing_part_of_a_gptq_linear_is_named(made, tmp_path):
    folder = Path(shutil.copytree(made.gptq, tmp_path / "q"))
    change_tensors(folder, lambda t: t.pop(f"{Q}.scales"))
    for use in (export, logits):
        with pytest.raises(UserError, match=rf"{Q}\.scales is missing"):
            use(folder)
