"""Where the ranks of replicas go, and whether there is room. Pure; imports no ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from serving.config import EngineSettings


def num_ranks(engine: EngineSettings) -> int:
    """Ranks of one replica."""
    return engine.tensor_parallel_size * engine.pipeline_parallel_size


def cpu_share(cores: int, num_replicas: int, engine: EngineSettings) -> float:
    """Ray's admission figure of one rank on a machine: half of what there is is left for a rolling update."""
    return math.floor(cores / (2 * num_replicas * num_ranks(engine)) * 1e4) / 1e4  # Ray counts by ten-thousandths


def deployment_options(engine: EngineSettings, num_cpus: float) -> dict[str, Any]:
    """What a replica asks Ray for, in the words of Serve's config: rank 0's share, and for a gang a bundle per
    rank, rank 0's first.

    A rank on CUDA takes a whole GPU. A tensor-parallel group meets in every layer and stays on one
    host; stages may lie on several.
    """
    rank = {"num_cpus": num_cpus} | ({"num_gpus": 1.0} if engine.device == "cuda" else {})
    options: dict[str, Any] = {"ray_actor_options": rank}
    if num_ranks(engine) > 1:
        bundle = {"CPU": num_cpus} | ({"GPU": 1.0} if engine.device == "cuda" else {})
        options["placement_group_bundles"] = [dict(bundle) for _ in range(num_ranks(engine))]
        options["placement_group_strategy"] = "STRICT_PACK" if engine.pipeline_parallel_size == 1 else "PACK"
    return options


def room_for(engine: EngineSettings, num_replicas: int, num_gpus: int) -> tuple[int, str]:
    """(max_surge_percent, "") or (0, why the replicas find no place), by the GPUs of the cluster (C19e)."""
    needed = num_replicas * num_ranks(engine)
    if engine.device != "cuda" or num_gpus >= 2 * needed:
        return 100, ""
    if num_gpus >= needed:
        return 0, ""
    return 0, (
        f"{num_replicas} x {num_ranks(engine)} ranks need {needed} GPUs, and Ray found {num_gpus}; lower --replicas, "
        "--tensor-parallel-size or --pipeline-parallel-size"
    )


def describe(entry: Mapping[str, Any], available: Mapping[str, float]) -> str:
    """What a placement group waits for, in one line. entry: of Ray's placement group table."""
    bundles = ", ".join(
        " + ".join(f"{amount:g} {resource}" for resource, amount in sorted(bundle.items()))
        for _, bundle in sorted(entry.get("bundles", {}).items())
    )
    state = str(entry.get("state", "unknown")).lower()
    free = ", ".join(f"{available.get(resource, 0.0):g} {resource}" for resource in ("CPU", "GPU"))
    return f"its placement group ({entry.get('strategy', '?')}) of [{bundles}] is {state}; free are {free}"
