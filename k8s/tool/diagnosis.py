"""`argosy k8s doctor`."""

from __future__ import annotations

from typing import Annotated, Final

import typer
from rich.console import Console

from k8s.tool import exits, tables
from k8s.tool.commands import Context, Kubeconfig, Output, Spec, Timeout, app, is_json, opened
from k8s.tool.doctor import cluster_checks, engine_checks, namespace_checks, pod_checks
from k8s.tool.doctor.facts import read_facts
from k8s.tool.doctor.table import ERROR, OK, UNKNOWN, WARNING, Check, Result, as_json, examine, exit_code
from k8s.tool.exits import ToolError
from k8s.tool.specs import find_spec

CHECKS: tuple[Check, ...] = tuple(
    check for module in (cluster_checks, namespace_checks, engine_checks, pod_checks) for check in module.TABLE.checks
)
_STYLES: Final = {ERROR: "red", WARNING: "yellow", UNKNOWN: "magenta", OK: "green"}


@app.command()
def doctor(
    spec: Spec,
    only: Annotated[
        list[str] | None, typer.Option("--check", help="Only this one; may be repeated.", metavar="NAME")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Show the checks, and look at nothing.")] = False,
    show_all: Annotated[bool, typer.Option("--all", help="Show checks that found nothing, too.")] = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    timeout: Timeout = 30.0,
    output: Output = "text",
) -> int:
    """Look for what goes wrong on clusters: named checks with a fix each. Reads only, and what it may.

    Exit code 0: nothing found; 2: warnings; 3: errors; 1: an error of the tool. What may not be read is `not known`.
    """
    wants_json, found, console = is_json(output), find_spec(spec), tables.make_console()
    checks = _chosen(only or [])
    if listing:
        rows = [(check.name, check.severity, check.fix) for check in checks]
        console.print(tables.table("Checks", ("check", "severity", "fix"), rows))
        return exits.DONE
    with opened(kubeconfig, context, timeout) as cluster:
        results = list(examine(checks, read_facts(cluster, found)))
    if wants_json:
        tables.print_json(as_json(results))
    else:
        _print(results, console, show_all=show_all)
    return exit_code(results)


def _chosen(names: list[str]) -> list[Check]:
    known = {check.name: check for check in CHECKS}
    if unknown := [name for name in names if name not in known]:
        raise ToolError(f"--check: {unknown[0]!r} is no check; --list shows them")
    return [known[name] for name in names] or list(CHECKS)


def _print(results: list[Result], console: Console, *, show_all: bool) -> None:
    for result in results:
        if result.outcome == OK and not show_all:
            continue
        tables.say(console, f"{result.outcome:8} {result.check.name}", _STYLES[result.outcome])
        for text in result.texts:
            tables.say(console, f"         {text}")
        if result.outcome in (ERROR, WARNING):
            tables.say(console, f"         fix: {result.check.fix}")
    counts = {outcome: sum(result.outcome == outcome for result in results) for outcome in _STYLES}
    tables.say(console, f"{len(results)} checks: " + ", ".join(f"{counts[name]} {name}" for name in _STYLES))
