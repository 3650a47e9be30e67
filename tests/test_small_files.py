"""The small files that come from outside: every damage is one error that names file, key, value and what is allowed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmc
from llmc import small_files
from llmc.compress.state_file import load_state
from llmc.errors import UserError
from llmc.evals.compare.ship import read_gates
from llmc.evals.report.store import read_report
from llmc.files import read_json, read_note, write_sealed
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.genai_config import QDQ_LEVEL, read_genai
from llmc.formats.gguf_header import read_header
from llmc.formats.imatrix import read_imatrix
from llmc.formats.manifest import last_artifact, read_manifest
from llmc.formats.source import front_matter
from llmc.formats.weight_files import weight_files
from llmc.recipes.recipe import parse, scalar
from llmc.runtimes.targets.target import load_targets
from llmc.sealed import read_sealed
from llmc.small_files import MEGABYTE, Kind, expect, parse_yaml, read_json_object, read_text, read_toml

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(("content", "problem"), [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"\xff\xfe{}", "not UTF-8"),
    (b"[1]", "holds no JSON object, but a list"),
    (b'"a"', "but a text"), (b"null", "but null"), (b"[" * 5000, "not valid JSON|nested too deeply"),
    (b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than 64 levels"), (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"a": "' + b"x" * 8 * MEGABYTE + b'"}', "larger than 8 MB"),
])
def test_json_that_is_none(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=problem) as e:
        read_json_object(file)
    assert str(file) in e.value.problem


@pytest.mark.parametrize("text", [r'{"a": "\ud800"}', r'{"\udfff": 1}', r'[["\ud83d x"]]'])
def test_half_a_character(tmp_path: Path, text: str) -> None:
    """JSON can write one, and no file that llmc makes can hold it."""
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UserError, match=r"f\.json holds half a character"):
        read_json(tmp_path / "f.json") if text[0] == "{" else small_files.read_json(tmp_path / "f.json")
    (tmp_path / "f.json").write_text(r'{"a": "\ud83d\ude00", "b": "\\ud800"}')
    assert read_json(tmp_path / "f.json") == {"a": "\U0001f600", "b": r"\ud800"}


def test_a_note_of_llmc_that_is_not_as_llmc_wrote_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, values = tmp_path / "note.json", {"b": [1, 2.5, None], "a": {"x": "ü"}}
    write_sealed(file, values)
    assert read_sealed(file, "again") == read_note(file) == values
    text = file.read_text(encoding="utf-8")
    for damaged in (text.replace("2.5", "2.6"), text[:-4], "{}", "[]", text.replace('"x"', '"y"'), "\0"):
        file.write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match=r"note\.json .*") as e:
            read_sealed(file, "again")
        assert e.value.hint == "again"
        assert read_note(file) == {}
        assert "a note is made again" in capsys.readouterr().err


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, problem in ((tmp_path, "is a folder"), (tmp_path / "none", "there is no file")):
        with pytest.raises(UserError, match=problem):
            read_text(path)
    if Path("/dev/zero").exists():
        with pytest.raises(UserError, match="is not a regular file"):
            read_text(Path("/dev/zero"))
    assert read_json(tmp_path / "none.json") == {}


@pytest.mark.parametrize(("value", "good"), [(1, True), (4, True), (0, False), (5, False), (True, False), (1.0, False),
                                             ("1", False), (None, True), ([1, 2], True), ([1, 9], False), ({}, False)])
def test_expectations(tmp_path: Path, value: Any, good: bool) -> None:
    kinds = {"n": Kind("a whole number from 1 to 4", (int,), 1, 4, listed=True)}
    if good:
        expect(tmp_path / "f.json", {"n": value, "other": object()}, kinds)
        return
    with pytest.raises(UserError, match=r"f\.json: n is .*; it must be a whole number from 1 to 4"):
        expect(tmp_path / "f.json", {"n": value}, kinds)


@pytest.mark.parametrize(("values", "problem"), [
    ({"max_position_embeddings": 512.0}, r"max_position_embeddings is 512\.0, a number with a fraction"),
    ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps is "1e-5", a text; it must be a number from 0 to 1'),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN"),
    ({"num_attention_heads": 3}, r"not a multiple of the number of attention heads \(3\)"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_hidden_layers": True}, "num_hidden_layers is true"),
    ({"hidden_size": -64}, "hidden_size is -64"), ({"vocab_size": "512"}, "vocab_size is"),
    ({"model_type": "my_own"}, "model type `my_own`"), ({"model_type": 3}, "model_type is 3"),
    ({"architectures": "Llama"[:0] or 5}, "architectures is 5"), ({"quantization_config": "gptq"}, "quantization_config is"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is"), ({"text_config": []}, "text_config is"),
])
def test_config_values_of_other_types(made: SimpleNamespace, tmp_path: Path, values: dict[str, Any], problem: str) -> None:
    folder = Path(shutil.copytree(made.base, tmp_path / "m"))
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    commands: list[Callable[[], Any]] = [
        lambda: llmc.quantize(folder, method="rtn", out="q"), lambda: llmc.export(folder, format="gguf", out="m.gguf"),
        lambda: llmc.evaluate(folder, context=32, chunks=1)]
    for command in commands:
        with pytest.raises(UserError, match=problem):
            command()
    assert sorted(os.listdir()) == ["m"]


def test_a_folder_without_config(made: SimpleNamespace, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for command in (lambda: llmc.evaluate(empty, base=made.base), lambda: llmc.bench(empty), lambda: llmc.inspect(empty),
                    lambda: llmc.quantize(empty, method="rtn"), lambda: llmc.export(empty, format="gguf")):
        with pytest.raises(UserError, match=r"empty has no config\.json"):
            command()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", ["", "[]", "{", "3", '"x"', "[" * 3000, '{"a": ' * 200 + "1" + "}" * 200])
def test_a_damaged_file_of_a_model_folder(made: SimpleNamespace, tmp_path: Path, name: str, content: str) -> None:
    folder = Path(shutil.copytree(made.base, tmp_path / "m"))
    (folder / name).write_text(content)
    with pytest.raises(UserError) as e:
        llmc.export(folder, format="gguf", out="m.gguf")
    assert str(folder) in e.value.problem
    assert sorted(os.listdir()) == ["m"]


def test_manifests_and_reports(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    manifest = tmp_path / "a" / "llmc.json"
    for content, problem in (("[]", "holds no JSON object"), ('{"passes": 3}', "passes is 3"),
                             ('{"source": []}', "source is"), ('{"outputs": [1]}', "outputs is")):
        manifest.write_text(content)
        with pytest.raises(UserError, match=problem):
            read_manifest(tmp_path / "a")
    (tmp_path / "r.json").write_text("{" * 9)
    with pytest.raises(UserError, match=r"r\.json is not valid JSON"):
        read_report(tmp_path / "r.json")
    with pytest.raises(UserError, match="is a folder"):
        read_report(tmp_path)


def test_yaml_with_aliases_is_refused_and_yaml_without_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gates.yaml").write_text(BOMB)
    for read in (lambda: parse_yaml(BOMB, "it"), lambda: read_gates(tmp_path / "gates.yaml"), lambda: scalar("[&a 1, *a]"),
                 lambda: parse("r.yaml", BOMB, tmp_path, [])):
        with pytest.raises(UserError, match="uses aliases"):
            read()
    (tmp_path / "README.md").write_text(f"---\n{BOMB}---\n")
    assert front_matter(tmp_path / "README.md") == {}
    assert "uses aliases" in capsys.readouterr().err
    assert parse_yaml("a: [1, 2]", "it") == {"a": [1, 2]}
    for text in ("a: [", "a: 2024-13-40", "[" * 5000, "[" * 200_000, "- " * 200_000, "? " * 200_000,
                 "!!python/object:os.system {}", "\0"):
        with pytest.raises(UserError, match="it is not valid YAML"):
            parse_yaml(text, "it")


def test_toml(tmp_path: Path) -> None:
    file = tmp_path / "targets.toml"
    for content in (b"a = [", b"\xff", b"a = " + b"[" * 5000, b"a = " + b"9" * 5000):
        file.write_bytes(content)
        for read in (read_toml, load_targets):
            with pytest.raises(UserError, match=r"targets\.toml is not (TOML|UTF-8)"):
                read(file)


def test_a_damaged_note_of_the_newest_artifact(tmp_path: Path) -> None:
    Path(".llmc").mkdir()
    for content in ("", "[]", "{}", "\0"):
        Path(".llmc/last.json").write_text(content)
        with pytest.raises(UserError) as e:
            last_artifact()
        assert "last.json" in e.value.problem or "no longer exists" in e.value.problem


@pytest.mark.parametrize(("change", "problem"), [
    (lambda r: r.update(artifact=None), r"it\['artifact'\] is no Described"),
    (lambda r: r["speeds"]["local-cpu"].update(decode="fast"), r"\['decode'\] is no Spread"),
    (lambda r: r["quality"]["texts"][0].pop("protocol"), r"\['protocol'\] is missing"),
    (lambda r: r["quality"]["texts"].append(3), r"\['texts'\]\[2\] is no Text"),
])
def test_a_report_with_values_of_other_kinds(two_reports: list[Path], change: Callable[[Any], Any], problem: str) -> None:
    report = json.loads(two_reports[0].read_text())
    two_reports[0].write_text(json.dumps(report | {"more": 1}))
    read_report(two_reports[0])  # a key of another version is no fault
    change(report)
    two_reports[0].write_text(json.dumps(report))
    with pytest.raises(UserError, match=problem):
        read_report(two_reports[0])


@pytest.mark.parametrize(("change", "problem"), [
    ({"model": None}, None), ({"model": {"decoder": None}}, None), ({"model": []}, "model is"),
    ({"model": {"decoder": {"filename": 3}}}, "filename is 3"), ({"model": {"vocab_size": -1}}, "vocab_size is -1"),
    ({"model": {"decoder": {"session_options": {QDQ_LEVEL: "fast"}}}}, "it must be a level from 0 to 4"),
    ({"model": {"decoder": {"sliding_window": {"cache_slack": "x"}}}}, "cache_slack is"),
])
def test_genai_config(tmp_path: Path, change: dict[str, Any], problem: str | None) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps(change))
    if problem is None:
        assert read_genai(tmp_path / "genai_config.json").get("model", {}).get("decoder", {}) == {}
        return
    with pytest.raises(UserError, match=problem):
        read_genai(tmp_path / "genai_config.json")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}',
                                     '{"weight_map": {"a": "../x.safetensors"}}', "[" * 3000,
                                     '{"weight_map": {"a": "b\\u0000.safetensors"}}'])
def test_a_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
@pytest.mark.parametrize("read", [read_header, read_imatrix, load_state, read_json_object, llmc.verify, llmc.inspect,
                                  read_report, read_gates, load_targets, front_matter, artifact_at])
@pytest.mark.parametrize("device", ["a pipe", "zeros without end"])
def test_what_never_ends_is_not_opened(tmp_path: Path, read: Callable[[Path], Any], device: str) -> None:
    """It would hang."""
    file = tmp_path / "x.gguf"
    os.mkfifo(file) if device == "a pipe" else file.symlink_to("/dev/zero")
    if read is front_matter:
        assert read(file) == {}
        return
    with pytest.raises(UserError):
        read(file)
