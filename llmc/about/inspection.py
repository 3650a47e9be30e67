"""`llmc inspect`: what is inside an artifact, whoever made it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.console import size
from llmc.errors import UserError
from llmc.files import sha256
from llmc.formats.checkpoint import TOKENIZER_FILES, Checkpoint
from llmc.formats.manifest import MANIFEST, read_manifest
from llmc.formats.onnx_folder import is_onnx_folder

if TYPE_CHECKING:
    from gguf import GGUFReader


def inspect(artifact: str | Path, tensors: bool = False) -> dict[str, Any]:
    """Contents of a model folder (float, quantized or ONNX), a .gguf file, or an importance matrix (see `_imatrix`).

    Returns {'artifact', 'format', 'architecture', 'model', 'type', 'weights' (llmc.formats.weigh), 'kv' (of its cache,
    llmc.formats.kv), 'tokenizer', 'licence', 'provenance' (the manifest without its file hashes, None where llmc did not make
    it)} and with `tensors` 'tensors', one object each. Keys that the artifact does not tell are None.
    """
    from llmc.formats import kv
    from llmc.formats.weigh import tensors as list_tensors
    from llmc.formats.weigh import weigh

    path = Path(artifact)
    if is_onnx_folder(path):
        found = _onnx(path)
    elif path.is_dir():
        found = _folder(path)
    elif path.is_file() and path.suffix == ".gguf":
        if (matrix := _imatrix(path, tensors)) is not None:
            return matrix
        found = _gguf(path)
    else:
        raise UserError(f"{artifact} is neither a model folder nor a .gguf file", "give one of these")
    manifest = read_manifest(path)
    if manifest:
        found["licence"] = manifest.get("source", {}).get("licence") or found["licence"]
        manifest = {k: v for k, v in manifest.items() if k != "outputs"}
    report = {"artifact": str(artifact), **found, "weights": weigh(path), "kv": kv.describe(path), "provenance": manifest}
    if tensors:
        report["tensors"] = [asdict(t) for t in list_tensors(path)]
    return report


def _folder(folder: Path) -> dict[str, Any]:
    """A Hugging Face folder, from its config and headers."""
    from llmc.formats.source import front_matter

    ckpt = Checkpoint.open(folder)
    # models that see and hear keep the language model's numbers one level down
    config = ckpt.config | ckpt.config.get("text_config", {})
    quantization = ckpt.quantization or {}
    method = quantization.get("quant_method")
    qtype = None
    if method is not None:
        from llmc.formats import quantized

        if method in quantized.METHODS:
            qtype = " + ".join(sorted({quantized.type_name(ckpt, linear) for linear in quantized.linears(ckpt)})) or None
    return {
        "format": f"Hugging Face folder, {method or 'float'}",
        "architecture": (ckpt.config.get("architectures") or [config.get("model_type")])[0],
        "model": {
            "layers": config.get("num_hidden_layers") or config.get("n_layer"),
            "hidden": config.get("hidden_size") or config.get("n_embd"),
            "heads": config.get("num_attention_heads") or config.get("n_head"),
            "kv_heads": config.get("num_key_value_heads"),
            "context": config.get("max_position_embeddings") or config.get("n_positions"),
        },
        "type": qtype,
        "tokenizer": _folder_tokenizer(folder, config.get("vocab_size")),
        "licence": front_matter(folder / "README.md").get("license"),
    }


def _onnx(folder: Path) -> dict[str, Any]:
    """An ONNX folder, from its graph and what describes it; 'operators' and 'matmul_nbits' (OnnxFolder), and 'notes' (what
    a class of devices will not like) beside what every artifact tells."""
    from llmc.export.onnx.lint import as_notes, lint
    from llmc.formats.onnx_folder import open_onnx
    from llmc.formats.source import front_matter
    from llmc.formats.weigh_onnx import tensors

    source = open_onnx(folder)
    model, config = source.genai.get("model", {}), source.config
    decoder = model.get("decoder", {})
    opsets = {o.domain or "ai.onnx": o.version for o in source.proto.opset_import}
    types = {t.type for t in tensors(source) if t.kind in ("attention", "mlp") and "int" in t.type}
    return {
        "format": "ONNX folder, " + ", ".join(f"{domain} {version}" for domain, version in opsets.items()),
        "architecture": model.get("type") or (config.get("architectures") or [config.get("model_type")])[0],
        "model": {
            "layers": decoder.get("num_hidden_layers") or config.get("num_hidden_layers"),
            "hidden": decoder.get("hidden_size") or config.get("hidden_size"),
            "heads": decoder.get("num_attention_heads") or config.get("num_attention_heads"),
            "kv_heads": decoder.get("num_key_value_heads") or config.get("num_key_value_heads"),
            "context": source.context,
        },
        "type": " + ".join(sorted(types)) or None,
        "operators": source.operators(),
        "matmul_nbits": source.matmul_nbits(),
        "notes": as_notes(lint(source.model)),
        "tokenizer": _folder_tokenizer(folder, model.get("vocab_size") or config.get("vocab_size")),
        "licence": front_matter(folder / "README.md").get("license"),
    }


def _blocks(b: dict[str, Any]) -> str:
    """'21 MatMulNBits int4 block 32, accuracy level 4' of one entry of 'matmul_nbits'."""
    qtype = f"int{b['bits']} block {b['block_size']}" + ("" if b["symmetric"] else " asym")
    return f"{b['matrices']} MatMulNBits {qtype}, accuracy level {b['accuracy_level']}"


def _folder_tokenizer(folder: Path, vocabulary: int | None) -> dict[str, Any]:
    return {
        "files": {n: sha256(folder / n) for n in TOKENIZER_FILES if (folder / n).is_file()},
        "vocabulary": vocabulary,
        "chat_template_sha256": _hash(_folder_template(folder)),
    }


def _folder_template(folder: Path) -> str | None:
    """The chat template, from its own file or from tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}", "download the model again") from e
    return json.dumps(template) if isinstance(template, list) else template  # a list: several templates by name


