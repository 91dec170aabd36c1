"""Puts a spec on the cluster in waves, waits for each, and says why when it does not come; back to the last good one
if asked to."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import secrets
import time
from collections.abc import Sequence

from k8s.objects import Object, engine_secret
from k8s.sizing import Sizing
from k8s.spec import ServingSpec
from k8s.tool import exits, upgrade
from k8s.tool.cluster import Cluster
from k8s.tool.exits import ApiError, Refused, ToolError
from k8s.tool.fleet import read_fleet
from k8s.tool.goals import WATCHED, Goal, Standing, goals_of, why_not
from k8s.tool.kinds import POD, RAY_CLUSTER, RAY_SERVICE, SECRET, kind_of, title
from k8s.tool.leftovers import make_way, prune
from k8s.tool.mirror import Mirror
from k8s.tool.plan import DELETE, Plan, make_plan
from k8s.tool.plan_report import gpus
from k8s.tool.progress import Progress
from k8s.tool.revisions import (
    FAILED,
    GOOD,
    RUNNING,
    Revision,
    begin,
    finish,
    forget_old,
    last_good,
    read_revisions,
)
from k8s.tool.specs import objects_of
from k8s.tool.waves import CONFIG, POLICY, wave_of, waves


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """timeout_s: of all waves together; 0 = from the spec. settle_s: how long a goal must hold. patience_s: how long
    something that waiting will not mend is waited for anyway."""

    waits: bool = True
    timeout_s: float = 0.0
    is_atomic: bool = False
    recreates: bool = False
    ignores_capacity: bool = False
    forces_conflicts: bool = False
    takes_over: bool = False
    settle_s: float = 5.0
    patience_s: float = 60.0
    note: str = ""


class NotReached(ToolError):
    """A wave did not get where it should, in time or at all."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exits.UNFINISHED)


def default_timeout_s(spec: ServingSpec) -> float:
    """What the probes of the spec allow a start: fetching weights, loading them; and a rollout of every gateway."""
    sizing = Sizing(spec)
    return sizing.fetch_deadline_s + 5.0 * sizing.startup_failures + sizing.gateway_grace_s + 300.0


def deploy(cluster: Cluster, spec: ServingSpec, options: Options, progress: Progress) -> int:
    """An exit code. Raises Refused before anything was changed, ToolError."""
    things = objects_of(spec)
    revisions = _history(cluster, spec, options)
    previous = revisions[0].manifest if revisions else []
    plan = make_plan(cluster, spec, things, previous, forces_conflicts=options.forces_conflicts)
    progress.tell("plan", f"{plan.upgrade.kind}: {plan.upgrade.explained}", upgrade=plan.upgrade.kind)
    progress.tell("gpus", gpus(plan.demand), during=plan.demand.gpus_during)
    check(plan, options)
    for warning in plan.warnings:
        progress.tell("warning", warning)
    return Deployment(cluster, spec, options, progress).run(things, plan, revisions)


