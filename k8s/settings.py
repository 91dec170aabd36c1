"""What gateways read at start: a ConfigMap whose name holds the hash of its content, so that a change is a rollout."""

from __future__ import annotations

from k8s.objects import GATEWAY, GATEWAY_PORT, MODELS_PATH, OPERATOR_TOKEN_FILE, Object, metadata, name_of
from k8s.sizing import Sizing
from k8s.yaml_text import content_hash, dump


def gateway_settings(sizing: Sizing) -> dict[str, object]:
    """By the names of serving/config.py; a file for `argosy gateway --config`."""
    spec = sizing.spec
    bounds = {"min_replicas": spec.engine.min_replicas, "max_replicas": spec.engine.max_replicas}
    return {
        **(bounds if spec.has("autoscale-ray") else {}),  # with 0, a gateway without replicas is ready to wait for one
        "drain_timeout_s": sizing.gateway_drain_s,
        "host": "0.0.0.0",
        "log_format": "json",
        "max_queue_len": sizing.max_queue_len,
        "model": spec.model.source,
        "operator_token_file": OPERATOR_TOKEN_FILE,
        "port": GATEWAY_PORT,
        "queue_timeout_s": spec.gateway.queue_timeout_s,
        "request_timeout_s": sizing.request_timeout_s,
        "served_model_name": spec.served_model_name,
        "store": "/tmp/argosy",
    }


def model_settings(sizing: Sizing) -> dict[str, str]:
    """Variables of whoever runs `argosy pull`."""
    model = sizing.spec.model
    return {
        "ARGOSY_STORE": MODELS_PATH,
        "FETCH_DEADLINE_S": str(sizing.fetch_deadline_s),
        "MODEL": model.source,
        "MODEL_DIR": model_dir(sizing),
    }


def model_dir(sizing: Sizing) -> str:
    """Where `argosy pull` puts the model: a hub id's slash becomes two dashes, as its revision's @ does.

    Weights are stored as they are published; an engine that serves int8 or int4 rounds them when it loads.
    """
    return f"{MODELS_PATH}/{sizing.spec.model.source.replace('/', '--').replace('@', '--')}"


def _config_map(sizing: Sizing, kind: str, data: dict[str, str]) -> Object:
    spec = sizing.spec
    name = name_of(spec, kind, content_hash(data))
    described = metadata(spec, name, GATEWAY if kind == "gateway" else "model")
    return {"apiVersion": "v1", "kind": "ConfigMap", "immutable": True, "metadata": described, "data": data}


def gateway_config_map(sizing: Sizing) -> Object:
    return _config_map(sizing, "gateway", {"settings.yaml": dump(gateway_settings(sizing))})


def model_config_map(sizing: Sizing) -> Object:
    data = model_settings(sizing)
    if sizing.spec.model.requirement:
        data = data | {"requirements.txt": sizing.spec.model.requirement + "\n"}
    return _config_map(sizing, "model", data)
