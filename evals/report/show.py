"""Reports and tables as text for people: value ± standard error, with units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from llmc.evals.report.schema import Accuracy, Kld, Ran, Report, RuntimeFacts, Speed, Spread, Stat, Task
from llmc.evals.report.sections import budget_of, quality_of, speeds_of
from llmc.formats.artifact import Size

Table = tuple[str, str, list[list[str]]]
"""Title, note, rows; the first row is the heading."""
ACCURACIES: tuple[Accuracy, ...] = ("acc", "acc_norm")
SPEEDS: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")


def pm(stat: Stat | None, digits: int = 3, factor: float = 1.0, unit: str = "", sign: bool = False) -> str:
    """{value, se} as '28.69 ± 0.41', multiplied by `factor`. None gives '–'. Without a standard error, ± is left out."""
    if stat is None:
        return "–"
    text = f"{stat['value'] * factor:{'+' if sign else 'z'}.{digits}f}"  # z: no minus before a rounded zero
    if (se := stat["se"]) is not None:
        text += f" ± {se * factor:.{digits}f}"
    return text + (f" {unit}" if unit else "")


def plain(value: Any) -> str:
    """A value of a report as text without brackets and quotes, as in 'bits 4, types q4_0 q6_k'."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(plain(v) for v in value)
    return "–" if value is None else str(value)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text. The first row is the heading. The first column is aligned left, the others right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
             for r in rows]
    return "\n".join([lines[0], "  ".join("─" * w for w in widths), *lines[1:]])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table. The first row is the heading. Pipes in cells are escaped."""
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def tables_text(tables: Iterable[Table]) -> str:
    """Tables as text, each with its title and note above it."""
    return "\n\n".join(f"{title}  ({note})\n{table(rows)}" for title, note, rows in tables)


def tables_markdown(tables: Iterable[Table], level: int = 2) -> str:
    """Tables as Markdown. level: heading level of the titles."""
    return "\n\n".join(f"{'#' * level} {title}\n\n{note}\n\n{markdown(rows)}" for title, note, rows in tables)


def quality_lines(report: Report) -> str:
    """The text that `llmc eval` prints."""
    from llmc.console import size
    from llmc.formats.kv import section_text as kv_text

    artifact, quality = report["artifact"], quality_of(report)
    assert quality is not None
    weight = artifact["size"]
    lines = [f"{artifact['name']}  {size(weight['file_bytes'])}, {weight['bits_per_weight']:.2f} bits per weight "
             f"({weight['decoder_bits_per_weight']:.2f} in the decoder's matrices), run by {_ran_by(quality['runtime'])}",
             f"  {matrices(weight)}", f"  KV cache in {kv_text(quality['kv'])}"]
    for t in quality["texts"]:
        p = t["protocol"]
        lines.append(f"\n{p['text']}: {p['chunks']} chunks of {p['context']} tokens, {p['scored_tokens']} scored")
        before, ratio = t["base_perplexity"], t["perplexity_ratio"]
        base = f"  (base {before['value']:.3f}; {change(ratio)})" if before and ratio else ""
        lines.append(f"  perplexity       {pm(t['perplexity'])}{base}")
        lines.append(f"  bits per byte    {pm(t['bits_per_byte'], 4)}")
        if t["kld"]:
            k = t["kld"]
            lines.append(f"  KL divergence    {pm(k, 4)} nats  (median {k['median']:.4f}, max {k['max']:.3f})")
            lines.append(f"  its tails        {tails_text(k)}")
            if budget := budget_of(report):
                lines.append(f"  predicted        {budget['predicted_kld']:.4f} nats, on calibration text, when the types "
                             f"were chosen{' and before healing' if budget['healed'] else ''}")
            lines.append(f"  top-1 agreement  {pm(t['top1'], 1, 100)} %")
    if quality["texts"]:
        lines.append("\n± is one standard error, from the spread between chunks (unknown for a single chunk)")
    if quality.get("tasks"):
        lines.append("\nzero-shot tasks, scored by log-likelihood as lm-evaluation-harness does\n"
                     + table(_task_rows(quality["tasks"])))
        lines.append("\n± is one standard error, from the spread between items; Δ is to the base, paired by item")
    return "\n".join(lines)


def tails_text(k: Kld) -> str:
    """The quantiles of a KL divergence, as in '90 % of tokens up to 0.12 ± 0.01, 99 % up to …'."""
    if "tails" not in k:
        return f"99 % of tokens up to {k['p99']:.3f}"
    t = k["tails"]
    return f"90 % of tokens up to {pm(t['p90'], 3)}, 99 % up to {pm(t['p99'], 3)}, 99.9 % up to {pm(t['p999'], 3)} nats"


def matrices(weight: Size) -> str:
    """The matrices by type, as in '24 Q4_K, 6 Q6_K'. Reports of earlier versions have only the names of the types."""
    counts = weight.get("matrices")
    return ", ".join(f"{n} {kind}" for kind, n in counts.items()) if counts else ", ".join(weight["types"])


def _task_rows(tasks: Sequence[Task]) -> list[list[str]]:
    """A heading, then a row for each task. Columns without values are left out."""
    rows = [["task", "items", "acc %", "base acc %", "Δ acc", "acc_norm %", "base acc_norm %", "Δ acc_norm", "perplexity",
             "base perplexity", "to base"]]
    for t in tasks:
        base, difference = t["base"], t["difference"]
        row = [t["protocol"]["task"], str(t["protocol"]["items"])]
        for k in ACCURACIES:
            row += [pm(t[k], 1, 100), pm(base and base[k], 1, 100), pm(difference and difference[k], 1, 100, sign=True)]
        ratio = difference and difference["perplexity_ratio"]
        rows.append([*row, pm(t["perplexity"], 2), pm(base and base["perplexity"], 2), change(ratio) if ratio else "–"])
    return filled(rows)


def filled(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows without the columns that have only '–' below the heading."""
    kept = [i for i in range(len(rows[0])) if any(r[i] != "–" for r in rows[1:])]
    return [[r[i] for i in kept] for r in rows]