def _gguf(file: Path) -> dict[str, Any]:
    """A GGUF file, from its metadata."""
    from llmc.formats.gguf import field, open_gguf

    reader = open_gguf(file)
    arch = field(reader, "general.architecture")
    tokens = reader.get_field("tokenizer.ggml.tokens")
    blocks = {t.tensor_type.name for t in reader.tensors if t.name.startswith("blk.") and len(t.shape) > 1}
    return {
        "format": f"GGUF version {field(reader, 'GGUF.version')}",
        "architecture": arch,
        "model": {
            "layers": field(reader, f"{arch}.block_count"),
            "hidden": field(reader, f"{arch}.embedding_length"),
            "heads": field(reader, f"{arch}.attention.head_count"),
            "kv_heads": field(reader, f"{arch}.attention.head_count_kv"),
            "context": field(reader, f"{arch}.context_length"),
        },
        "type": " + ".join(sorted(blocks)) or None,
        "tokenizer": {
            "model": field(reader, "tokenizer.ggml.model"), "pre": field(reader, "tokenizer.ggml.pre"),
            "vocabulary": None if tokens is None else len(tokens.data), "eos": _end_ids(reader),
            "chat_template_sha256": _hash(field(reader, "tokenizer.chat_template")),
        },
        "licence": field(reader, "general.license"),
        "metadata": {k: v for k in _short_keys(reader) if not isinstance(v := field(reader, k), list)},
    }


def _imatrix(file: Path, tensors: bool) -> dict[str, Any] | None:
    """{'artifact', 'format', 'datasets', 'chunks', 'chunk_size', 'tokens' (most of any matrix), 'matrices', 'layers',
    'unseen' (matrices that no token reached), 'provenance'} of an importance matrix, and with `tensors` an object for each
    matrix; None for any other .gguf file."""
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
        "unseen": [name for name, e in matrix.entries.items() if e.unseen],
        "provenance": manifest and {k: v for k, v in manifest.items() if k != "outputs"},
    }
    return {**report, "tensors": listed} if tensors else report


def _short_keys(reader: GGUFReader) -> Iterator[str]:
    """The keys whose values are worth a line: no vocabularies, no chat template."""
    for key in reader.fields:
        if not key.startswith("GGUF.") and key != "tokenizer.chat_template":
            yield key


def _end_ids(reader: GGUFReader) -> list[int]:
    from llmc.formats.gguf import field

    ids = (field(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return sorted({i for i in ids if i is not None})


def _hash(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------- text


def describe(report: dict[str, Any]) -> str:
    """The report as a page of plain text."""
    if "matrices" in report:
        return "\n".join(_describe_imatrix(report))
    from llmc.formats.kv import words

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
        told = {"type": "f16", "bytes_per_token": kv["bytes_per_token_f16"], "bytes_at": kv["bytes_at"]}
        lines.append(f"KV cache      {words(told)} tokens ({heads})")
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
        yield f"unseen        {len(unseen)} matrices that no token reached, first {unseen[0]}"
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
