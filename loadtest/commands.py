"""`argosy loadtest report` and `argosy loadtest compare`: what reads records, and sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from loadtest.compare import EXIT_INVALID, EXIT_WRONG_INPUT
from loadtest.compare import compare as compare_runs
from loadtest.goodput import Objective
from loadtest.record import RecordError
from loadtest.summary import summarize
from loadtest.table import Recorded, load

RECORD_NAME = "loadtest.jsonl"

TtftLimit = Annotated[float | None, typer.Option("--slo-ttft", help="Promise: first token within so many seconds.")]
ItlLimit = Annotated[float | None, typer.Option("--slo-itl", help="Promise: gaps between tokens of so many seconds.")]
ItlPercentile = Annotated[
    float, typer.Option("--slo-itl-percentile", help="Of a request's own gaps, the share that must keep it; 100 = all.")
]
E2eLimit = Annotated[float | None, typer.Option("--slo-e2e", help="Promise: last byte within so many seconds.")]
Skip = Annotated[float, typer.Option("--skip", help="Leave out requests due in the first so many seconds.")]
IsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def report(
    record: Annotated[Path, typer.Argument(help="Record of a run, or the folder that holds it.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for report.html, .png, .json.")] = None,
    slo_ttft: TtftLimit = None,
    slo_itl: ItlLimit = None,
    slo_itl_percentile: ItlPercentile = 99.0,
    slo_e2e: E2eLimit = None,
    skip: Skip = 0.0,
    is_json: IsJson = False,
) -> None:
    """Sum up a run. Exit code: 0; 2 wrong input; 3 the run is invalid."""
    from loadtest.report import run_report

    objective = _objective(slo_ttft, slo_itl, slo_itl_percentile, slo_e2e)
    run = _loaded(record, skip)
    summary = summarize(run, objective)
    if is_json:
        typer.echo(run_report.json_bytes(summary), nl=False)
    else:
        run_report.show(summary, Console())
    if out is not None:
        _wrote(lambda: run_report.write_report(run, objective, out).html_path)
    if not summary.is_valid:
        raise typer.Exit(EXIT_INVALID)


def compare(
    a: Annotated[Path, typer.Argument(help="Record of the run to compare with, or its folder.")],
    b: Annotated[Path, typer.Argument(help="Record of the run in question, or its folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for compare.html and compare.json.")] = None,
    slo_ttft: TtftLimit = None,
    slo_itl: ItlLimit = None,
    slo_itl_percentile: ItlPercentile = 99.0,
    slo_e2e: E2eLimit = None,
    skip: Skip = 0.0,
    threshold: Annotated[float, typer.Option(help="Relative change that counts.")] = 0.05,
    share_threshold: Annotated[float, typer.Option(help="Difference between shares that counts.")] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    is_json: IsJson = False,
) -> None:
    """B against A. Exit code: 0 nothing is worse; 1 something is; 2 wrong input; 3 a run is invalid."""
    from loadtest.report import compare_report

    objective = _objective(slo_ttft, slo_itl, slo_itl_percentile, slo_e2e)
    first, second = _loaded(a, skip), _loaded(b, skip)
    try:
        comparison = compare_runs(
            first, second, objective, threshold=threshold, share_threshold=share_threshold, seed=seed
        )
    except ValueError as error:
        _refuse(str(error))
    if is_json:
        typer.echo(compare_report.json_bytes(comparison), nl=False)
    else:
        compare_report.show(comparison, Console())
    if out is not None:
        _wrote(lambda: compare_report.write_comparison(first, second, comparison, out).html_path)
    raise typer.Exit(comparison.exit_code)


def _objective(ttft_s: float | None, itl_s: float | None, itl_percentile: float, e2e_s: float | None) -> Objective:
    try:
        return Objective(ttft_s=ttft_s, itl_s=itl_s, itl_percentile=itl_percentile, e2e_s=e2e_s)
    except ValueError as error:
        _refuse(str(error))


def _loaded(path: Path, skip_s: float) -> Recorded:
    if path.is_dir():
        path = path / RECORD_NAME
    try:
        run = load(path)
    except RecordError as error:
        _refuse(str(error))
    except OSError as error:
        _refuse(f"{path}: {error.strerror or error}")
    return run.since(skip_s) if skip_s > 0 else run


def _wrote(write: Callable[[], Path]) -> None:
    try:
        typer.echo(f"wrote {write()}", err=True)
    except OSError as error:
        _refuse(f"{error.filename}: {error.strerror or error}")


def _refuse(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(EXIT_WRONG_INPUT)
