"""Component gateway-api: the way in for clients, by an HTTPRoute of the Gateway API (1.6) to the gateways' Service.

Only the paths of the public API are routed. What operators ask (/metrics, /progressz, /console, /v1/requests, probes)
stays inside the cluster, though it lies on the same port.
"""

from __future__ import annotations

from typing import Final

from k8s.objects import GATEWAY, Object, metadata, name_of
from k8s.patches import Key, key_of
from k8s.sizing import Sizing
from k8s.spec import ServingSpec

API: Final = "gateway.networking.k8s.io/v1"

GENERATE: Final = (("POST", "Exact", "/v1/chat/completions"), ("POST", "Exact", "/v1/completions"))
READ: Final = (
    ("GET", "Exact", "/v1/capabilities"),
    ("GET", "PathPrefix", "/v1/models"),  # a model's name may hold slashes
)
"""(method, kind of match, path). A prefix ends at a slash or at the path's end: /v1/modelsx is none of it."""

UNLIMITED: Final = "0s"
"""No deadline: the gateway has its own (request_timeout_s), and ends a stream with an event that says so."""
READ_S: Final = "30s"


def alter(sizing: Sizing, objects: dict[Key, Object]) -> None:
    spec = sizing.spec
    things = [_route(spec), *([_gateway(spec)] if spec.cluster.gateway_class else [])]
    for thing in things:
        objects[key_of(thing)] = thing


def _gateway_name(spec: ServingSpec) -> str:
    return name_of(spec, spec.cluster.gateway_name) if spec.cluster.gateway_class else spec.cluster.gateway_name


def _parent(spec: ServingSpec) -> Object:
    cluster = spec.cluster
    parent = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": _gateway_name(spec)}
    if cluster.gateway_class:
        return parent
    parent["namespace"] = cluster.gateway_namespace or cluster.ingress_namespace
    return parent | ({"sectionName": cluster.gateway_listener} if cluster.gateway_listener else {})


def _route(spec: ServingSpec) -> Object:
    """No `retry` (of the experimental channel): a POST that was sent twice generates twice."""
    backend = {"group": "", "kind": "Service", "name": name_of(spec, "gateway"), "port": 80, "weight": 1}
    rules = [
        {
            "backendRefs": [backend],
            "matches": [{"method": method, "path": {"type": kind, "value": path}} for method, kind, path in paths],
            "timeouts": {"backendRequest": timeout, "request": timeout},
        }
        for paths, timeout in ((GENERATE, UNLIMITED), (READ, READ_S))
    ]
    return {
        "apiVersion": API,
        "kind": "HTTPRoute",
        "metadata": metadata(spec, name_of(spec, "gateway"), GATEWAY),
        "spec": {
            **({"hostnames": [spec.cluster.hostname]} if spec.cluster.hostname else {}),
            "parentRefs": [_parent(spec)],
            "rules": rules,
        },
    }


def _gateway(spec: ServingSpec) -> Object:
    """One listener, for routes of our own namespace."""
    cluster = spec.cluster
    listener: Object = {
        "allowedRoutes": {"namespaces": {"from": "Same"}},
        "name": "http",
        "port": 80,
        "protocol": "HTTP",
        **({"hostname": cluster.hostname} if cluster.hostname else {}),
    }
    if cluster.gateway_certificate:
        secret = {"group": "", "kind": "Secret", "name": cluster.gateway_certificate}
        listener |= {"name": "https", "port": 443, "protocol": "HTTPS"}
        listener["tls"] = {"certificateRefs": [secret], "mode": "Terminate"}
    return {
        "apiVersion": API,
        "kind": "Gateway",
        "metadata": metadata(spec, _gateway_name(spec), GATEWAY),
        "spec": {"gatewayClassName": cluster.gateway_class, "listeners": [listener]},
    }
