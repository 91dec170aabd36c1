"""Component dra: GPUs are claimed by what they are (resource.k8s.io/v1), in place of a number of `nvidia.com/gpu`.

KubeRay and Ray's autoscaler take a worker's GPUs from its container's limits only where rayStartParams say no
num-gpus; ours do (KubeRay: addWellKnownAcceleratorResources; Ray: _get_num_gpus).
"""

from __future__ import annotations

import re
from typing import Final

from k8s.objects import WORKER, Object, labels, metadata, name_of
from k8s.patches import Key, key_of
from k8s.sizing import Sizing
from k8s.spec import ServingSpec
from k8s.yaml_text import content_hash

API: Final = "resource.k8s.io/v1"
CLAIM: Final = "gpus"
DRIVER: Final = "gpu.nvidia.com"
"""Who publishes the devices, and the domain of what it says of them: productName, memory."""

CLAIMS_QUOTA: Final = "count/resourceclaims.resource.k8s.io"
"""What a ResourceQuota calls the number of claims."""

UNCOUNTED: Final = (
    "with the component dra GPUs are claimed, and no node's allocatable counts them; compare `kubectl get "
    "resourceslices` with `kubectl get resourceclaims -A`"
)


def alter(sizing: Sizing, objects: dict[Key, Object]) -> None:
    spec = sizing.spec
    template = _template(sizing)
    objects[key_of(template)] = template
    cluster = objects["ray.io/v1", "RayService", spec.name]["spec"]["rayClusterConfig"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    worker["resourceClaims"] = [{"name": CLAIM, "resourceClaimTemplateName": template["metadata"]["name"]}]
    worker["nodeSelector"].pop("nvidia.com/gpu.product", None)  # which the claim asks of the device itself
    resources = worker["containers"][0]["resources"]
    for amounts in (resources["limits"], resources["requests"]):
        del amounts[spec.cluster.gpu_resource]
    resources["claims"] = [{"name": CLAIM}]
    # Beside the quota of the extended resource: where a class serves that name, too, its claims may count there.
    quota = objects["v1", "ResourceQuota", name_of(spec, "quota")]["spec"]
    quota["hard"] = dict(sorted({**quota["hard"], devices_quota(spec): str(sizing.quota_gpus)}.items()))


def devices_quota(spec: ServingSpec) -> str:
    """What a ResourceQuota calls the devices that claims of a namespace ask for."""
    return f"{spec.cluster.device_class}.deviceclass.resource.k8s.io/devices"


def selectors(spec: ServingSpec) -> list[str]:
    """CEL on one device, all of which must hold.

    A field that a device lacks would end the allocation with an error, so each is looked for first. A product is
    named as in the node's label, where its spaces are dashes.
    """
    of_driver = f"device.driver == '{DRIVER}'"
    attributes, capacity = f"device.attributes['{DRIVER}']", f"device.capacity['{DRIVER}']"
    memory = f"{capacity}.memory.compareTo(quantity('{spec.engine.gpu_memory_bytes}')) >= 0"
    found = [f"{of_driver} && 'memory' in {capacity} && {memory}"]
    if spec.cluster.gpu_product:
        pattern = re.sub("[.-]", lambda match: "[ -]" if match[0] == "-" else "[.]", spec.cluster.gpu_product)
        product = f"{attributes}.productName.matches('^{pattern}$')"
        found.append(f"{of_driver} && 'productName' in {attributes} && {product}")
    return found


def _template(sizing: Sizing) -> Object:
    """Named by its content, since a claim's template never changes."""
    spec = sizing.spec
    exactly = {
        "allocationMode": "ExactCount",
        "count": sizing.gpus_per_pod,
        "deviceClassName": spec.cluster.device_class,
        "selectors": [{"cel": {"expression": expression}} for expression in selectors(spec)],
    }
    claim: Object = {
        "metadata": {"labels": labels(spec, WORKER)},
        "spec": {"devices": {"requests": [{"exactly": exactly, "name": "gpu"}]}},
    }
    name = name_of(spec, CLAIM, content_hash(claim))
    return {"apiVersion": API, "kind": "ResourceClaimTemplate", "metadata": metadata(spec, name, WORKER), "spec": claim}
