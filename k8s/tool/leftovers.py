"""What earlier deployments left on the cluster, and when it may go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from k8s.objects import WEIGHTS, Object
from k8s.tool import reasons
from k8s.tool.cluster import Cluster
from k8s.tool.exits import ApiError
from k8s.tool.kinds import AUTOSCALER, JOB, POD, RAY_CLUSTER, SCALED_OBJECT, kind_of, title
from k8s.tool.progress import Progress

KEPT_KINDS: Final = ("Namespace", "PersistentVolumeClaim")
"""Never deleted because a spec no longer names them: they hold what cannot be made again."""
READ_LATER: Final = ("ConfigMap", "ResourceClaimTemplate")
"""Kinds that a pod made later, of a template that runs, asks for by name."""
_TYPE: Final = {"apiVersion": JOB.api_version, "kind": JOB.name}
"""What items of a list do not say of themselves."""


def fetches_weights(thing: Object) -> bool:
    """Whether it is a Job of the component weights-pvc: one for each model and image, by its name."""
    labels = thing["metadata"].get("labels") or {}
    return thing["kind"] == "Job" and labels.get("app.kubernetes.io/component") == WEIGHTS


def old_jobs(
    cluster: Cluster, name: str, namespace: str, wanted: Sequence[Object]
) -> tuple[list[Object], list[Object]]:
    """Jobs that fetched the weights of earlier models or images, as (ended, still running). A cluster that is being
    replaced may wait for one that runs. Raises ApiError."""
    selector = f"app.kubernetes.io/instance={name},app.kubernetes.io/component={WEIGHTS}"
    kept = {thing["metadata"]["name"] for thing in wanted if thing["kind"] == "Job"}
    found = [
        job for job in cluster.select(JOB, namespace, labels=selector).items if job["metadata"]["name"] not in kept
    ]
    ended = [job for job in found if any(reasons.condition(job, how) == "True" for how in ("Complete", "Failed"))]
    return [{**job, **_TYPE} for job in ended], [{**job, **_TYPE} for job in found if job not in ended]


def prune(
    cluster: Cluster, name: str, namespace: str, wanted: Sequence[Object], gone: Sequence[Object], progress: Progress
) -> None:
    """Delete what the last revision had and this one has not, unless something that runs still reads it, and Jobs
    that have ended, with their pods. wanted: all objects of this revision; gone: those of the last one alone."""
    doomed = [thing for thing in gone if thing["kind"] not in KEPT_KINDS and not fetches_weights(thing)]
    if any(thing["kind"] in READ_LATER for thing in doomed):
        try:
            texts = "".join(
                repr([thing["spec"] for thing in cluster.select(kind, namespace).items]) for kind in (RAY_CLUSTER, POD)
            )
        except ApiError as error:
            progress.tell("warning", f"what is left over stays: {error}")
            return
        doomed = [
            thing for thing in doomed if thing["kind"] not in READ_LATER or repr(thing["metadata"]["name"]) not in texts
        ]
    try:
        ended, running = old_jobs(cluster, name, namespace, wanted)
    except ApiError as error:
        progress.tell("warning", f"Jobs of earlier models stay: {error}")
        ended, running = [], []
    for job in running:
        progress.tell("warning", f"{title(job)} still runs and stays; a deployment after its end deletes it")
    for thing in doomed:
        _delete(cluster, thing, progress)
    for job in ended:
        _delete(cluster, job, progress, uid=job["metadata"].get("uid", ""))


def make_way(cluster: Cluster, wanted: Sequence[Object], gone: Sequence[Object], progress: Progress) -> None:
    """Delete our HorizontalPodAutoscaler before a ScaledObject comes: KEDA refuses what another autoscaler owns."""
    if any(thing["kind"] == SCALED_OBJECT.name for thing in wanted):
        for thing in gone:
            if thing["kind"] == AUTOSCALER.name:
                _delete(cluster, thing, progress)


def _delete(cluster: Cluster, thing: Object, progress: Progress, *, uid: str = "") -> None:
    metadata = thing["metadata"]
    try:
        if cluster.delete(kind_of(thing), metadata["name"], metadata.get("namespace", ""), uid=uid):
            progress.tell("deleted", f"{title(thing)}: the spec no longer has it")
    except ApiError as error:
        progress.tell("warning", f"{title(thing)} is left over: {error}")
