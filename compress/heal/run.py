"""`llmc heal`: train the scales of a quantised model against the logits of the model it was made from.

The aim is the file that ships: codes stay bit for bit, scales end as fp16, so size, format and speed do not change. What
is minimised is the forward KL divergence from teacher to student over every position (Hinton et al., "Distilling the
Knowledge in a Neural Network", 2015, arXiv:1503.02531, at temperature 1). The best scales by a held-out part of the text
are kept, not the last; a run that never beats the start gives the start back and says so.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmc.artifact import (
    MANIFEST,
    check_disk,
    check_output,
    hash_folder,
    new_manifest,
    note_last,
    publish_folder,
    read_manifest,
    staged_file,
    write_json,
)
from llmc.checkpoint import Checkpoint
from llmc.compress.digest import code_digest
from llmc.compress.heal.config import HealConfig
from llmc.compress.heal.loss import Whole, distil
from llmc.compress.heal.student import head_of, hidden_states, load_student, load_teacher, norm_weights
from llmc.compress.precision import matmul_precision, prepare_cpu
from llmc.compress.sampling import sample_from_model
from llmc.compress.text import SELF, Calibration, from_model, load_calibration
from llmc.console import progress, say, warn
from llmc.errors import UserError
from llmc.export import quantized
from llmc.runtimes.targets.this_machine import physical_cores
from llmc.runtimes.torch_model import load_tokenizer, torch_device
from llmc.shards import pieces_of, write_checkpoint
from llmc.sources import describe_source, resolve_model

WARM_UP = 0.05  # share of the steps
FLOOR = 0.05  # of the learning rate, at the end of the cosine
NORM_LR = 0.25  # of the learning rate: a norm's weight moves a whole column at once
BETAS = (0.9, 0.95)
TOKENS = 1024  # run through student and teacher at once


def heal(model: str | Path, config: HealConfig) -> dict[str, Any]:
    """Heal the quantised folder `model`. Returns {'out', 'steps', 'best_step', 'kld': {'before', 'after'}, 'seconds', …}."""
    start = time.monotonic()
    threads = config.threads or physical_cores()
    prepare_cpu(threads)
    job = _Job(resolve_model(model), resolve_model(config.teacher), config, threads)
    result = job.run()
    note_last(job.out, job.kind)
    return {**result, "seconds": round(time.monotonic() - start, 1)}


@dataclass
class Texts:
    """Sequences to learn from and to judge by, int64 [n, seq_len]; what the manifest says about their sources."""

    train: torch.Tensor
    held: torch.Tensor
    origins: list[dict[str, Any]]


class _Job:
    """One healing: what is known before it starts, and the steps."""

    def __init__(self, folder: Path, teacher: Path, config: HealConfig, threads: int) -> None:
        self.folder, self.teacher_folder, self.config, self.threads = folder, teacher, config, threads
        self.out = config.out or folder.with_name(f"{folder.resolve().name}-healed")
        self.work = self.out.with_name(f".{self.out.name}.unfinished")
        if Checkpoint.open(teacher).quantization is not None:
            raise UserError(f"the teacher {teacher} is quantised itself", "name the float model it was made from")
        check_output(self.out)
        check_disk(self.out, 3 * sum(p.stat().st_size for p in Checkpoint.open(folder).files), "healing")
        self.kind = "gptq" if (Checkpoint.open(folder).quantization or {}).get("quant_method") == "gptq" else "blocks"
        self.device = torch_device(config.device)
        self.dtype = torch.bfloat16 if matmul_precision() == "bf16" or self.device.type != "cpu" else torch.float32

    def run(self) -> dict[str, Any]:
        self._open()
        self.student, self.linears = load_student(self.folder, self.dtype)
        self.student.to(self.device)
        self.teacher = load_teacher(self.teacher_folder, self.dtype).to(self.device)
        self._check_pair()
        if self.config.checkpointing:
            name = "activation_checkpointing_enable"  # its name from transformers 5 on
            enable = getattr(self.student, name, self.student.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.factors = {f"{name}.{kind}": p for name, m in self.linears.items() for kind, p in m.trained().items()}
        self.norms = norm_weights(self.student) if self.config.norms else {}
        for p in self.norms.values():
            p.requires_grad_(True)
        texts = self._texts()
        curve = self._train(texts)
        return self._publish(texts, curve)

    def _open(self) -> None:
        """The folder of an unfinished run, guarded by a fingerprint."""
        self.source, self.teacher_source = describe_source(self.folder), describe_source(self.teacher_folder)
        found = self.work / "fingerprint.json"
        fingerprint = json.loads(json.dumps({
            **self.config.numbers(), "threads": self.threads, "device": str(self.device), "model": self.source["files"],
            "teacher_files": self.teacher_source["files"], "torch": torch.__version__, "code": code_digest()}))
        if self.config.resume and found.is_file():
            old = json.loads(found.read_text(encoding="utf-8"))
            if differing := sorted(k for k in fingerprint if fingerprint[k] != old.get(k)):
                raise UserError(f"cannot resume: the unfinished run in {self.work} differs in {', '.join(differing)}",
                                "run with the same model and options, or without --resume to start again")
        else:
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
            write_json(found, fingerprint)

    def _check_pair(self) -> None:
        """Student and teacher must be of one shape."""
        ours, theirs = self.student.config.get_text_config(), self.teacher.config.get_text_config()
        for field in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
            if getattr(ours, field, None) != getattr(theirs, field, None):
                raise UserError(f"{self.folder} has {field} {getattr(ours, field, None)} and the teacher "
                                f"{getattr(theirs, field, None)}", "name the model it was quantised from")

    # ------------------------------------------------------------------------------------------------------------ text

    def _texts(self) -> Texts:
        """All of every text, shuffled by the seed; evenly spaced sequences are held out to judge by."""
        c, tokenizer = self.config, load_tokenizer(self.folder)
        parts = [self._sequences(spec, tokenizer) for spec in c.calibration]
        ids = torch.cat([p.sequences for p in parts])
        n = ids.shape[0]
        if n < c.held_out + c.batch:
            raise UserError(f"the healing text gives {n} sequences of {c.seq_len}, and {c.held_out} are held out",
                            "give more text, a smaller --seq-len or a smaller --held-out")
        held = {i * n // c.held_out + n // (2 * c.held_out) for i in range(c.held_out)}
        order = torch.randperm(n, generator=torch.Generator().manual_seed(c.seed)).tolist()
        return Texts(ids[[i for i in order if i not in held]], ids[sorted(held)], [p.origin for p in parts])

    def _sequences(self, spec: str, tokenizer: Any) -> Calibration:
        c = self.config
        needed = c.steps * c.batch + c.held_out
        if spec != SELF:
            return load_calibration(spec, tokenizer, None, c.seq_len)
        kept = self.work / "sampled.safetensors"
        if not kept.is_file():
            say("sampling healing text from the teacher (text like what the model will see is better: --calibration FILE)")
            ids = sample_from_model(self.teacher, tokenizer, -(-needed // len(c.calibration)), c.seq_len, c.seed, 32)
            with staged_file(kept) as tmp:
                save_file({"ids": ids}, tmp)
        ids = load_file(kept)["ids"]
        return from_model(ids, tokenizer, {"seed": c.seed, "temperature": 1.0})

    # -------------------------------------------------------------------------------------------------------- training

    def _train(self, texts: Texts) -> list[dict[str, Any]]:
        """Returns the curve: {'step', 'kld' of the held-out text, 'training' (mean loss since the last)}."""
        c = self.config
        groups = [{"params": list(self.factors.values()), "lr": c.lr, "share": 1.0}]
        if self.norms:
            groups.append({"params": list(self.norms.values()), "lr": c.lr, "share": NORM_LR})
        optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-10)
        known = self._know(texts.held)
        curve, done = self._restore(optimizer)
        if not curve:
            curve = [{"step": 0, "kld": self._judge(texts.held, known), "training": None}]
            self._keep_best()
        recent: list[float] = []
        with progress("healing, step", c.steps, done) as p:
            for step in range(done, c.steps):
                if self._no_better(curve):
                    say(f"no better for {c.patience} checks: stopped at step {step}")
                    break
                for group in optimizer.param_groups:
                    group["lr"] = c.lr * group["share"] * schedule(step, c.steps)
                optimizer.zero_grad(set_to_none=True)
                recent.append(self._step(batch_of(texts.train, step, c.batch).to(self.device)))
                optimizer.step()
                note = f"KLD {recent[-1]:.4f}"
                if (step + 1) % c.check_every == 0 or step + 1 == c.steps:
                    kld = self._judge(texts.held, known)
                    curve.append({"step": step + 1, "kld": kld, "training": sum(recent) / len(recent)})
                    recent = []
                    if kld < min(row["kld"] for row in curve[:-1]):
                        self._keep_best()
                    self._save(optimizer, curve)
                    note = f"held-out KLD {kld:.4f} (start {curve[0]['kld']:.4f})"
                p.step(note)
        return curve

    def _no_better(self, curve: list[dict[str, Any]]) -> bool:
        """Whether the last checks, so many as `patience` says, brought nothing. (While the rate is high the loss may rise and
        come back: patience counts in the second half.)"""
        best = min(curve, key=lambda row: row["kld"])["step"]
        since = curve[-1]["step"] - max(best, self.config.steps // 2)
        return bool(since >= self.config.patience * self.config.check_every)

    def _know(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The teacher's hidden states of the held-out sequences, computed once."""
        return [self._aim(row[None].to(self.device)) for row in ids]

    def _judge(self, ids: torch.Tensor, known: list[torch.Tensor]) -> float:
        """Mean KL divergence over the held-out sequences."""
        total = 0.0
        with torch.no_grad():
            for row, aim in zip(ids, known, strict=True):
                total += self._distil(self._states(self.student, row[None].to(self.device)), aim)
        return total / len(known)

    def _step(self, ids: torch.Tensor) -> float:
        """Gradients of one batch, at most TOKENS at a time, which bounds the activations."""
        total = 0.0
        parts = ids.split(max(1, TOKENS // ids.shape[1]))
        for part in parts:
            total += self._distil(self._states(self.student, part), self._aim(part), len(part) / len(ids))
        return total

    @torch.inference_mode()
    def _aim(self, ids: torch.Tensor) -> torch.Tensor:
        """The teacher's hidden states [n, seq_len, hidden]."""
        return self._states(self.teacher, ids)

    def _states(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return hidden_states(model, ids).float()

    def _distil(self, states: torch.Tensor, known: torch.Tensor, share: float | None = None) -> float:
        """Mean divergence, times `share` where given: then with the gradient."""
        vocab = self.teacher.get_output_embeddings().weight.shape[0]
        seen = known.reshape(-1, known.shape[-1])
        with (torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16),
              head_of(self.student) as student_head, head_of(self.teacher) as teacher_head):

            @torch.inference_mode()
            def aims(part: slice) -> Whole:
                return Whole(teacher_head(seen[part][None]))

            return distil(states, aims, student_head, vocab, share)

    # ---------------------------------------------------------------------------------------------------- what is kept

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {**self.factors, **{f"norm.{k}": p for k, p in self.norms.items()}}

    def _keep_best(self) -> None:
        with staged_file(self.work / "best.safetensors") as tmp:
            save_file({k: p.detach().cpu().contiguous() for k, p in self._parameters().items()}, tmp)

    def _save(self, optimizer: torch.optim.Optimizer, curve: list[dict[str, Any]]) -> None:
        """Everything that `--resume` needs to go on bit-identically after the last check, in one file."""
        tensors: dict[str, torch.Tensor] = {}
        for name, p in self._parameters().items():
            state = optimizer.state[p]
            tensors |= {f"{name}:value": p.detach(), f"{name}:first": state["exp_avg"], f"{name}:second": state["exp_avg_sq"]}
        with staged_file(self.work / "state.safetensors") as tmp:
            save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, tmp, metadata={"curve": json.dumps(curve)})

    def _restore(self, optimizer: torch.optim.Optimizer) -> tuple[list[dict[str, Any]], int]:
        from safetensors import safe_open

        path = self.work / "state.safetensors"
        if not path.is_file():
            return [], 0
        with safe_open(path, framework="pt") as f:
            curve: list[dict[str, Any]] = json.loads(f.metadata()["curve"])
            for name, p in self._parameters().items():
                p.data.copy_(f.get_tensor(f"{name}:value"))
                optimizer.state[p] = {"step": torch.tensor(float(curve[-1]["step"])),
                                      "exp_avg": f.get_tensor(f"{name}:first").to(self.device),
                                      "exp_avg_sq": f.get_tensor(f"{name}:second").to(self.device)}
        say(f"resuming after step {curve[-1]['step']}")
        return curve, int(curve[-1]["step"])

    def _publish(self, texts: Texts, curve: list[dict[str, Any]]) -> dict[str, Any]:
        """The folder of the student with its best scales and norms, every other byte as it was."""
        best = load_file(self.work / "best.safetensors")
        for name, p in self._parameters().items():
            p.data.copy_(best[name])
        checkpoint = Checkpoint.open(self.folder)
        changed: dict[str, torch.Tensor] = {}
        for name, m in self.linears.items():
            factors = {field: f.detach().to("cpu", torch.float16) for field, f in m.factors().items()}
            healed = quantized.encode(quantized.with_tensors(quantized.read(checkpoint, name), factors))
            changed |= {f"{name}.{part}": tensor for part, tensor in healed.items()}
        prefix = self.student.base_model_prefix + "."
        for name, p in self.norms.items():
            stored = next(n for n in (name, name.removeprefix(prefix), prefix + name) if n in checkpoint)
            changed[stored] = p.detach().to("cpu", torch.float32).contiguous()
        new = self.work / "healed.safetensors"
        save_file(changed, new)
        folder = self.work / "artifact"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kept = [piece for f in checkpoint.files for piece in pieces_of(f, set(checkpoint.headers[f]) - set(changed))]
        write_checkpoint(folder, kept + pieces_of(new))
        for file in self.folder.iterdir():
            if file.is_file() and file.name != MANIFEST and ".safetensors" not in file.name:
                shutil.copyfile(file, folder / file.name)
        top = min(curve, key=lambda row: row["kld"])
        if top["step"] == 0:
            warn("healing never beat the start on the held-out text: the model is as it was")
        moved = [float((m.shift.detach().exp() - 1).abs().mean()) for m in self.linears.values()]
        entry = {"name": "heal", "config": self.config.numbers(), "threads": self.threads, "device": str(self.device),
                 "teacher": self.teacher_source, "texts": texts.origins, "curve": curve,
                 "best_step": top["step"], "scales_moved": sum(moved) / len(moved), "trained": self._counts()}
        before = read_manifest(self.folder) or {}
        source = before.get("source") or self.source
        manifest = new_manifest(self.kind, source, [*before.get("passes", []), entry])
        manifest["outputs"] = hash_folder(folder)
        write_json(folder / MANIFEST, manifest)
        publish_folder(folder, self.out)
        shutil.rmtree(self.work)
        return {"out": str(self.out), "steps": curve[-1]["step"], "best_step": top["step"], "curve": curve,
                "kld": {"before": curve[0]["kld"], "after": top["kld"]}, "trained": self._counts(),
                "scales_moved": sum(moved) / len(moved),
                "weights_sha256": {k: v for k, v in manifest["outputs"].items() if "safetensors" in k}}

    def _counts(self) -> dict[str, int]:
        return {"scales": sum(p.numel() for p in self.factors.values()), "norms": sum(p.numel() for p in self.norms.values())}


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up, then a cosine down to FLOOR (Loshchilov and Hutter, 2017)."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def batch_of(sequences: torch.Tensor, step: int, batch: int) -> torch.Tensor:
    """The sequences of one step, round and round through the text."""
    return sequences[[(step * batch + i) % sequences.shape[0] for i in range(batch)]]
