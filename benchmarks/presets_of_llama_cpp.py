"""Check that `--preset` gives every tensor exactly the type that llama-quantize gives it.

llama-quantize quantizes small GGUF files, with and without an importance matrix. The files cover the hyperparameters that
llama.cpp's rules use: layers, grouped heads, experts, tied or not, rows that 256 divides or not. The types in its files are
compared with llmc's table. With --base the same is done for a real model: llmc exports it, llama-quantize quantizes it, and
its types are compared with those of `llmc quantize --preset` for that folder. Exit code 1 if one tensor differs.

    python benchmarks/presets_of_llama_cpp.py --llama-quantize BIN/llama-quantize [--base MODEL --base-gguf base-f16.gguf]
    ... --write tests/data/preset_types.json     # write the table of the tests from llama-quantize's own output
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter

from llmc.compress.quantize.presets import PRESETS, Facts, end_type, linear_type
from llmc.formats.types import BLOCK_TYPES

LLAMA = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MODELS: dict[str, dict[str, Any]] = {
    "small, tied": {"layers": 12, "gqa": 1, "tied": True},
    "grouped by 3, untied": {"layers": 34, "gqa": 3},
    "grouped by 4, untied": {"layers": 34, "gqa": 4},
    "rows of 576, tied": {"layers": 30, "gqa": 3, "tied": True, "width": 576},
    "rows of 576, untied": {"layers": 16, "gqa": 4, "width": 576},
    "70B": {"layers": 80, "gqa": 8},
    "8 experts": {"layers": 16, "gqa": 4, "experts": 8, "roles": LLAMA[:4]},
    "fused attention": {"layers": 24, "gqa": 1, "arch": "phi3", "roles": ("attn_qkv", "attn_output", "ffn_up", "ffn_down")},
}


def write_model(path: Path, layers: int, gqa: int, tied: bool = False, width: int = 256, experts: int = 1,
                arch: str = "llama", roles: tuple[str, ...] = LLAMA) -> None:
    """Write a GGUF file with four random rows in each tensor: llama-quantize reads hyperparameters, names and row lengths."""
    w = GGUFWriter(path, arch)
    w.add_block_count(layers)
    w.add_context_length(256)
    w.add_embedding_length(width)
    w.add_feed_forward_length(width)
    w.add_head_count(8 * gqa)
    w.add_head_count_kv(8)
    w.add_layer_norm_rms_eps(1e-5)
    if experts > 1:
        w.add_expert_count(experts)
        w.add_expert_used_count(2)
    names = ["token_embd.weight", *(["output.weight"] if not tied else [])]
    names += [f"blk.{i}.{role}.weight" for i in range(layers) for role in roles]
    rng = np.random.default_rng(0)
    for name in names:
        w.add_tensor(name, rng.standard_normal((4, width)).astype(np.float16))
    finish(w)


def write_imatrix(path: Path, model: Path) -> None:
    """Write an importance matrix of ones for every tensor of a model."""
    w = GGUFWriter(path, "")
    w.add_type("imatrix")
    w.add_array("imatrix.datasets", ["none"])
    w.add_uint32("imatrix.chunk_count", 1)
    w.add_uint32("imatrix.chunk_size", 512)
    for t in GGUFReader(model).tensors:
        if t.name.startswith("blk.") and len(t.shape) > 1:
            w.add_tensor(f"{t.name}.in_sum2", np.ones((1, int(t.shape[0])), np.float32))
            w.add_tensor(f"{t.name}.counts", np.ones((1, 1), np.float32))
    finish(w)


def finish(w: GGUFWriter) -> None:
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def types_by_llama_cpp(binary: Path, model: Path, preset: str, imatrix: Path | None) -> dict[str, str]:
    """The type of every matrix in the file that llama-quantize makes, by name."""
    out = model.with_suffix(".quantized.gguf")
    run(binary, *(["--imatrix", imatrix] if imatrix else []), model, out, preset.upper(), 1)
    found = {t.name: t.tensor_type.name.lower() for t in GGUFReader(out).tensors if len(t.shape) > 1}
    out.unlink()
    return found


def types_it_plans(binary: Path, model: Path, preset: str, imatrix: Path | None) -> dict[str, str]:
    """Like types_by_llama_cpp, but read from `llama-quantize --dry-run`."""
    listed = run(binary, "--dry-run", *(["--imatrix", imatrix] if imatrix else []), model, preset.upper(), 1)
    return {name: kind.lower() for name, kind in re.findall(r"^\[ *\d+/ *\d+\] (\S+) .*-> .*\((\w+)\)$", listed, re.M)}


def types_by_llmc(preset: str, imatrix: bool, layers: int, gqa: int, tied: bool = False, width: int = 256,
                  experts: int = 1, arch: str = "llama", roles: tuple[str, ...] = LLAMA) -> dict[str, str]:
    """The type of every matrix from llmc's table, by name."""
    facts = Facts(layers, gqa, experts, imatrix, seventy=layers == 80 and gqa > 1)
    found = {f"blk.{i}.{role}.weight": linear_type(preset, role, i, facts, width)
             for i in range(layers) for role in roles}
    found["token_embd.weight"] = end_type(preset, tied, width)
    return found if tied else {**found, "output.weight": end_type(preset, True, width)}


