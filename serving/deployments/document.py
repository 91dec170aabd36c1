"""What runs on a cluster, as one document in Serve's config format (`ServeDeploySchema`).

Imports no ray: Kubernetes manifests are rendered from the same function.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from serving.config import EngineSettings
from serving.control import DEFAULT_SERVER
from serving.deployments.placement import deployment_options

DIRECTORY_APP: Final = "directory"
DIRECTORY_DEPLOYMENT: Final = "Directory"
MODEL_APP: Final = "model"
MODEL_DEPLOYMENT: Final = "Replica"

POLICY: Final = "serving.deployments.serve_policy:QueueDelayPolicy"
_HEALTH: Final = {"health_check_period_s": 1.0, "health_check_timeout_s": 2.0}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaArguments:
    """Arguments of the Serve application, as they stand in its config."""

    engine: EngineSettings
    secret_file: str  # the secret itself stays out of Serve's config, logs and state
    listen: str = "tcp:127.0.0.1:7600-7631"  # tcp:node:…: the address under which Ray knows the host
    drain_timeout_s: float = 30.0
    server: str = DEFAULT_SERVER


def autoscaling_config(
    min_replicas: int, max_replicas: int, settings: dict[str, float], *, initial_replicas: int | None = None
) -> dict[str, Any]:
    """Serve's part of autoscaling: bounds, how often replicas tell, and our policy, which has delays of its own.

    settings: keys of `ScalingSettings`. initial_replicas: Serve sets the target to it whenever the config changes, so
    it is for a service that is deployed once; None = an update keeps as many as there are.
    """
    initial = {} if initial_replicas is None else {"initial_replicas": initial_replicas}
    return {
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        **initial,
        "metrics_interval_s": 1.0,
        "look_back_period_s": 5.0,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "policy": {"policy_function": POLICY, "policy_kwargs": settings},
    }


def serve_config(
    model: ReplicaArguments | None,
    *,
    num_replicas: int = 1,
    num_cpus: float = 1.0,
    max_surge_percent: int = 100,
    autoscaling: dict[str, Any] | None = None,
    secret_file: str = "",
) -> dict[str, Any]:
    """The whole of what shall run, as a `ServeDeploySchema` document: what it does not name is removed.

    model: None = the directory alone. num_cpus: Ray's admission figure of one rank; its threads are
    set in EngineSettings. autoscaling: `autoscaling_config`, which then decides instead of num_replicas. secret_file:
    by which gateways sign what waits in them; must be the same with and without a model, or the directory restarts.
    """
    directory: dict[str, Any] = {
        "name": DIRECTORY_APP,
        "route_prefix": "/directory",
        "import_path": "serving.deployments.app:build_directory",
        "deployments": [
            {
                "name": DIRECTORY_DEPLOYMENT,
                "num_replicas": 1,
                "max_ongoing_requests": 1000,  # one long poll per gateway process
                "graceful_shutdown_timeout_s": 1.0,
                "graceful_shutdown_wait_loop_s": 0.1,
                "ray_actor_options": {"num_cpus": 0.0},
                **_HEALTH,
            }
        ],
    }
    if secret_file:
        directory["args"] = {"secret_file": secret_file}
    applications: list[dict[str, Any]] = [directory]
    if model is not None:
        replica: dict[str, Any] = {
            "name": MODEL_DEPLOYMENT,
            **({"num_replicas": num_replicas} if autoscaling is None else {"autoscaling_config": autoscaling}),
            "graceful_shutdown_timeout_s": model.drain_timeout_s + 10.0,
            "graceful_shutdown_wait_loop_s": 0.1,
            "max_surge_percent": max_surge_percent,
            **deployment_options(model.engine, num_cpus),
            **_HEALTH,
        }
        applications.append(
            {
                "name": MODEL_APP,
                "route_prefix": None,
                "import_path": "serving.deployments.app:build",
                "args": dataclasses.asdict(model),
                "deployments": [replica],
            }
        )
    return {"applications": applications}
