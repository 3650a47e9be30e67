"""Reports as eval and bench write them, with made-up figures that behave like real ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from llmc.evals.compare.config import CompareConfig
from llmc.evals.quality import metrics
from llmc.evals.report import store as report
from llmc.families.names import CLASSES

CHUNKS, SCORED = 12, 31
FACTS = {"system": "Linux 6 x86_64", "machine": "x86_64", "cpu": "A CPU", "physical_cores": 2, "logical_cores": 4,
         "usable_cores": 2, "cpu_features": ["avx2"], "memory": 8 * 10**9, "governor": None, "temperature_c": None,
         "power": None}


def ran_by(name: str) -> dict[str, Any]:
    """A runtime, as it describes itself."""
    return {"runtime": name, "version": "1.0", "device": "cpu", "threads": 2, "kv_type": "f16", "cpu_features": ["avx2"]}


def tokens(seed: int, level: float) -> dict[str, np.ndarray]:
    """Per-token values that share the text's difficulty, as those of related models do."""
    rng, text = np.random.default_rng(seed), np.random.default_rng(0).gamma(2, 1.5, (CHUNKS, SCORED))
    kld = np.abs(rng.normal(0, level, text.shape))
    return {"nll": (text + kld + rng.normal(0, 0.01, text.shape)).astype(np.float32), "kld": kld.astype(np.float32),
            "top1": rng.random(text.shape) > level}


def quality(seed: int, level: float, names: tuple[str, ...] = ("wiki", "tales")) -> dict[str, Any]:
    texts = []
    for n, name in enumerate(names):
        values = tokens(seed + n, level)
        protocol = {"text": name, "text_sha256": "a" * 64, "tokenizer_sha256": "b" * 64, "ids_sha256": "c" * 64,
                    "context": 64, "stride": 64, "scored": "tokens 33 to 63", "bos": "none", "chunks": CHUNKS,
                    "scored_tokens": CHUNKS * SCORED, "bytes": 1500, "vocabulary": 512}
        texts.append({"protocol": protocol,
                      **metrics.summarise(values["nll"], 1500, values["kld"], values["top1"], tokens(0, 0.0)["nll"]),
                      "per_token": {k: report.pack(v) for k, v in values.items()}})
    return {"texts": texts, "runtime": ran_by("llama.cpp"), "tokenizer_agrees": True, "seconds": 1.0,
            "base": {"name": "base", "sha256": "d" * 64, "is_artifact": False, "runtime": ran_by("torch")}}


def speed(decode: float, target: str = "local-cpu") -> dict[str, Any]:
    def spread(median: float) -> dict[str, Any]:
        values = [median * f for f in (0.98, 0.99, 1.0, 1.01, 1.02)]
        return {"median": median, "iqr": median * 0.02, "values": values}

    return {"target": {"name": target, "address": target, "emulated": target == "emulated-arm64",
                       "facts": FACTS},
            "protocol": {"prompt": 512, "depth": 512, "generate": 64, "threads": 2, "device": "cpu", "cpu": "A CPU",
                         "cores": 2},
            "warmup": 2, "repetitions": 5, "load_s": 0.5, "peak_rss": int(1e9 / decode), "prefill": spread(decode * 5),
            "first_token": spread(100 / decode), "decode": spread(decode), "unstable": [], "token_bytes": 10**8,
            "prefill_curve": [{"tokens": 512, "prefill": spread(decode * 5), "first_token": spread(100 / decode)}],
            "decode_curve": [{"depth": 512, "decode": spread(decode)}],
            "read_bandwidth": decode * 1e8, "load_average": {"before": None, "after": None},
            "runtime": ran_by("llama.cpp"), "in_turns_with": [], "throttled": [], "ran": {}, "thread_sweep": None,
            "energy": None, "conditions": {"mhz": [None, None], "temperature_c": [None, None]}}


def artifact(name: str, size: int, layers: int = 0) -> dict[str, Any]:
    classes = {k: {"bytes": size // 5, "parameters": size // 8, "types": ["Q4_0"]} for k in CLASSES}
    return {"name": name, "path": f"out/{name}", "sha256": hashlib.sha256(name.encode()).hexdigest(), "kind": "gguf",
            "created": None, "kv": None, "source": {"licence": "mit", "name": name},
            "size": {"file_bytes": size, "tensor_bytes": size, "parameters": size, "bits_per_weight": 8.0, "tied": True,
                     "decoder_bits_per_weight": 8.0, "token_bytes": size, "types": {"Q4_0": size}, "classes": classes},
            "passes": [{"name": "gptq", "config": {"bits": 4, "note": name}}] if layers else [],
            "layers": [{"layer": i, "error": 0.01 * (i + 1), "events": [f"damp raised in {name}"]} for i in range(layers)]}


def whole(name: str, size: int, seed: int, level: float, decode: float, layers: int = 0) -> dict[str, Any]:
    made = report.new_report(artifact(name, size, layers), "quality", quality(seed, level))
    return {**made, "speeds": {"local-cpu": speed(decode)}}


def write(folder: Path, *reports: dict[str, Any]) -> list[Path]:
    paths = []
    for i, r in enumerate(reports):
        paths.append(folder / f"{i}.json")
        paths[-1].write_text(json.dumps(r))
    return paths


def config(paths: list[Path], **more: Any) -> CompareConfig:
    return CompareConfig(tuple(paths), **more)
