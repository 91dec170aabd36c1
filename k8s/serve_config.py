"""`serveConfigV2`: what Ray Serve runs, in the words of its config.

The applications are those of serving/deployments/document.py, which this package may not import: a test holds the two
documents equal.
"""

from __future__ import annotations

from typing import Any, Final

from k8s.objects import ENGINE_PORTS, SECRET_FILE, SERVE_PORT
from k8s.settings import model_dir
from k8s.sizing import Sizing

DIRECTORY_RESOURCE: Final = "argosy_directory"
"""Held by the pods of a directory group alone: where there is one, the directory runs there."""

_HEALTH: Final = {"health_check_period_s": 1.0, "health_check_timeout_s": 2.0}


def document(sizing: Sizing) -> dict[str, Any]:
    """A `ServeDeploySchema`: the directory, and the model's replicas."""
    return {
        "applications": [_directory(sizing), _model(sizing)],
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT},
        "proxy_location": "EveryNode",
    }


def has_directory_group(sizing: Sizing) -> bool:
    """Whether pods of their own hold the directory: where the engine may have none."""
    return sizing.spec.engine.min_replicas == 0


def engine_arguments(sizing: Sizing) -> dict[str, Any]:
    """`EngineSettings` of serving/config.py as far as they differ from its defaults."""
    spec = sizing.spec
    engine, model = spec.engine, spec.model
    return {
        "model_dir": model_dir(sizing),
        "served_model_name": spec.served_model_name,
        "device": engine.device,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "pipeline_parallel_size": engine.pipeline_parallel_size,
        "max_model_len": model.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "kv_cache_bytes": sizing.kv_cache_bytes,
        "num_threads": sizing.num_threads,
    }


def _directory(sizing: Sizing) -> dict[str, Any]:
    resources = {"resources": {DIRECTORY_RESOURCE: 0.001}} if has_directory_group(sizing) else {}
    return {
        "name": "directory",
        "route_prefix": "/directory",
        "import_path": "serving.deployments.app:build_directory",
        "args": {"secret_file": SECRET_FILE},  # by which gateways sign what waits in them
        "deployments": [
            {
                "name": "Directory",
                "num_replicas": 1,
                "max_ongoing_requests": 1000,
                "graceful_shutdown_timeout_s": 1.0,
                "graceful_shutdown_wait_loop_s": 0.1,
                "ray_actor_options": {"num_cpus": 0.0, **resources},
                **_HEALTH,
            }
        ],
    }


def _model(sizing: Sizing) -> dict[str, Any]:
    engine = sizing.spec.engine
    first, last = ENGINE_PORTS
    rank: dict[str, Any] = {"num_cpus": float(engine.cpus_per_rank)}
    bundle: dict[str, Any] = {"CPU": float(engine.cpus_per_rank)}
    if sizing.spec.has_gpus:
        rank["num_gpus"] = bundle["GPU"] = 1.0
    replica: dict[str, Any] = {
        "name": "Replica",
        "num_replicas": engine.min_replicas,
        "max_ongoing_requests": sizing.max_ongoing_requests,
        "graceful_shutdown_timeout_s": float(sizing.serve_shutdown_s),
        "graceful_shutdown_wait_loop_s": 0.1,
        "max_surge_percent": sizing.max_surge_percent,
        "ray_actor_options": rank,
        **_HEALTH,
    }
    if sizing.num_ranks > 1:
        replica["placement_group_bundles"] = [dict(bundle) for _ in range(sizing.num_ranks)]
        replica["placement_group_strategy"] = "STRICT_PACK" if engine.pipeline_parallel_size == 1 else "PACK"
    return {
        "name": "model",
        "route_prefix": None,
        "import_path": "serving.deployments.app:build",
        "args": {
            "engine": engine_arguments(sizing),
            "secret_file": SECRET_FILE,
            "listen": f"tcp:node:{first}-{last}",
            "drain_timeout_s": float(sizing.drain_timeout_s),
        },
        "deployments": [replica],
    }
