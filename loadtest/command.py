"""`argosy loadtest`: a run and its report. `argosy loadtest report | compare | knee`: what else can be done."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import msgspec
import typer
from rich.console import Console

from loadtest import commands, launch, options
from loadtest.goodput import Objective
from loadtest.knee import SearchSettings, Trial, find_knee
from loadtest.record import RecordError
from loadtest.report import run_report
from loadtest.spec import SpecError
from loadtest.summary import Summary, summarize
from loadtest.table import Recorded, load

EXIT_USAGE = 2


def main(args: list[str]) -> int:
    """Exit code: 0 = a valid run, 1 = nothing succeeded or a comparison differed, 2 = wrong input, 3 = not valid."""
    if args and args[0] in ("report", "compare"):
        readers = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        readers.command("report")(commands.report)
        readers.command("compare")(commands.compare)
        return int(readers(args, prog_name="argosy loadtest", standalone_mode=False) or 0)
    if importlib.util.find_spec("locust") is None:
        return _refuse("locust is missing: pip install 'argosy[loadtest]'")
    try:
        if args and args[0] == "knee":
            return _knee(options.parse(args[1:], "argosy loadtest knee"))
        asked = options.parse(args)
        if asked.is_worker:
            host = ["--master-host", asked.master_host, "--master-port", str(asked.master_port)]
            return subprocess.call(launch.locust_command("--worker", *host, *asked.locust))
        objective = _objective(asked)
        code = launch.run(launch.make_plan(asked), asked, Console(stderr=True))
        if asked.record.exists() and not asked.ui:
            _report(load(asked.record), objective, asked)
        return code
    except (SpecError, RecordError) as error:
        return _refuse(str(error))


def _report(run: Recorded, objective: Objective, asked: options.Asked) -> None:
    run_report.show(summarize(run, objective), Console())
    if asked.has_report:
        Console(stderr=True).print(f"wrote {run_report.write_report(run, objective, asked.out).html_path}")


def _knee(asked: options.Asked) -> int:
    """One run after another, each a record of its own below --out; then the report of the best that held."""
    objective, console = _objective(asked), Console(stderr=True)
    if not asked.arrivals.startswith("poisson") or asked.duration is None:
        raise SpecError("knee: the search starts at --rate, and each run needs --duration")
    if (objective.ttft_s, objective.itl_s, objective.e2e_s) == (None, None, None):
        raise SpecError("knee: a promise to hold: --slo-ttft, --slo-itl or --slo-e2e")
    start, out = float(asked.arrivals.partition(":")[2]), asked.out
    plan = launch.make_plan(asked)
    records: list[Path] = []

    def at(rate: float) -> Summary:
        asked.out = out / f"{len(records):02d}-{rate:.4g}"
        record = asked.record.absolute()
        launch.run(
            msgspec.structs.replace(
                plan, arrivals=f"poisson:{rate!r}", seed=plan.seed + len(records), record=str(record)
            ),
            asked,
            console,
        )
        records.append(record)
        if not record.exists():
            raise SpecError(f"knee: the run at {rate:g} requests/s left no record")
        return summarize(load(record), objective)

    def told(trial: Trial) -> None:
        word = "held" if trial.has_held else "broke" if trial.summary.is_valid else "is not valid"
        console.print(f"{trial.rate:g} requests/s {word}", highlight=False)

    try:
        settings = SearchSettings(
            start_rate=start,
            min_rate=min(start, SearchSettings.min_rate),
            max_rate=asked.max_rate,
            min_share=asked.share,
            precision=asked.precision,
            repeats=asked.repeats,
            max_runs=asked.max_runs,
            cool_down_s=asked.cool_down,
        )
    except ValueError as error:
        raise SpecError(f"knee: {error}") from None
    knee = find_knee(at, settings, on_trial=told)
    shown = max(
        range(len(records)), key=lambda n: (knee.trials[n].has_held, knee.trials[n].rate * (knee.rate > 0)), default=0
    )
    run = load(records[shown])
    run_report.show(summarize(run, objective), Console(), knee)
    if asked.has_report:
        console.print(f"wrote {run_report.write_report(run, objective, out, knee).html_path}")
    return 0 if knee.rate > 0 else 1


def _objective(asked: options.Asked) -> Objective:
    try:
        return Objective(
            ttft_s=asked.slo_ttft,
            itl_s=asked.slo_itl,
            itl_percentile=asked.slo_itl_percentile,
            e2e_s=asked.slo_e2e,
        )
    except ValueError as error:
        raise SpecError(str(error)) from None


def _refuse(message: str) -> int:
    Console(stderr=True).print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    return EXIT_USAGE
