"""The report of one artifact: a JSON file. `llmc eval` and `llmc bench` both write to it, `llmc compare` reads it.

Its types are in schema.py. The sha256 identifies the artifact.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, overload

import numpy as np

from llmc.errors import UserError
from llmc.evals.report.schema import Described, Packed, Quality, Report, Speed, Task, Text
from llmc.evals.report.sections import budget_of, kv_type, quality_of, speeds_of
from llmc.files import write_json
from llmc.formats import kv
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.manifest import read_manifest, versions
from llmc.locks import locked
from llmc.places import check_place
from llmc.small_files import LARGE, read_json

SCHEMA = 2
KIND = "llmc-report"


def hash_artifact(artifact: Path) -> str:
    """The sha256 that identifies an artifact in reports (Artifact.sha256)."""
    return artifact_at(artifact).sha256()


def describe_artifact(artifact: Path) -> Described:
    """Identity, size and origin of an artifact. The origin is read from its manifest, if there is one."""
    manifest = read_manifest(artifact) or {}
    opened = artifact_at(artifact)
    passes = manifest.get("passes", [])
    # the layers of the last pass that recorded them
    layers: list[dict[str, Any]] = next((p["layers"] for p in reversed(passes) if p.get("layers")), [])
    return {
        "name": artifact.name, "path": str(artifact), "sha256": opened.sha256(),
        "kind": manifest.get("kind") or opened.format, "size": opened.weigh(),
        "kv": kv.described(opened.kv_shape()),
        "source": manifest.get("source"), "created": manifest.get("created"),
        "passes": [{k: v for k, v in p.items() if k != "layers"} for p in passes],
        "layers": [{"layer": x.get("layer"), "error": x.get("error"), "events": x.get("events") or []} for x in layers],
    }


def read_report(path: Path) -> Report:
    """Read a report. Raises UserError if it is not a complete report of this version. The sections are not checked."""
    if not path.exists():
        raise UserError(f"there is no report {path}", "make it with `llmc eval ARTIFACT --base BASE -o FILE`")
    report = read_json(path, LARGE, "give reports of `llmc eval` or `llmc bench`")
    if not isinstance(report, dict) or report.get("kind") != KIND:
        raise UserError(f"{path} is not a report of llmc", "give reports of `llmc eval` or `llmc bench`")
    if lacking := [k for k in ("schema", "artifact", "versions") if k not in report]:
        raise UserError(f"{path} is not a complete report: {', '.join(lacking)} missing", "make the report again")
    if report.get("schema") != SCHEMA:
        raise UserError(f"{path} has report schema {report.get('schema')!r}; this llmc reads {SCHEMA}",
                        "make the report again with this version")
    return cast(Report, report)


def check_output(path: Path | None, digest: str, kv: str | None = None, *inputs: Any) -> None:
    """Check the output before any work. Raises UserError if the file exists and is not a report of the same artifact.

    kv: type of the KV cache that the report must have; None: any. inputs: what is read, as of `check_place`.
    """
    if path is None:
        return
    check_place(path, inputs)
    if path.exists():
        before = read_report(path)
        other = before["artifact"]
        if other["sha256"] != digest:
            found = f"{other['name']} (sha256 {other['sha256'][:12]}…, not {digest[:12]}…)"
            raise UserError(f"{path} is the report of another artifact, {found}",
                            "choose another file with -o, or delete this one")
        if kv is not None and kv_type(before) not in (None, kv):
            raise UserError(f"{path} is the report of {other['name']} with a KV cache in {kv_type(before)}, not {kv}",
                            "choose another file with -o; llmc compare can compare the two")


@overload
def new_report(artifact: Described, section: Literal["quality"], value: Quality) -> Report: ...
@overload
def new_report(artifact: Described, section: Literal["speeds"], value: dict[str, Speed]) -> Report: ...
def new_report(artifact: Described, section: str, value: Any) -> Report:
    """Return a report with one section. For `quality`, add the section `budget` if a budget chose the artifact's types."""
    made = cast(Report, {"schema": SCHEMA, "kind": KIND, "artifact": artifact, section: value, "versions": versions()})
    if section == "quality" and (budget := budget_of(made)):
        made["budget"] = budget
    return made


def merged(before: Report | None, report: Report) -> Report:
    """Return `report` plus the sections, and the targets of `speeds`, that only `before` has."""
    if before is None:
        return report
    made: Report = {**before, **report}
    if speeds := {**speeds_of(before), **speeds_of(report)}:
        made["speeds"] = speeds
    return made


def save(path: Path, report: Report) -> None:
    """Write `report`, merged with the report that is already in the file. Raises UserError as check_output does."""
    with locked(path, wait=True):  # `llmc eval` and `llmc bench` at once: each keeps what the other has written
        check_output(path, report["artifact"]["sha256"], kv_type(report))
        write_json(path, merged(read_report(path) if path.exists() else None, report))


def without_arrays(report: Report) -> Report:
    """The report without its per-token and per-item arrays, for `--json`."""
    if (quality := quality_of(report)) is None:
        return report
    made: Quality = {**quality, "texts": [cast(Text, _without(t, "per_token")) for t in quality["texts"]]}
    if "tasks" in quality:
        made["tasks"] = [cast(Task, _without(t, "per_item")) for t in quality["tasks"]]
    return {**report, "quality": made}


def _without(entry: Mapping[str, object], key: str) -> dict[str, object]:
    return {k: v for k, v in entry.items() if k != key}


def pack(values: np.ndarray) -> Packed:
    """Return an array as JSON: the base64 of little-endian float32, or of one byte per boolean."""
    dtype = "|b1" if values.dtype == bool else "<f4"
    data = base64.b64encode(values.astype(dtype).tobytes()).decode()
    return {"dtype": dtype, "shape": list(values.shape), "data": data}


def unpack(packed: Packed) -> np.ndarray:
    """The inverse of `pack`."""
    raw = base64.b64decode(packed["data"], validate=True)
    return np.frombuffer(raw, dtype=packed["dtype"]).reshape(packed["shape"])
