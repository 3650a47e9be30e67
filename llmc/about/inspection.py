"""`llmc inspect`: the contents of an artifact, made by llmc or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmc.console import size
from llmc.formats.artifacts.table import artifact_at
from llmc.formats.manifest import MANIFEST, read_manifest


def inspect(artifact: str | Path, tensors: bool = False) -> dict[str, Any]:
    """Contents of a model folder (float, quantized or ONNX), a .gguf file, or an importance matrix (see `_imatrix`).

    Returns {'artifact', 'format', 'architecture', 'model', 'type', 'weights' (Artifact.weigh), 'kv' (of its cache,
    llmc.formats.kv), 'tokenizer', 'licence', 'provenance' (the manifest without its file hashes, None if there is none)}, and
    with `tensors` also 'tensors', one object each. A value is None if the artifact does not state it.
    """
    from llmc.formats import kv

    path = Path(artifact)
    opened = artifact_at(path)
    if opened.format == "gguf" and (matrix := _imatrix(path, tensors)) is not None:
        return matrix
    found = opened.facts()
    manifest = read_manifest(path)
    if manifest:
        found["licence"] = manifest.get("source", {}).get("licence") or found["licence"]
        manifest = {k: v for k, v in manifest.items() if k != "outputs"}
    report = {"artifact": str(artifact), **found, "weights": opened.weigh(), "kv": kv.described(opened.kv_shape()),
              "provenance": manifest}
    if tensors:
        report["tensors"] = [asdict(t) for t in opened.tensors()]
    return report


def _blocks(b: dict[str, Any]) -> str:
    """One entry of 'matmul_nbits' as text: '21 MatMulNBits int4 block 32, accuracy level 4'."""
    qtype = f"int{b['bits']} block {b['block_size']}" + ("" if b["symmetric"] else " asym")
    return f"{b['matrices']} MatMulNBits {qtype}, accuracy level {b['accuracy_level']}"


def _imatrix(file: Path, tensors: bool) -> dict[str, Any] | None:
    """The contents of an importance matrix. None for any other .gguf file.

    Returns {'artifact', 'format', 'datasets', 'chunks', 'chunk_size', 'tokens' (maximum over the matrices), 'matrices',
    'layers', 'unseen' (matrices and experts that no token reached), 'provenance'}, and with `tensors` also
    'tensors', one object each.
    """
    from llmc.formats.gguf import field, open_gguf
    from llmc.formats.imatrix import is_imatrix, read_imatrix

    reader = open_gguf(file)
    if not is_imatrix(reader):
        return None
    matrix = read_imatrix(file)
    listed = [{
        "name": name, "columns": e.sums.shape[1], "experts": e.sums.shape[0], "tokens": int(e.counts.max()),
        "zero_columns": int((e.sums.sum(0) == 0).sum()), "peak_to_mean": float(e.sums.max() / (e.sums.mean() or 1)),
    } for name, e in matrix.entries.items()]
    manifest = read_manifest(file)
    report = {
        "artifact": str(file), "format": f"importance matrix, GGUF version {field(reader, 'GGUF.version')}",
        "datasets": matrix.datasets, "chunks": matrix.chunk_count, "chunk_size": matrix.chunk_size,
        "tokens": max(m["tokens"] for m in listed), "matrices": len(listed),
        "layers": len({m["name"].split(".")[1] for m in listed if m["name"].startswith("blk.")}),
        "unseen": [name if e.unseen else f"expert {i} of {name}" for name, e in matrix.entries.items()
                   for i in ([0] if e.unseen else (e.counts == 0).nonzero()[0].tolist())],
        "provenance": manifest and {k: v for k, v in manifest.items() if k != "outputs"},
    }
    return {**report, "tensors": listed} if tensors else report


# --------------------------------------------------------------------------------------------------------------- text


def describe(report: dict[str, Any]) -> str:
    """The report as a page of plain text."""
    if "matrices" in report:
        return "\n".join(_describe_imatrix(report))
    from llmc.formats.kv import KvUse, section_text

    w, m, t = report["weights"], report["model"], report["tokenizer"]
    shape = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in m.items() if v is not None)
    lines = [
        f"{report['artifact']}: {report['format']}",
        f"architecture  {report['architecture']}: {shape}",
        f"parameters    {w['parameters'] / 1e6:,.1f} M, {'tied' if w['tied'] else 'untied'} embedding and head",
        f"type          {report['type'] or 'none: float weights'}",
        f"matrices      {', '.join(f'{n} {kind}' for kind, n in w['matrices'].items())}",
        f"size          {size(w['file_bytes'])}; {w['bits_per_weight']:.2f} bits per weight in all, "
        f"{w['decoder_bits_per_weight']:.2f} in the decoder's matrices; {size(w['token_bytes'])} read per token",
    ]
    for name, c in w["classes"].items():
        if c["parameters"]:
            share = 100 * c["bytes"] / w["tensor_bytes"]
            lines.append(f"  {name:<11} {size(c['bytes']):>9}  {share:4.1f} %  {', '.join(c['types'])}")
    if kv := report["kv"]:
        heads = f"{kv['layers']} layers, {kv['kv_heads']} heads of {kv['head_dim']}"
        section: KvUse = {"type": "f16", "bytes_per_token": kv["bytes_per_token_f16"], "bytes_at": kv["bytes_at"]}
        lines.append(f"KV cache      {section_text(section)} tokens ({heads})")
    if "operators" in report:
        lines += [f"computed by   {_blocks(b)}" for b in report["matmul_nbits"]]
        lines.append("operators     " + ", ".join(f"{n} {op}" for op, n in report["operators"].items()))
        lines += [f"note          {note}" for note in report["notes"]]
    template = t["chat_template_sha256"]
    kind = f"{t['model']} ({t['pre']}), " if "model" in t else ""
    lines += [
        f"tokenizer     {kind}{t['vocabulary']} tokens" + (f", ends at {t['eos']}" if "eos" in t else ""),
        f"chat template {'none' if template is None else 'sha256 ' + template[:16] + '…'}",
        f"licence       {report['licence'] or 'unknown'}",
        *_describe_provenance(report["provenance"]),
    ]
    for tensor in report.get("tensors", []):
        lines.append(f"{tensor['type']:>10} {tensor['parameters']:>12,} {size(tensor['nbytes']):>9}  {tensor['name']}")
    return "\n".join(lines)


def _describe_imatrix(report: dict[str, Any]) -> Iterator[str]:
    yield f"{report['artifact']}: {report['format']}"
    yield f"matrices      {report['matrices']} in {report['layers']} layers"
    yield f"text          {', '.join(report['datasets']) or 'not named'}"
    yield f"tokens        {report['tokens']:,}, in {report['chunks']} chunks of {report['chunk_size']}"
    if unseen := report["unseen"]:
        yield f"unseen        {len(unseen)} matrices or experts that no token reached, first {unseen[0]}"
    yield from _describe_provenance(report["provenance"])
    for m in report.get("tensors", []):
        experts = f"{m['experts']} experts, " if m["experts"] > 1 else ""
        yield (f"{m['columns']:>8} columns, {experts}{m['zero_columns']} zero, largest {m['peak_to_mean']:,.1f} x the mean  "
               f"{m['name']}")


def _describe_provenance(manifest: dict[str, Any] | None) -> Iterator[str]:
    if manifest is None:
        yield "made by       not llmc (no manifest)"
        return
    source = manifest.get("source", {})
    revision = f" at {source['revision'][:12]}" if source.get("revision") else ""
    yield f"made from     {source.get('name')}{revision}, {manifest.get('created')}"
    for p in manifest.get("passes", []):
        config = ", ".join(f"{k} {v}" for k, v in p.get("config", {}).items() if v is not None)
        yield f"  pass        {p['name']}: {config}"
        if text := p.get("calibration"):
            yield f"  calibration {text['name']}: {text['tokens']:,} tokens, sha256 {text['sha256'][:16]}…"
        counts = [f"{p[k]} {k.replace('_', ' ')}" for k in ("fallbacks", "dead_columns", "events") if p.get(k)]
        if counts:
            yield f"  events      {', '.join(counts)} (see {MANIFEST})"
