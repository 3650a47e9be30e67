"""Texts to learn from: which sequences judge, and which tokens are answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import corpus, tokenizer
from training import DISTILL

import llmc
from llmc.compress.distill.config import DistillConfig
from llmc.compress.teaching.texts import Texts, gather
from llmc.compress.text import load_answers
from llmc.errors import UserError

CHATML = ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}<s>assistant\n{% endif %}")


@pytest.mark.parametrize("answers_only", [False, True])
def test_runs_of_any_length_are_judged_by_the_same_sequences(answers_only: bool, tmp_path: Path) -> None:
    files, tok = [], tokenizer()
    tok.chat_template = CHATML
    for name, first, lines in (("one", 0, 40), ("two", 1000, 7)):
        said = [[{"role": "user", "content": f"Count on from {n}."},
                 {"role": "assistant", "content": f"{n + 1}, {n + 2}, {n + 3}"}] for n in range(first, first + lines)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in said))
        files.append(str(tmp_path / f"{name}.jsonl"))

    def gathered(steps: int, sampled: int) -> Texts:
        c = DistillConfig("base", calibration=tuple(files), steps=steps, batch=2, sampled=sampled, seq_len=16, held_out=4)
        return gather(c, tok, lambda n: torch.zeros(n, 16, dtype=torch.int64), answers_only=answers_only)

    short, long = gathered(3, 0), gathered(30, 5)
    assert torch.equal(short.sequences[:4], long.sequences[:4])
    if answers_only:
        assert short.counted is not None
        assert long.counted is not None
        assert torch.equal(short.counted[:4], long.counted[:4])
    judged = {tuple(row.tolist()) for row in long.sequences[:4]}
    assert len(judged) == 4
    assert not judged & {tuple(row.tolist()) for t in (short, long) for row in t.sequences[4:]}
    assert short.sequences.shape[0] == 4 + 3 * 2
    assert sum(o["share"] for o in long.origins) == pytest.approx(1)


def test_only_answers_are_learned_and_sequences_without_any_left_out(tmp_path: Path) -> None:
    tok = tokenizer()
    tok.chat_template = CHATML
    chat = [{"role": "user", "content": "What is it? " + "Well, " * 90}, {"role": "assistant", "content": "A thing."},
            {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No more."}]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for _ in range(20)))
    found = load_answers(str(file), tok, 32)
    assert found.answers is not None
    said = "".join(tok.decode(ids[mask]) for ids, mask in zip(found.sequences, found.answers, strict=True))
    assert set(said.replace("</s>", "|").replace("\n", "").split("|")) == {"A thing.", "No more.", ""}
    assert said.count("thing") > 15
    assert found.answers.any(1).all()
    everything = len(tok(file.read_text()).input_ids) // 32
    assert 0 < found.origin["left_out"] < everything
    tok.chat_template = "{{ messages | length }}"
    with pytest.raises(UserError, match="changes earlier messages"):
        load_answers(str(file), tok, 32)
    with pytest.raises(UserError, match="has no answers"):
        load_answers(str(tmp_path / "chat.txt"), tok, 32)


def test_a_student_learns_answers(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    teacher, student, _ = trio
    models = [shutil.copytree(f, tmp_path / f.name) for f in (teacher, student)]
    for model in models:
        (model / "chat_template.jinja").write_text(CHATML)
    lines = corpus()[:60_000].splitlines()
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}]
             for a, b in zip(lines[::2], lines[1::2], strict=False) if a and b]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    result = llmc.distill(models[1], models[0], calibration=file, answers_only=True, ce_weight=0.5, out=tmp_path / "out",
                          **DISTILL | {"sampled": 8})
    assert result["loss"]["after"] < result["loss"]["before"]
    text = json.loads((tmp_path / "out/llmc.json").read_text())["passes"][-1]["texts"][0]
    assert 0 < text["answer_tokens"] < text["tokens"]
