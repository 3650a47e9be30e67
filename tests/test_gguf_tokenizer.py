"""The tokenizer in the file against the tokenizer of the folder, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from gguf_files import export
from tiny import GPT2_STEPS, QWEN_STEPS, build, edit_config
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmc.errors import UserError
from llmc.export.gguf.metadata import name_in_file
from llmc.export.gguf.tokenizer import Vocabulary
from llmc.export.gguf.verify import MARKS
from llmc.formats import pretokenizers
from llmc.formats.check_text import CHECK_TEXT
from llmc.formats.gguf import field
from llmc.runtimes.llamacpp import LlamaCpp

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(regex: str, **more: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **more}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


# As the tokenizer.json of well-known models spells them out; llama.cpp's name; ignore_merges
KNOWN: dict[str, tuple[dict[str, Any], str, bool]] = {
    "GPT-2": (GPT2_STEPS, "gpt-2", False),
    "SmolLM2": (sequence({"type": "Digits", "individual_digits": True}, GPT2_STEPS), "smollm", False),
    "Llama 3": (sequence(split(pretokenizers.CL100K), BYTES), "llama-bpe", True),
    "Phi-4": (sequence(split(pretokenizers.CL100K, behavior="Removed", invert=True), BYTES), "dbrx", False),
    "Qwen 2": (QWEN_STEPS, "qwen2", False),
    "Qwen 3.5": (sequence(split(pretokenizers.QWEN35), BYTES), "qwen35", False),
    "GPT-4o": (sequence(split(pretokenizers.O200K), BYTES), "gpt-4o", False),
    "Mistral Nemo": (sequence(split(pretokenizers.TEKKEN), BYTES), "tekken", False),
    "DeepSeek Coder": (sequence(
        split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
        {"type": "Digits", "individual_digits": True}, BYTES), "deepseek-coder", False),
    "DeepSeek V3": (sequence(
        split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"),
        split(pretokenizers.DEEPSEEK3.replace(r"\r", "\r").replace(r"\n", "\n")), BYTES), "deepseek-v3", False),
}


def greedy_tokenizer(steps: dict[str, Any], ignore_merges: bool) -> PreTrainedTokenizerFast:
    """Its merges run across words, digits, signs and spaces, so that only the splitting keeps those apart."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.train_from_iterator((CHECK_TEXT + MARKS).split("\n"), trainers.BpeTrainer(
        vocab_size=1500, min_frequency=1, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    spec = json.loads(tok.to_str())
    spec["pre_tokenizer"], spec["decoder"] = steps, {**BYTES}
    spec["model"]["ignore_merges"] = ignore_merges
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>",
                                   eos_token="</s>")


def model_with(folder: Path, tokenizer: PreTrainedTokenizerFast, family: str = "llama", **values: Any) -> Path:
    build(family, folder, vocab_size=len(tokenizer), num_hidden_layers=1, **values)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", KNOWN)
def test_the_pre_tokenizer_is_found_and_splits_alike(name, tmp_path):
    steps, expected, ignore_merges = KNOWN[name]
    family = "qwen2" if steps is QWEN_STEPS else "llama"
    report = export(model_with(tmp_path / "m", greedy_tokenizer(steps, ignore_merges), family))
    assert report["pre_tokenizer"] == expected
    assert report["token_ids"]["combining_marks_alike"] or expected in pretokenizers.WITHOUT_MARKS


def test_a_wrong_pre_tokenizer_does_not_pass(tmp_path):
    folder = model_with(tmp_path / "m", greedy_tokenizer(GPT2_STEPS, False))
    with pytest.raises(UserError, match=r"does not tokenize as the model does \(pre-tokenizer 'llama-bpe'\): after") as e:
        export(folder, pre="llama-bpe")
    assert "--pre NAME" in e.value.hint
    assert not (tmp_path / "m.gguf").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_an_unknown_splitting_is_spelt_out(tmp_path):
    folder = model_with(tmp_path / "m", greedy_tokenizer(sequence(split("[aeiou]+"), BYTES), False))
    with pytest.raises(UserError, match=r"\[aeiou\]\+ then bytes") as e:
        export(folder)
    assert "--pre" in e.value.hint


@pytest.mark.parametrize("style", ["llama", "gemma"])
def test_sentencepiece_style(style, tmp_path):
    report = export(build("llama", tmp_path / "m", style=style))
    reader = GGUFReader(tmp_path / "m.gguf")
    assert field(reader, "tokenizer.ggml.model") == "llama"
    assert field(reader, "tokenizer.ggml.add_space_prefix") is (style == "llama")
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
    types = field(reader, "tokenizer.ggml.token_type")
    assert types.count(6) == 256
    assert types[:3] == [2, 3, 3]  # unknown, and two control tokens
    assert report["token_ids"]["text_tokens"] > 300


