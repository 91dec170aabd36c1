"""Selectors find what they mean; whatever is named exists."""

from __future__ import annotations

from collections.abc import Iterator

from k8s.objects import GATEWAY, HEAD, WORKER, Object, external_secrets
from tests.k8s.invariants import invariant
from tests.k8s.manifests import Manifests, Pod, selects


def ports_of(pod: Pod) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"]
        for container in pod.containers(init=False)
        for port in container.get("ports", [])
        if "name" in port
    }


def _found(m: Manifests, selector: Object) -> list[Pod]:
    return [pod for pod in m.pods() if selects(selector, pod.labels)]


@invariant(
    lambda m: m.one("Service", "gateway")["spec"]["selector"].update({"app.kubernetes.io/component": "gatway"}),
    lambda m: m.one("PodDisruptionBudget", "head")["spec"]["selector"]["matchLabels"].update(x="y"),
    lambda m: m.one("NetworkPolicy", "gateway")["spec"]["podSelector"]["matchLabels"].update(x="y"),
    lambda m: m.one("NetworkPolicy", "gateway")["spec"]["egress"][0]["to"][0]["podSelector"]["matchLabels"].update(
        {"app.kubernetes.io/instance": "other"}
    ),
    lambda m: m.one("ServiceMonitor", "gateway")["spec"]["selector"]["matchLabels"].update(x="y"),
    lambda m: m.one("PodMonitor", "ray")["spec"]["selector"]["matchLabels"].update(x="y"),
    lambda m: m.one("HorizontalPodAutoscaler", "gateway")["spec"]["scaleTargetRef"].update(name="argosy-gatway"),
    lambda m: m.one("Deployment", "gateway")["spec"]["selector"]["matchLabels"].update(x="y"),
)
def selectors_find_pods(m: Manifests) -> Iterator[str]:
    selectors: list[tuple[str, Object]] = []
    for kind in ("Service", "PodDisruptionBudget", "PodMonitor", "NetworkPolicy", "Deployment", "DaemonSet"):
        for thing in m.of_kind(kind):
            where = f"{kind} {thing['metadata']['name']}"
            spec = thing["spec"]
            if kind == "Service":
                selectors.append((where, {"matchLabels": spec["selector"]}))
            elif kind == "NetworkPolicy":
                selectors.append((where, spec["podSelector"]))
                for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
                    for peer in [*rule.get("from", []), *rule.get("to", [])]:
                        if "podSelector" in peer and "namespaceSelector" not in peer:
                            selectors.append((where, peer["podSelector"]))
            else:
                selectors.append((where, spec["selector"]))
    for where, selector in selectors:
        if not _found(m, selector):
            yield f"{where}: selects no pod: {selector}"
    for monitor in m.of_kind("ServiceMonitor"):
        found = [s for s in m.of_kind("Service") if selects(monitor["spec"]["selector"], s["metadata"]["labels"])]
        if len(found) != 1:
            yield f"ServiceMonitor {monitor['metadata']['name']}: finds {len(found)} Services"
    for scaler in m.of_kind("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        if (target["apiVersion"], target["kind"], target["name"]) not in m.objects:
            yield f"HorizontalPodAutoscaler: there is no {target}"
    for kind in ("Deployment", "DaemonSet"):
        for thing in m.of_kind(kind):
            if not selects(thing["spec"]["selector"], thing["spec"]["template"]["metadata"]["labels"]):
                yield f"{kind} {thing['metadata']['name']}: does not select its own pods"


@invariant(
    lambda m: m.pod(GATEWAY).spec.update(serviceAccountName="default"),
    lambda m: m.pod(WORKER).spec.update(priorityClassName="high"),
    lambda m: m.pod(GATEWAY).spec["volumes"][0]["configMap"].update(name="argosy-gateway-00000000"),
    lambda m: m.pod(WORKER).spec["volumes"][2]["secret"].update(secretName="argosy-engin"),
    lambda m: m.pod(WORKER).spec["volumes"][3]["persistentVolumeClaim"].update(claimName="weights"),
    lambda m: m.pod(WORKER).spec["initContainers"][0]["envFrom"][0]["configMapRef"].update(name="x"),
    lambda m: m.container(WORKER)["volumeMounts"].append({"name": "cache", "mountPath": "/cache"}),
    lambda m: m.of_kind("ClusterRoleBinding")[0]["subjects"][0].update(name="x"),
    lambda m: m.of_kind("ClusterRoleBinding")[0]["roleRef"].update(name="x"),
)
def what_is_named_exists(m: Manifests) -> Iterator[str]:
    names = {kind: {t["metadata"]["name"] for t in m.of_kind(kind)} for kind in {key[1] for key in m.objects}}
    secrets = external_secrets(m.spec)
    for pod in m.pods():
        if pod.spec["serviceAccountName"] not in names["ServiceAccount"]:
            yield f"{pod.owner}: no ServiceAccount {pod.spec['serviceAccountName']}"
        if pod.spec["priorityClassName"] not in names["PriorityClass"]:
            yield f"{pod.owner}: no PriorityClass {pod.spec['priorityClassName']}"
        maps = [volume["configMap"]["name"] for volume in pod.spec.get("volumes", []) if "configMap" in volume]
        maps += [
            source["configMapRef"]["name"]
            for container in pod.containers()
            for source in container.get("envFrom", [])
            if "configMapRef" in source
        ]
        for name in maps:
            if name not in names["ConfigMap"]:
                yield f"{pod.owner}: no ConfigMap {name}"
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and claim not in names.get("PersistentVolumeClaim", set()):
                yield f"{pod.owner}: no PersistentVolumeClaim {claim}"
            secret = volume.get("secret")
            if secret and secret["secretName"] not in secrets:
                yield f"{pod.owner}: nobody is told to make the Secret {secret['secretName']}"
            elif secret and secret.get("optional", False) != secrets[secret["secretName"]][1]:
                yield f"{pod.owner}: {secret['secretName']} is optional, or is not"
        for container in pod.containers():
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{pod.owner}/{container['name']}: no volume {mount['name']}"
    for binding in m.of_kind("ClusterRoleBinding"):
        if binding["roleRef"]["name"] not in names["ClusterRole"]:
            yield f"no ClusterRole {binding['roleRef']['name']}"
        for subject in binding["subjects"]:
            if subject["name"] not in names["ServiceAccount"] or subject["namespace"] != m.spec.namespace:
                yield f"no ServiceAccount {subject['name']} in {subject['namespace']}"


@invariant(
    lambda m: m.container(GATEWAY)["livenessProbe"]["httpGet"].update(port="web"),
    lambda m: m.one("Service", "gateway")["spec"]["ports"][0].update(targetPort="web"),
    lambda m: m.one("ServiceMonitor", "gateway")["spec"]["endpoints"][0].update(port="metrics"),
    lambda m: m.one("PodMonitor", "ray")["spec"]["podMetricsEndpoints"][0].update(port="ray-metrics"),
    lambda m: m.one("NetworkPolicy", "gateway")["spec"]["ingress"][0]["ports"][0].update(port="web"),
    lambda m: m.container(HEAD)["ports"].pop(),
)
def ports_have_their_names(m: Manifests) -> Iterator[str]:
    for pod in m.pods():
        for container in pod.containers(init=False):
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                port = container.get(kind, {}).get("httpGet", {}).get("port", 0)
                if isinstance(port, str) and port not in ports_of(pod):
                    yield f"{pod.owner}: {kind} asks the port {port}"
    for service in m.of_kind("Service"):
        for pod in _found(m, {"matchLabels": service["spec"]["selector"]}):
            for port in service["spec"]["ports"]:
                if isinstance(port["targetPort"], str) and port["targetPort"] not in ports_of(pod):
                    yield f"Service {service['metadata']['name']}: {pod.owner} has no port {port['targetPort']}"
    for monitor in m.of_kind("ServiceMonitor"):
        for service in m.of_kind("Service"):
            if selects(monitor["spec"]["selector"], service["metadata"]["labels"]):
                known = {port["name"] for port in service["spec"]["ports"]}
                for endpoint in monitor["spec"]["endpoints"]:
                    if endpoint["port"] not in known:
                        yield f"ServiceMonitor: the Service has no port {endpoint['port']}"
    for monitor in m.of_kind("PodMonitor"):
        for pod in _found(m, monitor["spec"]["selector"]):
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] not in ports_of(pod):
                    yield f"PodMonitor: {pod.owner} has no port {endpoint['port']}"
    for policy in m.of_kind("NetworkPolicy"):
        for pod in _found(m, policy["spec"]["podSelector"]):
            for rule in policy["spec"].get("ingress", []):
                for port in rule.get("ports", []):
                    if isinstance(port["port"], str) and port["port"] not in ports_of(pod):
                        yield f"NetworkPolicy {policy['metadata']['name']}: {pod.owner} has no port {port['port']}"
    # KubeRay takes the Service of Serve's proxies from the head's ports.
    if ports_of(m.pod(HEAD)).get("serve") != ports_of(m.pod(WORKER)).get("serve"):
        yield "the head does not name the port of Serve's proxies"
