"""`llmc fit`."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from llmc.evals.config import FitConfig


def register(app: typer.Typer) -> None:
    app.command()(fit)


def fit(
    items: list[Path] = typer.Argument(None, metavar="ARTIFACT-or-REPORT…", show_default=False,
                                       help=".gguf files, ONNX folders, and reports of llmc eval and bench."),
    target: list[str] = typer.Option([], "--target", show_default=False,
                                     help="A target's name or a profile (pi5, m2, …); repeatable. Default: local-cpu."),
    min_decode: float | None = typer.Option(FitConfig.min_decode, metavar="TOK/S", show_default=False,
                                            help="Decode speed at --context."),
    max_first_token: float | None = typer.Option(FitConfig.max_first_token, metavar="S", show_default=False,
                                                 help="Time to the first token of --prompt tokens."),
    max_kld: float | None = typer.Option(FitConfig.max_kld, metavar="NATS", show_default=False,
                                         help="Mean KL divergence to the base, on the worst text."),
    min_top1: str | None = typer.Option(FitConfig.min_top1, metavar="80%", show_default=False,
                                        help="Top-1 agreement with the base."),
    max_ram: str | None = typer.Option(FitConfig.max_ram, metavar="2GB", show_default=False, help="Memory at --context."),
    max_size: str | None = typer.Option(FitConfig.max_size, metavar="90MB", show_default=False, help="The file."),
    context: int = typer.Option(FitConfig.context, help="Tokens in the KV cache."),
    prompt: int = typer.Option(FitConfig.prompt, help="Tokens of the prompt."),
    targets: Path | None = typer.Option(FitConfig.targets, metavar="FILE", show_default=False,
                                        help="The file of targets. Default: ./targets.toml, or the user's own."),
    validate: bool = typer.Option(False, "--validate", help="Hold estimates against what was measured, and show the error."),
    profiles: bool = typer.Option(False, "--profiles", help="List the device profiles, with the source of every figure."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Say which candidates keep limits on a device, measured or estimated, and what to make if none does.

    Exit code 0 where every target has a candidate that certainly fits, else 1. An estimate is shown with its interval, and
    answers `maybe` where the interval holds the limit.
    """
    from llmc.evals.report.show import table

    if profiles:
        from llmc.evals.fit.profiles import profile_lines, profiles_json

        print(json.dumps(profiles_json(), indent=2, ensure_ascii=False) if as_json else profile_lines())
        return
    if validate:
        from llmc.evals.fit.validate import rows
        from llmc.evals.fit.validate import validate as run

        points = run(tuple(items or ()), targets)
        print(json.dumps({"points": points}, indent=2, ensure_ascii=False) if as_json else table(rows(points)))
        return
    from llmc.evals.fit.run import fit
    from llmc.evals.fit.show import fit_lines

    result = fit(FitConfig(tuple(items or ()), tuple(target), min_decode, max_first_token, max_kld, min_top1, max_ram,
                           max_size, context, prompt, targets))
    print(json.dumps(result, indent=2, ensure_ascii=False) if as_json else fit_lines(result))
    raise typer.Exit(0 if result["fits"] else 1)
