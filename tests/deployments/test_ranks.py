"""Ranks as actors on a real Ray cluster: real rank processes, a stand-in for rank 0's engine."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
import pytest

from serving.config import EngineSettings
from serving.deployments.document import ReplicaArguments, serve_config
from tests.conftest import RayCluster
from tests.deployments.test_cluster import listing, members
from tests.stand_in import eventually, fetch, is_alive

pytestmark = pytest.mark.ray


def deploy(
    cluster: RayCluster,
    num_replicas: int = 1,
    *,
    tp: int = 2,
    name: str = "gang",
    model_dir: str = "model",
    num_cpus: float = 0.1,
    secret_file: str = "",
) -> None:
    engine = EngineSettings(model_dir=model_dir, served_model_name=name, tensor_parallel_size=tp)
    arguments = ReplicaArguments(
        engine=engine,
        secret_file=secret_file or str(cluster.secret_file),
        drain_timeout_s=5.0,
        server="tests.stand_in:StandInServer",
    )
    cluster.deploy(serve_config(arguments, num_replicas=num_replicas, num_cpus=num_cpus))


def rank_pids() -> set[int]:
    """Processes of ranks beyond rank 0, of this cluster."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Rank") and is_alive(process.pid):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def serving(cluster: RayCluster, num_replicas: int, **fields: Any) -> dict[str, tuple[int, int]]:
    """The gangs, once there are exactly so many with all their ranks; deploys them."""
    deploy(cluster, num_replicas, **fields)
    others = num_replicas * (fields.get("tp", 2) - 1)

    def exactly() -> dict[str, tuple[int, int]]:
        seen = members(cluster, fields.get("name", "gang"))
        is_all = len(seen) == len(listing(cluster)["replicas"]) == num_replicas and len(rank_pids()) == others
        return seen if is_all else {}

    return dict(eventually(exactly, 90.0))


def placements() -> list[dict[str, Any]]:
    import ray

    return [entry for entry in ray.util.placement_group_table().values() if entry["state"] != "REMOVED"]


def test_the_ranks_of_a_gang_lie_in_its_placement_group(ray_cluster: RayCluster) -> None:
    serving(ray_cluster, 1, tp=3)
    [placement] = placements()
    assert placement["state"] == "CREATED" and placement["strategy"] == "STRICT_PACK"
    assert list(placement["bundles"].values()) == [{"CPU": 0.1}] * 3


def test_no_rank_outlives_its_replica_even_when_frozen(ray_cluster: RayCluster) -> None:
    """A frozen process reads no end of its connection, and who would have killed it is dead: Ray does it."""
    before = serving(ray_cluster, 2)
    ranks = rank_pids()
    victim, survivor = sorted(before)
    for pid in ranks:  # whichever is the victim's
        os.kill(pid, signal.SIGSTOP)
    os.kill(before[victim][0], signal.SIGKILL)
    eventually(lambda: len([pid for pid in ranks if not is_alive(pid)]) == 1, 20.0)
    for pid in ranks:
        if is_alive(pid):
            os.kill(pid, signal.SIGCONT)
    eventually(lambda: len(rank_pids()) == 2 and len(members(ray_cluster, "gang")) == 2, 60.0)
    assert members(ray_cluster, "gang")[survivor] == before[survivor], "its neighbour was not touched"
    eventually(lambda: len(placements()) == 2, 20.0)


def test_scaling_down_ends_a_whole_gang(ray_cluster: RayCluster) -> None:
    serving(ray_cluster, 2)
    ranks = rank_pids()
    deploy(ray_cluster, 1)
    eventually(lambda: len(rank_pids()) == 1, 30.0)
    assert rank_pids() < ranks, "the other gang was not touched"
    eventually(lambda: len(placements()) == 1, 20.0)


def test_a_gang_that_does_not_load_tells_why_and_leaves_no_rank(ray_cluster: RayCluster) -> None:
    serving(ray_cluster, 1)
    deploy(ray_cluster, name="broken", model_dir="broken")

    def failures() -> list[str]:
        return [r["failure"] for r in fetch(f"{ray_cluster.directory_url}/starts")[1]["reports"] if r["failure"]]

    assert "tensor model.norm.weight is missing" in eventually(failures, 60.0)
    deploy_nothing(ray_cluster)
    eventually(lambda: not rank_pids(), 30.0)
    eventually(lambda: not placements(), 20.0)


def deploy_nothing(cluster: RayCluster) -> None:
    cluster.deploy(serve_config(None))


def test_a_gang_that_finds_no_place_is_described(ray_cluster: RayCluster) -> None:
    """Two bundles of three cores on a cluster of four."""
    from serving.deployments.cluster import waiting_gang

    deploy(ray_cluster, num_cpus=3.0)
    told = eventually(waiting_gang, 60.0)
    assert told.startswith("a replica's gang finds no place: its placement group (STRICT_PACK) of [3 CPU, 3 CPU] is ")
    assert "; free are " in told
    deploy_nothing(ray_cluster)
