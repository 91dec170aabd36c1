"""What is deployed for which engine: pure, without Ray; Ray's own schema checks the result."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from serving.config import EngineSettings
from serving.deployments.cluster import room_for
from serving.deployments.document import ReplicaArguments, cpu_share, num_ranks, serve_config


def engine(tp: int = 1, pp: int = 1, device: str = "cpu") -> EngineSettings:
    return EngineSettings(
        model_dir="m", served_model_name="m", tensor_parallel_size=tp, pipeline_parallel_size=pp, device=device
    )


def replica(engine: EngineSettings, **options: Any) -> dict[str, Any]:
    """The model's deployment, as Ray's schema reads it."""
    with warnings.catch_warnings(action="ignore"):  # Ray's own deprecations, at import
        from ray.serve.schema import ServeDeploySchema
    document = serve_config(ReplicaArguments(engine=engine, secret_file="s"), **options)
    schema = ServeDeploySchema.model_validate(document)
    dumped = schema.model_dump(exclude_unset=True)
    found: dict[str, Any] = dumped["applications"][1]["deployments"][0]
    return found


def test_a_replica_of_one_rank_needs_no_placement_group() -> None:
    found = replica(engine(), num_cpus=0.5)
    assert found["ray_actor_options"] == {"num_cpus": 0.5}
    assert "placement_group_bundles" not in found


@pytest.mark.parametrize(
    ("tp", "pp", "strategy"), [(2, 1, "STRICT_PACK"), (4, 1, "STRICT_PACK"), (1, 2, "PACK"), (2, 2, "PACK")]
)
def test_a_gang_has_a_bundle_per_rank(tp: int, pp: int, strategy: str) -> None:
    """A tensor-parallel group stays on one host; stages may be spread."""
    found = replica(engine(tp, pp), num_cpus=0.25)
    assert found["placement_group_bundles"] == [{"CPU": 0.25}] * (tp * pp)
    assert found["placement_group_strategy"] == strategy
    assert found["ray_actor_options"]["num_cpus"] == 0.25, "rank 0 fits into the first"


def test_a_rank_on_cuda_takes_a_gpu() -> None:
    found = replica(engine(2, device="cuda"), num_cpus=0.5)
    assert found["placement_group_bundles"] == [{"CPU": 0.5, "GPU": 1.0}] * 2
    assert found["ray_actor_options"]["num_gpus"] == 1.0
    assert replica(engine(device="cuda"))["ray_actor_options"]["num_gpus"] == 1.0


@pytest.mark.parametrize("cores", [1, 2, 7, 192])
@pytest.mark.parametrize(("replicas", "tp", "pp"), [(1, 1, 1), (1, 2, 1), (3, 2, 2), (8, 8, 8), (64, 64, 1)])
def test_an_update_finds_room_beside_what_runs(cores: int, replicas: int, tp: int, pp: int) -> None:
    asked = engine(tp, pp)
    share = cpu_share(cores, replicas, asked)
    assert 2 * replicas * num_ranks(asked) * round(share * 10_000) <= cores * 10_000
    assert share > 0


def test_gpus_are_counted_before_ray_would_wait_for_them() -> None:
    assert room_for(engine(8, device="cpu"), 4, gpus=0) == (100, "")
    assert room_for(engine(2, device="cuda"), 2, gpus=8) == (100, "")
    assert room_for(engine(2, device="cuda"), 2, gpus=7) == (0, ""), "the old one stops first"
    surge, problem = room_for(engine(2, 2, device="cuda"), 2, gpus=7)
    assert surge == 0 and problem.startswith("2 x 4 ranks need 8 GPUs, and Ray found 7; lower --replicas")
