"""Takes a node or a replica out without cutting a stream: mark, wait, evict.

The drain of C19: Ray is told that the pod's node drains, so Serve starts a successor and the replica says `draining`;
gateways move its rows, which continue on another replica; when none is left, or time is up, the pod is evicted through
the eviction API, which honours PodDisruptionBudgets. A pod that could not be marked drains itself after its eviction,
within its grace period.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Sequence

from k8s.objects import GATEWAY, HEAD, Object
from k8s.tool import exits, inside, reasons
from k8s.tool.cluster import Cluster
from k8s.tool.exits import ApiError, DeadlineError, Refused, ToolError
from k8s.tool.fleet import Fleet, read_fleet
from k8s.tool.kinds import NODE, POD, RAY_SERVICE
from k8s.tool.progress import Progress

EXEC_S = 30.0
MARGIN_S = 20.0  # of Ray's own drain beyond ours, as in k8s/sizing.py


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """max_disruption: share of replicas, and of gateways, that may be away at once."""

    timeout_s: float = 600.0
    max_disruption: float = 0.1
    cordons: bool = True
    poll_s: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Pods that leave together: the hosts of one replica, or a pod by itself."""

    title: str
    pods: tuple[Object, ...]
    replicas: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(pod["metadata"]["name"] for pod in self.pods)


def drain(cluster: Cluster, name: str, namespace: str, target: str, options: Options, progress: Progress) -> int:
    """target: a node, a replica's id or a pod of ours. An exit code. Raises Refused before anything was changed."""
    fleet = read_fleet(cluster, name, namespace, kinds=(RAY_SERVICE, POD))
    if POD.name in fleet.unknown:
        raise ToolError(f"drain: pods are not known: {fleet.unknown[POD.name]}")
    node, groups = _find(cluster, fleet, target)
    if not groups:
        progress.tell("done", f"nothing of {name} runs on {target}")
        return exits.DONE
    _check(fleet, groups, options.max_disruption)
    if node and options.cordons:
        _cordon(cluster, node, progress)
    return _Drain(cluster, fleet, options, progress).run(groups)


def _find(cluster: Cluster, fleet: Fleet, target: str) -> tuple[str, list[Group]]:
    """(node to cordon or "", what leaves). Raises ToolError."""
    for replica in fleet.replicas or []:
        if replica.id == target:
            return "", _groups(fleet, [pod for pod in fleet.workers if pod["metadata"]["name"] in replica.pods])
    pods = fleet.pods()
    if any(pod["metadata"]["name"] == target for pod in pods):
        return "", _groups(fleet, [pod for pod in pods if pod["metadata"]["name"] == target])
    here = [pod for pod in pods if pod["spec"].get("nodeName") == target and not _is_daemon(pod)]
    if here:
        return target, _groups(fleet, here)
    try:
        if cluster.get(NODE, target) is not None:
            return target, []
    except ApiError as error:
        if not error.is_forbidden:
            raise
    ids = ", ".join(replica.id for replica in fleet.replicas or []) or fleet.unknown.get("replicas", "none")
    raise ToolError(f"TARGET: {target!r} is no node with pods of {fleet.name}, no pod of it and no replica ({ids})")


def _groups(fleet: Fleet, pods: Sequence[Object]) -> list[Group]:
    """Replicas first, with all their hosts wherever those are; then gateways; the head last: it places the others."""
    workers = {pod["metadata"]["name"]: pod for pod in fleet.workers}
    found: list[Group] = []
    seen: set[str] = set()
    for pod in pods:
        name = pod["metadata"]["name"]
        if name in seen:
            continue
        if name in workers:
            replicas = fleet.of_pod(name)
            hosts = list(dict.fromkeys([name, *(host for replica in replicas for host in replica.pods)]))
            seen.update(hosts)
            ids = tuple(replica.id for replica in replicas)
            title = f"replica {', '.join(ids)}" if ids else f"worker {name}"
            found.append(Group(title, tuple(workers[host] for host in hosts if host in workers), ids))
        else:
            seen.add(name)
            component = (pod["metadata"].get("labels") or {}).get("app.kubernetes.io/component", "pod")
            found.append(Group(f"{component} {name}", (pod,)))
    return sorted(found, key=lambda group: (_component(group) == HEAD, _component(group) == GATEWAY))


