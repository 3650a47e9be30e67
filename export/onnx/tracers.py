"""The packages that trace a model to a graph of ONNX's standard operators: transformers' own exporters (5.23), and
optimum-onnx for transformers 4.57. Inputs and outputs of both get the names that runtimes/onnx_kv.py reads."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from llmc.errors import UserError
from llmc.formats.checkpoint import Checkpoint
from llmc.formats.hf import quiet_transformers
from llmc.formats.onnx_folder import MODEL

TASK = "text-generation-with-past"
OTHERS = "export it with --exporter builder or as GGUF (--format gguf)"
PAST, NEW = 20, 6  # tokens in the traced cache and after it; the proof runs other numbers
_CACHE = re.compile(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s")


def check_packages(exporter: str) -> None:
    """Raise UserError unless the exporter's packages and a transformers that they support are installed."""
    version = metadata.version("transformers")
    if exporter == "transformers":
        if importlib.util.find_spec("transformers.exporters") is None:
            raise UserError(f"--exporter transformers needs transformers.exporters, which transformers {version} lacks",
                            "install transformers 5.23 or newer")
        if importlib.util.find_spec("onnxscript") is None:
            raise UserError("--exporter transformers needs onnxscript, which is not installed",
                            "pip install 'llmc-toolkit[trace]'")
        return
    hint = ("run pip install 'llmc-toolkit[optimum]' in a separate environment: it installs transformers 4.57, which "
            "optimum-onnx supports; with transformers 5 there is --exporter transformers")
    try:
        found = metadata.version("optimum-onnx")
    except metadata.PackageNotFoundError as e:
        raise UserError("--exporter optimum needs optimum-onnx, which is not installed", hint) from e
    if int(version.partition(".")[0]) > 4:
        raise UserError(f"optimum-onnx {found} does not support transformers {version}", hint)


def check_model(exporter: str, ckpt: Checkpoint) -> None:
    """Raise UserError for an architecture that the exporter says that it cannot trace."""
    if exporter == "transformers":  # it has no list: it traces what torch.export can
        return
    import optimum.exporters.onnx.model_configs  # noqa: F401 - registers the architectures
    from optimum.exporters.tasks import TasksManager

    model_type = str(ckpt.config.get("model_type"))
    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(model_type, "onnx", library_name="transformers")
    except KeyError:
        tasks = {}
    if TASK not in tasks:
        raise UserError(f"optimum-onnx {metadata.version('optimum-onnx')} does not support the architecture {model_type!r}",
                        OTHERS)


def trace(exporter: str, model: Any, folder: Path) -> None:
    """Write the graph of the model, with its weights, as model.onnx into a new `folder`."""
    folder.mkdir()
    model.set_attn_implementation("eager")  # computes every variant; sdpa ignores Gemma 2's soft cap
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with quiet_transformers(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # torch warns of every branch on a shape; the checks run other shapes
            (_with_transformers if exporter == "transformers" else _with_optimum)(model, folder)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as e:
        raise UserError(f"{exporter} cannot trace {type(model).__name__}: {' '.join(repr(e).split())[:300]}", OTHERS) from e
    finally:
        logging.disable(level)


def _with_optimum(model: Any, folder: Path) -> None:
    from optimum.exporters.onnx import export
    from optimum.exporters.tasks import TasksManager

    make = TasksManager.get_exporter_config_constructor("onnx", model=model, task=TASK, library_name="transformers")
    export(model, make(model.config, use_past_in_inputs=True), folder / MODEL)


def _with_transformers(model: Any, folder: Path) -> None:
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    ids = torch.arange(PAST + NEW)[None] % model.config.get_text_config().vocab_size
    cache = DynamicCache()  # of whole length in layers with a window too: other caches are no tensors alone
    with torch.no_grad():
        model(input_ids=ids[:, :PAST], past_key_values=cache, use_cache=True)
    sample = {"input_ids": ids[:, PAST:], "attention_mask": torch.ones_like(ids), "past_key_values": cache, "use_cache": True}
    made: ir.Model = OnnxExporter().export(model, sample, config=OnnxConfig(dynamic=True)).program
    _name_caches(made.graph)
    ir.save(made, folder / MODEL, external_data=f"{MODEL}.data")


def _name_caches(graph: ir.Graph) -> None:
    """Give caches their usual names. The sizes of the heads, which inputs have as names, are those of the outputs."""
    present = {}
    for value in graph.outputs:
        if found := _CACHE.fullmatch(str(value.name)):
            value.name = f"present.{found[2]}.{found[3]}"
            present[found[2], found[3]] = value.shape
    for value in graph.inputs:
        if (found := _CACHE.fullmatch(str(value.name))) and value.shape is not None:
            value.name = f"past_key_values.{found[2]}.{found[3]}"
            if (shape := present.get((found[2], found[3]))) is not None:
                value.shape = ir.Shape([value.shape[0], shape[1], value.shape[2], shape[3]])
