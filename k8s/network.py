"""Who may talk to whom: nobody, until a policy says so."""

from __future__ import annotations

from typing import Any, Final

from k8s.objects import (
    AGENT_PORT,
    DASHBOARD_PORT,
    ENGINE,
    ENGINE_PORTS,
    GATEWAY,
    HEAD,
    RAY_METRICS_PORT,
    SERVE_PORT,
    WORKER,
    Object,
    metadata,
    name_of,
    pods_of,
    selector,
)
from k8s.spec import ServingSpec

FETCH: Final = "fetch"
"""The policy of pods that run `argosy pull`."""


def ports(*numbers: int, protocol: str = "TCP") -> list[Object]:
    return [{"port": number, "protocol": protocol} for number in numbers]


def engine_ports() -> list[Object]:
    """Where gateways find replicas."""
    return [{"endPort": ENGINE_PORTS[1], "port": ENGINE_PORTS[0], "protocol": "TCP"}]


def from_namespace(name: str) -> Object:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def network_policy(spec: ServingSpec, name: str, pods: Object, **rules: Any) -> Object:
    """rules: `ingress`, `egress`: what they list is allowed, in addition to all other policies."""
    types = [kind.capitalize() for kind in ("ingress", "egress") if kind in rules]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(spec, name_of(spec, name), "policy"),
        "spec": {"podSelector": pods, "policyTypes": types, **rules},
    }


def to_world(*excepted: str) -> Object:
    """Any address outside the private ranges, for what is downloaded."""
    private = ["10.0.0.0/8", "100.64.0.0/10", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16", *excepted]
    return {"ipBlock": {"cidr": "0.0.0.0/0", "except": private}}


def network_policies(spec: ServingSpec) -> list[Object]:
    """Deny everything, then allow: clients -> gateway -> engine, engine <-> engine, operator -> head,
    Prometheus -> metrics, everybody -> DNS, workers -> where weights come from."""
    dns = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
        "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
    }
    # A node's own cache of DNS has an address of the host and no labels.
    resolvers = [dns, *([{"ipBlock": {"cidr": spec.cluster.dns_cidr}}] if spec.cluster.dns_cidr else [])]
    gateway = {"matchLabels": selector(spec, GATEWAY)}
    head = {"matchLabels": selector(spec, HEAD)}
    engine = pods_of(spec, *ENGINE)
    monitoring = from_namespace(spec.cluster.monitoring_namespace)
    operator = from_namespace(spec.cluster.operator_namespace)
    return [
        network_policy(spec, "deny", {}, ingress=[], egress=[]),
        network_policy(spec, "dns", {}, egress=[{"ports": ports(53) + ports(53, protocol="UDP"), "to": resolvers}]),
        network_policy(
            spec,
            "gateway",
            gateway,
            ingress=[
                {
                    "from": [from_namespace(spec.cluster.ingress_namespace), monitoring],
                    "ports": [{"port": "http", "protocol": "TCP"}],
                }
            ],
            egress=[{"ports": engine_ports() + ports(SERVE_PORT), "to": [{"podSelector": engine}]}],
        ),
        network_policy(
            spec,
            "engine",
            engine,
            ingress=[
                {"from": [{"podSelector": engine}]},  # Ray, plans, NCCL: any port, and nobody else
                {"from": [{"podSelector": gateway}], "ports": engine_ports() + ports(SERVE_PORT)},
                {"from": [monitoring], "ports": ports(RAY_METRICS_PORT)},
            ],
            egress=[{"to": [{"podSelector": engine}]}],
        ),
        network_policy(
            spec,
            "operator",
            head,
            ingress=[{"from": [operator], "ports": ports(DASHBOARD_PORT, SERVE_PORT, AGENT_PORT)}],
        ),
        fetch_policy(spec, WORKER),
    ]


def fetch_policy(spec: ServingSpec, component: str) -> Object:
    """The pods that run `argosy pull` reach hubs and package indexes."""
    pods = {"matchLabels": selector(spec, component)}
    return network_policy(spec, FETCH, pods, egress=[{"ports": ports(443), "to": [to_world()]}])
