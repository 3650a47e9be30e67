"""Loads config, tokenizer and model of a Hugging Face folder with transformers. No code from the folder is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from llmc.errors import UserError
from llmc.files import read_json
from llmc.formats import contents, quantized
from llmc.formats.chat_template import in_one_form, of_processor, set_templates, template_in
from llmc.formats.checkpoint import TOKENIZER_FILES, Checkpoint
from llmc.formats.config_json import HINT, read_checked, read_tokenizer_config
from llmc.formats.ends import check_tied
from llmc.formats.mixture import is_transposed
from llmc.formats.names import Names, missing
from llmc.formats.tokenizer_json import HINT as TOKENIZER_HINT
from llmc.small_files import LARGE, check_file

# What transformers raises at a folder that it cannot read.
EDGE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError, ImportError,
        StrictDataclassError)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder. No code from the folder is run."""
    # checked here, because transformers reads them without limits
    read_tokenizer_config(folder)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        read_json(folder / name)
    template_in(folder)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            check_file(folder / name, LARGE, TOKENIZER_HINT)
    import transformers

    auto: Any = transformers.AutoTokenizer
    more: dict[str, Any] = {}
    if not hasattr(transformers, "TokenizersBackend"):  # transformers 4.57 does not know two values that 5 writes
        values = read_tokenizer_config(folder)
        if values.get("tokenizer_class") == "TokenizersBackend":
            auto = transformers.PreTrainedTokenizerFast
        if isinstance(extra := values.get("extra_special_tokens"), list):
            more = {"extra_special_tokens": {}, "additional_special_tokens": extra}
    try:
        with quiet_transformers():
            tokenizer = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **more)
    except Exception as e:
        if not isinstance(e, EDGE) and type(e) is not Exception:  # the package tokenizers raises Exception itself
            raise
        if (folder / "config.json").is_file():
            load_config(folder)  # transformers reads it for the tokenizer too: an error in it is told as such
        raise UserError(f"{folder} has no tokenizer that transformers can read: {(str(e).splitlines() or [repr(e)])[0]}",
                        TOKENIZER_HINT) from e
    if not tokenizer.chat_template and (template := in_one_form(of_processor(folder), folder)):
        set_templates(tokenizer, template)
    return tokenizer


def load_config(folder: Path) -> Any:
    """The transformers config of a folder, without `quantization_config`. No code from the folder is run."""
    from transformers import AutoConfig

    own_code = "AutoConfig" in (read_checked(folder / "config.json").get("auto_map") or {})
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except EDGE as e:
        if own_code:
            raise UserError(f"llmc cannot load {folder}: its architecture is code in the folder (auto_map), which is not run",
                            "llmc runs causal language models whose code is part of transformers") from e
        raise UserError(f"transformers cannot read {folder / 'config.json'}: {' '.join(str(e).split())[:300]}", HINT) from e
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if hasattr(config, "rope_theta") and not hasattr(type(config), "rope_parameters"):
        _translate_rope(config)
    if getattr(config, "attn_logit_softcapping", None):  # Gemma 2: 4.57 would use sdpa, which ignores the soft cap
        config._attn_implementation = "eager"
    return config


