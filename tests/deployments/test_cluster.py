"""The deployments on a real Ray cluster, with stand-in replicas."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.config import EngineSettings
from serving.deployments.directory import RENEW_S
from serving.deployments.document import ReplicaArguments, serve_config
from tests.conftest import RayCluster
from tests.stand_in import ask, eventually, fetch, is_alive

pytestmark = pytest.mark.ray


def deploy(cluster: RayCluster, num_replicas: int, *, name: str = "stand-in", model_dir: str = "model") -> None:
    arguments = ReplicaArguments(
        engine=EngineSettings(model_dir=model_dir, served_model_name=name),
        secret_file=str(cluster.secret_file),
        drain_timeout_s=5.0,
        server="tests.stand_in:StandInServer",
    )
    cluster.deploy(serve_config(arguments, num_replicas=num_replicas, num_cpus=0.1))


def listing(cluster: RayCluster, since: int = -1) -> dict[str, Any]:
    try:
        status, body = fetch(f"{cluster.directory_url}?since={since}", timeout_s=30.0)
    except OSError:
        return {"version": -1, "replicas": []}
    return body if status == 200 else {"version": -1, "replicas": []}


def members(cluster: RayCluster, name: str = "stand-in") -> dict[str, tuple[int, int]]:
    """id -> (pid, epoch) of the ready replicas that answer."""
    found = {}
    for entry in listing(cluster)["replicas"]:
        if entry["state"] == "ready" and entry["card"]["model"] == name:
            try:
                found[entry["id"]] = ask(f"tcp:{entry['host']}:{entry['port']}", timeout_s=0.0)
            except OSError:
                continue
    return found


def serving(cluster: RayCluster, num_replicas: int, name: str = "stand-in") -> dict[str, tuple[int, int]]:
    """The replicas, once there are exactly so many; deploys them."""
    deploy(cluster, num_replicas, name=name)

    def exactly() -> dict[str, tuple[int, int]]:
        seen = members(cluster, name)
        return seen if len(seen) == num_replicas and len(listing(cluster)["replicas"]) == num_replicas else {}

    return dict(eventually(exactly, 60.0))


def test_scaling_by_config_leaves_running_replicas_alone(ray_cluster: RayCluster) -> None:
    [(first, identity)] = serving(ray_cluster, 1).items()
    two = serving(ray_cluster, 2)
    assert two[first] == identity, "scaling replaced a replica"
    entry = listing(ray_cluster)["replicas"][0]
    assert set(entry) == {"id", "epoch", "host", "port", "card", "state"}
    assert entry["host"] == "127.0.0.1" and 7600 <= entry["port"] <= 7631
    assert entry["card"]["fingerprint"] == "f0"


def test_a_long_poll_returns_when_a_replica_comes(ray_cluster: RayCluster) -> None:
    serving(ray_cluster, 1)
    version = listing(ray_cluster)["version"]
    answers: list[dict[str, Any]] = []
    poll = threading.Thread(target=lambda: answers.append(listing(ray_cluster, version)))
    poll.start()
    time.sleep(0.5)
    assert poll.is_alive() and not answers
    serving(ray_cluster, 2)
    poll.join(10.0)
    assert len(answers[0]["replicas"]) == 2 and answers[0]["version"] > version


@pytest.mark.parametrize("end", ["kill", "sick", "stop"])
def test_check_health_tells_the_truth(ray_cluster: RayCluster, end: str) -> None:
    before = serving(ray_cluster, 2)
    victim = sorted(before)[0]
    entry = next(e for e in listing(ray_cluster)["replicas"] if e["id"] == victim)
    pid, _ = before[victim]
    begun = time.monotonic()
    if end == "sick":
        ask(f"tcp:{entry['host']}:{entry['port']}", "sick")
    else:
        os.kill(pid, signal.SIGKILL if end == "kill" else signal.SIGSTOP)
    eventually(lambda: not is_alive(pid), 20.0)
    gone_s = time.monotonic() - begun
    after = eventually(lambda: len(seen := members(ray_cluster)) == 2 and victim not in seen and seen, 30.0)
    # Serve asks three times, each for health_check_period_s + health_check_timeout_s at most. A drain
    # would take drain_timeout_s + 10 s more.
    assert gone_s < 14.0, "a sick replica is killed, not drained"
    [survivor] = set(before) - {victim}
    assert after[survivor] == before[survivor], "its neighbour was not touched"


def test_a_restarted_directory_is_full_again_within_two_renewals(ray_cluster: RayCluster) -> None:
    before = serving(ray_cluster, 2)
    version = listing(ray_cluster)["version"]
    [directory] = [p for p in psutil.process_iter(["name", "cmdline"]) if is_directory(p, ray_cluster)]
    directory.kill()
    after = eventually(lambda: listing(ray_cluster)["version"] > version and members(ray_cluster), 30.0)
    back = time.monotonic()
    eventually(lambda: len(members(ray_cluster)) == 2, 2 * RENEW_S + 1.0)
    assert time.monotonic() - back < 2 * RENEW_S + 1.0 and after
    assert members(ray_cluster) == before, "replicas do not depend on it"


def is_directory(process: psutil.Process, cluster: RayCluster) -> bool:
    if "ray::ServeReplica:directory" not in " ".join(process.info["cmdline"] or []):
        return False
    return any(parent.pid == os.getpid() for parent in process.parents())


def test_a_replica_that_leaves_drains_first(ray_cluster: RayCluster) -> None:
    before = serving(ray_cluster, 2, name="slow-drain")
    deploy(ray_cluster, 1, name="slow-drain")
    leaving = eventually(lambda: [e for e in listing(ray_cluster)["replicas"] if e["state"] == "draining"], 10.0)[0][
        "id"
    ]
    pid, _ = before[leaving]
    begun = time.monotonic()
    assert is_alive(pid), "its rows are still being moved"
    eventually(lambda: leaving not in [e["id"] for e in listing(ray_cluster)["replicas"]], 5.0)
    assert time.monotonic() - begun > 1.0, "it waited for its drain"
    eventually(lambda: not is_alive(pid), 10.0)
    [(kept, identity)] = members(ray_cluster, "slow-drain").items()
    assert before[kept] == identity


def test_a_model_that_does_not_load_tells_why(ray_cluster: RayCluster) -> None:
    serving(ray_cluster, 1)
    deploy(ray_cluster, 1, name="broken", model_dir="broken")

    def failures() -> list[str]:
        return [r["failure"] for r in fetch(f"{ray_cluster.directory_url}/starts")[1]["reports"] if r["failure"]]

    assert eventually(failures, 30.0)[0] == "tensor model.norm.weight is missing"


def test_an_application_that_serve_gives_up_tells_so_in_one_line(ray_cluster: RayCluster) -> None:
    from serving.deployments.cluster import deploy_failure
    from serving.deployments.document import MODEL_APP

    serving(ray_cluster, 1)
    assert deploy_failure(MODEL_APP) == ""
    document = serve_config(ReplicaArguments(engine=EngineSettings(model_dir="", served_model_name=""), secret_file=""))
    document["applications"][1]["import_path"] = "serving.deployments.app:no_such_builder"
    ray_cluster.deploy(document)
    told = eventually(lambda: deploy_failure(MODEL_APP), 30.0)
    assert told.startswith("Ray Serve gave up on the model: ") and "no_such_builder" in told and "\n" not in told


def test_ray_refuses_whoever_has_no_token(ray_cluster: RayCluster) -> None:
    import ray

    script = (
        "import sys; from ray._raylet import GcsClient; print(GcsClient(address=sys.argv[1]).internal_kv_keys(b''))"
    )
    other = ray_cluster.folder / "other-token"
    other.write_text("0" * 64)

    def connect(**environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        command = [sys.executable, "-c", script, ray.get_runtime_context().gcs_address]
        return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=60)

    for refused in (connect(), connect(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(other))):
        assert refused.returncode != 0 and "AuthenticationError" in refused.stderr
    admitted = connect(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=os.environ["RAY_AUTH_TOKEN_PATH"])
    assert admitted.returncode == 0 and admitted.stdout.startswith("["), admitted.stderr


def test_only_serves_own_replica_port_listens_beyond_loopback(ray_cluster: RayCluster) -> None:
    serving(ray_cluster, 1)
    wide = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for connection in process.net_connections(kind="inet"):
            host = connection.laddr.ip.removeprefix("::ffff:")
            if connection.status == psutil.CONN_LISTEN and host not in ("127.0.0.1", "::1"):
                wide.add(" ".join(process.cmdline())[:22])
    # Serve's inter-replica gRPC server binds every interface; the token guards it (C20).
    assert wide <= {"ray::ServeReplica:mode", "ray::ServeReplica:dire"}
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600


def test_decisions_are_read_from_the_controllers_log_once_and_whole(tmp_path: Path) -> None:
    from serving.deployments.cluster import Decisions

    folder = tmp_path / "session_latest" / "logs" / "serve"
    decisions = Decisions(tmp_path)
    assert decisions.news() == []
    folder.mkdir(parents=True)
    log = folder / "controller_17.log"
    log.write_text("INFO controller 17 -- Adding 1 replica.\nINFO controller 17 -- autoscaling of Replica: 1 -> 2: a")
    assert decisions.news() == []
    with log.open("a") as file:
        file.write(" queue\nINFO controller 17 -- something else\n")
    (folder / "controller_18.log").write_text("INFO controller 18 -- autoscaling of Replica: 2 -> 1: idle\n")
    assert decisions.news() == ["autoscaling of Replica: 1 -> 2: a queue", "autoscaling of Replica: 2 -> 1: idle"]
    assert decisions.news() == []
