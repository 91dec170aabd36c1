"""What replicas ask Ray for, and whether there is room: pure, without Ray (whose schema tests/deployments/test_ranks.py
meets)."""

from __future__ import annotations

import pytest

from serving.config import EngineSettings
from serving.deployments.document import ReplicaArguments, serve_config
from serving.deployments.placement import cpu_share, deployment_options, describe, num_ranks, room_for


def engine(tp: int = 1, pp: int = 1, device: str = "cpu") -> EngineSettings:
    return EngineSettings(
        model_dir="m", served_model_name="m", tensor_parallel_size=tp, pipeline_parallel_size=pp, device=device
    )


def test_a_replica_of_one_rank_needs_no_placement_group() -> None:
    assert deployment_options(engine(), 0.5) == {"ray_actor_options": {"num_cpus": 0.5}}


@pytest.mark.parametrize(
    ("tp", "pp", "strategy"), [(2, 1, "STRICT_PACK"), (4, 1, "STRICT_PACK"), (1, 2, "PACK"), (2, 2, "PACK")]
)
def test_a_gang_has_a_bundle_per_rank(tp: int, pp: int, strategy: str) -> None:
    """A tensor-parallel group stays on one host; stages may be spread."""
    document = serve_config(ReplicaArguments(engine=engine(tp, pp), secret_file="s"), num_cpus=0.25)
    replica = document["applications"][1]["deployments"][0]
    assert replica["placement_group_bundles"] == [{"CPU": 0.25}] * (tp * pp)
    assert replica["placement_group_strategy"] == strategy
    assert replica["ray_actor_options"] == {"num_cpus": 0.25}, "rank 0 fits into the first"


def test_a_rank_on_cuda_takes_a_gpu() -> None:
    gang = deployment_options(engine(2, device="cuda"), 0.5)
    assert gang["placement_group_bundles"] == [{"CPU": 0.5, "GPU": 1.0}] * 2
    alone = deployment_options(engine(device="cuda"), 0.5)
    assert gang["ray_actor_options"] == alone["ray_actor_options"] == {"num_cpus": 0.5, "num_gpus": 1.0}


@pytest.mark.parametrize("cores", [1, 2, 7, 192])
@pytest.mark.parametrize(("replicas", "tp", "pp"), [(1, 1, 1), (1, 2, 1), (3, 2, 2), (8, 8, 8), (64, 64, 1)])
def test_an_update_finds_room_beside_what_runs(cores: int, replicas: int, tp: int, pp: int) -> None:
    asked = engine(tp, pp)
    share = cpu_share(cores, replicas, asked)
    assert 2 * replicas * num_ranks(asked) * round(share * 10_000) <= cores * 10_000
    assert share > 0


def test_gpus_are_counted_before_ray_would_wait_for_them() -> None:
    assert room_for(engine(8, device="cpu"), 4, num_gpus=0) == (100, "")
    assert room_for(engine(2, device="cuda"), 2, num_gpus=8) == (100, "")
    assert room_for(engine(2, device="cuda"), 2, num_gpus=7) == (0, ""), "the old one stops first"
    surge, problem = room_for(engine(2, 2, device="cuda"), 2, num_gpus=7)
    assert surge == 0 and problem.startswith("2 x 4 ranks need 8 GPUs, and Ray found 7; lower --replicas")


def test_a_placement_group_in_words() -> None:
    entry = {"bundles": {1: {"GPU": 1.0, "CPU": 0.5}, 0: {"CPU": 0.5}}, "strategy": "PACK", "state": "PENDING"}
    assert describe(entry, {"CPU": 1.5}) == (
        "its placement group (PACK) of [0.5 CPU, 0.5 CPU + 1 GPU] is pending; free are 1.5 CPU, 0 GPU"
    )
