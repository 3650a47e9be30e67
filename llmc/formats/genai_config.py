"""genai_config.json of onnxruntime-genai: what llmc reads of it, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmc.formats.config_json import ID, LAYERS
from llmc.small_files import OBJECT, TEXT, Kind, expect, read_json_object

AGAIN = "copy the whole folder again, or export it again"
# The type to which the inputs of a quantized matrix are rounded before the product: 0 none, 4 int8 in blocks. It is an
# attribute of MatMulNBits. For DequantizeLinear and MatMul, which ONNX Runtime fuses, it is a session option, by default 4
LEVEL, QDQ_LEVEL, QDQ_DEFAULT = "accuracy_level", "session.qdq_matmulnbits_accuracy_level", 4
SIZE = Kind("a whole number from 1 to 100 million", (int,), 1, 100_000_000)
# {objects, one in the other: the keys that llmc reads there}
PARTS: dict[tuple[str, ...], dict[str, Kind]] = {
    (): {"model": OBJECT},
    ("model",): {"decoder": OBJECT, "type": TEXT, "eos_token_id": ID, "vocab_size": SIZE, "context_length": SIZE},
    ("model", "decoder"): {
        "filename": TEXT, "session_options": OBJECT, "sliding_window": OBJECT, "num_hidden_layers": LAYERS,
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_size", "hidden_size"), SIZE)},
    ("model", "decoder", "session_options"): {
        QDQ_LEVEL: Kind("a level from 0 to 4", (str, int), 0, 4, within=tuple("01234"))},
    ("model", "decoder", "sliding_window"): {"cache_slack": Kind("a whole number from 0", (int,), 0, 1 << 31)},
}


def read_genai(path: Path) -> dict[str, Any]:
    """The object in a genai_config.json, the keys of PARTS checked. An object of PARTS that is null is left out."""
    config = read_json_object(path, hint=AGAIN)
    for way, kinds in PARTS.items():
        part = config
        for key in way:
            part = part.get(key, {})
        expect(path, part, kinds, AGAIN)
        for key in [k for k, kind in kinds.items() if kind is OBJECT and k in part and part[k] is None]:
            del part[key]
    return config