def _check(fleet: Fleet, groups: Sequence[Group], share: float) -> None:
    """Raises Refused when more would be away at once than allowed, or nobody would serve."""
    leaving = {replica for group in groups for replica in group.replicas}
    if fleet.replicas is None and any(_component(group) == "engine-worker" for group in groups):
        raise Refused(
            f"drain: which replicas would leave is not known: {fleet.unknown.get('replicas')}; so --max-disruption "
            "cannot be kept"
        )
    ready = {replica.id for replica in fleet.replicas or [] if replica.state == "ready"}
    total = max(len(fleet.replicas or []), (fleet.bounds or (0, 0))[0])
    _check_share("replicas", total, total - len(ready), len(leaving & ready), len(ready - leaving), share)
    gateways = {pod["metadata"]["name"]: reasons.is_ready(pod) for pod in fleet.gateways}
    gone = [name for group in groups for name in group.names if gateways.get(name)]
    well = sum(gateways.values())
    _check_share("gateways", len(gateways), len(gateways) - well, len(gone), well - len(gone), share)


def _check_share(what: str, total: int, away: int, leaving: int, left: int, share: float) -> None:
    if leaving == 0:
        return
    allowed = math.ceil(total * share - 1e-9)  # rounded up, as a PodDisruptionBudget rounds
    if away + leaving > allowed:
        raise Refused(
            f"--max-disruption {share:.0%} of {total} {what} is {allowed} at once; {away} are away already and this "
            f"takes {leaving} more"
        )
    if left < 1 and share < 1.0:
        raise Refused(f"no ready one of {total} {what} would be left; --max-disruption 100% drains all the same")


def _cordon(cluster: Cluster, node: str, progress: Progress) -> None:
    try:
        cluster.patch(NODE, node, "", {"spec": {"unschedulable": True}})
    except ApiError as error:
        if error.is_forbidden:
            raise Refused(
                f"node {node} cannot be cordoned: needs patch on nodes; --no-cordon drains all the same, and pods may "
                "come back to it"
            ) from None
        raise
    progress.tell("cordoned", f"node {node} takes no new pods; `kubectl uncordon {node}` opens it again", node=node)


