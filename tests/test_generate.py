"""llmc generate: the same text as transformers, from any artifact."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc.cli import run
from llmc.errors import UserError
from llmc.runtimes.config import GenerateConfig
from llmc.runtimes.generation import _generate, choose, generate
from llmc.runtimes.open import open_runtime

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


def test_greedy_is_transformers_greedy(made: SimpleNamespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    ids = tokenizer("The import statement", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1]:]
    shown: list[str] = []
    made_text = generate(made.base, "The import statement", GenerateConfig(max_tokens=20, threads=1), show=shown.append)
    assert made_text["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(shown) == made_text["text"]
    assert made_text["tokens"] == 20
    assert made_text["prompt_tokens"] == ids.shape[1]
    assert made_text["stopped"] == "max tokens"


def test_every_runtime_answers(made: SimpleNamespace) -> None:
    for artifact in (made.gptq, made.gguf):
        assert generate(artifact, "def f", GenerateConfig(max_tokens=5, threads=1))["tokens"] == 5


class Scripted:
    """A runtime that says given tokens; ids are bytes, 0 ends a text."""

    end_tokens = frozenset({0})

    def __init__(self, says: bytes) -> None:
        self.says = [*list(says), 0]

    def tokenize(self, text: str, special: bool = True) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def detokenize(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def _next(self) -> np.ndarray:
        return np.eye(256, dtype=np.float32)[self.says.pop(0)]

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        return self._next()

    def decode(self, token: int) -> np.ndarray:
        return self._next()


def test_characters_are_shown_whole_and_the_end_is_the_end() -> None:
    shown: list[str] = []
    made = _generate(Scripted("é日🙂!".encode()), "ab", GenerateConfig(max_tokens=99), shown.append)  # type: ignore[arg-type]
    assert [s for s in shown if s] == ["é", "日", "🙂", "!"]
    assert (made["text"], made["tokens"], made["stopped"]) == ("é日🙂!", 10, "end of text")


def test_a_token_costs_the_same_at_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detokenizing takes a few tokens each time, and neither it nor the terminal is in the speed."""
    clock, sizes = [0.0], []

    class Timed(Scripted):
        def detokenize(self, ids: list[int]) -> str:
            sizes.append(len(ids))
            clock[0] += 5.0
            return super().detokenize(ids)

        def decode(self, token: int) -> np.ndarray:
            clock[0] += 0.25
            return super().decode(token)

    def show(text: str) -> None:
        clock[0] += 3.0
        shown.append(text)

    monkeypatch.setattr("llmc.runtimes.generation.perf_counter", lambda: clock[0])
    text = "é日🙂 and so on. " * 40
    shown: list[str] = []
    made = _generate(Timed(text.encode()), "a" * 300, GenerateConfig(max_tokens=9999), show)  # type: ignore[arg-type]
    assert made["text"] == "".join(shown) == text
    assert made["tokens_per_second"] == pytest.approx(4)
    assert max(sorted(sizes)[:-2]) <= 12  # all but the whole text and the whole prompt at the end


def test_nothing_to_say() -> None:
    made = _generate(Scripted(b""), "ab", GenerateConfig(), lambda _: None)  # type: ignore[arg-type]
    assert (made["text"], made["tokens"], made["stopped"], made["tokens_per_second"]) == ("", 0, "end of text", None)
    with pytest.raises(UserError, match="prompt is empty"):
        _generate(Scripted(b""), "", GenerateConfig(), lambda _: None)  # type: ignore[arg-type]


def test_sampling_follows_the_softmax() -> None:
    rng = np.random.default_rng(0)
    logits = np.log(np.array([0.6, 0.3, 0.1], dtype=np.float32))
    for temperature in (1.0, 0.5):
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        drawn = np.bincount([choose(logits, temperature, rng) for _ in range(8000)], minlength=3) / 8000
        np.testing.assert_allclose(drawn, expected, atol=0.02)
    assert {choose(logits, 0, rng) for _ in range(20)} == {0}


def test_seed(made: SimpleNamespace) -> None:
    texts = [generate(made.gguf, "x", GenerateConfig(max_tokens=12, temperature=1.5, seed=s, threads=1))["text"]
             for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_chat_template(made: SimpleNamespace, tmp_path: Path) -> None:
    import shutil

    import llmc

    folder = shutil.copytree(made.base, tmp_path / "chat")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    llmc.export(folder, format="gguf", out=tmp_path / "chat.gguf")
    for artifact in (folder, tmp_path / "chat.gguf"):
        runtime = open_runtime(artifact, 64, 1)
        assert runtime.chat("hi") == "<s>[user] hi\n[assistant]"
        assert runtime.tokenize(runtime.chat("hi"), special=False)[0] == 0  # BOS once, as one token
        runtime.close()
        with pytest.raises(UserError, match="no chat template"):
            open_runtime(made.base if artifact.is_dir() else made.gguf, 64, 1).chat("hi")


def test_chat_templates_run_in_a_sandbox(made: SimpleNamespace, tmp_path: Path) -> None:
    """A template is code of whoever made the file: it must not reach Python."""
    import shutil

    import gguf
    from jinja2.exceptions import SecurityError

    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    folder = shutil.copytree(made.base, tmp_path / "evil")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": evil}))
    import llmc

    llmc.export(folder, format="gguf", out=tmp_path / "evil.gguf")
    field = gguf.GGUFReader(tmp_path / "evil.gguf").get_field("tokenizer.chat_template")
    assert field is not None
    assert field.contents() == evil
    for artifact in (folder, tmp_path / "evil.gguf"):
        with pytest.raises(UserError, match="chat template") as e:
            open_runtime(artifact, 64, 1).chat("hi")
        assert isinstance(e.value.__cause__, SecurityError)
        assert run(["generate", str(artifact), "hi", "--chat", "--threads", "1"]) == 2


def test_command_line(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["generate", str(made.gguf), "import os", "--max-tokens", "6", "--threads", "1"]
    assert run([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert run(args) == 0
    assert capsys.readouterr().out == f"import os{found['text']}\n"
    assert run([*args, "--temperature", "-1"]) == 2
    assert run([*args, "--max-tokens", "0"]) == 2
    assert run(["generate", "nowhere.gguf", "x"]) == 2