class Deployment:
    """One run of it."""

    def __init__(self, cluster: Cluster, spec: ServingSpec, options: Options, progress: Progress) -> None:
        self._cluster = cluster
        self._spec = spec
        self._options = options
        self._progress = progress
        self._deadline = time.monotonic() + (options.timeout_s or default_timeout_s(spec))
        self._deleted = ""  # the Ray cluster that had to go

    def run(self, things: Sequence[Object], plan: Plan, revisions: Sequence[Revision]) -> int:
        """An exit code."""
        spec, progress = self._spec, self._progress
        recreates = self._options.recreates and plan.upgrade.is_left_behind
        if not plan.has_changes and revisions and revisions[0].status == GOOD:
            progress.tell("done", f"nothing to change: revision {revisions[0].number} runs", number=revisions[0].number)
            return exits.DONE
        for thing in things:
            if thing["kind"] == "Namespace":  # revisions live in it
                self._apply(thing)
        revision = begin(self._cluster, spec, things, revisions, self._options.note)
        progress.tell("revision", f"revision {revision.number}", number=revision.number)
        try:
            self._make_secret()
            make_way(self._cluster, things, _gone(plan), progress)
            self._waves(things, recreates=recreates)
        except (ToolError, KeyboardInterrupt) as error:
            text = str(error) or "interrupted"
            progress.tell("error", text)
            finish(self._cluster, revision, spec.namespace, FAILED, text)
            return self._give_up(revisions, error)
        if self._options.waits:
            prune(self._cluster, spec.name, spec.namespace, things, _gone(plan), progress)
        finish(self._cluster, revision, spec.namespace, GOOD)
        forget_old(self._cluster, spec.name, spec.namespace)
        done = "is deployed" if self._options.waits else "is applied; nobody waited for it"
        progress.tell("done", f"revision {revision.number} {done}", number=revision.number)
        return exits.DONE

    def _give_up(self, revisions: Sequence[Revision], error: BaseException) -> int:
        good = last_good(revisions)
        if not self._options.is_atomic:
            how = (
                f"`argosy k8s rollback` returns to revision {good.number}" if good else "there is nothing to return to"
            )
            self._progress.tell("failed", f"the cluster stays as it is; {how}")
            return error.code if isinstance(error, ToolError) and error.code != exits.ERROR else exits.UNFINISHED
        if good is None:
            self._progress.tell("failed", "the cluster stays as it is: no good revision to return to")
            return exits.UNFINISHED
        self._progress.tell("rollback", f"back to revision {good.number}", number=good.number)
        self._deadline = time.monotonic() + (self._options.timeout_s or default_timeout_s(self._spec))
        try:
            # A cluster that took the place of a deleted one stays, unless it goes the same way.
            self._waves(good.manifest, recreates=bool(self._deleted))
        except ToolError as second:
            self._progress.tell("failed", f"revision {good.number} did not come back either: {second}")
            return exits.UNFINISHED
        self._progress.tell("rolled_back", f"revision {good.number} runs again", number=good.number)
        return exits.ROLLED_BACK

    # --- waves --------------------------------------------------------------------------------

    def _waves(self, things: Sequence[Object], *, recreates: bool) -> None:
        since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with Mirror(self._cluster, self._spec.namespace, WATCHED) as mirror:
            for name, group in waves(things):
                for thing in group:
                    self._apply(thing)
                    if thing["kind"] == "RayService":
                        self._resize(thing, shrinks=False)
                        if recreates:
                            self._recreate(thing)
                self._progress.tell("applied", f"{name}: {len(group)} objects", wave=name, objects=len(group))
                if self._options.waits:
                    self._wait(mirror, name, goals_of(group), since)
                for thing in group:
                    if thing["kind"] == "RayService":  # now Serve has taken replicas off the pods that go
                        self._resize(thing, shrinks=True)

    def _apply(self, thing: Object) -> None:
        """What a namespace's owner may not apply is told, and left to whoever may."""
        try:
            self._cluster.apply(thing, is_forced=self._options.forces_conflicts)
        except ApiError as error:
            if error.is_forbidden and wave_of(thing) == POLICY:
                self._progress.tell("warning", f"{title(thing)} was not applied: {error.message}")
                return
            if error.status == 409:
                raise ToolError(f"{error}; --force-conflicts takes the fields") from None
            if error.is_missing and "namespaces" not in error.message:
                resource = kind_of(thing).resource
                raise ToolError(f"{title(thing)}: this cluster does not know {resource}; install its CRD") from None
            raise

    def _wait(self, mirror: Mirror, wave: str, goals: list[Goal], since: str) -> None:
        """Until every goal has held for settle_s. Raises NotReached with the reasons."""
        if not goals:
            return
        seen = 0
        held_since: float | None = None
        stuck_since: float | None = None
        while True:
            now = time.monotonic()
            standings = {goal: self._look(goal, mirror) for goal in goals}
            late = [goal for goal, standing in standings.items() if not standing.is_done]
            why = [reason for goal in late for reason in why_not(mirror, goal, self._spec.name, since)]
            lines = [str(reason) for reason in why]
            if not late:
                held_since = now if held_since is None else held_since
                if now - held_since >= self._options.settle_s:
                    for goal in goals:
                        self._progress.tell("ready", f"{goal.title}: {standings[goal].text}", wave=wave)
                    return
            else:
                held_since = None
                self._progress.standing({goal.title: standings[goal].text for goal in late}, lines)
            is_stuck = any(reason.is_stuck for reason in why)
            stuck_since = (now if stuck_since is None else stuck_since) if is_stuck else None
            shown = "; ".join(lines) or "; ".join(f"{goal.title}: {standings[goal].text}" for goal in late)
            if stuck_since is not None and now - stuck_since >= self._options.patience_s:
                stuck = "; ".join(str(reason) for reason in why if reason.is_stuck)
                raise NotReached(f"{wave}: waiting will not mend it: {stuck}")
            if late and now >= self._deadline:
                raise NotReached(f"{wave}: not ready in time: {shown}")
            seen = mirror.wait(seen, min(1.0, max(0.05, self._options.settle_s / 2)))

    def _look(self, goal: Goal, mirror: Mirror) -> Standing:
        """KubeRay takes a while to see that a cluster is gone, and calls its service ready until then."""
        standing = goal.look(mirror)
        if goal.kind is RAY_SERVICE and self._deleted:
            status = (mirror.find(RAY_SERVICE, goal.name) or {}).get("status") or {}
            if (status.get("activeServiceStatus") or {}).get("rayClusterName") == self._deleted:
                return Standing(False, f"{self._deleted} is gone, its successor is not ready", standing.reasons)
        return standing

    # --- the engine ---------------------------------------------------------------------------

    def _active_cluster(self, service: Object) -> Object | None:
        name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
        live = self._cluster.get(RAY_SERVICE, name, namespace)
        status = ((live or {}).get("status") or {}).get("activeServiceStatus") or {}
        active = status.get("rayClusterName")
        return self._cluster.get(RAY_CLUSTER, active, namespace) if active else None

    def _resize(self, service: Object, *, shrinks: bool) -> None:
        """KubeRay hands bounds of worker groups on only to new clusters; the running one gets them from us."""
        for _ in range(5):
            live = self._active_cluster(service)
            if live is None or not upgrade.resizing(live, service, shrinks=shrinks):
                return
            patch = upgrade.resizing(live, service, shrinks=shrinks, idle=self._idle_pods() if shrinks else ())
            name = live["metadata"]["name"]
            try:
                self._cluster.patch(RAY_CLUSTER, name, self._spec.namespace, patch)
            except ApiError as error:
                if error.status not in (409, 422):
                    raise
                continue
            steps = [step for step in patch if step["op"] == "add"]
            changed = ", ".join(f"{step['path'].rpartition('/')[2]} {step['value']}" for step in steps)
            self._progress.tell("resized", f"RayCluster {name}: {changed}")
            return
        raise ToolError(f"RayCluster of {service['metadata']['name']}: changed by others five times in a row")

    def _idle_pods(self) -> list[str]:
        """Workers without a replica."""
        fleet = read_fleet(self._cluster, self._spec.name, self._spec.namespace, kinds=(POD,))
        if fleet.replicas is None:
            self._progress.tell("warning", f"KubeRay chooses which pods go: {fleet.unknown['replicas']}")
            return []
        busy = {pod for replica in fleet.replicas for pod in replica.pods}
        return sorted(pod["metadata"]["name"] for pod in fleet.workers if pod["metadata"]["name"] not in busy)

    def _recreate(self, service: Object) -> None:
        live = self._active_cluster(service)
        if live is not None:
            name = live["metadata"]["name"]
            self._progress.tell(
                "warning", f"RayCluster {name} is deleted; nothing is served until its successor is ready"
            )
            self._deleted = name
            self._cluster.delete(RAY_CLUSTER, name, self._spec.namespace, uid=live["metadata"].get("uid", ""))

    def _make_secret(self) -> None:
        """What gateways and replicas prove to each other (C22): 256 random bits, made once, never shown."""
        name, namespace = engine_secret(self._spec), self._spec.namespace
        try:
            if self._cluster.get(SECRET, name, namespace) is not None:
                return
        except ApiError as error:
            if not error.is_forbidden:
                raise
            return
        value = base64.b64encode(secrets.token_hex(32).encode()).decode()
        labels = {"app.kubernetes.io/instance": self._spec.name, "app.kubernetes.io/component": "secret"}
        metadata = {"name": name, "namespace": namespace, "labels": labels}
        thing = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": metadata,
            "type": "Opaque",
            "data": {"secret": value},
        }
        try:
            self._cluster.create(thing)
        except ApiError as error:
            if error.status != 409:
                raise
            return
        self._progress.tell("secret", f"Secret {name} was not there, and has been made", wave=CONFIG)


