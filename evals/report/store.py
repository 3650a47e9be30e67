"""The report of one artifact: one JSON file that `llmc eval` and `llmc bench` both write into and `llmc compare` reads.

    {"schema": 2, "kind": "llmc-report", "artifact": {…}, "quality": {…}, "budget": {…}, "speeds": {target: {…}},
     "versions": {…}}

`quality` and `speeds` are there once they were measured, `budget` where a budget chose the types; `speeds` has a section for
each target (a device, by its name). The artifact's sha256 says whose figures they are.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.files import write_json
from llmc.formats import kv
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.manifest import read_manifest, versions

SCHEMA = 2
KIND = "llmc-report"


def hash_artifact(artifact: Path) -> str:
    """Whose figures a report holds (Artifact.sha256)."""
    return artifact_at(artifact).sha256()


def describe_artifact(artifact: Path) -> dict[str, Any]:
    """Identity, weight and provenance of an artifact, as far as its manifest tells."""
    manifest = read_manifest(artifact) or {}
    opened = artifact_at(artifact)
    passes = manifest.get("passes", [])
    # of the last pass that has any
    layers: list[dict[str, Any]] = next((p["layers"] for p in reversed(passes) if p.get("layers")), [])
    return {
        "name": artifact.name, "path": str(artifact), "sha256": opened.sha256(),
        "kind": manifest.get("kind") or opened.format, "size": opened.weigh(),
        "kv": kv.described(opened.kv_shape()),
        "source": manifest.get("source"), "created": manifest.get("created"),
        "passes": [{k: v for k, v in p.items() if k != "layers"} for p in passes],
        "layers": [{"layer": x.get("layer"), "error": x.get("error"), "events": x.get("events") or []} for x in layers],
    }


def budget_of(report: dict[str, Any]) -> dict[str, Any] | None:
    """What a budget predicted when it chose the artifact's types, and what was found; None for an artifact without one.

    {'target', 'planned_bytes' (of the .gguf file), 'file_bytes' (None: this is not the file), 'predicted_kld' (on
    calibration text), 'peer' (of --target-size as:PRESET), 'healed', 'measured': [{'text', 'kld', 'se', 'ratio' (to the
    prediction)}]}. A later pass, `heal`, moves the divergence, not the bytes.
    """
    names = [p.get("name") for p in report["artifact"]["passes"]]
    plans = [p["plan"] for p in report["artifact"]["passes"] if p.get("plan")]
    if not plans:
        return None
    plan, texts = plans[-1], report.get("quality", {}).get("texts", [])
    predicted = float(plan["predicted_kld"])
    measured = [{"text": t["protocol"]["text"], "kld": t["kld"]["value"], "se": t["kld"]["se"],
                 "ratio": t["kld"]["value"] / predicted if predicted > 0 else None} for t in texts if t["kld"]]
    return {"target": plan["target"], "planned_bytes": plan["file_bytes"],
            "file_bytes": report["artifact"]["size"]["file_bytes"] if "export-gguf" in names else None,
            "predicted_kld": predicted, "peer": plan.get("peer"), "healed": "heal" in names, "measured": measured}


def read_report(path: Path) -> dict[str, Any]:
    """A report as written by `save`, its frame checked."""
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"there is no report {path}", "make it with `llmc eval ARTIFACT --base BASE -o FILE`") from e
    except (ValueError, IsADirectoryError) as e:
        raise UserError(f"{path} is not a JSON file: {e}", "give reports of `llmc eval` or `llmc bench`") from e
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise UserError(f"{path} is not a report of llmc", "give reports of `llmc eval` or `llmc bench`")
    if lacking := [k for k in ("schema", "artifact", "versions") if k not in report]:
        raise UserError(f"{path} is not a whole report: {', '.join(lacking)} missing", "make the report again")
    if report.get("schema") != SCHEMA:
        raise UserError(f"{path} has report schema {report.get('schema')!r}; this llmc reads {SCHEMA}",
                        "make the report again with this version")
    return report


def kv_type(report: dict[str, Any]) -> str | None:
    """The type of the KV cache that a report's figures are of; all its sections have the same."""
    sections = [report["quality"]] if "quality" in report else []
    return next((s["kv"]["type"] for s in [*sections, *speeds_of(report).values()] if "kv" in s), None)


def check_output(path: Path | None, digest: str, kv: str | None = None) -> None:
    """Before any work: an existing file at `path` must be a report of the same artifact, with that KV cache (None: any)."""
    if path is not None and path.exists():
        before = read_report(path)
        other = before["artifact"]
        if other["sha256"] != digest:
            theirs = f"{other['name']} (sha256 {other['sha256'][:12]}…, not {digest[:12]}…)"
            raise UserError(f"{path} is the report of another artifact, {theirs}",
                            "choose another file with -o, or delete that one")
        if kv is not None and kv_type(before) not in (None, kv):
            raise UserError(f"{path} is the report of {other['name']} with a KV cache in {kv_type(before)}, not {kv}",
                            "choose another file with -o: llmc compare holds the two side by side")


def new_report(artifact: dict[str, Any], section: str, value: dict[str, Any]) -> dict[str, Any]:
    """A report with one section: 'quality' or 'speeds'. One of an artifact that was made to a budget says beside the quality
    what the budget promised."""
    made = {"schema": SCHEMA, "kind": KIND, "artifact": artifact, section: value, "versions": versions()}
    budget = budget_of(made) if section == "quality" else None
    return {**made, "budget": budget} if budget else made


def speeds_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The speed sections by target, in the order in which they were measured; empty where nothing was."""
    found: dict[str, dict[str, Any]] = report.get("speeds", {})
    return found


def targets_of(reports: list[dict[str, Any]]) -> list[str]:
    """Every target that something was benched on, in order of appearance."""
    return list(dict.fromkeys(target for r in reports for target in speeds_of(r)))


def merged(before: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """`report`, with the sections that only `before` has and the speeds on targets that only `before` has."""
    speeds = {**speeds_of(before), **speeds_of(report)}
    return {**before, **report, **({"speeds": speeds} if speeds else {})}


def save(path: Path, report: dict[str, Any]) -> None:
    """Write `report`, merged with the one that the file holds."""
    check_output(path, report["artifact"]["sha256"], kv_type(report))
    write_json(path, merged(read_report(path) if path.exists() else {}, report))


def without_arrays(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its per-token and per-item arrays, for people and pipes."""
    if "quality" not in report:
        return report
    lists = {k: [{n: v for n, v in t.items() if n not in ("per_token", "per_item")} for t in report["quality"][k]]
             for k in ("texts", "tasks") if k in report["quality"]}
    return {**report, "quality": {**report["quality"], **lists}}


def pack(values: np.ndarray) -> dict[str, Any]:
    """An array as JSON: floats as little-endian float32, booleans as bytes, base64."""
    kind = "|b1" if values.dtype == bool else "<f4"
    data = base64.b64encode(values.astype(kind).tobytes()).decode()
    return {"dtype": kind, "shape": list(values.shape), "data": data}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """The inverse of `pack`."""
    raw = base64.b64decode(packed["data"], validate=True)
    return np.frombuffer(raw, dtype=packed["dtype"]).reshape(packed["shape"])
