"""What comes in from outside, where the Gateway API leads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from k8s.objects import GATEWAY, Object
from tests.k8s.invariants import invariant
from tests.k8s.invariants_of_network import reaches
from tests.k8s.manifests import Manifests
from tests.k8s.paths_of_the_app import Endpoint, endpoints

ROUTE = ("gateway.networking.k8s.io/v1", "HTTPRoute", "argosy-gateway")
OURS = ("gateway.networking.k8s.io/v1", "Gateway", "argosy-edge")


def rules(m: Manifests) -> list[Object]:
    found: list[Object] = m.one("HTTPRoute", "gateway")["spec"]["rules"]
    return found


def takes(match: Object, method: str, path: str) -> bool:
    """Whether a request falls to a match of an HTTPRoute; absent parts have the API's defaults."""
    if match.get("method", method) != method:
        return False
    kind, value = match.get("path", {}).get("type", "PathPrefix"), match.get("path", {}).get("value", "/")
    if kind == "Exact":
        return bool(path == value)
    if kind == "PathPrefix":
        stem = value.rstrip("/")
        return path == stem or path.startswith(stem + "/")
    raise AssertionError(f"a match of the kind {kind} is nothing that these tests can judge")


def is_for(match: Object, endpoint: Endpoint) -> bool:
    """Whether a match names just this endpoint, or a prefix of what its parameter makes long."""
    value, stem = match.get("path", {}).get("value", "/"), endpoint.template.partition("/{")[0]
    return value == stem and takes(match, endpoint.method, endpoint.sample)


def _path(i: int, j: int, **values: Any) -> Callable[[Manifests], object]:
    return lambda m: rules(m)[i]["matches"][j]["path"].update(values)


@invariant(
    lambda m: m.objects.pop(ROUTE),
    lambda m: rules(m).append({"matches": [{"path": {"type": "PathPrefix", "value": "/"}}]}),
    lambda m: rules(m).append({}),
    lambda m: rules(m)[1]["matches"].append({"path": {"type": "Exact", "value": "/metrics"}}),
    lambda m: rules(m)[1]["matches"].append({"path": {"type": "PathPrefix", "value": "/console"}}),
    lambda m: rules(m)[0]["matches"].append({"path": {"type": "Exact", "value": "/v1/embeddings"}}),
    _path(1, 1, value="/v1"),
    _path(1, 1, value="/v1/requests"),
    _path(1, 1, type="Exact"),
    _path(0, 0, value="/v1/chat"),
    lambda m: rules(m)[0]["matches"].pop(),
    lambda m: rules(m)[0]["matches"][0].update(method="PUT"),
    overlay="edge-all",
)
def clients_reach_the_public_api_and_nothing_else(m: Manifests) -> Iterator[str]:
    if not m.spec.has("gateway-api"):
        return
    if ROUTE not in m.objects:
        yield "there is no route"
        return
    matches = [match for rule in rules(m) for match in rule.get("matches", [{}])]
    for endpoint in endpoints():
        is_routed = any(takes(match, endpoint.method, endpoint.sample) for match in matches)
        if is_routed != endpoint.is_public:
            yield f"{endpoint.method} {endpoint.template} {'is' if is_routed else 'is not'} routed"
    for match in matches:
        if not any(is_for(match, endpoint) for endpoint in endpoints()):
            yield f"the application has nothing that just {match} asks for"


@invariant(
    lambda m: rules(m)[0].pop("timeouts"),
    lambda m: rules(m)[0]["timeouts"].update(request="300s"),
    lambda m: rules(m)[0]["timeouts"].update(backendRequest="300s"),
    lambda m: rules(m)[0]["timeouts"].pop("backendRequest"),
    lambda m: rules(m)[0].update(retry={"attempts": 1, "codes": [503]}),
    lambda m: rules(m)[0].update(filters=[{"type": "RequestMirror"}]),
    lambda m: rules(m)[0]["backendRefs"][0].update(filters=[{"type": "RequestMirror"}]),
    lambda m: rules(m)[0].update(sessionPersistence={"type": "Cookie"}),
    overlay="edge-all",
)
def no_proxy_cuts_or_repeats_a_generation(m: Manifests) -> Iterator[str]:
    """An absent deadline is the implementation's own."""
    for rule in rules(m) if ROUTE in m.objects else []:
        if not any(match.get("method", "POST") == "POST" for match in rule["matches"]):
            continue
        if rule.get("timeouts") != {"request": "0s", "backendRequest": "0s"}:
            yield f"a stream may be cut after {rule.get('timeouts')}"
        more = rule.keys() | {key for backend in rule["backendRefs"] for key in backend}
        for key in sorted(more & {"retry", "filters", "sessionPersistence"}):
            yield f"{key}: a request is sent twice, changed, or bound to one gateway"


