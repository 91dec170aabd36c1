"""`argosy k8s`: the commands for what already runs."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer
from rich.console import Console

from k8s.tool import exits, plan_report, tables
from k8s.tool.cluster import Cluster
from k8s.tool.commands import Context, Kubeconfig, Output, Spec, Timeout, app, is_json, opened, progress_for
from k8s.tool.exits import ApiError, ToolError
from k8s.tool.revisions import Revision, read_revisions
from k8s.tool.specs import find_spec, objects_of

Name = Annotated[str, typer.Option("--name", help="Of the deployment.", metavar="NAME")]
Namespace = Annotated[str, typer.Option("-n", "--namespace", help="Where it is.", metavar="NAMESPACE")]
TimeoutAll = Annotated[float, typer.Option("--timeout", help="Of the whole command, in seconds.", min=0.0)]
Settle = Annotated[float, typer.Option(help="How long everything must stay ready, in seconds.", min=0.0)]
Patience = Annotated[float, typer.Option(help="How long to wait for what waiting will not mend, in seconds.", min=0.0)]
IgnoreCapacity = Annotated[bool, typer.Option("--ignore-capacity", help="Though nodes or quota have no room now.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command()
def status(
    name: Name = "argosy",
    namespace: Namespace = "argosy",
    watch: Annotated[bool, typer.Option("--watch", help="Again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(help="Between two looks, in seconds.", min=0.5)] = 2.0,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    timeout: Timeout = 30.0,
    output: Output = "text",
) -> int:
    """Show a deployment: conditions, clusters, replicas with their nodes and queues, pods, budgets, last warnings.

    Exit code 0: healthy; 2: serves, but not as asked; 3: serves nothing; 1: an error.
    """
    from k8s.tool.fleet import read_fleet
    from k8s.tool.status import CODES, as_json, health, print_status

    wants_json, console = is_json(output), tables.make_console()
    with opened(kubeconfig, context, timeout) as cluster:
        while True:
            fleet = read_fleet(cluster, name, namespace)
            revisions = _revisions(cluster, name, namespace)
            if wants_json:
                tables.print_json(as_json(fleet, revisions))
            else:
                if watch:
                    console.clear()
                print_status(fleet, revisions, console)
            if not watch:
                return CODES[health(fleet, revisions).verdict]
            time.sleep(interval)


@app.command()
def capacity(
    spec: Spec,
    replicas: Annotated[
        int | None, typer.Option(help="Of the engine. [the most that the spec allows]", min=0, metavar="N")
    ] = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    timeout: Timeout = 30.0,
    output: Output = "text",
) -> int:
    """Bin-pack a spec on the nodes as they are, and say what is missing where. Needs to read nodes and all pods.

    Exit code 0: everything fits; 2: not everything; 1: an error.
    """
    from k8s.tool.fitting import as_json, fit_spec, print_fitting

    wants_json, found = is_json(output), find_spec(spec)
    with opened(kubeconfig, context, timeout) as cluster:
        fitting = fit_spec(cluster, found, objects_of(found), replicas)
    if wants_json:
        tables.print_json(as_json(fitting))
    else:
        print_fitting(fitting, tables.make_console())
    return fitting.exit_code


@app.command()
def scale(
    name: Name = "argosy",
    namespace: Namespace = "argosy",
    replicas: Annotated[int | None, typer.Option(help="Of the engine, where nothing scales it.", metavar="N")] = None,
    low: Annotated[int | None, typer.Option("--min", help="Fewest engine replicas, where Serve scales.")] = None,
    high: Annotated[int | None, typer.Option("--max", help="Most engine replicas, where Serve scales.")] = None,
    gateways: Annotated[int | None, typer.Option(help="Of gateways, where nothing scales them.", metavar="N")] = None,
    min_gateways: Annotated[int | None, typer.Option(help="Fewest gateways of their autoscaler.")] = None,
    max_gateways: Annotated[int | None, typer.Option(help="Most gateways of their autoscaler.")] = None,
    ignore_capacity: IgnoreCapacity = False,
    timeout_all: TimeoutAll = 0.0,
    settle: Settle = 5.0,
    patience: Patience = 60.0,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    timeout: Timeout = 30.0,
    output: Output = "text",
) -> int:
    """Change the number of replicas or gateways, unless an autoscaler owns it; quota and GPUs are checked first."""
    from k8s.tool import scale as scaling
    from k8s.tool.deploy import Options

    progress = progress_for(output)
    wish = scaling.Wish(
        replicas=replicas,
        min_replicas=low,
        max_replicas=high,
        gateways=gateways,
        min_gateways=min_gateways,
        max_gateways=max_gateways,
    )
    options = Options(
        timeout_s=timeout_all, settle_s=settle, patience_s=patience, ignores_capacity=ignore_capacity, note="scale"
    )
    with opened(kubeconfig, context, timeout) as cluster, progress:
        prepared = scaling.prepare(cluster, name, namespace, wish)
        before = next(revision.spec for revision in prepared.revisions if revision.status == "good")
        code = scaling.scale(cluster, prepared, options, progress)
        if lines := scaling.lines_for_spec(before, prepared.spec):
            progress.tell("warning", f"put into the spec, or its next deployment undoes this: {', '.join(lines)}")
        return code


@app.command()
def rollback(
    name: Name = "argosy",
    namespace: Namespace = "argosy",
    to: Annotated[int | None, typer.Option(help="A revision's number. [the last good one]", metavar="N")] = None,
    listing: Annotated[bool, typer.Option("--list", help="Show the revisions that are kept, and do nothing.")] = False,
    yes: Yes = False,
    recreate: Annotated[
        bool, typer.Option("--recreate", help="Delete a Ray cluster that KubeRay would not update; an interruption.")
    ] = False,
    ignore_capacity: IgnoreCapacity = False,
    timeout_all: TimeoutAll = 0.0,
    settle: Settle = 5.0,
    patience: Patience = 60.0,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    timeout: Timeout = 30.0,
    output: Output = "text",
) -> int:
    """Show what returning to an earlier revision changes, and do it. The last ten are kept on the cluster."""
    from k8s.tool import rollback as returning
    from k8s.tool.deploy import Options

    progress, console = progress_for(output), tables.make_console()
    options = Options(
        timeout_s=timeout_all,
        settle_s=settle,
        patience_s=patience,
        recreates=recreate,
        ignores_capacity=ignore_capacity,
        takes_over=True,
    )
    with opened(kubeconfig, context, timeout) as cluster:
        if listing:
            return _list_revisions(read_revisions(cluster, name, namespace), output, console)
        prepared = returning.prepare(cluster, name, namespace, to)
        if not is_json(output):
            plan_report.print_plan(prepared.plan, console)
        if not yes:
            if not sys.stdin.isatty():
                raise ToolError("rollback: --yes is needed where nobody can be asked")
            typer.confirm(f"Return to revision {prepared.target.number}?", abort=True)
        with progress:
            return returning.roll_back(cluster, prepared, options, progress)


@app.command()
def drain(
    target: Annotated[str, typer.Argument(help="A node, a replica's id, or a pod.", metavar="NODE|REPLICA|POD")],
    name: Name = "argosy",
    namespace: Namespace = "argosy",
    max_disruption: Annotated[
        str, typer.Option(help="Share of replicas, and of gateways, that may be away at once.", metavar="PERCENT")
    ] = "10%",
    cordon: Annotated[bool, typer.Option(help="Close a node to new pods first.")] = True,
    timeout_all: TimeoutAll = 600.0,
    poll: Annotated[float, typer.Option(help="Between two looks, in seconds.", min=0.01)] = 1.0,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    timeout: Timeout = 30.0,
    output: Output = "text",
) -> int:
    """Take a node or a replica out: its requests continue elsewhere, then its pods are evicted as budgets allow.

    Exit code 0: everything left; 4: something stayed when time was up; 3: refused, and nothing was changed.
    """
    from k8s.tool import drain as draining

    share = _percent(max_disruption)
    progress = progress_for(output)
    options = draining.Options(timeout_s=timeout_all, max_disruption=share, cordons=cordon, poll_s=poll)
    with opened(kubeconfig, context, timeout) as cluster, progress:
        return draining.drain(cluster, name, namespace, target, options, progress)


@app.command()
def preflight(
    spec: Spec,
    nodes: Annotated[
        list[str] | None, typer.Argument(help="Nodes; none = every GPU node that waits for it.", metavar="[NODE]...")
    ] = None,
    clear_fault: Annotated[
        bool, typer.Option("--clear-fault", help="Take away the taint of a GPU fault, too, from nodes that pass.")
    ] = False,
    timeout_all: TimeoutAll = 1200.0,
    poll: Annotated[float, typer.Option(help="Between two looks, in seconds.", min=0.01)] = 2.0,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    timeout: Timeout = 30.0,
    output: Output = "text",
) -> int:
    """Test the GPUs of nodes with a Job on each; who passes loses its taint. Needs to read and patch nodes."""
    from k8s.tool import preflight as testing

    found, progress = find_spec(spec), progress_for(output)
    if not found.has_gpus:
        raise ToolError("preflight: engine.device of the spec is cpu")
    options = testing.Options(nodes=tuple(nodes or ()), timeout_s=timeout_all, poll_s=poll, clears_faults=clear_fault)
    with opened(kubeconfig, context, timeout) as cluster, progress:
        return testing.preflight(cluster, found, options, progress)


def _revisions(cluster: Cluster, name: str, namespace: str) -> list[Revision] | None:
    try:
        return read_revisions(cluster, name, namespace)
    except ApiError as error:
        if error.is_forbidden:
            return None
        raise


def _list_revisions(revisions: list[Revision], output: str, console: Console) -> int:
    if is_json(output):
        fields = ("number", "status", "time", "hash", "note")
        tables.print_json({"revisions": [{key: getattr(r, key) for key in fields} for r in revisions]})
        return exits.DONE
    rows = [(str(r.number), r.status, r.time, r.hash, r.note) for r in revisions]
    console.print(tables.table("Revisions", ("revision", "status", "time", "manifest", "note"), rows))
    return exits.DONE


def _percent(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise ToolError(f"--max-disruption: {text!r} is no share above 0% and up to 100%")
    return share
