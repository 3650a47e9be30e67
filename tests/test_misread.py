"""Folders whose files say something else than their tensors: each is read as transformers reads it, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_config, edit_tensors
from transformers import AutoModelForCausalLM

import llmc
from llmc.compress.skeleton import Skeleton
from llmc.errors import UserError
from llmc.export.gguf.architectures import find_architecture as gguf_architecture
from llmc.export.onnx.builder import name_of as onnx_architecture
from llmc.formats import contents, quantized
from llmc.formats.checkpoint import INDEX, SINGLE, Checkpoint, model_files
from llmc.formats.hf import load_torch_model
from llmc.formats.shards import rest_of
from llmc.formats.source import model_name

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def model(made: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.base, tmp_path / "model"))


def split(folder: Path, *parts: dict[str, torch.Tensor], index: dict[str, int] | None = None) -> None:
    """Write shards and their index. index: {tensor: number of the shard}, where it is not the last that has the tensor."""
    where = {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        save_file({k: v.contiguous() for k, v in part.items()}, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(part, name)
    where |= {k: f"model-{i:05d}-of-{len(parts):05d}.safetensors" for k, i in (index or {}).items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


# ------------------------------------------------------------------------------------------------- which files


def test_the_single_file_counts_before_the_index_as_in_transformers(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = load_file(model / SINGLE)
    split(model, {k: v + 1 for k, v in new.items()})
    ckpt = Checkpoint.open(model)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).state_dict()[UP]
    assert torch.equal(ckpt.tensor(UP), new[UP])
    assert torch.equal(ckpt.tensor(UP), theirs)
    assert [f.name for f in ckpt.files] == [SINGLE]
    assert (model / INDEX) not in model_files(model)
    said = capsys.readouterr().err
    assert f"the weights are those of {SINGLE}" in said
    assert f"2 other files are not read: {INDEX}, model-00001-of-00001.safetensors" in said


def test_a_tensor_in_two_shards(model: Path) -> None:
    tensors = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    names = sorted(tensors)
    one, two = ({k: tensors[k] for k in part} for part in (names[:9], names[9:]))
    name = names[0]
    split(model, one, {**two, name: tensors[name]}, index={name: 1})
    ckpt = Checkpoint.open(model)
    assert ckpt.shard_of[name].name == "model-00001-of-00002.safetensors"
    assert sorted(p.name for p in rest_of(ckpt, ())) == names  # once
    split(model, one, {**two, name: tensors[name] * 2}, index={name: 1})
    with pytest.raises(UserError, match="with other values") as e:
        Checkpoint.open(model)
    assert name in e.value.problem


# -------------------------------------------------------------------------------------------- what the tensors are


def to_fp8(t: dict[str, torch.Tensor]) -> None:
    for k in [k for k in t if "proj" in k]:
        scale = t[k].float().abs().max() / 448
        t[k], t[k.replace("weight", "weight_scale")] = (t[k].float() / scale).to(torch.float8_e4m3fn), scale.reshape(())


def to_int8(t: dict[str, torch.Tensor]) -> None:
    for k in [k for k in t if "proj" in k]:
        scale = t[k].float().abs().amax(1)
        t[k], t[k.replace("weight", "SCB")] = (t[k].float() / scale[:, None] * 127).round().to(torch.int8), scale


@pytest.mark.parametrize(("change", "named"), [(to_fp8, "F8_E4M3"), (to_int8, "I8")])
def test_codes_without_a_config_are_no_weights(model: Path, change: object, named: str) -> None:
    tiny.change_tensors(model, change)  # type: ignore[arg-type]
    for read in (Checkpoint.open, load_torch_model, lambda m: llmc.quantize(m, method="rtn")):
        with pytest.raises(UserError, match="codes are not weights") as e:
            read(model)
        assert named in e.value.problem
    assert llmc.inspect(model)["weights"]["types"][named] > 0  # but they can be looked at


def test_hf_quant_config_says_what_the_codes_are(model: Path) -> None:
    tiny.change_tensors(model, to_fp8)
    (model / "hf_quant_config.json").write_text('{"producer": {}, "quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(UserError, match=r"quantized already \(modelopt\)"):
        llmc.quantize(model, method="rtn")
    with pytest.raises(UserError, match=r"quantized as 'modelopt' \(NVFP4"):
        load_torch_model(model)


@pytest.mark.parametrize("left", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {}])
def test_a_leftover_config_over_float_tensors(model: Path, left: dict[str, object],
                                              capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(model, quantization_config=left)
    ckpt = Checkpoint.open(model)
    assert ckpt.quantization is None
    assert "quantization_config" not in ckpt.config  # and so not in what is made of it
    assert ("it is read as a float model" in capsys.readouterr().err) == bool(left)
    assert torch.equal(load_torch_model(model).get_submodule(UP.removesuffix(".weight")).weight, ckpt.tensor(UP).float())


def test_quantize_config_alone(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.gptq, tmp_path / "old"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    linear = UP.removesuffix(".weight")
    assert torch.equal(load_torch_model(folder).get_submodule(linear).weight,
                       load_torch_model(made.gptq).get_submodule(linear).weight)
    assert llmc.inspect(folder)["type"] == "int4-sym-g32"
    with pytest.raises(UserError, match=r"quantized already \(gptq\)"):
        llmc.quantize(folder, method="rtn")
    (folder / "quantize_config.json").unlink()
    with pytest.raises(UserError, match="codes are not weights"):
        load_torch_model(folder)
    assert llmc.inspect(folder)["weights"]["types"]["I32"] > 0


def test_codes_of_another_form_than_the_config_says(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.gptq, tmp_path / "mixed"))
    with edit_tensors(folder) as tensors:
        tensors["model.layers.0.mlp.extra"] = torch.zeros(4, 4, dtype=torch.int8)
    with pytest.raises(UserError, match=r"says gptq, and it holds 1 tensors .*mlp\.extra"):
        Checkpoint.open(folder)
    assert any("mlp.extra" in problem for problem in llmc.verify(folder)["problems"])


def test_columns_in_another_order(made: SimpleNamespace, tmp_path: Path) -> None:
    """Act-order is dequantized by g_idx; only what needs the order of the columns refuses it."""
    folder = Path(shutil.copytree(made.gptq, tmp_path / "act"))
    linear = UP.removesuffix(".weight")
    order = torch.arange(64).flip(0)
    expected = quantized.dequantized(Checkpoint.open(folder), linear)
    with edit_tensors(folder) as tensors:
        scales = tensors[f"{linear}.scales"].clone()
        tensors[f"{linear}.g_idx"] = (order // 32).to(torch.int32)  # group 1 first
        tensors[f"{linear}.scales"] = scales.flip(0).contiguous()  # [groups, out]: so each column keeps its scale
    with pytest.raises(UserError, match="permuted g_idx, and its config says"):
        load_torch_model(folder)
    edit_config(folder, quantization_config={**(Checkpoint.open(folder).quantization or {}), "desc_act": True})
    ckpt = Checkpoint.open(folder)
    assert torch.equal(quantized.dequantized(ckpt, linear), expected)
    assert torch.equal(load_torch_model(folder).get_submodule(linear).weight, expected)
    with pytest.raises(UserError, match="permuted g_idx"):
        llmc.export(folder, format="gguf", out=tmp_path / "x.gguf")
    assert llmc.inspect(folder)["type"] == "int4-sym-g32"


# ------------------------------------------------------------------------------------------ tensors that nothing reads


def test_buffers_are_ignored_and_the_rest_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with edit_tensors(model) as tensors:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.layers.0.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["model.layers.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    Skeleton(Checkpoint.open(model), "cpu")
    assert "not part of its architecture" not in capsys.readouterr().err
    with edit_tensors(model) as tensors:
        tensors["mtp.layers.0.weight"] = torch.ones(4, 4)
    Skeleton(Checkpoint.open(model), "cpu")
    assert "1 tensors (64 bytes) are not part of its architecture and are left as they are: mtp" in capsys.readouterr().err
    load_torch_model(model)
    assert "are not read: mtp.layers.0.weight" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["scale", "scales", "zero_point", "lora_A.weight"])
def test_scales_that_nothing_reads_refuse_the_folder(model: Path, part: str) -> None:
    with edit_tensors(model) as tensors:
        tensors[f"{UP.removesuffix('weight')}{part}"] = torch.ones(128)
    for read in (lambda m: Skeleton(Checkpoint.open(m), "cpu"), load_torch_model):
        with pytest.raises(UserError, match="does not read") as e:
            read(model)
        assert part in e.value.problem


def test_a_real_bias_of_an_attention_is_no_buffer() -> None:
    assert contents.is_buffer("h.0.attn.bias", (1, 1, 8, 8))
    assert not contents.is_buffer("h.0.attn.bias", (8,))


# ------------------------------------------------------------------------------------------------ heads


def test_a_tied_head_in_another_type_is_one_matrix(model: Path) -> None:
    with edit_tensors(model) as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()
    skeleton = Skeleton(Checkpoint.open(model), "cpu")
    assert skeleton.ends.one
    assert skeleton.ends.says_tied
    load_torch_model(model)


@pytest.mark.parametrize(("tied", "complaint"), [(True, "differs"), (False, "there is none")])
def test_a_head_that_contradicts_the_config_is_refused_by_every_command(
        model: Path, text: Path, tied: bool, complaint: str) -> None:
    if tied:
        with edit_tensors(model) as tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    else:
        edit_config(model, tie_word_embeddings=False)
    commands = [
        lambda: llmc.quantize(model, method="rtn"),
        lambda: llmc.prune(model, method="magnitude", calibration=str(text)),
        lambda: llmc.transform(model, rotate="r2"),
        lambda: llmc.imatrix(model, calibration=str(text)),
        lambda: llmc.distill(model, teacher=str(model), calibration=(str(text),)),
        lambda: llmc.export(model, format="gguf"),
        lambda: llmc.export(model, format="onnx"),
    ]
    for command in commands:
        with pytest.raises(UserError, match=complaint):
            command()
    with pytest.raises(UserError, match=complaint if tied else "has no tensor lm_head"):
        load_torch_model(model)


# --------------------------------------------------------------------------------------------- other layouts


def test_adapters(model: Path, tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match="a LORA adapter of org/base beside its model") as e:
        Checkpoint.open(model)
    assert "merge" in e.value.hint
    alone = tmp_path / "lora"
    alone.mkdir()
    (alone / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match="is a LORA adapter of org/base, not a model"):
        Checkpoint.open(alone)


@pytest.mark.parametrize(("file", "complaint"), [
    ("snapshots/abc/config.json", "hub's cache"), ("model_index.json", "diffusers"), ("params.json", "another format"),
    ("a.gguf", r"\.gguf"), ("model.onnx", "transformers.js"), ("sub/config.json", "folders in it"), ("x.txt", "no config"),
])
def test_folders_without_a_config(tmp_path: Path, file: str, complaint: str) -> None:
    (tmp_path / "f" / file).parent.mkdir(parents=True)
    (tmp_path / "f" / file).write_text("{}")
    with pytest.raises(UserError, match=complaint):
        Checkpoint.open(tmp_path / "f")


@pytest.mark.parametrize(("file", "complaint"), [
    ("onnx/model_q4.onnx", "transformers.js"), ("model-00001-of-00002.safetensors", "parts of a model"),
    ("consolidated.safetensors", "but consolidated"), ("tf_model.h5", "another library"), ("a.gguf", r"but \.gguf files"),
])
def test_folders_without_weights(made: SimpleNamespace, tmp_path: Path, file: str, complaint: str) -> None:
    (tmp_path / "f" / file).parent.mkdir(parents=True)
    (tmp_path / "f" / file).write_text("x")
    shutil.copy(made.base / "config.json", tmp_path / "f")
    with pytest.raises(UserError, match=complaint):
        Checkpoint.open(tmp_path / "f")


def test_eval_and_bench_of_a_folder_without_config(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in (lambda: llmc.evaluate(tmp_path / "empty", base=made.base), lambda: llmc.bench(tmp_path / "empty")):
        with pytest.raises(UserError, match=r"no config\.json"):
            command()


def test_results_of_a_snapshot_are_named_after_the_model(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--small" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "small"
    assert model_name(tmp_path) == tmp_path.name


def test_architectures_that_are_missing_or_of_a_base_class(made: SimpleNamespace) -> None:
    config = {"model_type": "llama"}
    for find in (gguf_architecture, onnx_architecture):
        assert find(config) == find({**config, "architectures": ["LlamaForCausalLM"]})
        with pytest.raises(UserError, match="LlamaModel, which is a base class") as e:
            find({**config, "architectures": ["LlamaModel"]})
        assert "LlamaForCausalLM" in e.value.hint
