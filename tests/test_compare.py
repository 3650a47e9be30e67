"""llmc compare: paired differences, refusals, gates, and a page that trusts nobody's names."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmc.cli import run
from llmc.errors import GateFailedError, UserError
from llmc.evals.compare import gates
from llmc.evals.compare.config import CompareConfig
from llmc.evals.compare.run import compare
from llmc.evals.compare.tables import tables
from llmc.evals.pages import charts
from llmc.evals.pages.compare import page
from llmc.evals.quality import metrics
from llmc.evals.report import store as report
from llmc.families.names import CLASSES, classify
from llmc.formats.weigh import weigh

CHUNKS, SCORED = 12, 31
HOSTILE = "<script>alert('x')</script>&\"|small"


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
    return {"texts": texts, "runtime": {"runtime": "llama.cpp", "threads": 2}, "tokenizer_agrees": True, "seconds": 1.0,
            "base": {"name": "base", "sha256": "d" * 64, "is_artifact": False, "runtime": {"runtime": "torch"}}}


def speed(decode: float, target: str = "local-cpu") -> dict[str, Any]:
    def spread(median: float) -> dict[str, Any]:
        values = [median * f for f in (0.98, 0.99, 1.0, 1.01, 1.02)]
        return {"median": median, "iqr": median * 0.02, "values": values}

    return {"target": {"name": target, "address": target, "emulated": target == "emulated-arm64",
                       "facts": {"cpu": "A CPU", "memory": 8 * 10**9}},
            "protocol": {"prompt": 512, "depth": 512, "generate": 64, "threads": 2, "device": "cpu", "cpu": "A CPU",
                         "cores": 2},
            "warmup": 2, "repetitions": 5, "load_s": 0.5, "peak_rss": int(1e9 / decode), "prefill": spread(decode * 5),
            "first_token": spread(100 / decode), "decode": spread(decode), "unstable": [], "token_bytes": 10**8,
            "prefill_curve": [{"tokens": 512, "prefill": spread(decode * 5), "first_token": spread(100 / decode)}],
            "decode_curve": [{"depth": 512, "decode": spread(decode)}],
            "read_bandwidth": decode * 1e8, "load_average": {"before": None, "after": None},
            "runtime": {"runtime": "llama.cpp"}, "in_turns_with": []}


def artifact(name: str, size: int, layers: int = 0) -> dict[str, Any]:
    classes = {k: {"bytes": size // 5, "parameters": size // 8, "types": ["Q4_0"]} for k in CLASSES}
    return {"name": name, "path": f"out/{name}", "sha256": report.hashlib.sha256(name.encode()).hexdigest(), "kind": "gguf",
            "created": None, "source": {"licence": "mit", "name": name},
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


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), whole("small", 250_000, 5, 0.2, 30.0, layers=4))


def config(paths: list[Path], **more: Any) -> CompareConfig:
    return CompareConfig(tuple(paths), **more)


def test_paired_differences(tmp_path: Path) -> None:
    paths = write(tmp_path, whole("a", 1000, 1, 0.1, 10.0), whole("b", 250, 5, 0.3, 30.0))
    d = compare(config(paths))["artifacts"][1]["differences"]
    for n in (0, 1):
        a, b = tokens(1 + n, 0.1), tokens(5 + n, 0.3)
        for key in ("kld", "top1"):
            means = b[key].astype(float).mean(1) - a[key].astype(float).mean(1)  # a chunk at a time
            assert d["texts"][n][key]["value"] == pytest.approx(means.mean(), abs=1e-9)
            assert d["texts"][n][key]["se"] == pytest.approx(math.sqrt(means.var(ddof=1) / CHUNKS))
        logs = b["nll"].astype(float).mean(1) - a["nll"].astype(float).mean(1)
        ratio = d["texts"][n]["perplexity_ratio"]
        assert ratio["value"] == pytest.approx(math.exp(logs.mean()), rel=1e-6)
        assert ratio["se"] == pytest.approx(math.exp(logs.mean()) * math.sqrt(logs.var(ddof=1) / CHUNKS), rel=1e-6)
    assert d["size_ratio"] == 0.25
    faster = d["speeds"]["local-cpu"]
    assert faster["decode_speedup"]["value"] == pytest.approx(3)
    assert faster["first_token_ratio"]["value"] == pytest.approx(1 / 3)
    one = np.log([0.98, 0.99, 1.0, 1.01, 1.02]).std(ddof=1) / math.sqrt(5)
    assert faster["decode_speedup"]["se"] == pytest.approx(3 * math.sqrt(2) * one)


def test_an_artifact_against_itself_differs_by_nothing(tmp_path: Path) -> None:
    one = whole("a", 1000, 1, 0.1, 10.0)
    two = copy.deepcopy(one)
    two["artifact"]["sha256"] = "e" * 64
    result = compare(config(write(tmp_path, one, two)))
    for t in result["artifacts"][1]["differences"]["texts"]:
        assert (t["perplexity_ratio"]["value"], t["perplexity_ratio"]["se"]) == (1, 0)
        assert (t["kld"]["value"], t["kld"]["se"], t["top1"]["value"]) == (0, 0, 0)
    assert [a["name"] for a in result["artifacts"]] == ["out/a", "out/a"]  # equal names: their paths are shown


PROTOCOL = ["text_sha256", "tokenizer_sha256", "ids_sha256", "context", "stride", "scored", "bos", "chunks", "scored_tokens",
            "bytes", "vocabulary"]


@pytest.mark.parametrize("field", PROTOCOL)
@pytest.mark.parametrize("text", [0, 1])
def test_unequal_protocols_are_refused(field: str, text: int, pair: list[Path]) -> None:
    r = json.loads(pair[1].read_text())
    p = r["quality"]["texts"][text]["protocol"]
    before = p[field]
    p[field] = before + 1 if isinstance(before, int) else f"other {before[:3]}"
    pair[1].write_text(json.dumps(r))
    with pytest.raises(UserError) as e:
        compare(config(pair))
    assert f"{field} (of the text {p['text']}) is {before!r} in one and {p[field]!r} in the other" in e.value.problem
    assert e.value.exit_code == 2


@pytest.mark.parametrize("field", ["prompt", "depth", "generate", "threads", "device", "cpu", "cores"])
def test_unequal_benches_are_refused(field: str, pair: list[Path]) -> None:
    r = json.loads(pair[1].read_text())
    r["speeds"]["local-cpu"]["protocol"][field] = "other"
    pair[1].write_text(json.dumps(r))
    with pytest.raises(UserError, match=rf"{field} \(on local-cpu\) is .* and 'other' in the other"):
        compare(config(pair))


def test_other_texts_and_other_bases_are_refused(pair: list[Path]) -> None:
    original = json.loads(pair[1].read_text())
    r = copy.deepcopy(original)
    r["quality"]["texts"].pop()
    pair[1].write_text(json.dumps(r))
    with pytest.raises(UserError, match="texts is"):
        compare(config(pair))
    r = copy.deepcopy(original)
    r["quality"]["base"]["sha256"] = "f" * 64
    pair[1].write_text(json.dumps(r))
    with pytest.raises(UserError, match="the base is base"):
        compare(config(pair))


def test_a_baseline_without_a_base_has_a_perplexity_to_compare(pair: list[Path]) -> None:
    r = json.loads(pair[0].read_text())
    r["quality"]["base"] = None
    for t in r["quality"]["texts"]:
        t |= {"kld": None, "top1": None, "perplexity_ratio": None, "base_perplexity": None}
        t["per_token"] = {"nll": t["per_token"]["nll"]}
    pair[0].write_text(json.dumps(r))
    result = compare(config(pair, max_ppl_increase="90%", max_kld="0.9"))
    changes = result["artifacts"][1]["differences"]["texts"][0]
    assert changes["kld"] is None
    assert changes["perplexity_ratio"]["value"] > 1
    assert page(result)
    assert tables(result)


def test_quality_and_speed_from_two_files_are_joined(tmp_path: Path, pair: list[Path]) -> None:
    r = json.loads(pair[1].read_text())
    parts = [{k: v for k, v in r.items() if k != drop} for drop in ("speeds", "quality")]
    split = [pair[0]]
    for i, part in enumerate(parts):
        split.append(tmp_path / f"part{i}.json")
        split[-1].write_text(json.dumps(part))
    assert compare(config(split)) == compare(config(pair))
    with pytest.raises(UserError, match="second report with a quality section of small"):
        compare(config([*split, split[1]]))


def test_speeds_are_compared_target_by_target(tmp_path: Path) -> None:
    one, two = whole("a", 1000, 1, 0.1, 10.0), whole("b", 250, 5, 0.3, 30.0)
    for r, decode in ((one, 2.0), (two, 3.0)):
        r["speeds"] |= {"pi": speed(decode, "pi"), "arm": speed(decode, "emulated-arm64")}
    del one["speeds"]["local-cpu"]
    found = compare(config(write(tmp_path, one, two), min_decode_speedup="1.4x"))
    speeds = found["artifacts"][1]["differences"]["speeds"]
    assert list(speeds) == ["pi"], "local-cpu was measured of one only, and an emulated speed is nothing to compare"
    assert speeds["pi"]["decode_speedup"]["value"] == pytest.approx(1.5)
    assert [(g["text"], g["passed"]) for g in found["gates"]] == [("pi", True)]
    titles = [title for title, _, _ in tables(found)]
    assert [t for t in titles if t.startswith("Speed")] == ["Speed on pi", "Speed on arm", "Speed on local-cpu"]
    html = page(found)
    assert "Speed on pi against divergence" in html
    assert "Speed on arm against divergence" not in html


def test_speeds_of_several_files_are_joined_by_target(tmp_path: Path) -> None:
    one = whole("a", 1000, 1, 0.1, 10.0)
    more = {**one, "speeds": {"pi": speed(2.0, "pi")}}
    del more["quality"]
    (found,) = compare(config(write(tmp_path, one, more)))["artifacts"]
    assert list(found["report"]["speeds"]) == ["local-cpu", "pi"]
    with pytest.raises(UserError, match="second report with the speed on pi of a"):
        compare(config(write(tmp_path, more, more)))


def test_speed_alone(pair: list[Path]) -> None:
    for path in pair:
        r = json.loads(path.read_text())
        del r["quality"]
        path.write_text(json.dumps(r))
    result = compare(config(pair, min_decode_speedup="2.5x"))
    assert result["passed"]
    assert result["artifacts"][1]["differences"]["texts"] is None
    assert "llmc eval ARTIFACT --base BASE" in page(result)
    with pytest.raises(UserError, match="--max-kld: the reports hold no such figure for small"):
        compare(config(pair, max_kld="0.1"))


@pytest.mark.parametrize(("gate", "passes", "fails"), [
    ("max_ppl_increase", "30%", "10%"), ("max_kld", "0.2", "0.1"), ("min_top1", "70%", "95%"),
    ("min_decode_speedup", "2.9x", "3.5x"),
])
def test_gates(gate: str, passes: str, fails: str, pair: list[Path]) -> None:
    assert compare(config(pair, **{gate: passes}))["passed"]
    result = compare(config(pair, **{gate: fails}))
    assert not result["passed"]
    with pytest.raises(GateFailedError) as e:
        gates.enforce(result["gates"])
    option = "--" + gate.replace("_", "-")
    assert e.value.problem.count(f"{option} {fails}, measured") == len(result["gates"])
    assert e.value.exit_code == 1
    gates.enforce(compare(config(pair, **{gate: passes}))["gates"])


def test_a_gate_holds_on_every_text_and_for_every_candidate(tmp_path: Path) -> None:
    bad_second = whole("b", 250, 5, 0.05, 30.0)
    bad_second["quality"]["texts"][1] = quality(5, 0.4)["texts"][1]
    paths = write(tmp_path, whole("base", 1000, 1, 0.0, 10.0), whole("a", 250, 3, 0.05, 30.0), bad_second)
    missed = [g for g in compare(config(paths, max_kld="0.1"))["gates"] if not g["passed"]]
    assert [(g["artifact"], g["text"]) for g in missed] == [("b", "tales")]


@pytest.mark.parametrize(("gate", "written"), [
    ("max_ppl_increase", "5"), ("max_ppl_increase", "0.05x"), ("max_ppl_increase", "-5%"), ("max_kld", "0.1%"),
    ("max_kld", "nan"), ("max_kld", ""), ("min_top1", "0.8"), ("min_top1", "80 %"), ("min_decode_speedup", "2"),
    ("min_decode_speedup", "2x faster"),
])
def test_gates_are_read_strictly(gate: str, written: str, pair: list[Path]) -> None:
    with pytest.raises(UserError, match="is not a number") as e:
        compare(config(pair, **{gate: written}))
    assert e.value.exit_code == 2


def test_a_missing_speed_is_no_pass(pair: list[Path]) -> None:
    r = json.loads(pair[0].read_text())
    del r["speeds"]
    pair[0].write_text(json.dumps(r))
    with pytest.raises(UserError, match="--min-decode-speedup: the reports hold no such figure"):
        compare(config(pair, min_decode_speedup="2x"))


class Reader(HTMLParser):
    """Collects tags and attributes, so that text cannot pass for markup unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            self.attributes.setdefault(key, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page(tmp_path: Path) -> None:
    paths = write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), whole(HOSTILE, 250_000, 5, 0.2, 30.0, layers=4),
                  whole("third", 500_000, 8, 0.1, 20.0, layers=4))
    html = page(compare(config(paths, max_kld="0.1")))
    reader = Reader()
    reader.feed(html)
    assert "script" not in reader.tags
    assert reader.text.count(HOSTILE) > 5
    assert "third" in reader.text
    assert reader.tags.count("svg") == 6
    assert "gates missed" in reader.text
    assert "damp raised in third" in reader.text
    for axis in ("file, MB", "decode, tokens/s", "KL divergence to the base, nats", "output energy lost, %", "MB of tensors"):
        assert axis in reader.text
    # nothing is fetched from anywhere
    assert not {"src", "href", "srcset"} & set(reader.attributes)
    assert "url(" not in html
    assert "prefers-color-scheme: dark" in html


