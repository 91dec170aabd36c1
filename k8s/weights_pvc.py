"""Component weights-pvc: one Job brings the model into a volume that all workers read.

Without it every worker brings it for itself, which takes minutes for a large model and the network of every node.
"""

from __future__ import annotations

from typing import Final

from k8s.amounts import quantity
from k8s.network import fetch_policy
from k8s.objects import (
    MODELS_PATH,
    PULL_POLICY,
    WEIGHTS,
    Object,
    container_security,
    labels,
    metadata,
    name_of,
    pod,
    scratch_volume,
    service_account,
)
from k8s.patches import Key, key_of
from k8s.settings import model_config_map
from k8s.sizing import Sizing
from k8s.weights import fetch_container, fetch_volumes
from k8s.yaml_text import content_hash

MANIFEST: Final = "argosy.json"
"""The last file that a pull writes, when everything else is there and verified."""

AWAIT: Final = f"""\
for second in $(seq "$FETCH_DEADLINE_S"); do
  if [ -f "$MODEL_DIR/{MANIFEST}" ]; then exit 0; fi
  sleep 1
done
echo "$MODEL_DIR did not come within $FETCH_DEADLINE_S s: look at the Job that fetches it" >&2
exit 1
"""


def alter(sizing: Sizing, objects: dict[Key, Object]) -> None:
    spec = sizing.spec
    for thing in (service_account(spec, name_of(spec, WEIGHTS), WEIGHTS), _claim(sizing), _job(sizing)):
        objects[key_of(thing)] = thing
    cluster = objects["ray.io/v1", "RayService", spec.name]["spec"]["rayClusterConfig"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    worker["initContainers"] = [_await_container(sizing)]
    worker["volumes"] = [
        _volume(sizing, is_read_only=True) if volume["name"] == "models" else volume
        for volume in worker["volumes"]
        if volume["name"] not in ("hub-secret", "model")
    ]
    fetch = fetch_policy(spec, WEIGHTS)
    objects[key_of(fetch)] = fetch


def claim_name(sizing: Sizing) -> str:
    return name_of(sizing.spec, "models")


def _volume(sizing: Sizing, *, is_read_only: bool) -> Object:
    claim = {"claimName": claim_name(sizing)} | ({"readOnly": True} if is_read_only else {})
    return {"name": "models", "persistentVolumeClaim": claim}


def _claim(sizing: Sizing) -> Object:
    """ReadWriteMany: the Job writes while workers of an earlier model read."""
    spec = sizing.spec
    storage_class = spec.cluster.shared_storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(spec, claim_name(sizing), WEIGHTS),
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": quantity(sizing.weights_volume_bytes)}},
            **({"storageClassName": storage_class} if storage_class else {}),
        },
    }


def _job(sizing: Sizing) -> Object:
    """Named by what it does: another model or image is another Job, as a Job's template cannot change."""
    spec = sizing.spec
    container = fetch_container(sizing)
    template = pod(
        spec,
        service_account=name_of(spec, WEIGHTS),
        priority="batch",
        grace_s=30,
        containers=[container],
        restartPolicy="OnFailure",
        volumes=[
            scratch_volume("tmp", "16Gi"),
            _volume(sizing, is_read_only=False),
            *fetch_volumes(sizing),
        ],
    )
    job_spec: Object = {
        "activeDeadlineSeconds": sizing.fetch_deadline_s,
        "backoffLimit": 4,
        "template": {"metadata": {"labels": labels(spec, WEIGHTS)}, "spec": template},
    }
    name = name_of(spec, WEIGHTS, content_hash(job_spec))
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata(spec, name, WEIGHTS), "spec": job_spec}


def _await_container(sizing: Sizing) -> Object:
    return {
        "name": "await-weights",
        "image": sizing.spec.images.engine,
        "imagePullPolicy": PULL_POLICY,
        "command": ["/bin/sh", "-c", AWAIT],
        "envFrom": [{"configMapRef": {"name": model_config_map(sizing)["metadata"]["name"]}}],
        "resources": {"limits": {"memory": "64Mi"}, "requests": {"cpu": "10m", "memory": "64Mi"}},
        "securityContext": container_security(),
        "volumeMounts": [{"mountPath": MODELS_PATH, "name": "models", "readOnly": True}],
    }
