"""More or fewer replicas and gateways, without a fight with whoever else decides their number."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

from k8s.objects import Object
from k8s.spec import ServingSpec, SpecError, spec_from
from k8s.tool import upgrade
from k8s.tool.cluster import Cluster
from k8s.tool.deploy import Deployment, Options, check
from k8s.tool.exits import Refused, ToolError
from k8s.tool.fleet import read_fleet, scaler_of_gateways
from k8s.tool.kinds import AUTOSCALER, RAY_SERVICE, SCALED_OBJECT
from k8s.tool.plan import Plan, make_plan
from k8s.tool.progress import Progress
from k8s.tool.revisions import Revision, last_good, read_revisions
from k8s.tool.specs import as_mapping


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Numbers that were asked for; None = as they are."""

    replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    gateways: int | None = None
    min_gateways: int | None = None
    max_gateways: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Scaling:
    """What a wish comes to: the objects of the last good revision with other numbers."""

    spec: ServingSpec
    things: list[Object]
    plan: Plan
    revisions: Sequence[Revision]


def prepare(cluster: Cluster, name: str, namespace: str, wish: Wish) -> Scaling:
    """Raises Refused when somebody else owns a number, ToolError."""
    revisions = read_revisions(cluster, name, namespace)
    good = last_good(revisions)
    if good is None:
        raise ToolError(f"no good revision of {name} is kept in {namespace}: `argosy k8s deploy` comes first")
    fleet = read_fleet(cluster, name, namespace, kinds=(RAY_SERVICE, AUTOSCALER))
    things = copy.deepcopy(good.manifest)
    spec = good.spec
    asks_engine = (wish.replicas, wish.min_replicas, wish.max_replicas) != (None, None, None)
    asks_gateways = (wish.gateways, wish.min_gateways, wish.max_gateways) != (None, None, None)
    if not (asks_engine or asks_gateways):
        raise ToolError("scale: say what: --replicas, --min and --max of the engine, or --gateways, ...")
    if asks_engine:
        spec = _scale_engine(spec, things, wish)
    if asks_gateways:
        owner = scaler_of_gateways(cluster, fleet)
        spec = _scale_gateways(spec, things, wish, owner)
    return Scaling(spec, things, make_plan(cluster, spec, things, good.manifest), revisions)


def scale(cluster: Cluster, prepared: Scaling, options: Options, progress: Progress) -> int:
    """An exit code."""
    check(prepared.plan, options)
    return Deployment(cluster, prepared.spec, options, progress).run(prepared.things, prepared.plan, prepared.revisions)


def lines_for_spec(before: ServingSpec, after: ServingSpec) -> list[str]:
    """What must change in a spec's file, or its next deployment undoes the scaling."""
    found = []
    for section in ("engine", "gateway"):
        for key in ("min_replicas", "max_replicas"):
            old, new = getattr(getattr(before, section), key), getattr(getattr(after, section), key)
            if old != new:
                found.append(f"{section}.{key}: {new}")
    return found


def _scale_engine(spec: ServingSpec, things: list[Object], wish: Wish) -> ServingSpec:
    for value, option in ((wish.replicas, "--replicas"), (wish.min_replicas, "--min"), (wish.max_replicas, "--max")):
        if value is not None and not 0 <= value <= 64:
            raise ToolError(f"{option}: {value} is outside 0 to 64")
    i = next(i for i, thing in enumerate(things) if thing["kind"] == "RayService")
    try:
        things[i] = upgrade.with_replicas(things[i], low=wish.min_replicas, high=wish.max_replicas, count=wish.replicas)
    except ValueError as error:
        if str(error) == "fixed":
            raise Refused("--min, --max: nothing scales this engine; --replicas sets its number") from None
        raise Refused(
            "--replicas: Ray Serve decides the number of replicas, within --min and --max; a number of ours would be "
            "overwritten"
        ) from None
    low = wish.replicas if wish.replicas is not None else wish.min_replicas
    high = wish.replicas if wish.replicas is not None else wish.max_replicas
    return _changed(spec, "engine", low, high)


def _scale_gateways(
    spec: ServingSpec, things: list[Object], wish: Wish, owner: tuple[str, Object] | None
) -> ServingSpec:
    """owner: as `scaler_of_gateways` found it on the cluster."""
    name = f"{spec.name}-gateway"
    deployment = next(t for t in things if t["kind"] == "Deployment" and t["metadata"]["name"] == name)
    autoscaler = next((t for t in things if t["kind"] == AUTOSCALER.name), None)
    scaled = next((t for t in things if t["kind"] == SCALED_OBJECT.name), None)
    if scaled is None and owner is not None and owner[0] == "KEDA":
        raise Refused(
            f"gateways: the ScaledObject {owner[1]['metadata']['name']} of KEDA, which is not ours, decides their "
            "number; change its minReplicaCount there"
        )
    if scaled is not None:
        return _scale_with_keda(spec, scaled, wish)
    if wish.gateways is not None:
        if owner is not None or autoscaler is not None:
            raise Refused(
                "--gateways: the HorizontalPodAutoscaler decides the number of gateways; --min-gateways and "
                "--max-gateways set its bounds"
            )
        deployment["spec"]["replicas"] = wish.gateways
        return _changed(spec, "gateway", wish.gateways, wish.gateways)
    if autoscaler is None:
        raise Refused("--min-gateways, --max-gateways: nothing scales the gateways; --gateways sets their number")
    if wish.min_gateways is not None:
        autoscaler["spec"]["minReplicas"] = wish.min_gateways
    if wish.max_gateways is not None:
        autoscaler["spec"]["maxReplicas"] = wish.max_gateways
    return _changed(spec, "gateway", wish.min_gateways, wish.max_gateways)


def _scale_with_keda(spec: ServingSpec, scaled: Object, wish: Wish) -> ServingSpec:
    """Ours, of the component autoscale-keda: its bounds are the spec's."""
    if wish.gateways is not None:
        raise Refused(
            f"--gateways: the ScaledObject {scaled['metadata']['name']} of KEDA decides the number of gateways; "
            "--min-gateways and --max-gateways set its bounds"
        )
    if wish.min_gateways is not None:
        scaled["spec"]["minReplicaCount"] = wish.min_gateways
    if wish.max_gateways is not None:
        scaled["spec"]["maxReplicaCount"] = scaled["spec"]["fallback"]["replicas"] = wish.max_gateways
    return _changed(spec, "gateway", wish.min_gateways, wish.max_gateways)


def _changed(spec: ServingSpec, section: str, low: int | None, high: int | None) -> ServingSpec:
    """Raises ToolError for numbers that a spec may not have."""
    document = as_mapping(spec)
    if low is not None:
        document[section]["min_replicas"] = low
    if high is not None:
        document[section]["max_replicas"] = high
    try:
        return spec_from(document, "scale")
    except SpecError as error:
        raise ToolError(str(error)) from None
