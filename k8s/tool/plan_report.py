"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console

from k8s.tool.demand import Demand
from k8s.tool.differences import ABSENT, Difference, shown
from k8s.tool.plan import CHANGE, CREATE, DELETE, SAME, UNKNOWN, Plan
from k8s.tool.tables import say

_SIGNS = {CREATE: ("+", "green"), CHANGE: ("~", "yellow"), DELETE: ("-", "red"), UNKNOWN: ("?", "magenta")}


def as_json(plan: Plan) -> dict[str, Any]:
    demand = plan.demand
    return {
        "exit_code": plan.exit_code,
        "has_changes": plan.has_changes,
        "compared": plan.compared,
        "upgrade": {
            "kind": plan.upgrade.kind,
            "explained": plan.upgrade.explained,
            "causes": list(plan.upgrade.causes),
        },
        "restarts": list(plan.restarts),
        "gpus": {
            "now": demand.gpus_now,
            "during": demand.gpus_during,
            "after": demand.gpus_after,
            "more_replicas": demand.more_replicas,
            "fitting_replicas": None if demand.fit is None else demand.fit.placed,
            "unknown": demand.unknown,
        },
        "refusals": list(plan.refusals),
        "warnings": list(plan.warnings),
        "objects": [
            {
                "kind": change.thing["kind"],
                "name": change.thing["metadata"]["name"],
                "action": change.action,
                "note": change.note,
                "fields": [dataclasses.asdict(found) | {"path": found.field} for found in change.differences],
            }
            for change in plan.changes
        ],
    }


def print_plan(plan: Plan, console: Console) -> None:
    num_same = sum(change.action == SAME for change in plan.changes)
    for change in plan.changes:
        if change.action == SAME:
            continue
        sign, style = _SIGNS[change.action]
        note = f": {change.note}" if change.note else ""
        say(console, f"{sign} {change.action} {change.title}{note}", style)
        if change.action == CHANGE:
            for found in change.differences:
                say(console, f"    {_line(found)}")
    say(console, f"{num_same} of {len(plan.changes)} objects stay as they are; compared {plan.compared}")
    if not plan.has_changes:
        say(console, "Nothing to change.", "bold")
        return
    say(console, "")
    say(console, f"Engine: {plan.upgrade.kind}: {plan.upgrade.explained}", "bold")
    if plan.upgrade.causes:
        say(console, f"  because of {', '.join(plan.upgrade.causes[:8])}{' ...' * (len(plan.upgrade.causes) > 8)}")
    for restart in plan.restarts:
        say(console, f"  restarts {restart}")
    say(console, f"  {gpus(plan.demand)}")
    for warning in plan.warnings:
        say(console, f"! {warning}", "yellow")
    for refusal in plan.refusals:
        say(console, f"x refused: {refusal}", "red")


def gpus(demand: Demand) -> str:
    """What a change needs, in a sentence."""
    if demand.gpus_now is None:
        return f"GPUs: {demand.gpus_after} after the change; before and during it not known: {demand.unknown}"
    text = f"GPUs: {demand.gpus_now} now, {demand.gpus_during} during the change, {demand.gpus_after} after it"
    if demand.more_replicas == 0:
        return text + "; no replica needs a new place"
    if demand.fit is None:
        return text + f"; whether {demand.more_replicas} more replicas fit is not known: {demand.unknown}"
    return text + f"; {demand.fit.placed} of {demand.more_replicas} more replicas fit on the nodes now"


def _line(found: Difference) -> str:
    if found.before == ABSENT:
        return f"+ {found.field}: {shown(found.after)}"
    if found.after == ABSENT:
        return f"- {found.field}: {shown(found.before)}"
    return f"~ {found.field}: {shown(found.before)} -> {shown(found.after)}"
