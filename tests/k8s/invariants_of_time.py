"""Graces, drains, timeouts, probes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from k8s.objects import ENGINE, GATEWAY, HEAD, WORKER, Object
from tests.k8s.invariants import invariant
from tests.k8s.manifests import Manifests, Pod

RAY_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
MARGIN_S = 10
BALANCER_IDLE_S = 60  # the shortest idle timeout that load balancers come with


def env(container: Object) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


def set_env(container: Object, name: str, value: str) -> None:
    [entry] = [entry for entry in container["env"] if entry["name"] == name]
    entry["value"] = value


def pre_stop_s(pod: Pod) -> int:
    hooks = (container.get("lifecycle", {}).get("preStop", {}) for container in pod.containers(init=False))
    return max(hook.get("sleep", {}).get("seconds", 0) for hook in hooks)


def engine_pods(m: Manifests) -> list[Pod]:
    return [pod for pod in m.pods() if pod.component in ENGINE]


def drain_s(m: Manifests) -> float:
    return float(m.serve["applications"][1]["args"]["drain_timeout_s"])


def _set_drain(m: Manifests, value: float) -> None:
    m.alter_serve(lambda document: document["applications"][1]["args"].update(drain_timeout_s=value))


def _set_replica(m: Manifests, **values: Any) -> None:
    m.alter_serve(lambda document: document["applications"][1]["deployments"][0].update(values))


@invariant(
    lambda m: m.pod(GATEWAY).spec.update(terminationGracePeriodSeconds=30),
    lambda m: m.pod(WORKER).spec.update(terminationGracePeriodSeconds=435),
    lambda m: m.pod(HEAD).spec.pop("terminationGracePeriodSeconds"),
    lambda m: set_env(m.container(WORKER), RAY_DRAIN, "445"),
    lambda m: m.container(WORKER).update(lifecycle={"preStop": {"sleep": {"seconds": 15}}}),
    lambda m: m.alter_settings(drain_timeout_s=1000.0),
)
def grace_is_longer_than_the_drain(m: Manifests) -> Iterator[str]:
    drains = {pod.owner: (pod, float(env(pod.spec["containers"][0]).get(RAY_DRAIN, 30.0))) for pod in engine_pods(m)}
    gateway = m.pod(GATEWAY)
    drains[gateway.owner] = gateway, m.settings["drain_timeout_s"]
    for owner, (pod, drain) in drains.items():
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        if grace < pre_stop_s(pod) + drain + MARGIN_S:
            yield f"{owner}: grace {grace} s < preStop {pre_stop_s(pod)} s + drain {drain} s + {MARGIN_S} s"


@invariant(lambda m: _set_drain(m, 400.0), lambda m: m.alter_settings(drain_timeout_s=400.0))
def drains_outlast_the_longest_generation(m: Manifests) -> Iterator[str]:
    longest = m.spec.engine.max_tokens / m.spec.engine.slowest_tokens_per_s
    for who, drain in (("engine", drain_s(m)), ("gateway", m.settings["drain_timeout_s"])):
        if drain < longest:
            yield f"{who}: drain {drain} s < longest generation {longest} s"


@invariant(
    lambda m: _set_replica(m, graceful_shutdown_timeout_s=20.0),
    lambda m: set_env(m.container(WORKER), RAY_DRAIN, "415"),
    lambda m: m.service.update(rayClusterDeletionDelaySeconds=60),
    lambda m: m.service.pop("rayClusterDeletionDelaySeconds"),
)
def who_stops_replicas_waits_for_their_drain(m: Manifests) -> Iterator[str]:
    serve = m.replica["graceful_shutdown_timeout_s"]
    if serve < drain_s(m) + MARGIN_S:
        yield f"Serve kills after {serve} s, the drain takes {drain_s(m)} s"
    for pod in engine_pods(m):
        ray = float(env(pod.spec["containers"][0]).get(RAY_DRAIN, 30.0))
        if ray < serve:
            yield f"{pod.owner}: Ray's drain {ray} s < Serve's shutdown {serve} s"
    delay = m.service.get("rayClusterDeletionDelaySeconds", 60)
    if delay < max(drain_s(m), m.settings["request_timeout_s"]):
        yield f"an old cluster is deleted after {delay} s, requests take {m.settings['request_timeout_s']} s"


@invariant(lambda m: m.alter_settings(request_timeout_s=300), lambda m: m.alter_settings(queue_timeout_s=300.0))
def a_gateway_waits_longer_than_an_engine_may_take(m: Manifests) -> Iterator[str]:
    longest = m.spec.engine.max_tokens / m.spec.engine.slowest_tokens_per_s + m.settings["queue_timeout_s"]
    if m.settings["request_timeout_s"] < longest:
        yield f"request timeout {m.settings['request_timeout_s']} s < queue and generation {longest} s"


@invariant(
    lambda m: m.container(WORKER)["startupProbe"].update(failureThreshold=10),
    lambda m: m.container(WORKER).pop("startupProbe"),
)
def start_ups_have_time(m: Manifests) -> Iterator[str]:
    engine = m.spec.engine
    num_bytes = m.sizing.rank_weights_bytes * m.sizing.ranks_per_pod
    needed = 1.5 * (num_bytes / engine.disk_bytes_per_s + engine.prepare_s)
    probe = m.container(WORKER).get("startupProbe", {"periodSeconds": 10, "failureThreshold": 3})
    budget = probe["periodSeconds"] * probe["failureThreshold"]
    if budget < needed:
        yield f"workers: a start-up budget of {budget} s < {needed:.0f} s"


@invariant(
    lambda m: m.container(GATEWAY)["livenessProbe"].update(initialDelaySeconds=30),
    lambda m: m.container(GATEWAY)["livenessProbe"]["httpGet"].update(path="/readyz"),
    lambda m: m.container(WORKER)["livenessProbe"].update(timeoutSeconds=1),
    lambda m: m.container(HEAD).pop("livenessProbe"),
    lambda m: m.container(GATEWAY).pop("readinessProbe"),
    lambda m: m.container(GATEWAY)["startupProbe"]["httpGet"].update(path="/readyz"),
)
def liveness_is_not_readiness(m: Manifests) -> Iterator[str]:
    for pod in m.pods():
        if pod.component not in (*ENGINE, GATEWAY):
            continue
        for container in pod.containers(init=False):
            where = f"{pod.owner}/{container['name']}"
            kinds = ("startupProbe", "livenessProbe", "readinessProbe")
            missing = [kind for kind in kinds if kind not in container]
            if missing:
                yield f"{where} has no {', '.join(missing)}"
                continue
            startup, liveness, readiness = (container[kind] for kind in kinds)
            if "initialDelaySeconds" in liveness:
                yield f"{where}: a liveness probe needs no delay beside a startup probe"
            if liveness["httpGet"]["path"] == readiness["httpGet"]["path"]:
                yield f"{where}: {readiness['httpGet']['path']} decides over life and readiness"
            if startup["httpGet"]["path"] != liveness["httpGet"]["path"]:
                yield f"{where}: it is killed for not being ready while it starts"
            if liveness["timeoutSeconds"] < 5:
                yield f"{where}: a busy process is killed after {liveness['timeoutSeconds']} s"


@invariant(lambda m: m.container(GATEWAY).pop("lifecycle"))
def load_balancers_hear_first(m: Manifests) -> Iterator[str]:
    if pre_stop_s(m.pod(GATEWAY)) < 5:
        yield "a gateway stops listening before its endpoint has gone from load balancers"


@invariant(
    lambda m: set_env(m.container(WORKER), "RAY_gcs_rpc_server_reconnect_timeout_s", "60"),
    lambda m: m.container(HEAD)["env"].clear(),
)
def workers_outlive_the_head(m: Manifests) -> Iterator[str]:
    head = m.container(HEAD)
    restart = head["startupProbe"]["periodSeconds"] * head["startupProbe"]["failureThreshold"]
    for pod in engine_pods(m):
        patience = float(env(pod.spec["containers"][0]).get("RAY_gcs_rpc_server_reconnect_timeout_s", 60))
        if patience < 2 * restart:
            yield f"{pod.owner} ends itself {patience:g} s after GCS, and a head may take {restart} s to start"
