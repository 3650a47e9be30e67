"""Every small file that llmc reads: where it lies, its form, and commands that read it. test_fuzz.py damages them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import reports
import tiny
from damage import CARD, CSV, GGUF, JSON, LINES, ONNX, SAFETENSORS, TEMPLATE, TEXT, TOML, TSV, YAML_FORM, Form
from killing import interrupted

import llmc
from llmc.formats.manifest import manifest_path

RUN = "--threads 1"
TEACH = f"--calibration text.txt --seq-len 32 --sampled 0 --steps 4 --check-every 2 --batch 1 --held-out 2 {RUN} -o out"
RTN = f"quantize m --method rtn {RUN} -o out"
GPTQ = f"quantize m --calibration text.txt --samples 4 --seq-len 32 {RUN} -o out"
BUDGET = f"quantize m --method rtn --calibration text.txt --seq-len 32 --target-bpw 8 {RUN} -o out"
HEALED = f"quantize m --method rtn --heal 4 --calibration text.txt --seq-len 32 {RUN} -o out"
CHUNKS = f"--context 32 --chunks 1 {RUN} -o out.json"


def _gguf(model: str) -> str:
    return f"export {model} --format gguf {RUN} -o out.gguf"


def _onnx(model: str) -> str:
    return f"export {model} --format onnx --accuracy-level 4 {RUN} -o out"


def _eval(artifact: str, text: str = "text.txt", more: str = "") -> str:
    return f"eval {artifact} --text {text} {more} {CHUNKS}"


def _talk(artifact: str, more: str = "--chat") -> str:
    return f"generate {artifact} 'a b' --max-tokens 2 {more} {RUN}"


def _bench(artifact: str) -> str:
    return f"bench {artifact} --prompt 4 --generate 2 --warmup 0 --repetitions 5 --max-repetitions 5 {RUN} -o out.json"


@dataclass(frozen=True)
class File:
    """A file that is damaged. path: of the file.  form: of its content.  things: what else must lie in the working folder,
    names of the world, as NAME or NAME:OTHER.  commands: what reads the file.  good: its content, if the world has no such
    file.  gates: exit code 1 says that a gate was missed."""

    path: str
    form: Form
    things: tuple[str, ...]
    commands: tuple[str, ...]
    good: bytes | None = None
    gates: bool = False


HEAL, DISTILL = f"heal q --teacher m {TEACH}", f"distill m --teacher m {TEACH}"
PRUNE = f"prune m --method wanda --sparsity 0.5 --calibration text.txt --samples 4 --seq-len 32 {RUN} -o out"
IMATRIX = f"imatrix m --calibration text.txt --samples 4 --seq-len 32 {RUN} -o out.gguf"
SEEN = ("inspect m", "verify m")
MADE = (RTN, _gguf("m"), _onnx("m"), _eval("m"), _talk("m"))
WHOLE = (*SEEN, *MADE, GPTQ, _bench("m"), HEAL, DISTILL, BUDGET, PRUNE, IMATRIX,
         f"prune m --method magnitude --sparsity 0.5 {RUN} -o out", f"prune m --method depth --drop 1 {RUN} -o out",
         f"transform m --scaling none --rotate r2 {RUN} -o out")
QUANTIZED = ("inspect q", "verify q", _gguf("q"), _onnx("q"), _eval("q"), HEAL)
CHATTED = f"quantize m --calibration chat.jsonl --samples 2 --seq-len 16 {RUN} -o out"
TEMPLATED = (_gguf("m"), _talk("m"), RTN, "inspect m", CHATTED)
ONNX_COMMANDS = ("inspect o", "verify o", _eval("o"), _talk("o"), _bench("o"), "fit o --target pi5 --min-decode 1")
GGUF_COMMANDS = ("inspect q.gguf", "inspect q.gguf --tensors --json", "verify q.gguf", _eval("q.gguf"), _talk("q.gguf"),
                 _bench("q.gguf"), f"quantize q.gguf --method rtn {RUN} -o out", "fit q.gguf --target pi5 --min-decode 1")
REPORTS = ("compare base.json small.json --max-kld 1 --page out.html", "ship gates.yaml -o out",
           "compare small.json base.json --markdown - --page out.html",
           "fit small.json base.json --target pi5 --min-decode 1 --max-kld 1 --max-ram 1GB",
           f"eval q.gguf --base m --text text.txt --context 32 --chunks 1 {RUN} -o small.json")
TEXTS = (GPTQ, _eval("m"), PRUNE, HEAL, IMATRIX, DISTILL)
RECIPE = ("recipe validate recipe.yaml", "recipe show recipe.yaml", "run recipe.yaml --dry-run",
          "run recipe.yaml -o run --json", "sweep recipe.yaml quantize.bits=4,8 --dry-run", "recipe cp recipe.yaml out.yaml")
RERUN = ("run recipe.yaml -o run", "run recipe.yaml -o run --dry-run", "run recipe.yaml -o run --json",
         "sweep recipe.yaml quantize.bits=4 -o run")
TARGETS = ("target ls", "target show pi", "target show local-cpu --json", "target add new ssh://u@host", "target rm pi",
           "fit q.gguf --target pi --min-decode 1", "target add pi ssh://pi --profile pi5")
HEALTHY, SMALL = ("m", "q", "text.txt"), ("q", "m", "text.txt")
REPORT_THINGS = ("base.json", "small.json", "gates.yaml", "q.gguf", "m", "text.txt")
RUN_THINGS = ("recipe.yaml", "m", "text.txt", "run")

TASK = ('{"query": "Question: what is red?\\nAnswer:", "choices": ["blood", "the sea"], "gold": 0}\n'
        '{"query": "Question: what is wet?\\nAnswer:", "choices": ["sand", "the sea"], "gold": 1}\n')
SPOKEN = [{"role": "user", "content": "What is red?"}, {"role": "assistant", "content": "Blood is red, and so on."}]
CHAT = (json.dumps({"messages": SPOKEN}) + "\n") * 40
ROWS = "".join(json.dumps({"text": t}) + "\n" for t in tiny.corpus()[:20_000].split("\n\n"))
SHEET = 'text,other\n"' + tiny.corpus()[:4000].replace('"', "'") + '",1\n"b",2\n'
JINJA = b"{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
PROCESSOR = b'{"chat_template": "{{ messages[0].content }}"}'
OTHER_CONFIG = (b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64, '
                b'"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256, '
                b'"eos_token_id": [1], "text_config": {"head_dim": 16}}')
MODELOPT = b'{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["a"]}}'
LORA = b'{"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8, "target_modules": ["q_proj"]}'


def texts(name: str) -> tuple[str, ...]:
    return tuple(t.replace("text.txt", name) for t in TEXTS)


def state(name: str, form: Form, things: tuple[str, ...], *commands: str) -> File:
    return File(f".out.unfinished/{name}", form, things, commands)


FILES = (
    File("m/config.json", JSON, HEALTHY, WHOLE),
    File("q/config.json", JSON, SMALL, QUANTIZED),
    File("m/generation_config.json", JSON, HEALTHY, (*MADE, *SEEN)),
    File("m/tokenizer.json", JSON, HEALTHY, (*SEEN, *MADE, GPTQ)),
    File("m/tokenizer_config.json", JSON, HEALTHY, (*SEEN, *MADE, GPTQ)),
    File("m/special_tokens_map.json", JSON, HEALTHY, (*SEEN, *MADE),
         b'{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}}'),
    File("m/added_tokens.json", JSON, HEALTHY, (*SEEN, *MADE), b'{"<s>": 0, "<new>": 511}'),
    File("m/chat_template.jinja", TEMPLATE, (*HEALTHY, "chat.jsonl"), TEMPLATED, JINJA),
    File("m/additional_chat_templates/tool.jinja", TEMPLATE, (*HEALTHY, "chat.jsonl"), TEMPLATED, JINJA),
    File("m/chat_template.json", JSON, (*HEALTHY, "chat.jsonl"), TEMPLATED, PROCESSOR),
    File("template.jinja", TEMPLATE, HEALTHY, tuple(f"{c} --chat-template template.jinja" for c in (_gguf("m"), _onnx("m"))),
         b"{{ messages[0].content }}"),
    File("q/quantize_config.json", JSON, SMALL, QUANTIZED),
    File("r/quantize_config.json", JSON, ("r", "text.txt"), ("inspect r", "verify r", _gguf("r"), _eval("r"), _talk("r"))),
    File("r/hf_quant_config.json", JSON, ("r-bare:r", "text.txt"), ("inspect r", _gguf("r"), _eval("r")), MODELOPT),
    File("r/quant_config.json", JSON, ("r-bare:r", "text.txt"), ("inspect r", _gguf("r"), _eval("r")),
         b'{"zero_point": true, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}'),
    File("m/adapter_config.json", JSON, HEALTHY, (*SEEN, RTN, _gguf("m"), _eval("m")), LORA),
    File("a/adapter_config.json", JSON, HEALTHY, ("inspect a", "quantize a --method rtn -o out", _gguf("a")), LORA),
    File("s/model.safetensors.index.json", JSON, ("s", "text.txt"),
         ("inspect s", "verify s", _gguf("s"), _eval("s"), f"quantize s --method rtn {RUN} -o out")),
    File("m/model.safetensors", SAFETENSORS, HEALTHY, (*SEEN, *MADE)),
    File("q/model.safetensors", SAFETENSORS, SMALL, QUANTIZED),
    File("b/model.safetensors", SAFETENSORS, ("b", "m", "text.txt"), ("inspect b", "verify b", _gguf("b"), _eval("b"))),
    File("q/llmc.json", JSON, SMALL, (*QUANTIZED, f"quantize m --method rtn {RUN} -o q")),
    File("q.gguf.llmc.json", JSON, ("q.gguf", "q.gguf.llmc.json", "m", "text.txt"),
         ("inspect q.gguf", "verify q.gguf", _eval("q.gguf"), _talk("q.gguf", ""), f"export m --format gguf {RUN} -o q.gguf",
          f"quantize q.gguf --method rtn {RUN} -o out")),
    File("m/README.md", CARD, HEALTHY, (*SEEN, RTN, _gguf("m"), _onnx("m"))),
    File("m/.cache/huggingface/download/config.json.metadata", TEXT, HEALTHY, (RTN, _gguf("m")), b"0" * 40 + b"\nabc\n1.0\n"),
    File(".llmc/last.json", JSON, (*HEALTHY, "notes:.llmc"), (f"export --format gguf {RUN} -o out.gguf", RTN)),
    File("base.json", JSON, REPORT_THINGS, REPORTS, gates=True),
    File("small.json", JSON, REPORT_THINGS, REPORTS, gates=True),
    File("gates.yaml", YAML_FORM, REPORT_THINGS, ("ship gates.yaml -o out", "ship gates.yaml -o out --json"), gates=True),
    File("out.json", JSON, REPORT_THINGS, ("ship gates.yaml -o out",),
         b'{"gates": 1, "passed": true, "artifacts": [], "signed": {}}', gates=True),
    File("targets.toml", TOML, ("q.gguf", "targets.toml"), TARGETS, gates=True),
    File("recipe.yaml", YAML_FORM, ("m", "text.txt", "recipe.yaml"), RECIPE, gates=True),
    *(File(f"run/{name}", JSON, RUN_THINGS, RERUN, gates=True)
      for name in (".run.json", ".hashes.json", "recipe.json", "quantize-*/.done.json", "quantize-*/quantize/llmc.json",
                   "eval-base-*/base.json", "compare-*/compare.json", "export-*/export.gguf.llmc.json")),
    File("o/genai_config.json", JSON, ("o", "text.txt"), ONNX_COMMANDS),
    File("o/config.json", JSON, ("o", "text.txt"), ONNX_COMMANDS, OTHER_CONFIG),
    File("o/tokenizer.json", JSON, ("o", "text.txt"), ONNX_COMMANDS),
    File("o/tokenizer_config.json", JSON, ("o", "text.txt"), ONNX_COMMANDS),
    File("o/model.onnx", ONNX, ("o", "text.txt"), ONNX_COMMANDS),
    File("i.gguf", GGUF, ("m", "i.gguf"),
         ("inspect i.gguf", "verify i.gguf", f"{RTN} --imatrix i.gguf", "inspect i.gguf --tensors")),
    File("q.gguf", GGUF, ("q.gguf", "text.txt"), GGUF_COMMANDS),
    File("text.txt", TEXT, SMALL, TEXTS),
    File("text.json", JSON, SMALL, texts("text.json"), b'[{"text": "a b c d e f g h"}, {"text": "i j"}]'),
    File("text.jsonl", LINES, SMALL, texts("text.jsonl"), ROWS.encode()),
    File("chat.jsonl", LINES, ("chat:m", "q"), texts("chat.jsonl"), CHAT.encode()),
    File("text.csv", CSV, SMALL, texts("text.csv"), SHEET.encode()),
    File("text.tsv", TSV, SMALL, texts("text.tsv"), SHEET.replace("\t", " ").replace(",", "\t").encode()),
    File("arc.jsonl", LINES, HEALTHY, tuple(_eval("m", more=f"--no-text --tasks {task}=arc.jsonl")
                                            for task in ("arc_easy", "piqa", "openbookqa")), TASK.encode()),
    *(state(name, form, (*HEALTHY, "quantizing:.out.unfinished"), f"{GPTQ} --resume", GPTQ)
      for name, form in (("fingerprint.json", JSON), ("state.json", JSON), ("layers/0000.json", JSON),
                         ("layers/0000.safetensors", SAFETENSORS), ("hidden.a.f32", TEXT))),
    *(state(name, form, (*SMALL, "healing:.out.unfinished"), f"{HEAL} --resume")
      for name, form in (("state.safetensors", SAFETENSORS), ("best.safetensors", SAFETENSORS))),
    File(".out.sampled.safetensors", SAFETENSORS, ("m", "sampled:.out.sampled.safetensors"),
         (GPTQ.replace("text.txt", "self") + " --resume",)),
    File(".out.json", JSON, (*HEALTHY, "unhealed:.out.unhealed", "unhealed.json:.out.json"), (f"{HEALED} --resume",)),
    File(".llmc/sensitivity-*.json", JSON, (*HEALTHY, "notes:.llmc"), (BUDGET,)),
)
RECIPE_TEXT = """about: tiny
model: m
defaults: {threads: 1, calibration: text.txt}
steps:
  - quantize: {method: rtn, bits: 4}
  - export: gguf
  - eval: {text: text.txt, context: 32, chunks: 2, of: [base, export]}
  - compare: {max_kld: 100}
