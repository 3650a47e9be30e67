"""onnxruntime-genai's model builder (onnxruntime_genai/models, 0.18): the architectures that it knows, and what it makes.

The function `create_model` of its builder.py chooses a class for a config. llmc runs that function, with its own subclasses
(graph.py) in the place of the builder's classes. So llmc has no list of architectures: the builder's text is the list.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from llmc.errors import UserError
from llmc.families import nearest, of_config
from llmc.runtimes.onnx_session import genai_library

TEXT = "ForCausalLM"
# The text part of Mistral 3 may be Ministral 3, which transformers' config of Mistral 3 does not say: its default is Mistral
WRAPPERS = {"ministral3": "Mistral3ForConditionalGeneration"}
# The builder takes every Gemma 4 for a mixture of experts, but has a class for the dense ones too
DENSE_GEMMA4 = "Gemma4UnifiedForConditionalGeneration"
OTHERWISE = "export it as GGUF (--format gguf), or evaluate the folder itself"


@cache
def known() -> list[str]:
    """The architectures that the builder's text compares with config.json's. Importing nothing, it is fast."""
    spec = importlib.util.find_spec("onnxruntime_genai")
    if spec is None or spec.origin is None:
        return []
    text = (Path(spec.origin).parent / "models" / "builder.py").read_text(encoding="utf-8")
    compared = (n for n in ast.walk(ast.parse(text))
                if isinstance(n, ast.Compare) and ast.unparse(n.left) == "config.architectures[0]")
    return sorted({str(c.value) for n in compared for c in n.comparators if isinstance(c, ast.Constant)})


def name_of(config: dict[str, Any]) -> str:
    """The builder's name for the architecture of a config.json: its own, or that of the multimodal model that has it as its
    text part. Raises UserError if the builder knows neither."""
    of_config(config)  # refuses a base class without a head
    names, text = config.get("architectures") or [], config.get("text_config") or config
    model_type = str(text.get("model_type"))
    name = str(names[0]) if names else _causal(model_type)
    if name in known() and (name.endswith(TEXT) or _text_type(name)):
        found: str | None = name
    else:
        found = next((n for n in known() if name.endswith(TEXT) and _text_type(n) == model_type), WRAPPERS.get(model_type))
    if model_type == "gemma4_text" and not text.get("enable_moe_block"):
        found = DENSE_GEMMA4
    if found not in known():
        texts = [n for n in known() if n.endswith(TEXT)]
        raise UserError(f"llmc does not write {name or f'model_type {model_type}'} as ONNX, because onnxruntime-genai's "
                        f"model builder does not know it; it knows {', '.join(texts)}{nearest(name, texts)}", OTHERWISE)
    return str(found)


def _causal(model_type: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, ""))


@cache
def _text_type(wrapper: str) -> str | None:
    """The model_type of the text part of a multimodal class in transformers; None if it has none."""
    import transformers

    cls = None if wrapper.endswith(TEXT) else getattr(transformers, wrapper, None)
    return None if cls is None else getattr(getattr(cls.config_class(), "text_config", None), "model_type", None)


def make(name: str, hf: Any, subclass: Callable[[type], type], work: Path) -> Any:
    """Run the builder for the architecture `name`; return the object that it made, and write genai_config.json into `work`.

    hf: a text config, which the builder changes.  subclass: makes the class that takes the place of one of the builder's.
    Errors of the builder for a model that it cannot build become UserError.
    """
    module, made = _module(), list[Any]()

    def replaced(cls: type) -> type:
        decoder = getattr(cls, "get_decoder_model_class", None)  # Qwen 3.5's class is a pair of decoder and draft model
        return subclass(cls if decoder is None else decoder(None))

    def recorded(cls: type) -> Callable[..., Any]:
        def construct(*args: Any) -> Any:
            made.append(replaced(cls)(*args))
            return made[-1]
        return construct

    create = inspect.unwrap(module.create_model)
    classes = {n: recorded(v) for n, v in vars(module).items() if isinstance(v, type) and hasattr(v, "make_model")}
    run = types.FunctionType(create.__code__, {**vars(module), **classes})
    hf.architectures = [name]
    details = {"extra_kwargs": {}, "hf_name": str(hf.name_or_path), "hf_config": hf}
    # every layer's cache is as long as the context, so any runtime can feed it; windowed layers still attend to their window
    options = {"hf_token": False, "hf_remote": False, "shared_embeddings": False, "windowed_kv_cache": False}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run("", str(hf.name_or_path), str(work), "fp32", "cpu", str(work), hf_details=details, **options)
    except (NotImplementedError, AttributeError, KeyError, ValueError, TypeError, AssertionError) as e:
        why = e if isinstance(e, NotImplementedError) else repr(e)
        raise UserError(f"onnxruntime-genai's model builder cannot build {name} from {hf.name_or_path}: {why}",
                        "export it as GGUF (--format gguf), or please report this with the model's name") from e
    return made[0]


def _module() -> Any:
    """Import the builder. Its modules add their folder to sys.path to import each other; this restores sys.path."""
    before = list(sys.path)
    try:
        genai_library()
        from onnxruntime_genai.models import builder

        return builder
    except ImportError as e:  # 0.18 imports classes that transformers 4.57 lacks
        raise UserError(f"onnxruntime-genai's model builder does not load: {e}",
                        "it needs transformers 5: use an environment without the extra 'optimum'") from e
    finally:
        sys.path[:] = before