def _translate_rope(config: Any) -> None:
    """Copy `rope_parameters`, which transformers 4.57 ignores, into the attributes that it reads, in place."""
    kinds = getattr(config, "rope_parameters", None) or {}
    found, local = kinds.get("full_attention", kinds), kinds.get("sliding_attention", {})
    if any(isinstance(v, dict) for v in found.values()) or (local and not hasattr(config, "rope_local_base_freq")):
        raise UserError(f"config.json gives {config.model_type} rotary embeddings that this transformers does not know: "
                        f"{', '.join(kinds)}", "use a newer transformers")
    values = {k: v for k, v in found.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if found:
        config.rope_scaling = None if values.get("rope_type", "default") == "default" else values
    for key, names in (("rope_theta", ("rope_theta",)), ("partial_rotary_factor", ("partial_rotary_factor", "rotary_pct"))):
        for name in names:
            if key in found:
                setattr(config, name, found[key])
    if "rope_theta" in local:
        config.rope_local_base_freq = local["rope_theta"]


def auto_class(config: Any) -> Any:
    """transformers' Auto class that builds the model of a config with a language model's head: of a text model, or of a
    multimodal one. UserError for an encoder, for an encoder with a decoder, and for what transformers does not know."""
    import transformers
    from transformers.models.auto import modeling_auto

    kind = type(config)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{config.model_type} is an encoder with a decoder", ONLY_DECODERS)
    masked = _knows(modeling_auto, "MODEL_FOR_MASKED_LM_MAPPING", kind)
    if masked and not getattr(config, "is_decoder", False):
        raise UserError(f"{config.model_type} is an encoder: its tokens see the tokens after them", ONLY_DECODERS)
    for mapping, auto in AUTO_CLASSES.items():
        if _knows(modeling_auto, mapping, kind):
            return getattr(transformers, auto)
    raise UserError(f"transformers has no language model of the architecture {config.model_type!r}", ONLY_DECODERS)


ONLY_DECODERS = "llmc needs a causal language model that transformers knows without remote code"
AUTO_CLASSES = {"MODEL_FOR_CAUSAL_LM_MAPPING": "AutoModelForCausalLM",
                "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": "AutoModelForImageTextToText",
                "MODEL_FOR_MULTIMODAL_LM_MAPPING": "AutoModelForMultimodalLM"}


def _knows(modeling_auto: Any, mapping: str, kind: type) -> bool:
    return kind in getattr(modeling_auto, mapping, {})


def empty_model(config: Any, **options: Any) -> Any:
    """The model of a config without weights, on the meta device, in eval mode. Its buffers have their values.

    options: of transformers' `from_config`. UserError if transformers cannot build it.
    """
    from accelerate import init_empty_weights

    auto = auto_class(config)
    try:
        with init_empty_weights(include_buffers=False):
            return auto.from_config(config, dtype=torch.float32, trust_remote_code=False, **options).eval()
    except EDGE as e:
        raise UserError(f"transformers cannot build the architecture {config.model_type!r}: {' '.join(str(e).split())[:300]}",
                        ONLY_DECODERS) from e


def load_torch_model(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model (an nn.Module in eval mode) in `folder`, float or quantized.

    Quantized weights are dequantized exactly in float32, then cast to `dtype`. Safetensors only. No code from the folder is
    run. Raises UserError if the folder lacks a tensor of the architecture.
    """
    ckpt = Checkpoint.open(folder)
    kwargs: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    try:
        with quiet_transformers():
            config = load_config(folder)
            auto = auto_class(config)
            if not quantized.is_quantized(ckpt) and not ckpt.decoded.tensors:
                model, info = auto.from_pretrained(folder, config=config, use_safetensors=True, local_files_only=True,
                                                   trust_remote_code=False, **kwargs)
            else:
                with torch.device("meta"):
                    skeleton = auto.from_config(config)
                weights = _dequantized(ckpt, skeleton, dtype)
                model, info = type(skeleton).from_pretrained(None, config=skeleton.config, state_dict=weights, **kwargs)
    except (ValueError, KeyError, OSError, SafetensorError) as e:
        raise UserError(f"transformers cannot load {folder}: {str(e).splitlines()[0]}",
                        "llmc runs causal language models whose code is part of transformers") from e
    if lacking := sorted(info["missing_keys"]):
        raise missing(folder, *lacking)
    contents.check_unread(ckpt, sorted(info["unexpected_keys"]), "are not read")
    check_tied(ckpt, model, Names.of(ckpt, model, quantized.linears(ckpt)))
    return model.eval().to(device)


def _dequantized(ckpt: Checkpoint, skeleton: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint of codes as a float model would have it.

    transformers stores the weights of GPT-2's Conv1D modules as [in, out]; quantized weights are always [out, in].
    """
    from transformers.pytorch_utils import Conv1D

    linears = quantized.linears(ckpt)
    names = Names.of(ckpt, skeleton, linears)
    modules = dict(skeleton.named_modules())
    packed = {name for linear in linears for name in quantized.parts(linear)}
    weights = {name: ckpt.tensor(name).to(dtype) for name in ckpt.names() if name not in packed}
    stacks: dict[str, torch.Tensor] = {}
    for linear in linears:
        w = quantized.dequantized(ckpt, linear)
        if (place := names.stack_of(linear)) is not None:
            parameter, number = place
            owner: Any = modules[parameter.rpartition(".")[0]]
            empty = owner.get_parameter(parameter.rpartition(".")[2])
            stack = stacks.setdefault(parameter, torch.empty(empty.shape, dtype=dtype, device="cpu"))
            stack[number] = w.t() if is_transposed(owner) else w
            continue
        module = modules.get(names.find_own(linear) or "")
        if isinstance(module, Conv1D):
            w = w.t().contiguous()
        expected = getattr(module, "weight", w)  # transformers may stack or rename weights while loading
        if expected.shape != w.shape:
            raise UserError(f"{linear} of {ckpt.folder} has shape {list(w.shape)}, config.json says "
                            f"{list(expected.shape)}", "the checkpoint and its config.json do not belong together")
        weights[f"{linear}.weight"] = w.to(dtype)
    return weights | stacks


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside the block transformers shows errors, but no progress bars and no load report."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