def test_the_page_marks_a_bench_that_is_unstable(tmp_path: Path) -> None:
    name = "a-name-that-is-longer-than-its-label-may-be"
    shaky = whole(name, 250_000, 5, 0.2, 30.0)
    mark = "UNSTABLE"
    reports = write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), shaky)
    assert mark not in page(compare(config(reports)))
    why = ["decode is known to ±23.0% only", "prefill drifts by +12% over the repetitions"]
    shaky["speeds"]["local-cpu"]["unstable"] = why
    html = page(compare(config(write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), shaky))))
    cards, size_chart, speed_chart = html.split("<figure")[:3]
    assert re.findall(r"<dd>([^<]*)</dd>", cards)[-2] == (
        f"30.0 tokens/s (3.00x); {mark}: {why[0]}; {mark}: {why[1]}")
    assert cards.count(mark) == 2, "the baseline's bench is stable"
    assert mark not in size_chart, "its size is certain"
    assert re.findall(r'class="mark"[^>]*>([^<]*)<', speed_chart) == ["base", "a-name-that-is-longer-th… UNSTABLE"]
    assert speed_chart.count("stroke-dasharray") == 2  # a point for each of the two texts
    assert "Broken outline" in speed_chart


@pytest.mark.parametrize(("name", "by", "label"), [("heal", "kld", "KL divergence, nats"), ("distill", "loss", "loss, nats")])
def test_the_page_draws_how_a_training_went(name: str, by: str, label: str, tmp_path: Path) -> None:
    healed = whole("healed", 250_000, 5, 0.2, 30.0)
    checks = [{"step": n, by: value, "training": None} for n, value in ((0, 0.4), (2, 0.1), (4, 0.2))]
    healed["artifact"]["passes"] = [{"name": name, "curve": checks, "losses": [0.5, 0.3, 0.2, 0.3], "best_step": 2}]
    html = page(compare(config(write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), healed))))
    reader = Reader()
    reader.feed(html)
    assert label in reader.text
    assert re.findall(r"healed, held-out, \d: ([\d.]+)", reader.text) == ["0.4", "0.1", "0.2"]
    assert reader.attributes["class"].count("line thin") == 1
    # a ring around the step that was kept, just before its dot
    assert re.search(r'<circle (cx="[\d.]+" cy="[\d.]+") r="8" fill="none" [^>]+/><circle \1 [^>]+>'
                     r"<title>healed, held-out, 2: 0.1<", html)