def compact(types: dict[str, str]) -> dict[str, str]:
    """For each role the types of layers 0, 1, ... as counts of equal neighbours: '2 q6_k, 5 q4_k'."""
    roles: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        layer = re.match(r"blk\.(\d+)\.(\w+)\.weight", name)
        roles.setdefault(layer[2] if layer else name, {})[int(layer[1]) if layer else 0] = kind
    return {role: ", ".join(f"{len(list(run))} {kind}" for kind, run in itertools.groupby(v for _, v in sorted(by.items())))
            for role, by in sorted(roles.items())}


def types_of_folder(folder: Path, preset: str, method: str) -> dict[str, str]:
    """The types that `llmc quantize --preset` would give a model folder, by GGUF's names."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    from llmc.compress.quantize.assignment import assign
    from llmc.compress.quantize.config import QuantizeConfig
    from llmc.compress.skeleton import Skeleton
    from llmc.export.gguf.architectures import find_architecture
    from llmc.formats.checkpoint import Checkpoint

    skeleton = Skeleton(Checkpoint.open(folder), "cpu")
    a = assign(QuantizeConfig(preset=preset, method=method), skeleton)
    arch = MODEL_ARCH[find_architecture(skeleton.checkpoint.config).gguf.name.upper()]
    names = get_tensor_name_map(arch, len(skeleton.layers))
    found = {f"{names.get_name(n)}.weight": str(qtype.gguf_type).lower() for n, qtype in a.types.items()}
    ends = {"embedding": "token_embd.weight", "head": "output.weight"}
    return found | {ends[what]: kind for what, kind in a.end_types.items()}


def differences(what: str, ours: dict[str, str], theirs: dict[str, str]) -> int:
    wrong = [n for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n)]
    for name in wrong[:5]:
        print(f"{what}: {name} is {theirs.get(name)} by llama-quantize, {ours.get(name)} by llmc")
    return len(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-quantize", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="a float model folder")
    parser.add_argument("--base-gguf", type=Path, help="the F16 file of --base, written by `llmc export`")
    parser.add_argument("--write", type=Path, help="file for llama-quantize's types of the small models")
    args = parser.parse_args()
    compared = wrong = 0
    frozen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, matrix = Path(folder) / "model.gguf", Path(folder) / "imatrix.gguf"
        runs: list[tuple[str, dict[str, Any] | None]] = [*MODELS.items(), *([("the base", None)] if args.base else [])]
        for title, spec in runs:
            model.unlink(missing_ok=True)
            if spec:
                write_model(model, **spec)
            else:
                model.symlink_to(args.base_gguf.resolve())
            write_imatrix(matrix, model)
            for preset, imatrix in itertools.product(PRESETS, (False, True)):
                if preset == "q2_k_s" and not imatrix:
                    continue  # llama-quantize refuses it
                # with codebooks it takes a second for its tables, and refuses to write some files without a matrix
                planned = not spec or BLOCK_TYPES[PRESETS[preset]].codebook is not None
                read = types_it_plans if planned else types_by_llama_cpp
                theirs = read(args.llama_quantize, model, preset, matrix if imatrix else None)
                ours = (types_by_llmc(preset, imatrix, **spec) if spec
                        else types_of_folder(args.base, preset, "gptq" if imatrix else "rtn"))
                wrong += differences(f"{title}, {preset}{', imatrix' if imatrix else ''}", ours, theirs)
                compared += len(theirs)
                if spec:
                    key = f"{preset}{' with imatrix' if imatrix else ''}"
                    frozen.setdefault(title, {"model": spec, "types": {}})["types"][key] = compact(theirs)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(json.dumps(frozen, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"models": len(runs), "tensors_compared": compared, "different": wrong}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
