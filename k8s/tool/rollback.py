"""Back to an earlier revision, from what the cluster itself keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from k8s.tool.cluster import Cluster
from k8s.tool.deploy import Deployment, Options, check
from k8s.tool.exits import ToolError
from k8s.tool.plan import Plan, make_plan
from k8s.tool.progress import Progress
from k8s.tool.revisions import GOOD, Revision, read_revisions


@dataclasses.dataclass(frozen=True, slots=True)
class Return:
    """What a rollback would do."""

    target: Revision
    plan: Plan
    revisions: Sequence[Revision]


def prepare(cluster: Cluster, name: str, namespace: str, number: int | None) -> Return:
    """number: of the revision; None = the last good one before the newest. Raises ToolError."""
    revisions = read_revisions(cluster, name, namespace)
    target = _target(revisions, name, namespace, number)
    plan = make_plan(cluster, target.spec, target.manifest, revisions[0].manifest)
    return Return(target, plan, revisions)


def roll_back(cluster: Cluster, prepared: Return, options: Options, progress: Progress) -> int:
    """An exit code. It is a deployment like any other, with a revision of its own."""
    check(prepared.plan, options)
    target = prepared.target
    options = dataclasses.replace(options, note=options.note or f"rollback to revision {target.number}")
    return Deployment(cluster, target.spec, options, progress).run(target.manifest, prepared.plan, prepared.revisions)


def _target(revisions: Sequence[Revision], name: str, namespace: str, number: int | None) -> Revision:
    if not revisions:
        raise ToolError(f"no revision of {name} is kept in {namespace}")
    if number is None:
        found = next((revision for revision in revisions[1:] if revision.status == GOOD), None)
        if found is None:
            raise ToolError(f"no good revision before {revisions[0].number} is kept; --to names any other")
        return found
    for revision in revisions:
        if revision.number == number:
            return revision
    kept = ", ".join(f"{revision.number} ({revision.status})" for revision in revisions)
    raise ToolError(f"--to: there is no revision {number}; kept are {kept}")