"""
TARGETS_TEXT = """[targets.pi]
address = "ssh://u@pi:22"
cache_gb = 3
profile = "pi5"

[targets.pi.facts]
cpu = "A"
"""
GATES_TEXT = """artifacts: [q.gguf]
reports: [base.json, small.json]
targets:
  pi5: {min_decode: 1, max_first_token: 30, max_ram: 2GB, max_kld: 9, min_top1: 1%, max_size: 1GB}
  local-cpu: {max_ppl_increase: 500%, stable: true}
"""


def world(folder: Path, made: SimpleNamespace, onnx: Path) -> Path:
    """A folder with everything that the table names."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    for name, source in {"m": made.base, "q": made.gptq, "o": onnx}.items():
        shutil.copytree(source, name)
    shutil.copy(made.gguf, "q.gguf")
    shutil.copy(manifest_path(made.gguf), "q.gguf.llmc.json")
    shutil.copytree("m", "chat")
    Path("chat/chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    tiny.build("llama", folder / "s", max_shard_size="100KB")
    tiny.write_text(folder / "text.txt", 20_000)
    Path("chat.jsonl").write_text(CHAT)
    shutil.copytree("q", "r")
    tiny.edit_config(folder / "r", quantization_config=None)
    shutil.copytree("r", "r-bare")
    Path("r-bare/quantize_config.json").unlink()
    llmc.quantize("m", method="rtn", type="q5_k", threads=1, out="b")
    llmc.imatrix("m", calibration="text.txt", samples=2, seq_len=32, threads=1, out="i.gguf")
    _reports()
    Path("gates.yaml").write_text(GATES_TEXT)
    Path("targets.toml").write_text(TARGETS_TEXT)
    Path("recipe.yaml").write_text(RECIPE_TEXT)
    llmc.run_recipe("recipe.yaml", out="run")
    _states()
    return folder


def _reports() -> None:
    """Quality as it was measured; speeds are made up."""
    given: dict[str, Any] = {"text": "text.txt", "context": 32, "chunks": 3, "threads": 1}
    llmc.evaluate("m", base="m", out="base.json", **given)
    llmc.evaluate("q.gguf", base="m", out="small.json", **given)
    for path, decode in (Path("base.json"), 10.0), (Path("small.json"), 30.0):
        path.write_text(json.dumps({**json.loads(path.read_text()), "speeds": {"local-cpu": reports.speed(decode)}}))


def _states() -> None:
    """What interrupted runs leave for --resume."""
    from llmc.cli import run
    from llmc.compress.calibration import Workspace
    from llmc.compress.heal import run as heal
    from llmc.compress.teaching.training import Training

    def left(name: str, stop: Any, command: str, found: str = ".out.unfinished") -> None:
        with stop:
            code = run(["--quiet", *command.split()])
            assert code == 130, f"{command}: {code}"
            raise KeyboardInterrupt
        os.rename(found, name)

    left("quantizing", interrupted(Workspace, "save_layer", 1), GPTQ)
    left("healing", interrupted(Training, "_check", 4), f"heal q --teacher m {TEACH}")
    left("unhealed.json", interrupted(heal, "heal"), HEALED, ".out.json")
    os.rename(".out.unhealed", "unhealed")
    left("sampled", interrupted(Workspace, "save_layer", 0), GPTQ.replace("text.txt", "self"), ".out.sampled.safetensors")
    run(["--quiet", *BUDGET.split()])
    os.rename(".llmc", "notes")
    for rest in Path().glob("*out*"):
        shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
