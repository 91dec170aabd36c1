"""What a deployment would change, before it changes anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from k8s.objects import Object, external_secrets
from k8s.spec import ServingSpec
from k8s.tool import exits, reasons, upgrade
from k8s.tool.cluster import Cluster
from k8s.tool.demand import Demand, live_quotas, read_demand
from k8s.tool.differences import Difference, differences, removals
from k8s.tool.exits import ApiError
from k8s.tool.kinds import CONFIG_MAP, NAMESPACE, RAY_CLUSTER, SECRET, Kind, kind_of, title
from k8s.tool.leftovers import KEPT_KINDS, fetches_weights, old_jobs
from k8s.tool.specs import place_holders
from k8s.tool.upgrade import Upgrade
from k8s.tool.waves import POLICY, wave_of, waves

CREATE: Final = "create"
CHANGE: Final = "change"
DELETE: Final = "delete"
SAME: Final = "same"
UNKNOWN: Final = "not known"


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one object. note: why it is not known, or will not be done."""

    action: str
    thing: Object
    differences: tuple[Difference, ...] = ()
    note: str = ""

    @property
    def title(self) -> str:
        return title(self.thing)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The whole. refusals: why `deploy` would refuse; warnings: what it would do without."""

    changes: tuple[Change, ...]
    upgrade: Upgrade
    demand: Demand
    compared: str
    restarts: tuple[str, ...]
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def has_changes(self) -> bool:
        """Of objects, or of a Ray cluster that was left behind by an earlier one."""
        is_behind = self.upgrade.kind == upgrade.NOT_ROLLED_OUT
        return is_behind or any(change.action not in (SAME, UNKNOWN) for change in self.changes)

    @property
    def exit_code(self) -> int:
        if not self.has_changes:
            return exits.DONE
        return exits.REFUSED if self.refusals else exits.CHANGES


def make_plan(
    cluster: Cluster,
    spec: ServingSpec,
    things: Sequence[Object],
    previous: Sequence[Object],
    *,
    forces_conflicts: bool = False,
) -> Plan:
    """things: all objects as they should be; previous: as they were applied last, as far as that is known.
    forces_conflicts: whether fields of other managers would be taken.

    Raises ApiError, DeadlineError; what may not be read is UNKNOWN instead.
    """
    ordered = [thing for _, group in waves(things) for thing in group]
    before = {_key(thing): thing for thing in previous}
    wanted = {_key(thing) for thing in things}
    gone = [thing for key, thing in before.items() if key not in wanted and thing["kind"] not in KEPT_KINDS]
    live = _Live(cluster, spec.namespace, [*ordered, *gone])
    why_local = _why_not_by_server(cluster, spec, live.has_namespace)
    refusals: list[str] = []
    warnings: list[str] = []
    changes: list[Change] = []
    for thing in ordered:
        change, refusal = _compare(
            cluster, thing, live, before.get(_key(thing)), is_local=bool(why_local), is_forced=forces_conflicts
        )
        changes.append(change)
        if refusal:
            refusals.append(refusal)
        elif change.note:
            warnings.append(f"{change.title}: {change.note}")
    changes += [Change(DELETE, thing) for thing in gone if not fetches_weights(thing) and live.find(thing) is not None]
    if live.has_namespace is not False:
        try:
            changes += [Change(DELETE, job) for job in old_jobs(cluster, spec.name, spec.namespace, things)[0]]
        except ApiError as error:
            if not error.is_forbidden:
                raise
            warnings.append("whether Jobs of earlier models are left is not known: needs list on jobs")
    found, service = _upgrade(cluster, live, changes)
    quotas = live_quotas(cluster, spec.namespace, things) if live.has_namespace is not False else []
    demand = read_demand(cluster, spec, service, found, quotas)
    refusals += demand.refusals
    if found.kind == upgrade.NOT_ROLLED_OUT:
        refusals.append(found.explained)
        warnings.append(_second_cluster(cluster, spec, service))
    if spec.placeholder_images:
        refusals.append(place_holders(spec))
    warnings += _of_engine(live.find(service), found)
    warnings += _secrets(cluster, spec)
    if demand.unknown:
        warnings.append(f"whether there is room is not known: {demand.unknown}")
    restarts = (*found.restarts, *_gateway_restarts(changes))
    compared = f"locally: {why_local}" if why_local else "by the server, in a dry run"
    return Plan(tuple(changes), found, demand, compared, restarts, tuple(refusals), tuple(warnings))


def _upgrade(cluster: Cluster, live: _Live, changes: Sequence[Change]) -> tuple[Upgrade, Object]:
    """(what becomes of the engine, its RayService as it should be)."""
    [change] = [change for change in changes if change.thing["kind"] == "RayService" and change.action != DELETE]
    service, now = change.thing, live.find(change.thing)
    running = None
    if name := upgrade.compared_cluster(now):
        try:
            running = cluster.get(RAY_CLUSTER, name, service["metadata"]["namespace"])
        except ApiError as error:
            if not (error.is_forbidden or error.is_missing):
                raise
    return upgrade.classify(now, service, changed=change.differences, running=running), service


class _Live:
    """Objects as they are, with one list for every kind of which there are several."""

    def __init__(self, cluster: Cluster, namespace: str, things: Sequence[Object]) -> None:
        self._found: dict[tuple[str, str], Object] = {}
        self.unknown: dict[tuple[str, str], str] = {}
        self.has_namespace: bool | None = None
        kinds = [kind_of(thing) for thing in things]
        listed: set[Kind] = set()
        for thing, kind in zip(things, kinds, strict=True):
            name = thing["metadata"]["name"]
            try:
                if kind.is_namespaced and kinds.count(kind) > 1:
                    if kind not in listed:
                        listed.add(kind)
                        for item in cluster.select(kind, namespace).items:
                            self._found[kind.name, item["metadata"]["name"]] = item
                elif (found := cluster.get(kind, name, thing["metadata"].get("namespace", ""))) is not None:
                    self._found[kind.name, name] = found
                if kind is NAMESPACE:
                    self.has_namespace = (kind.name, name) in self._found
            except ApiError as error:
                if not (error.is_forbidden or error.is_missing):
                    raise
                if error.is_forbidden:
                    self.unknown[kind.name, name] = f"needs {'list' if kind in listed else 'get'} on {kind.resource}"
                listed.discard(kind)

    def find(self, thing: Object) -> Object | None:
        return self._found.get((thing["kind"], thing["metadata"]["name"]))

    def why_unknown(self, thing: Object) -> str:
        return self.unknown.get((thing["kind"], thing["metadata"]["name"]), "")


def _compare(
    cluster: Cluster, thing: Object, live: _Live, previous: Object | None, *, is_local: bool, is_forced: bool
) -> tuple[Change, str]:
    """(the change, why it cannot be made)."""
    now = live.find(thing)
    if why := live.why_unknown(thing):
        return Change(UNKNOWN, thing, note=why), ""
    refusal = note = ""
    found = differences(now, thing, is_partial=True)
    if now is not None and previous is not None:
        found += removals(previous, thing, now)
    in_namespace = "namespace" not in thing["metadata"] or live.has_namespace is not False
    if not is_local and in_namespace:
        try:
            tried = cluster.apply(thing, is_dry_run=True, is_forced=is_forced)
            found = differences(now, tried, is_partial=False)
        except ApiError as error:
            if error.is_forbidden and wave_of(thing) == POLICY:
                note = f"will not be applied: {error.message}"
            elif error.is_missing:
                refusal = f"{title(thing)}: this cluster does not know {kind_of(thing).resource}; install its CRD"
            elif error.status == 409:
                refusal = f"{error}; --force-conflicts takes the fields"
            else:
                refusal = str(error)
    if now is None:
        return Change(CREATE, thing, note=note), refusal
    return Change(CHANGE if found else SAME, thing, tuple(found), note if found else ""), refusal if found else ""


def _why_not_by_server(cluster: Cluster, spec: ServingSpec, has_namespace: bool | None) -> str:
    """ "" where the server can try an apply without doing it; tried with something that never exists."""
    if has_namespace is False:
        return f"the namespace {spec.namespace} is not there yet"
    probe = {
        "apiVersion": CONFIG_MAP.api_version,
        "kind": CONFIG_MAP.name,
        "metadata": {"name": f"{spec.name}-dry-run", "namespace": spec.namespace},
    }
    try:
        cluster.apply(probe, is_dry_run=True)
    except ApiError as error:
        if error.is_forbidden:
            return f"a dry run needs patch on configmaps in {spec.namespace}"
        return f"the server has no dry run ({error.status} {error.reason})"
    return ""


def _second_cluster(cluster: Cluster, spec: ServingSpec, service: Object) -> str:
    """Whether an upgrade without an interruption would do, where the spec asks for none. Its quota would be twice
    this one."""
    demand = read_demand(cluster, spec, service, Upgrade(upgrade.NEW_CLUSTER), [])
    if demand.fit is None:
        why = demand.unknown or "it starts without any replica"
        return f"`engine.upgrade: new-cluster`: {demand.more_replicas} more replicas must run during the change; {why}"
    how = "would be deployed" if demand.fit.is_whole else "would be refused"
    return (
        f"`engine.upgrade: new-cluster` {how}: it needs {demand.gpus_during} GPUs during the change, and "
        f"{demand.fit.placed} of {demand.more_replicas} more replicas fit on the nodes now"
    )


def _of_engine(now: Object | None, found: Upgrade) -> list[str]:
    """What people should know before they change a RayService. now: as it is."""
    warnings = []
    if found.left:
        warnings.append(
            f"the running cluster keeps its own {', '.join(found.left[:4])}: KubeRay hands these on to a new cluster "
            "only, and makes none for them; `deploy --recreate` does"
        )
    if now is not None and reasons.condition(now, "UpgradeInProgress") == "True":
        warnings.append(f"an upgrade is under way, and its second cluster {upgrade.compared_cluster(now)} holds GPUs")
    if now is not None and upgrade.strategy(now) == upgrade.INCREMENTAL_STRATEGY:
        warnings.append(
            f"RayService {now['metadata']['name']}: upgradeStrategy is {upgrade.INCREMENTAL_STRATEGY}, which no spec "
            "asks for: it empties the first cluster while gateways still send to it"
        )
    return warnings


def _secrets(cluster: Cluster, spec: ServingSpec) -> list[str]:
    found = []
    for name, (keys, is_optional) in external_secrets(spec).items():
        try:
            secret = cluster.get(SECRET, name, spec.namespace)
        except ApiError as error:
            if not error.is_forbidden:
                raise
            found.append(f"Secret {name}: whether it is there is not known: needs get on secrets")
            continue
        if secret is None and not is_optional:
            made = "`deploy` makes it" if keys == ("secret",) else f"make it, with {', '.join(keys)}"
            found.append(f"Secret {name} is not there; {made}")
    return found


def _gateway_restarts(changes: Sequence[Change]) -> tuple[str, ...]:
    return tuple(
        f"pods of {change.title}, one after another"
        for change in changes
        if change.action == CHANGE
        and change.thing["kind"] in ("Deployment", "DaemonSet")
        and any(found.path[:2] == ("spec", "template") for found in change.differences)
    )


def _key(thing: Object) -> tuple[str, str]:
    return thing["kind"], thing["metadata"]["name"]
