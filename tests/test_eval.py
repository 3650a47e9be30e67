"""llmc eval: the protocol is llama-perplexity's, every runtime gets the same ids, and a report belongs to its artifact."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reports
import tiny
import torch
from tiny import Letters
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmc.cli import run
from llmc.errors import UserError
from llmc.evals.quality import protocol, texts
from llmc.evals.quality import run as evaluate_module
from llmc.evals.quality.config import EvalConfig
from llmc.evals.quality.run import evaluate
from llmc.evals.report import store as report


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.corpus()[5000:9000] + " naïve 日本語 🙂 " + tiny.corpus()[9000:12000], encoding="utf-8")
    return path


def settings(text: Path, **more: Any) -> dict[str, Any]:
    return {"text": str(text), "context": 64, "chunks": 5, "threads": 1, **more}




def test_chunks_without_bos() -> None:
    cut = protocol.cut("t", "abcdefghijklmnopqrstuvwxyz", Letters(), context=8, chunks=0)
    assert [bytes(c.astype(np.uint8)).decode() for c in cut.ids] == ["abcdefgh", "ijklmnop", "qrstuvwx"]
    assert cut.first == 4  # llama-perplexity: first = n_ctx / 2, and n_ctx - first - 1 tokens are scored
    p = cut.protocol
    assert (p.chunks, p.context, p.stride, p.scored_tokens, p.bytes, p.bos) == (3, 8, 8, 9, 9, "none")
    assert p.text_sha256 == hashlib.sha256(b"abcdefghijklmnopqrstuvwxyz").hexdigest()


def test_chunks_with_bos() -> None:
    """The text starts with BOS, so it is one later in the chunks, and BOS then takes the place of each chunk's first."""
    cut = protocol.cut("t", "abcdefghijklmnopqrstuvwxyz", Letters(bos=42), context=8, chunks=2)
    assert [bytes(c.astype(np.uint8)).decode() for c in cut.ids] == ["*abcdefg", "*ijklmno"]
    assert cut.protocol.bos != "none"
    assert cut.protocol.ids_sha256 != protocol.cut("t", "abcdefghijklmnopqrstuvwxyz", Letters(), 8, 2).protocol.ids_sha256


def test_a_text_shorter_than_a_chunk() -> None:
    with pytest.raises(UserError, match="26 tokens, fewer than one chunk of 64"):
        protocol.cut("t", "abcdefghijklmnopqrstuvwxyz", Letters(), 64, 0)


@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_bos_policy_is_the_tokenizers(style: str, tmp_path: Path) -> None:
    tiny.tokenizer(style).save_pretrained(tmp_path)
    tokenizer = protocol.FolderTokenizer(tmp_path)
    assert tokenizer.bos == (1 if style == "llama" else None)
    assert tokenizer.decode(tokenizer.encode("a  few words")).strip() == "a  few words"


