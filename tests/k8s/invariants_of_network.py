"""Who reaches whom, by evaluating the NetworkPolicies as a cluster would."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from k8s.objects import BALLOON, DIRECTORY, GATEWAY, GPU_HEALTH, HEAD, LOADTEST, WEIGHTS, WORKER, Object
from tests.k8s.invariants import invariant
from tests.k8s.invariants_of_references import ports_of
from tests.k8s.manifests import Manifests, Pod, selects

API_SERVER, WORLD, NODE = "10.96.0.1", "151.101.0.223", "10.1.2.3"
Peer = Pod | str
"""A pod of ours, "ns:NAME" for any pod of another namespace, or an address."""


def reaches(m: Manifests, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies let `source` open a connection to `target`."""
    leaves = not isinstance(source, Pod) or _allowed(m, source, "egress", target, port, protocol)
    return leaves and (not isinstance(target, Pod) or _allowed(m, target, "ingress", source, port, protocol))


def _allowed(m: Manifests, pod: Pod, direction: str, other: Peer, port: int, protocol: str) -> bool:
    policies = [
        policy["spec"]
        for policy in m.of_kind("NetworkPolicy")
        if selects(policy["spec"]["podSelector"], pod.labels)
        and direction.capitalize() in policy["spec"]["policyTypes"]
    ]
    if not policies:
        return True
    target = pod if direction == "ingress" else other
    return any(
        _peer_matches(m, rule.get("from" if direction == "ingress" else "to"), other)
        and _port_matches(rule.get("ports"), target, port, protocol)
        for policy in policies
        for rule in policy.get(direction, [])
    )


def _peer_matches(m: Manifests, peers: list[Object] | None, other: Peer) -> bool:
    if peers is None:
        return True
    for peer in peers:
        block = peer.get("ipBlock")
        if block:
            if isinstance(other, str) and not other.startswith("ns:"):
                address = ipaddress.ip_address(other)
                excepted = any(address in ipaddress.ip_network(cidr) for cidr in block.get("except", []))
                if address in ipaddress.ip_network(block["cidr"]) and not excepted:
                    return True
        elif isinstance(other, Pod):
            if "namespaceSelector" not in peer and selects(peer["podSelector"], other.labels):
                return True
        elif other.startswith("ns:") and "namespaceSelector" in peer:
            namespace, _, label = other.removeprefix("ns:").partition("/")
            labels = dict([label.split("=")]) if label else {}
            if selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace}) and selects(
                peer.get("podSelector", {}), labels
            ):
                return True
    return False


def _port_matches(ports: list[Object] | None, target: Peer, port: int, protocol: str) -> bool:
    if ports is None:
        return True
    for entry in ports:
        first = entry["port"]
        if isinstance(first, str):
            first = ports_of(target).get(first, -1) if isinstance(target, Pod) else -1
        if entry.get("protocol", "TCP") == protocol and first <= port <= entry.get("endPort", first):
            return True
    return False