@invariant(
    lambda m: rules(m)[0]["backendRefs"][0].update(name="argosy-gatway"),
    lambda m: rules(m)[0]["backendRefs"][0].update(port=8000),
    lambda m: rules(m)[0]["backendRefs"][0].update(namespace="default"),
    lambda m: rules(m)[0]["backendRefs"][0].update(weight=0),
    lambda m: rules(m)[1].pop("backendRefs"),
    lambda m: m.one("NetworkPolicy", "gateway")["spec"]["ingress"][0]["from"].pop(0),
    overlay="edge-all",
)
def routed_requests_arrive(m: Manifests) -> Iterator[str]:
    for rule in rules(m) if ROUTE in m.objects else []:
        if not rule.get("backendRefs"):
            yield "a rule without a backend answers 500"
        for backend in rule.get("backendRefs", []):
            service = m.objects.get(("v1", backend.get("kind", "Service"), backend["name"]))
            if service is None or backend.get("namespace", m.spec.namespace) != m.spec.namespace:
                yield f"there is no {backend}"
            elif backend["port"] not in {port["port"] for port in service["spec"]["ports"]}:
                yield f"the Service has no port {backend['port']}"
            if backend.get("weight", 1) == 0:
                yield "a backend of weight 0 gets nothing"
    if ROUTE in m.objects and not reaches(m, f"ns:{m.spec.cluster.ingress_namespace}", m.pod(GATEWAY), 8000):
        yield "the pods that carry the Gateway's requests may not talk to gateways"


@invariant(
    lambda m: m.objects[ROUTE]["spec"]["parentRefs"][0].update(name="argosy-edge"),
    lambda m: m.objects[ROUTE]["spec"]["parentRefs"][0].pop("namespace"),
    overlay="edge-route",
)
def a_gateway_that_is_there_is_named_as_the_spec_does(m: Manifests) -> Iterator[str]:
    cluster = m.spec.cluster
    if ROUTE not in m.objects or cluster.gateway_class:
        return
    [parent] = m.objects[ROUTE]["spec"]["parentRefs"]
    wanted = (cluster.gateway_name, cluster.gateway_namespace or cluster.ingress_namespace)
    if (parent["name"], parent.get("namespace")) != wanted:
        yield f"the parent is {parent}, not {wanted}"


@invariant(
    lambda m: m.objects.pop(OURS),
    lambda m: m.objects[ROUTE]["spec"]["parentRefs"][0].update(name="edge"),
    lambda m: m.objects[ROUTE]["spec"]["parentRefs"][0].update(namespace="default"),
    lambda m: m.objects[ROUTE]["spec"]["parentRefs"][0].update(sectionName="http"),
    lambda m: m.objects[ROUTE]["spec"].update(hostnames=["other.example.com"]),
    lambda m: m.objects[OURS]["spec"]["listeners"][0].update(protocol="HTTP"),
    lambda m: m.objects[OURS]["spec"]["listeners"][0]["tls"]["certificateRefs"][0].update(name="other"),
    lambda m: m.objects[OURS]["spec"]["listeners"][0]["allowedRoutes"]["namespaces"].update({"from": "All"}),
    overlay="edge-all",
)
def a_gateway_of_ours_takes_its_route(m: Manifests) -> Iterator[str]:
    if ROUTE not in m.objects or not m.spec.cluster.gateway_class:
        return
    cluster, route = m.spec.cluster, m.objects[ROUTE]["spec"]
    [parent] = route["parentRefs"]
    gateway = m.objects.get((parent["group"] + "/v1", parent["kind"], parent["name"]))
    if gateway is None or parent.get("namespace", m.spec.namespace) != m.spec.namespace:
        yield f"there is no {parent}"
        return
    [listener] = gateway["spec"]["listeners"]
    if parent.get("sectionName", listener["name"]) != listener["name"]:
        yield f"the Gateway has no listener {parent['sectionName']}"
    if route.get("hostnames", [None])[0] != listener.get("hostname"):
        yield f"the listener {listener.get('hostname')} takes no {route.get('hostnames')}"
    if listener["allowedRoutes"]["namespaces"]["from"] != "Same":
        yield "anybody may add routes to the Gateway"
    if m.spec.is_prod and listener["protocol"] != "HTTPS":
        yield "keys of accounts travel in plain HTTP"
    for secret in listener.get("tls", {}).get("certificateRefs", []):
        if secret["name"] != cluster.gateway_certificate:
            yield f"nobody is told to make the Secret {secret['name']}"