def test_perplexity_by_hand(made: SimpleNamespace, text: Path) -> None:
    """Every figure of the base again with transformers alone, one token at a time."""
    made_report = evaluate(EvalConfig(str(made.base), **settings(text)))
    got = made_report["quality"]["texts"][0]
    ids = AutoTokenizer.from_pretrained(made.base)(text.read_text(encoding="utf-8"))["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    nll = []
    for start in range(0, 5 * 64, 64):
        chunk = ids[start : start + 64]
        with torch.no_grad():
            logits = model(torch.tensor([chunk])).logits[0].double()
        nll += [-float(torch.log_softmax(logits[i], -1)[chunk[i + 1]]) for i in range(32, 63)]
    assert got["perplexity"]["value"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    np.testing.assert_allclose(report.unpack(got["per_token"]["nll"]).ravel(), nll, rtol=1e-3, atol=1e-4)
    assert got["protocol"]["scored_tokens"] == len(nll) == 5 * 31
    assert got["kld"] is None


def test_the_base_itself(made: SimpleNamespace, text: Path) -> None:
    quality = evaluate(EvalConfig(str(made.base), base=str(made.base), **settings(text)))["quality"]
    assert quality["base"]["is_artifact"]
    got = quality["texts"][0]
    assert (got["kld"]["value"], got["kld"]["max"], got["top1"]["value"]) == (0, 0, 1)
    assert got["perplexity_ratio"]["value"] == 1


def test_folder_and_file_are_measured_alike(made: SimpleNamespace, text: Path) -> None:
    """The GGUF holds the folder's codes, so llama.cpp and torch must tell the same story from the same ids."""
    folder, file = (evaluate(EvalConfig(str(a), base=str(made.base), second_text="python-docs", **settings(text)))
                    for a in (made.gptq, made.gguf))
    assert folder["quality"]["runtime"]["runtime"] == "torch"
    assert file["quality"]["runtime"]["runtime"] == "llama.cpp"
    assert file["quality"]["tokenizer_agrees"]
    for a, b in zip(folder["quality"]["texts"], file["quality"]["texts"], strict=True):
        assert a["protocol"] == b["protocol"]
        assert b["perplexity"]["value"] == pytest.approx(a["perplexity"]["value"], rel=0.05)
        assert b["kld"]["value"] == pytest.approx(a["kld"]["value"], rel=0.2)  # 8-bit activations, embedding in 8 bits
        assert b["base_perplexity"]["value"] == pytest.approx(a["base_perplexity"]["value"], rel=1e-6)
        assert 0 < a["kld"]["median"] < a["kld"]["p99"] <= a["kld"]["max"]
    assert file["artifact"]["size"]["decoder_bits_per_weight"] == pytest.approx(4.5, abs=0.01)
    assert len(file["artifact"]["layers"]) == 2
    assert file["artifact"]["passes"]


def test_kld_by_hand(made: SimpleNamespace, text: Path) -> None:
    from llmc.formats.hf import load_torch_model

    got = evaluate(EvalConfig(str(made.gptq), base=str(made.base), **settings(text, chunks=2)))["quality"]["texts"][0]
    ids = AutoTokenizer.from_pretrained(made.base)(text.read_text(encoding="utf-8"))["input_ids"]
    base, small = load_torch_model(made.base), load_torch_model(made.gptq)
    kld = []
    for start in (0, 64):
        with torch.no_grad():
            p, q = (torch.log_softmax(m(torch.tensor([ids[start : start + 64]])).logits[0, 32:63].double(), -1)
                    for m in (base, small))
        kld += (p.exp() * (p - q)).sum(-1).tolist()
    assert got["kld"]["value"] == pytest.approx(sum(kld) / len(kld), rel=1e-4)
    assert got["kld"]["max"] == pytest.approx(max(kld), rel=1e-3)


def test_ids_come_from_the_base_and_another_tokenizer_is_told(made: SimpleNamespace, text: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    other = tiny.build("llama", tmp_path / "other", style="llama")
    got = evaluate(EvalConfig(str(other), base=str(made.base), **settings(text)))
    same = evaluate(EvalConfig(str(made.gptq), base=str(made.base), **settings(text)))
    assert not got["quality"]["tokenizer_agrees"]
    assert "other ids than the base's" in capsys.readouterr().err
    assert got["quality"]["texts"][0]["protocol"] == same["quality"]["texts"][0]["protocol"]


def test_a_gguf_alone_and_as_base(made: SimpleNamespace, text: Path) -> None:
    alone = evaluate(EvalConfig(str(made.gguf), **settings(text)))["quality"]
    assert alone["base"] is None
    against = evaluate(EvalConfig(str(made.gptq), base=str(made.gguf), **settings(text)))["quality"]["texts"][0]
    assert against["kld"]["value"] < 0.05  # the same codes
    folder = evaluate(EvalConfig(str(made.base), **settings(text)))["quality"]["texts"][0]["protocol"]
    assert alone["texts"][0]["protocol"]["ids_sha256"] == folder["ids_sha256"]


def test_nan_is_an_error(made: SimpleNamespace, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc.runtimes.torch_model import TorchModel

    original = TorchModel.logits
    monkeypatch.setattr(TorchModel, "logits", lambda *a: original(*a) * np.float32("nan"))
    with pytest.raises(UserError, match="NaN"):
        evaluate(EvalConfig(str(made.base), **settings(text)))


def test_report_is_added_to_and_never_mixed(made: SimpleNamespace, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    evaluate(EvalConfig(str(made.gptq), output=path, **settings(text)))
    first = report.read_report(path)
    speed: Any = reports.speed(10.0)
    report.save(path, report.new_report(first["artifact"], "speeds", {"pi": speed}))
    both = report.read_report(path)
    assert both["speeds"] == {"pi": speed}
    assert both["quality"] == first["quality"]
    evaluate(EvalConfig(str(made.gptq), output=path, **settings(text, chunks=3)))
    assert report.read_report(path)["speeds"] == {"pi": speed}
    assert report.read_report(path)["quality"]["texts"][0]["protocol"]["chunks"] == 3
    before = path.read_bytes()
    with pytest.raises(UserError, match="report of another artifact, small"):
        evaluate(EvalConfig(str(made.gguf), output=path, **settings(text)))
    assert path.read_bytes() == before


def test_other_files_are_not_written_over(made: SimpleNamespace, text: Path, tmp_path: Path) -> None:
    for content in ("not json", "[]", '{"a": 1}'):
        path = tmp_path / "precious.json"
        path.write_text(content)
        with pytest.raises(UserError, match=r"precious\.json"):
            evaluate(EvalConfig(str(made.base), output=path, **settings(text)))
        assert path.read_text() == content


def test_arrays_survive_json() -> None:
    values = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    assert np.array_equal(report.unpack(json.loads(json.dumps(report.pack(values)))), values)
    assert np.array_equal(report.unpack(report.pack(values > 0)), values > 0)


def test_texts(tmp_path: Path) -> None:
    name, docs = texts.load_text("python-docs")
    assert name == "python-docs"
    assert docs == tiny.corpus()
    with pytest.raises(UserError, match="no text file"):
        texts.load_text(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        texts.load_text(str(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        texts.load_text(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="hub cannot be reached"):
        texts.load_text("wikitext")


def test_the_sample_holds_what_breaks_tokenizers() -> None:
    sample = evaluate_module.SAMPLE
    assert all(part in sample for part in ("  ", "\n\n", "\t", "\r\n", "100000", "日本", "العربية", "👍🏽"))


@pytest.mark.parametrize(("options", "words"), [
    (["--context", "4"], "--context 4"), (["--chunks", "-1"], "--chunks -1"), (["--threads", "0"], "--threads 0"),
    (["--device", "tpu"], "tpu"), (["--context", "100000"], "trained for"), (["--text", "nowhere.txt"], "nowhere.txt"),
])
def test_bad_options_are_errors_of_the_user(made: SimpleNamespace, options: list[str], words: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", str(made.base), "--context", "64", *options]) == 2
    assert words in capsys.readouterr().err


def test_command_line(made: SimpleNamespace, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["eval", str(made.gguf), "--base", str(made.base), "--text", str(text), "--context", "64", "--chunks", "3",
            "--threads", "1"]
    assert run([*args, "-o", "r.json", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["quality"]["texts"][0]["kld"]["value"] > 0
    assert "per_token" not in printed["quality"]["texts"][0]
    assert run(args) == 0
    out, err = capsys.readouterr()
    assert "KL divergence" in out
    assert "top-1 agreement" in out
    assert "--second-text" in err
    assert report.read_report(Path("r.json"))["artifact"]["name"] == "small.gguf"