def expected(m: Manifests) -> Iterator[tuple[Peer, Peer, int, bool]]:
    """(from, to, port, whether it must be reached)."""
    gateway, head, worker = m.pod(GATEWAY), m.pod(HEAD), m.pod(WORKER)
    cluster = m.spec.cluster
    ingress, monitoring, operator = (
        f"ns:{name}" for name in (cluster.ingress_namespace, cluster.monitoring_namespace, cluster.operator_namespace)
    )
    dns = "ns:kube-system/k8s-app=kube-dns"
    for pod in m.pods():
        yield pod, dns, 53, True
        yield "ns:default", pod, 22, False
    for port in (7600, 7631, 8000):
        yield gateway, worker, port, True
        yield "ns:default", worker, port, False
        yield ingress, worker, port, False
    yield gateway, worker, 7599, False
    yield gateway, head, 8265, False
    yield gateway, head, 6379, False
    yield gateway, WORLD, 443, False
    yield ingress, gateway, 8000, True
    yield "ns:default", gateway, 8000, False
    yield monitoring, gateway, 8000, True
    yield monitoring, worker, 8080, True
    yield monitoring, head, 8080, True
    yield monitoring, head, 8265, False
    yield operator, head, 8265, True
    yield operator, head, 8000, True
    yield operator, worker, 7600, False
    for source, target in ((worker, worker), (worker, head), (head, worker)):
        for port in (6379, 8076, 30000, 10002):
            yield source, target, port, True
    yield head, API_SERVER, 443, m.ray["enableInTreeAutoscaling"]
    yield worker, API_SERVER, 443, False
    yield gateway, API_SERVER, 443, False
    fetcher = WEIGHTS if m.spec.has("weights-pvc") else "" if m.spec.has("weights-image") else WORKER
    for pod in m.pods():
        yield pod, WORLD, 443, pod.component == fetcher or _asks_api_server(m, pod)
        yield pod, WORLD, 80, False
        yield pod, NODE, 10250, False
        yield pod, "169.254.169.254", 80, False
    if m.spec.has("loadtest"):
        master, sender = m.pod(LOADTEST), m.pod("loadtest-worker")
        yield sender, gateway, 8000, True
        yield master, gateway, 8000, True
        yield sender, master, 5557, True
        yield sender, worker, 7600, False
    if m.spec.has("balloons"):
        yield m.pod(BALLOON), gateway, 8000, False
    if m.spec.has("gpu-health"):
        yield m.pod(GPU_HEALTH), API_SERVER, 6443, True
        yield m.pod(GPU_HEALTH), worker, 7600, False
    if m.spec.engine.min_replicas == 0:
        yield gateway, m.pod(DIRECTORY), 8000, True
        yield m.pod(DIRECTORY), head, 6379, True


def _asks_api_server(m: Manifests, pod: Pod) -> bool:
    """An API server's address may be anywhere unless the spec says where."""
    is_open = m.spec.cluster.api_server_cidr == "0.0.0.0/0"
    return is_open and (pod.component == GPU_HEALTH or (pod.component == HEAD and m.ray["enableInTreeAutoscaling"]))


@invariant(
    lambda m: m.objects.pop(("networking.k8s.io/v1", "NetworkPolicy", "argosy-deny")),
    lambda m: m.objects.pop(("networking.k8s.io/v1", "NetworkPolicy", "argosy-dns")),
    lambda m: m.one("NetworkPolicy", "gateway")["spec"]["egress"][0]["ports"][0].pop("endPort"),
    lambda m: m.one("NetworkPolicy", "engine")["spec"]["ingress"][1]["ports"].pop(0),
    lambda m: m.one("NetworkPolicy", "engine")["spec"]["ingress"].append({}),
    lambda m: m.one("NetworkPolicy", "operator")["spec"]["ingress"][0].pop("from"),
    lambda m: m.one("NetworkPolicy", "fetch")["spec"]["podSelector"].clear(),
    lambda m: m.one("NetworkPolicy", "fetch")["spec"]["egress"][0].pop("ports"),
    lambda m: m.objects.pop(("networking.k8s.io/v1", "NetworkPolicy", "argosy-api-server")),
    lambda m: m.objects.pop(("networking.k8s.io/v1", "NetworkPolicy", "argosy-gateway-loadtest")),
    lambda m: m.one("NetworkPolicy", "deny")["spec"]["policyTypes"].remove("Ingress"),
)
def the_network_lets_through_what_it_must_and_nothing_else(m: Manifests) -> Iterator[str]:
    for source, target, port, must in expected(m):
        if reaches(m, source, target, port) != must:
            names = [peer.owner if isinstance(peer, Pod) else peer for peer in (source, target)]
            yield f"{names[0]} -> {names[1]}:{port} {'is blocked' if must else 'is open'}"
