"""A Hugging Face folder, float or quantized, which torch runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llmc.errors import UserError
from llmc.formats.artifact import Artifact, collected
from llmc.small_files import read_json_object

if TYPE_CHECKING:
    from llmc.formats.checkpoint import Checkpoint
    from llmc.formats.kv import KvShape
    from llmc.formats.tensors import Tensor


class FolderArtifact(Artifact):
    format, label, plural = "hf", "a model folder", "model folders"
    packages: ClassVar = {}  # torch and transformers are not expected on a device
    kv_default = None
    exported, can_start = False, True

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether the path is a folder. Missing files are reported when it is read."""
        return path.is_dir()

    @property
    def tokenizer_folder(self) -> Path:
        return self.path

    def weight_files(self) -> list[Path]:
        return self._open().files

    def deciding_files(self) -> list[Path]:
        from llmc.formats.checkpoint import read_config

        read_config(self.path)  # a folder without it is told as such
        return [self.path / "config.json", *self.weight_files()]

    def source_files(self) -> list[Path]:
        from llmc.formats.checkpoint import model_files

        return model_files(self.path)

    def starts_quantized(self) -> bool:
        return bool(self._open().quantization)

    def tensors(self) -> list[Tensor]:
        return list(self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        from dataclasses import replace

        from llmc.formats.experts import share_of_config, used_of

        ckpt = self._open()
        used = share_of_config(self._config(ckpt.config))
        return (replace(t, used=used_of(t.name, used)) for t in self._stored(ckpt))

    @staticmethod
    def _stored(ckpt: Checkpoint) -> Iterator[Tensor]:
        from llmc.families.names import classify
        from llmc.formats.packed import layout_of
        from llmc.formats.tensors import Tensor

        layout = layout_of(ckpt.quantization)
        for name in ckpt.names():
            linear, _, part = name.rpartition(".")
            if layout.codes is None or f"{linear}.{layout.parts[0]}" not in ckpt or part not in layout.parts:
                yield Tensor(name, classify(name), ckpt.dtype(name), prod(ckpt.shape(name)), ckpt.nbytes(name),
                             axes=sum(n > 1 for n in ckpt.shape(name)))
            elif part == layout.parts[0]:
                from llmc.formats.quantized import shape, type_of
                from llmc.formats.types import BlockType

                qtype, packed = type_of(ckpt, linear), [f"{linear}.{p}" for p in layout.parts]
                kind = qtype.gguf_type if isinstance(qtype, BlockType) else f"{layout.name.partition(',')[0]} int{qtype.bits}"
                yield Tensor(f"{linear}.weight", classify(linear), kind, prod(shape(ckpt, linear)),
                             sum(ckpt.nbytes(p) for p in packed if p in ckpt), axes=2)

    def shape(self) -> dict[str, int]:
        config = self._config(self._open().config)
        def number(*keys: str) -> int:
            """The first that is given; of a list with an entry for each layer its length."""
            value = next((config[key] for key in keys if config.get(key)), 0)
            return len(value) if isinstance(value, list) else int(value)

        found = {"layers": number("num_hidden_layers", "n_layer", "n_layers", "layers_block_type", "layer_types"),
                 "heads": number("num_attention_heads", "n_head", "n_heads"), "vocabulary": number("vocab_size")}
        if lacking := [name for name in ("layers", "vocabulary") if not found[name]]:  # Mamba has no heads
            raise UserError(f"config.json of {self.path} (model_type {config.get('model_type')}) has no number for "
                            f"{' and '.join(lacking)}", "llmc needs a decoder-only language model")
        return found

    def kv_shape(self) -> KvShape | None:
        from llmc.formats.checkpoint import read_config
        from llmc.formats.kv import shape_of_config

        return shape_of_config(self._config(read_config(self.path)))

    def facts(self) -> dict[str, Any]:
        from llmc.formats.source import front_matter
        from llmc.formats.tokenizer_facts import of_folder

        ckpt = self._open()
        config = self._config(ckpt.config)
        method = (ckpt.quantization or {}).get("quant_method")
        return {
            "format": f"Hugging Face folder, {method or 'float'}",
            "architecture": (ckpt.config.get("architectures") or [config.get("model_type")])[0],
            "model": {
                "layers": config.get("num_hidden_layers") or config.get("n_layer"),
                "hidden": config.get("hidden_size") or config.get("n_embd"),
                "heads": config.get("num_attention_heads") or config.get("n_head"),
                "kv_heads": config.get("num_key_value_heads"),
                "context": config.get("max_position_embeddings") or config.get("n_positions"),
            },
            "type": _types(ckpt),
            "tokenizer": of_folder(self.path, config.get("vocab_size")),
            "licence": front_matter(self.path / "README.md").get("license"),
        }

    def problems(self) -> Iterator[str]:
        """Tensors that are unreadable or not finite, and quantization labels that contradict each other or the codes."""
        from llmc.formats import contents

        ckpt = self._open()
        problems: list[str] = []
        collected(problems, partial(contents.check, ckpt))
        packed: set[str] = set()
        if ckpt.quantization is not None:
            from llmc.formats import quantized

            method = ckpt.quantization.get("quant_method")
            linears = quantized.linears(ckpt)
            packed = {name for linear in linears for name in quantized.parts(linear)}
            if method == "gptq":
                yield from _quantize_config_problems(ckpt.quantization, self.path / "quantize_config.json")
            if not linears:
                yield f"config.json says {method}, but there is no quantized linear"
            for linear in linears:
                collected(problems, partial(quantized.dequantized, ckpt, linear))
        for name in sorted(set(ckpt.names()) - packed):
            collected(problems, partial(ckpt.tensor, name))
        yield from problems

    def _open(self) -> Checkpoint:
        from llmc.formats.checkpoint import Checkpoint

        return Checkpoint.open(self.path, look=True)

    @staticmethod
    def _config(config: dict[str, Any]) -> dict[str, Any]:
        """The config merged with its `text_config`, where multimodal models have the language model's values."""
        return config | config.get("text_config", {})


def _types(ckpt: Checkpoint) -> str | None:
    """The types of the quantized linears, 'int4-sym-g32 + int8-sym-g32'; None without codes that llmc can read."""
    from llmc.formats import quantized

    if ckpt.quantization is None or quantized.form_of(ckpt) is None:
        return None
    return " + ".join(sorted({quantized.type_name(ckpt, linear) for linear in quantized.linears(ckpt)})) or None


def _quantize_config_problems(config: dict[str, Any], copy: Path) -> Iterator[str]:
    """Differences between config.json, which transformers reads, and its copy, which GPTQ tools read."""
    if not copy.is_file():
        yield f"{copy.name} is missing"
        return
    try:
        other = read_json_object(copy)
    except UserError as e:
        yield e.problem
        return
    for key in sorted(config.keys() | other.keys()):
        if config.get(key) != other.get(key):
            yield f"{copy.name} says {key} = {other.get(key)!r}, config.json says {config.get(key)!r}"
