"""Rotary embeddings: both spellings of the parameters, every scaling variant against torch, and refusals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tiny import build

from llmc.errors import UserError
from llmc.export.gguf import GgufExportConfig, export_gguf, verify
from llmc.export.gguf.arithmetic import Kinds
from llmc.export.gguf.rope import add_rope, rope_parameters
from llmc.formats.checkpoint import Checkpoint
from llmc.runtimes.llamacpp import LlamaCpp

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [1.0, 1.5, 2, 2.5, 3, 3.5, 4, 5],
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]}
GEMMA3 = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
          "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
# family, config.json's values, largest relative error of the logits (gelu comes from a float16 table in llama.cpp)
VARIANTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}, 1e-4),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}, 1e-4),
    "yarn": ("qwen2", {"rope_parameters": YARN}, 1e-4),
    "yarn with an attention factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}, 1e-4),
    "yarn with mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}, 1e-4),
    "longrope, long": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}, 1e-4),
    "longrope, short": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256,
                                 "max_position_embeddings": 1024}, 1e-4),
    "partial": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                         "partial_rotary_factor": 0.5}, 1e-4),
    "global and local": ("gemma3_text", {"rope_parameters": GEMMA3}, 1e-3),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_gives_torchs_logits(name, tmp_path):
    family, values, bound = VARIANTS[name]
    folder = build(family, tmp_path / "m", **copy.deepcopy(values))  # transformers completes the dicts in place
    report = export_gguf(GgufExportConfig(model=folder, out=tmp_path / "m.gguf", float_type="f32", threads=1))
    assert report["logits"]["relative_error"] < bound


def test_the_check_sees_a_missing_scaling(tmp_path):
    plain = build("llama", tmp_path / "plain")
    scaled = build("llama", tmp_path / "scaled", rope_parameters=dict(YARN))
    export_gguf(GgufExportConfig(model=plain, out=tmp_path / "plain.gguf", float_type="f32", threads=1))
    runtime = LlamaCpp(tmp_path / "plain.gguf", context=128, threads=1, flash_attention=False, kv_type="f32")
    ids = np.arange(100) + 5
    held = verify.end_matrices(tmp_path / "plain.gguf")
    verify.logits(runtime, Checkpoint.open(plain), ids, 1e-3, held, Kinds())
    with pytest.raises(UserError, match="logits are not torch's"):
        verify.logits(runtime, Checkpoint.open(scaled), ids, 1e-3, held, Kinds())
    runtime.close()


def test_old_and_new_spelling_are_the_same():
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    a, b = rope_parameters(old), rope_parameters(new)
    assert (a.kind, a.theta, a.values["factor"]) == (b.kind, b.theta, b.values["factor"]) == ("linear", 5e5, 2.0)
    gemma = rope_parameters({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None})
    assert (gemma.kind, gemma.theta, gemma.local_theta) == ("default", 1e6, 1e4)
    assert rope_parameters({"rope_parameters": GEMMA3}).local_theta == 1e4


def written(arch: str, config: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    writer = GGUFWriter(None, arch)
    tensors = add_rope(writer, config, head_dim=16, context=256)
    writer.write_header_to_file(tmp_path / "x.gguf")
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with (tmp_path / "x.gguf").open("ab") as f:
        f.write(bytes(64))
    return {k: v.contents() for k, v in GGUFReader(tmp_path / "x.gguf").fields.items()}, tensors


def test_llama3_divisors_by_the_definition(tmp_path):
    _, tensors = written("llama", {"rope_parameters": LLAMA3}, tmp_path)
    for i, got in enumerate(tensors["rope_freqs.weight"]):
        wavelength = 2 * math.pi * 10000 ** (2 * i / 16)
        if wavelength < 64 / 4:
            expected = 1.0
        elif wavelength > 64 / 1:
            expected = 8.0
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            expected = 1 / ((1 - smooth) / 8 + smooth)
        assert got == pytest.approx(expected, rel=1e-6)
    assert len({round(float(x), 4) for x in tensors["rope_freqs.weight"]}) > 2  # some lie between


def test_longrope_metadata(tmp_path):
    keys, tensors = written("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}, tmp_path)
    assert keys["phi3.rope.scaling.type"] == "longrope"
    assert keys["phi3.rope.scaling.original_context_length"] == 64
    assert keys["phi3.rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))
    assert tensors["rope_factors_long.weight"].tolist() == LONG["long_factor"]


@pytest.mark.parametrize(("arch", "config", "message"), [
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "rope type 'spiral'"),
    ("qwen2", {"rope_parameters": LLAMA3}, "does not support the rope type 'llama3'"),
    ("llama", {"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast = 16"),
    ("llama", {"rope_parameters": {"rope_type": "default"}, "partial_rotary_factor": 0.5}, "only 8 of 16"),
    ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "mrope"),
    ("phi3", {"rope_parameters": {**LONG, "long_factor": [1.0]}}, "1 values for 8 frequencies"),
    ("gemma3", {"rope_parameters": {**GEMMA3, "sliding_attention": GEMMA3["full_attention"]}}, "sliding layers"),
])
def test_what_llama_cpp_has_no_place_for_is_refused(arch, config, message):
    with pytest.raises(UserError, match=message):
        add_rope(GGUFWriter(None, arch), config, head_dim=16, context=256)