def test_markdown_keeps_its_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write(tmp_path, whole("base", 1000_000, 1, 0.0, 10.0), whole(HOSTILE, 250_000, 5, 0.2, 30.0))
    assert run(["compare", *map(str, paths), "--markdown", "-"]) == 0
    lines = capsys.readouterr().out.splitlines()
    blocks = [[]]
    for line in lines:
        if line.startswith("|"):
            blocks[-1].append(len(re.findall(r"(?<!\\)\|", line)))
        elif blocks[-1]:
            blocks.append([])
    assert len([b for b in blocks if b]) == 4  # size, two texts, speed
    assert all(len(set(b)) == 1 for b in blocks if b)


def test_command_line(pair: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(p) for p in pair]
    assert run(["compare", *names]) == 0
    out = capsys.readouterr().out
    assert "small" in out
    assert "±" in out
    assert Path("compare.html").is_file()
    assert run(["compare", *names, "--json", "--page", "other.html", "--max-kld", "0.9"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"]
    assert "per_token" not in json.dumps(printed)
    assert Path("other.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run(["compare", *names, "--max-kld", "0.1", "--min-decode-speedup", "9x"]) == 1
    out, err = capsys.readouterr()
    assert "MISSED" in out
    assert "--max-kld 0.1, measured" in err
    assert "--min-decode-speedup 9x, measured 3x" in err
    assert run(["compare", *names, "--max-kld", "ten"]) == 2
    assert run(["compare", names[0], "nowhere.json"]) == 2
    assert "no report nowhere.json" in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    "", "{", "[]", "{}", '{"kind": "llmc-report"}',
    '{"kind": "llmc-report", "schema": 99, "artifact": {}, "versions": {}}',
])
def test_what_is_no_report(content: str, pair: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    with pytest.raises(UserError, match=r"bad\.json"):
        compare(config([pair[0], bad]))


def test_real_artifacts(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    """From eval and bench to the page, with what llmc makes."""
    common = ["--base", str(made.base), "--context", "64", "--chunks", "4", "--threads", "1"]
    for artifact_path, name in ((made.base, "base.json"), (made.gguf, "small.json")):
        assert run(["eval", str(artifact_path), *common, "-o", name]) == 0
    capsys.readouterr()
    assert run(["compare", "base.json", "small.json", "--json", "--max-ppl-increase", "1000%"]) == 0
    small = json.loads(capsys.readouterr().out)["artifacts"][1]
    t = small["report"]["quality"]["texts"][0]
    # against the base itself, the paired ratio is the one that eval gave
    changes = small["differences"]["texts"][0]
    assert changes["perplexity_ratio"]["value"] == pytest.approx(t["perplexity_ratio"]["value"], rel=1e-6)
    assert changes["kld"]["value"] == pytest.approx(t["kld"]["value"])
    assert "Error by layer" in Path("compare.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "kind"), [
    ("model.embed_tokens.weight", "embedding"), ("transformer.wte.weight", "embedding"), ("token_embd.weight", "embedding"),
    ("model.decoder.embed_positions.weight", "embedding"), ("gpt_neox.embed_in.weight", "embedding"),
    ("lm_head.weight", "head"), ("output.weight", "head"), ("embed_out.weight", "head"), ("output_norm.weight", "other"),
    ("model.layers.0.self_attn.o_proj.weight", "attention"), ("blk.3.attn_output.weight", "attention"),
    ("gpt_neox.layers.0.attention.query_key_value.weight", "attention"), ("blk.0.attn_norm.weight", "other"),
    ("model.layers.0.self_attn.q_norm.weight", "other"), ("h.0.attn.c_attn", "attention"), ("blk.0.ffn_up.weight", "mlp"),
    ("model.layers.0.mlp.gate_proj.weight", "mlp"), ("model.decoder.layers.1.fc2.weight", "mlp"),
    ("model.layers.0.post_attention_layernorm.weight", "other"), ("model.norm.weight", "other"), ("h.0.ln_1.bias", "other"),
    ("model.decoder.layers.0.self_attn_layer_norm.weight", "other"), ("blk.0.ffn_norm.weight", "other"),
])
def test_classes(name: str, kind: str) -> None:
    assert classify(name) == kind


def test_weights_of_one_model_in_three_forms(made: SimpleNamespace) -> None:
    base, folder, file = (weigh(p) for p in (made.base, made.gptq, made.gguf))
    assert base["parameters"] == folder["parameters"] == file["parameters"]
    for w in (base, folder, file):
        assert sum(c["bytes"] for c in w["classes"].values()) == w["tensor_bytes"] < w["file_bytes"]
        assert sum(w["types"].values()) == w["tensor_bytes"]
        assert [w["classes"][k]["parameters"] for k in CLASSES] == [base["classes"][k]["parameters"] for k in CLASSES]
    assert base["bits_per_weight"] == 16
    assert file["decoder_bits_per_weight"] == 4.5
    assert base["tied"]


@pytest.mark.parametrize(("top", "expected"), [
    (1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.27, [0, 0.1, 0.2, 0.3]), (270, [0, 100, 200, 300]), (0, [0, 1]),
])
def test_ticks(top: float, expected: list[float]) -> None:
    assert charts.ticks(top) == pytest.approx(expected)


def test_points_lie_inside_their_frame_and_labels_do_not_overlap() -> None:
    points = [charts.Point(x, y, f"artifact-{i}", i, error=0.02) for i, (x, y) in enumerate(
        [(100, 0.3), (101, 0.31), (102, 0.29), (270, 0.0), (90, 0.1)])]
    svg = charts.scatter(points, "x", "y")
    circles = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert len(circles) == 5
    assert all(charts.LEFT <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT - charts.BOTTOM for x, y in circles)
    boxes = []
    for x, y, anchor, label in re.findall(r'<text class="mark" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]+)<', svg):
        width = len(label) * charts.LETTER
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        boxes.append((left, float(y) - 11, left + width, float(y) + 3))
    assert len(boxes) == 5
    assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
                   for i, a in enumerate(boxes) for b in boxes[:i])