def _gone(plan: Plan) -> list[Object]:
    """What the last revision had and this one has not."""
    return [change.thing for change in plan.changes if change.action == DELETE]


def _history(cluster: Cluster, spec: ServingSpec, options: Options) -> list[Revision]:
    """Raises Refused while somebody else deploys, or for --atomic where there can be no way back."""
    try:
        revisions = read_revisions(cluster, spec.name, spec.namespace)
    except ApiError as error:
        if error.is_forbidden:
            raise Refused(f"revisions are kept as Secrets: {error}") from None
        raise
    if revisions and revisions[0].status == RUNNING and not options.takes_over:
        raise Refused(
            f"revision {revisions[0].number} of {revisions[0].time} is being deployed, or its deployer was killed; "
            "--take-over deploys all the same"
        )
    return revisions


def check(plan: Plan, options: Options) -> None:
    """Raises Refused for a plan that would do harm, as far as the options do not allow it."""
    refusals = list(plan.refusals)
    if options.ignores_capacity:
        refusals = [text for text in refusals if text not in plan.demand.refusals]
    if options.recreates:
        refusals = [text for text in refusals if text != upgrade.EXPLAINED[upgrade.NOT_ROLLED_OUT]]
    if refusals and (plan.has_changes or options.recreates):
        hint = "; --ignore-capacity deploys all the same" if plan.demand.refusals else ""
        raise Refused("; ".join(refusals) + hint)