class _Drain:
    """One run of it."""

    def __init__(self, cluster: Cluster, fleet: Fleet, options: Options, progress: Progress) -> None:
        self._cluster = cluster
        self._fleet = fleet
        self._options = options
        self._progress = progress
        self._deadline = time.monotonic() + options.timeout_s
        self._cut: list[str] = []
        self._stayed: list[str] = []

    def run(self, groups: Sequence[Group]) -> int:
        for group in groups:
            rows = self._empty(group) if group.replicas else 0
            if rows:
                self._cut.append(f"{group.title} had {rows} requests when its time was up")
            for pod in group.pods:
                if not self._evict(pod):
                    self._stayed.append(pod["metadata"]["name"])
            for pod in group.pods:
                self._await_end(pod)
        for text in self._cut:
            self._progress.tell("warning", f"{text}; they continue on another replica, or were cut with the pod")
        if self._stayed:
            names = ", ".join(dict.fromkeys(self._stayed))
            self._progress.tell("failed", f"not gone in time: {names}", stayed=self._stayed, cut=self._cut)
            return exits.UNFINISHED
        text = "drained; no request was running on what left" if not self._cut else "drained"
        self._progress.tell("done", text, cut=self._cut)
        return exits.DONE

    # --- mark and wait ------------------------------------------------------------------------

    def _empty(self, group: Group) -> int:
        """Mark a replica's pods as draining and wait until it has no rows. Rows that are left when time is up; 0 also
        where the pods could not be marked, since waiting would be for nothing."""
        try:
            self._mark(group)
        except (ApiError, DeadlineError) as error:
            self._progress.tell(
                "warning", f"{group.title} is not marked, and drains itself after the eviction: {error}"
            )
            return 0
        self._progress.tell("draining", f"{group.title} drains", replicas=list(group.replicas))
        while True:
            rows = self._rows(group)
            if rows == 0:
                return 0
            left_s = self._deadline - time.monotonic()
            if rows is not None and left_s <= 0:
                return rows
            if left_s <= 0:
                return 0
            text = "its requests are not known right now" if rows is None else f"{rows} requests still run"
            self._progress.standing({group.title: text}, [])
            time.sleep(min(self._options.poll_s, max(0.0, left_s)))

    def _mark(self, group: Group) -> None:
        head = next((pod for pod in self._fleet.heads if reasons.is_ready(pod)), None)
        if head is None:
            raise ApiError(f"mark {group.title}", 0, "NoHead", "no head is ready to be told")
        name, namespace = head["metadata"]["name"], self._fleet.namespace
        listing = ["ray", "list", "nodes", "--format", "json", "--limit", "10000", "--timeout", "20"]
        printed = inside.run_in(self._cluster, name, namespace, "ray-head", listing, EXEC_S)
        nodes = _nodes_by_address(printed)
        deadline_s = max(1, math.ceil(self._deadline - time.monotonic() + MARGIN_S))
        for pod in group.pods:
            node = nodes.get((pod.get("status") or {}).get("podIP", ""))
            if node is None:
                raise ApiError(
                    f"mark {group.title}", 0, "NoNode", f"Ray knows no node at Pod {pod['metadata']['name']}"
                )
            command = ["ray", "drain-node", "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
            command += ["--reason-message", "argosy k8s drain", "--deadline-remaining-seconds", str(deadline_s)]
            inside.run_in(self._cluster, name, namespace, "ray-head", command, EXEC_S)

    def _rows(self, group: Group) -> int | None:
        """Of a group's replicas now; a replica that is no longer listed has none. None: no gateway told."""
        fleet = read_fleet(self._cluster, self._fleet.name, self._fleet.namespace, kinds=(POD,))
        if fleet.replicas is None:
            return None
        return sum(replica.num_rows for replica in fleet.replicas if replica.id in group.replicas)

    # --- evict --------------------------------------------------------------------------------

    def _evict(self, pod: Object) -> bool:
        """Whether the API server took the eviction before time was up."""
        name = pod["metadata"]["name"]
        told = False
        while True:
            try:
                self._cluster.evict(name, self._fleet.namespace)
            except ApiError as error:
                if error.is_missing:
                    return True
                if error.status != 429:
                    raise
                if not told:
                    told = True
                    self._progress.tell("held", f"a PodDisruptionBudget holds Pod {name}: {error.message}", pod=name)
                if time.monotonic() >= self._deadline:
                    return False
                time.sleep(min(self._options.poll_s, max(0.0, self._deadline - time.monotonic())))
                continue
            self._progress.tell("evicted", f"Pod {name} is evicted", pod=name)
            return True

    def _await_end(self, pod: Object) -> None:
        """Until the pod, and not only its name, is gone; its own grace period bounds what comes after the deadline."""
        name = pod["metadata"]["name"]
        if name in self._stayed:
            return
        while True:
            live = self._cluster.get(POD, name, self._fleet.namespace)
            if live is None or live["metadata"].get("uid") != pod["metadata"].get("uid"):
                return
            if time.monotonic() >= self._deadline:
                self._stayed.append(name)
                return
            self._progress.standing({f"Pod {name}": "is leaving"}, [])
            time.sleep(self._options.poll_s)


def _nodes_by_address(printed: str) -> dict[str, str]:
    """Address -> node id, of living nodes in what `ray list nodes --format json` prints. Raises ApiError."""
    try:
        listed = json.loads(printed[printed.index("[") :])
        return {node["node_ip"]: node["node_id"] for node in listed if node.get("state") == "ALIVE"}
    except (ValueError, KeyError, TypeError) as error:
        raise ApiError("list Ray's nodes", 0, "Invalid", f"an answer of another version: {error!r}") from None


def _component(group: Group) -> str:
    return str((group.pods[0]["metadata"].get("labels") or {}).get("app.kubernetes.io/component", ""))


def _is_daemon(pod: Object) -> bool:
    return any(owner.get("kind") == "DaemonSet" for owner in pod["metadata"].get("ownerReferences") or [])
