"""`argosy k8s`: the commands that put a spec on a cluster, and what all commands share. As thin as they can be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from k8s import render as rendering
from k8s.tool import exits, plan_report, tables
from k8s.tool.cluster import Cluster, connect
from k8s.tool.exits import ToolError
from k8s.tool.progress import JsonProgress, Progress, TextProgress
from k8s.tool.specs import find_spec, objects_of
from k8s.yaml_text import documents

_CODES = "\n\n".join(f"{code}  {meaning}" for code, meaning in exits.MEANINGS.items())

app = typer.Typer(
    name="argosy k8s",
    help="Put a ServingSpec on a Kubernetes cluster, and operate it.",
    epilog=f"Exit codes:\n\n{_CODES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Spec = Annotated[str, typer.Argument(help="A spec's YAML file, or the name of an overlay.", metavar="SPEC")]
Kubeconfig = Annotated[
    Path | None, typer.Option(help="[$KUBECONFIG, else ~/.kube/config, else this pod's account]", metavar="FILE")
]
Context = Annotated[str | None, typer.Option(help="Of the kubeconfig. [its current one]", metavar="NAME")]
Timeout = Annotated[float, typer.Option("--request-timeout", help="Deadline of each call, in seconds.", min=0.1)]
Output = Annotated[str, typer.Option("-o", "--output", help="text, or JSON for programs.", metavar="text|json")]


@contextlib.contextmanager
def opened(kubeconfig: Path | None, context: str | None, timeout_s: float) -> Iterator[Cluster]:
    cluster = connect(kubeconfig, context, timeout_s)
    try:
        yield cluster
    finally:
        cluster.close()


def is_json(output: str) -> bool:
    if output not in ("text", "json"):
        raise ToolError(f"--output: {output!r} is not one of text, json")
    return output == "json"


def progress_for(output: str) -> Progress:
    return JsonProgress() if is_json(output) else TextProgress(tables.make_console())


@app.command()
def render(
    spec: Spec,
    out: Annotated[
        Path | None, typer.Option(help="Write the overlay's files below this folder instead.", metavar="DIR")
    ] = None,
) -> int:
    """Print the objects of a spec as YAML; the same spec gives the same bytes."""
    found = find_spec(spec)
    if out is None:
        typer.echo(documents(objects_of(found)), nl=False)
        return exits.DONE
    for path, text in rendering.render_overlay(found, f"overlays/{found.name}").items():
        target = out / Path(path).name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ToolError(f"--out: {target}: {error.strerror}") from None
        typer.echo(f"wrote {target}")
    return exits.DONE


@app.command()
def plan(
    spec: Spec,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    timeout: Timeout = 30.0,
    output: Output = "text",
) -> int:
    """Say what a deployment would change, how the engine is upgraded, and the GPUs that takes; changes nothing.

    Exit code 0: nothing to change; 2: changes; 3: changes that `deploy` would refuse; 1: an error.
    """
    from k8s.tool.plan import make_plan
    from k8s.tool.revisions import read_revisions

    wants_json, found = is_json(output), find_spec(spec)
    things = objects_of(found)
    with opened(kubeconfig, context, timeout) as cluster:
        try:
            revisions = read_revisions(cluster, found.name, found.namespace)
        except exits.ApiError as error:
            if not error.is_forbidden:
                raise
            revisions = []
        made = make_plan(cluster, found, things, revisions[0].manifest if revisions else [])
    if wants_json:
        tables.print_json(plan_report.as_json(made))
    else:
        plan_report.print_plan(made, tables.make_console())
    return made.exit_code


@app.command()
def deploy(
    spec: Spec,
    wait: Annotated[bool, typer.Option(help="Wait until everything is ready.")] = True,
    timeout_all: Annotated[
        float, typer.Option("--timeout", help="Of the whole deployment, in seconds. [0: from the spec]", min=0.0)
    ] = 0.0,
    atomic: Annotated[bool, typer.Option(help="Return to the last good revision when it fails.")] = False,
    recreate: Annotated[
        bool, typer.Option("--recreate", help="Delete a Ray cluster that KubeRay would not update; an interruption.")
    ] = False,
    ignore_capacity: Annotated[
        bool, typer.Option("--ignore-capacity", help="Deploy though nodes or quota have no room now.")
    ] = False,
    force_conflicts: Annotated[
        bool, typer.Option("--force-conflicts", help="Take fields that other managers hold.")
    ] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Deploy though another deployment has not ended.")
    ] = False,
    patience: Annotated[
        float, typer.Option(help="How long to wait for what waiting will not mend, in seconds.", min=0.0)
    ] = 60.0,
    settle: Annotated[float, typer.Option(help="How long everything must stay ready, in seconds.", min=0.0)] = 5.0,
    note: Annotated[str, typer.Option(help="Kept with the revision.", metavar="TEXT")] = "",
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    timeout: Timeout = 30.0,
    output: Output = "text",
) -> int:
    """Apply a spec in waves (policy, config, engine, gateway), wait for each, and say why when one does not come."""
    from k8s.tool import deploy as deploying

    progress, found = progress_for(output), find_spec(spec)
    if atomic and not wait:
        raise ToolError("--atomic: without --wait nobody learns that it failed")
    options = deploying.Options(
        waits=wait,
        timeout_s=timeout_all,
        is_atomic=atomic,
        recreates=recreate,
        ignores_capacity=ignore_capacity,
        forces_conflicts=force_conflicts,
        takes_over=take_over,
        patience_s=patience,
        settle_s=settle,
        note=note,
    )
    with opened(kubeconfig, context, timeout) as cluster, progress:
        return deploying.deploy(cluster, found, options, progress)
