"""What a user may name as MODEL, and what a manifest says of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import tiny
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmc
from llmc.errors import UserError
from llmc.formats.manifest import read_manifest
from llmc.formats.pretokenizers import CL100K, QWEN
from llmc.formats.source import describe_source
from llmc.sources.dequantize import restore_templates
from llmc.sources.resolve import resolve_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_itself(made: SimpleNamespace) -> None:
    assert resolve_model(made.base) == made.base
    assert resolve_model(str(made.base)) == made.base


def test_a_folder_wins_over_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model("org/name") == Path("org/name")


@pytest.mark.parametrize("model", ["nowhere", "./models/nowhere", "a b/c", "", "org/name/more", "../x"])
def test_neither_path_nor_hub_id(model: str) -> None:
    with pytest.raises(UserError) as e:
        resolve_model(model or "no file")
    assert "hub id" in e.value.hint


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="neither a model folder nor a"):
        resolve_model(tmp_path / "weights.bin")


def test_hub_id_without_network(capsys: pytest.CaptureFixture[str]) -> None:
    """The tests run with HF_HUB_OFFLINE: a hub id that is not in the cache is an error with a next step."""
    with pytest.raises(UserError, match="no folder someone/llmc-no-such-model here and the hub cannot be") as e:
        resolve_model("someone/llmc-no-such-model")
    assert "online" in e.value.hint
    assert "there is no path someone/llmc-no-such-model here" in capsys.readouterr().err


def test_gguf_becomes_a_folder_with_the_same_model(made: SimpleNamespace, tmp_path: Path, cache: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """base -> F32 GGUF -> folder: weights and token ids come back, and the chain of custody is written down."""
    file = tmp_path / "base.gguf"
    llmc.export(made.base, format="gguf", float_type="f32", embedding="f32", out=file)
    folder = resolve_model(file)
    assert cache in folder.parents
    assert "they keep its rounding errors" in capsys.readouterr().err
    before = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = "The with statement, 3.14 and naïve {x: 1}"
    ids = AutoTokenizer.from_pretrained(made.base)(text).input_ids
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == ids
    with torch.no_grad():
        torch.testing.assert_close(after(torch.tensor([ids])).logits, before(torch.tensor([ids])).logits)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["source"]["files"] == {"base.gguf": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert [p["name"] for p in manifest["passes"]] == ["dequantize"]
    assert llmc.verify(folder)["problems"] == []
    assert describe_source(folder)["licence"] == "mit"  # from the file's metadata: the folder has no card


def test_gguf_is_dequantized_once(made: SimpleNamespace, tmp_path: Path) -> None:
    first = resolve_model(made.gguf)
    stamp = (first / "llmc.json").stat().st_mtime_ns
    assert resolve_model(shutil.copy(made.gguf, tmp_path)) == first
    assert (first / "llmc.json").stat().st_mtime_ns == stamp
    assert [p.name for p in first.parent.iterdir()] == [first.name], "a work folder was left behind"


TEMPLATES = {"default": "{{ messages[0].content }}", "tool_use": "{{ messages[0].content }} with tools"}


def test_gguf_gives_back_every_chat_template(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.base, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(folder)
    llmc.export(folder, format="gguf", out=tmp_path / "base.gguf")
    assert AutoTokenizer.from_pretrained(resolve_model(tmp_path / "base.gguf")).chat_template == TEMPLATES


@pytest.mark.parametrize("name", ["../../x", "a/b", ".", ""])
def test_a_chat_template_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be a file's"):
        restore_templates(None, [{"name": "default", "template": "x"}, {"name": name, "template": "y"}], tmp_path / "m.gguf")


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITTINGS = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), BYTES]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CL100K), "isolated"), BYTES]),
}


@pytest.fixture(params=sorted(SPLITTINGS))
def other_splitting(request: pytest.FixtureRequest, made: SimpleNamespace, tmp_path: Path) -> tuple[Path, Path, str]:
    """A model whose tokenizer does not split as GPT-2's, and its GGUF."""
    folder = Path(shutil.copytree(made.base, tmp_path / "base"))
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # a vocabulary in which the splitting shows: with numbers that `smollm` never uses, or learned by the others' own
    tok.pre_tokenizer = WORDS if request.param == "smollm" else SPLITTINGS[request.param]
    trainer = trainers.BpeTrainer(vocab_size=tiny.VOCAB, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator([tiny.corpus()[:100_000], " 3.14159 ** 2 = 12345" * 2000], trainer)
    tok.pre_tokenizer = SPLITTINGS[request.param]
    tok.model.ignore_merges = request.param == "llama-bpe"
    tok.save(str(folder / "tokenizer.json"))
    file = tmp_path / "base.gguf"
    llmc.export(folder, format="gguf", float_type="f32", embedding="f32", out=file)
    return folder, file, request.param


def test_the_tokenizer_of_a_gguf_splits_as_the_models_own(other_splitting: tuple[Path, Path, str]) -> None:
    """transformers alone does not know `smollm`: numbers, spaces and newlines become other tokens."""
    folder, file, name = other_splitting
    text = tiny.corpus()[:20_000] + "\n\n  12345  6 v1.2.3\r\n\t\t'Tis DON'T x²½ \n   7"
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    assert AutoTokenizer.from_pretrained(resolve_model(file))(text).input_ids == ids
    if name == "smollm":
        assert AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(text).input_ids != ids, "nothing to restore"


@pytest.mark.parametrize("other_splitting", ["smollm"], indirect=True)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(other_splitting: tuple[Path, Path, str], cache: Path) -> None:
    """llama.cpp splits for `refact` as for `smollm`; llmc does not know the name, so it cannot restore the splitting."""
    _, file, _ = other_splitting
    raw = file.read_bytes()
    assert raw.count(b"smollm") == 1
    file.write_bytes(raw.replace(b"smollm", b"refact"))
    with pytest.raises(UserError, match=r"the tokenizer in .* cannot be rebuilt"):
        resolve_model(file)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def write_gguf(path: Path, **metadata: str) -> Path:
    """A Llama of one embedding and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, n in ((writer.add_block_count, 1), (writer.add_embedding_length, 64), (writer.add_head_count, 4),
                   (writer.add_feed_forward_length, 64), (writer.add_vocab_size, 32), (writer.add_context_length, 64)):
        add(n)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((32, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_that_would_lose_its_rope_scaling(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="has a scaled rotary embedding"):
        resolve_model(write_gguf(tmp_path / "long.gguf", llama__rope__scaling__type="yarn"))
    assert not list(cache.rglob("*.safetensors"))


def test_gguf_that_is_not_whole(made: SimpleNamespace, tmp_path: Path, cache: Path) -> None:
    half = tmp_path / "half.gguf"
    for n in (0, 10, 2000, made.gguf.stat().st_size - 1000):
        half.write_bytes(made.gguf.read_bytes()[:n])
        with pytest.raises(UserError, match="not a complete GGUF file"):
            resolve_model(half)
    with pytest.raises(UserError, match=r"lacks .* tensors, first model\.layers\.0"):
        resolve_model(write_gguf(tmp_path / "embedding_only.gguf", general__name="embedding only"))
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_description_of_a_plain_folder(made: SimpleNamespace) -> None:
    found = describe_source(made.base)
    said = {k: v for k, v in found.items() if k != "files"}
    assert said == {"name": "base", "licence": "mit", "base_model": "someone/tiny", "revision": None}
    for name, digest in found["files"].items():
        assert hashlib.sha256((made.base / name).read_bytes()).hexdigest() == digest
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(found["files"])


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\ntext", "apache-2.0"),
        ("---\r\nlicense: apache-2.0\r\n---\r\n", "apache-2.0"),
        ("\ufeff---\nlicense: llama3.1\ntags: [a]\n---", "llama3.1"),
        ("# A model\nlicense: mit\n", "unknown"),
        ("---\ntags: [a]\n---\nlicense: mit", "unknown"),
        ("---\nlicense: [unclosed\n---\n", "unknown"),
        ("---\n- just\n- a list\n---\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_licence_is_read_never_guessed(made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                       card: str | None, licence: str) -> None:
    folder = Path(shutil.copytree(made.base, tmp_path / "m"))
    (folder / "README.md").unlink()
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8", newline="")
    assert describe_source(folder)["licence"] == licence
    assert ("the manifest says 'unknown'" in capsys.readouterr().err) == (licence == "unknown")


def test_revision_and_name_of_a_hub_snapshot(made: SimpleNamespace, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--org--name-1b" / "snapshots" / commit
    shutil.copytree(made.base, folder)
    found = describe_source(folder)
    assert (found["name"], found["revision"]) == ("org/name-1b", commit)
    local = Path(shutil.copytree(made.base, tmp_path / "local"))
    note = local / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{commit}\netag\n1700000000.0\n")
    found = describe_source(local)
    assert (found["name"], found["revision"]) == ("local", commit)


def test_quantizing_from_gguf_keeps_the_whole_chain(made: SimpleNamespace, tmp_path: Path) -> None:
    llmc.quantize(made.gguf, method="rtn", out=tmp_path / "again")
    manifest = json.loads((tmp_path / "again" / "llmc.json").read_text())
    assert [p["name"] for p in manifest["passes"]] == ["dequantize", "quantize"]
    assert llmc.verify(tmp_path / "again")["problems"] == []