def test_a_vocabulary_without_byte_tokens_is_refused(tmp_path):
    folder = build("llama", tmp_path / "m", style="gemma")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["<no byte>"] = spec["model"]["vocab"].pop("<0x41>")
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="255 of the 256 byte tokens"):
        export(folder)


def test_two_tokens_of_one_text_are_refused(tmp_path):
    folder = build("llama", tmp_path / "m")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 300, "content": "Ġthe"})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="have the text 'Ġthe'"):
        export(folder)


# ------------------------------------------------------------------------------------------------------- special tokens


def with_ends(folder: Path, texts: list[str]) -> set[int]:
    """A model at `folder` with `texts` added, whose generation_config ends at </s> and at all of them; their ids."""
    tok = greedy_tokenizer(GPT2_STEPS, False)
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in texts])
    model_with(folder, tok)
    ends = tok.convert_tokens_to_ids(["</s>", *texts])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.6, "top_k": 20}))
    return set(ends)


def test_every_end_token_of_every_file_ends_a_generation(tmp_path):
    ends = with_ends(tmp_path / "m", ["<stop>", "<halt>", "<|im_end|>"])
    assert len(ends) == 4
    assert ends <= set(export(tmp_path / "m")["token_ids"]["end_tokens"])
    runtime = LlamaCpp(tmp_path / "m.gguf", context=64, threads=1)
    assert ends <= runtime.end_tokens
    runtime.close()
    reader = GGUFReader(tmp_path / "m.gguf")
    assert field(reader, "general.sampling.temp") == pytest.approx(0.6)
    assert field(reader, "general.sampling.top_k") == 20


def test_more_end_tokens_than_gguf_has_places_for_are_refused(tmp_path):
    with_ends(tmp_path / "m", ["<a>", "<b>", "<c>"])
    with pytest.raises(UserError, match="4 tokens end a generation: '</s>', '<a>', '<b>', '<c>'"):
        export(tmp_path / "m")


def test_ids_without_a_token_become_unused(tmp_path):
    export(build("llama", tmp_path / "m", vocab_size=520, num_hidden_layers=1))
    reader = GGUFReader(tmp_path / "m.gguf")
    assert field(reader, "tokenizer.ggml.tokens")[519] == "[PAD519]"
    assert field(reader, "tokenizer.ggml.token_type")[511:] == [1] + [5] * 8


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = build("llama", tmp_path / "m", vocab_size=500, num_hidden_layers=1)
    with pytest.raises(UserError, match="the id 511 and the embedding only 500 rows"):
        export(folder)


def test_a_file_that_transformers_reads_otherwise_is_refused(tmp_path):
    """transformers 5 gives Qwen 2 models its own splitting, whatever their tokenizer.json says."""
    folder = model_with(tmp_path / "m", greedy_tokenizer(GPT2_STEPS, False), "qwen2")
    with pytest.raises(UserError, match=r"transformers does not tokenize as .*tokenizer\.json does"):
        export(folder)


def test_llama_cpp_reads_nothing_into_the_name():
    tokens = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    assert name_in_file("my-phi3", Vocabulary("gpt2", "gpt-2", ["a"], [1])) == "my-phi 3"
    assert name_in_file("Phi-3-mini", Vocabulary("llama", "default", tokens, [], strips_right=True)) == "Phi-3-mini"
    assert name_in_file("mine", Vocabulary("llama", "default", tokens, [], strips_right=True)) == "mine (phi-3)"
    assert name_in_file("mine", Vocabulary("llama", "default", tokens, [])) == "mine"


# -------------------------------------------------------------------------------------------------------- chat template


TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_the_chat_template_is_kept_with_its_hash(chatty):
    report = export(chatty)
    assert field(GGUFReader(report["path"]), "tokenizer.chat_template") == TEMPLATE
    assert report["chat_template_sha256"] == hashlib.sha256(TEMPLATE.encode()).hexdigest()


def test_the_chat_template_can_be_dropped_or_replaced(chatty, tmp_path):
    report = export(chatty, chat_template="drop")
    assert field(GGUFReader(report["path"]), "tokenizer.chat_template") is None
    assert report["chat_template_sha256"] is None
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}")
    report = export(chatty, chat_template=str(tmp_path / "other.jinja"))
    assert field(GGUFReader(report["path"]), "tokenizer.chat_template") == "{{ messages[0].content }}"
    with pytest.raises(UserError, match=r"nowhere\.jinja is not a text file"):
        export(chatty, chat_template="nowhere.jinja")


def test_a_suspicious_chat_template_is_pointed_out(chatty, capsys):
    (chatty / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    export(chatty)
    assert "'__class__', which a template does not need" in capsys.readouterr().err


def test_the_config_may_name_one_end_token_or_several(tmp_path):
    folder = build("llama", tmp_path / "m", num_hidden_layers=1)
    edit_config(folder, eos_token_id=[1, 7])
    assert {1, 7} <= set(export(folder)["token_ids"]["end_tokens"])