def change(ratio: Stat) -> str:
    """A ratio as a change in percent, as in '+22.4 ± 0.8 %'."""
    return pm({"value": ratio["value"] - 1, "se": ratio["se"]}, 1, 100, "%", sign=True)


def speed_lines(report: Report) -> str:
    """The text that `llmc bench` prints for one artifact."""
    from llmc.console import size

    found = []
    for target, s in speeds_of(report).items():
        p = s["protocol"]
        where = p["cpu"] if s["target"]["address"].startswith("local-") else f"{target} ({p['cpu']})"
        head = (f"{report['artifact']['name']}  {size(report['artifact']['size']['file_bytes'])}, run by "
                f"{_ran_by(s['runtime'])} on {where}, threads {p['threads']}, {p['device']}")
        emulated = ["  EMULATED: these speeds are not those of the real device"] if s["target"]["emulated"] else []
        found.append("\n".join([head, *emulated, *_speed(s)]))
    return "\n\n".join(found)


def _speed(s: Speed) -> list[str]:
    """The lines of one speed section."""
    from llmc.console import size
    from llmc.formats.kv import section_text as kv_text

    lines = [
        f"  load                 {s['load_s']:.2f} s  (file in the page cache)",
    ]
    for p in s["prefill_curve"]:
        lines += [f"  time to first token  {median_iqr(p['first_token'], 3)} s  ({p['tokens']} tokens)",
                  f"  prefill              {median_iqr(p['prefill'])} tokens/s"]
    n, reads = s["protocol"]["generate"], s["target"]["facts"].get("read_bandwidth")
    share = f", {s['read_bandwidth'] / reads:.0%} of what this machine reads ({reads / 1e9:.1f} GB/s)" if reads else ""
    lines += [f"  decode               {median_iqr(d['decode'])} tokens/s  ({n} tokens at depth {d['depth']})"
              for d in s["decode_curve"]]
    lines += [
        f"  peak memory          {size(s['peak_rss'])}",
        f"  KV cache             {kv_text(s['kv'])}",
        f"  read per token       {size(s['token_bytes'])} of weights: {s['read_bandwidth'] / 1e9:.1f} GB/s{share}",
        f"  ran on               {ran_text(s['ran'])}", *_more(s),
        f"  medians [IQR] of {s['repetitions']} repetitions after {s['warmup']} warm-ups",
    ]
    return [*lines, *(f"  UNSTABLE: {why}" for why in s["unstable"])]


def _ran_by(runtime: RuntimeFacts) -> str:
    """The name of the runtime, as in 'onnxruntime at accuracy level 4'. Results of different levels differ."""
    levels = runtime.get("accuracy_levels")
    return runtime["runtime"] + (f" at accuracy level {' and '.join(map(str, levels))}" if levels else "")


def _more(s: Speed) -> list[str]:
    """The lines of energy and thread sweep, if they were measured."""
    lines = []
    if energy := s["energy"]:
        lines.append(f"  energy               {energy['joules_per_token']:.2f} J per decoded token ({energy['source']})")
    if found := s["thread_sweep"]:
        for what in SPEEDS:
            tried = ", ".join(f"{p['threads']}: {p['median']:.1f}" for p in found[what])
            lines.append(f"  threads              {found['best'][what]} are best for {what}  ({tried} tokens/s)")
    return lines


def median_iqr(s: Spread, digits: int = 1) -> str:
    """Median and interquartile range as text, as in '41.2 [0.8]'."""
    return f"{s['median']:.{digits}f} [{s['iqr']:.{digits}f}]"


def ran_text(found: Ran) -> str:
    """The record as text, as in '31 of 31 layers offloaded; AVX2 AVX512' or '120 nodes on CPUExecutionProvider'."""
    if "nodes" in found:
        return ", ".join(f"{n} nodes on {provider}" for provider, n in found["nodes"].items())
    parts = []
    if "offloaded_layers" in found:
        parts.append(f"{found['offloaded_layers']} of {found['layers']} layers offloaded")
        parts += [f"{mib:.0f} MiB in {name}" for name, mib in found["buffers"].items()]
    else:
        parts.append(str(found["device"]))
    return "; ".join([*parts, " ".join(found["instruction_sets"])]).rstrip("; ")
