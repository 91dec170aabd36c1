"""The documents that Kubernetes is given, given to a real Ray and a real gateway: what they say works together."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from k8s.objects import GATEWAY
from serving.supervisor import free_port
from tests.conftest import RayCluster
from tests.k8s.manifests import ROOT, Manifests, manifests
from tests.tiny import tiny_model_folder

pytestmark = pytest.mark.ray


def document(m: Manifests, cluster: RayCluster, model: Path) -> dict[str, Any]:
    """serveConfigV2 as it is, but for what one machine has in other places."""
    found = m.serve
    found.pop("http_options")  # the cluster's proxy runs already
    found.pop("proxy_location")
    found["applications"][0]["args"]["secret_file"] = str(cluster.secret_file)
    arguments = found["applications"][1]["args"]
    arguments["secret_file"] = str(cluster.secret_file)
    arguments["engine"] |= {"model_dir": str(model), "max_model_len": 256, "kv_cache_bytes": 1 << 24}
    return found


@pytest.fixture(scope="module")
def gateway(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The gateway's container: its args and its settings file, with this machine's paths and port."""
    folder = tmp_path_factory.mktemp("k8s")
    m = manifests("dev-cpu")
    ray_cluster.deploy(document(m, ray_cluster, tiny_model_folder(folder / "model")))
    port = free_port()
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump(m.settings | {"host": "127.0.0.1", "port": port, "store": str(folder)}))
    ours = {
        "--config": str(settings),
        "--secret-file": str(ray_cluster.secret_file),
        "--directory-url": ray_cluster.directory_url,
    }
    command, *flags = m.container(GATEWAY)["args"]
    arguments = [f"{name}={ours[name]}" for name in (flag.partition("=")[0] for flag in flags)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.cli", command, *arguments], cwd=ROOT, stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            deadline = time.monotonic() + 90
            while not _is_ready(client):
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_a_completion_goes_the_whole_way(gateway: httpx.Client) -> None:
    model = manifests("dev-cpu").spec.served_model_name
    assert [entry["id"] for entry in gateway.get("/v1/models").json()["data"]] == [model]
    body = {"model": model, "prompt": "ahoy", "max_tokens": 12, "seed": 1, "ignore_eos": True}
    first, second = (gateway.post("/v1/completions", json=body).json() for _ in range(2))
    assert first["usage"]["completion_tokens"] == 12
    assert first["choices"] == second["choices"]


def test_probes_and_scrapes_are_answered(gateway: httpx.Client) -> None:
    m = manifests("dev-cpu")
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert gateway.get(m.container(GATEWAY)[kind]["httpGet"]["path"]).status_code == 200
    assert "argosy_connections" in gateway.get("/metrics").text


def test_the_replica_is_where_the_network_policy_says(gateway: httpx.Client, ray_cluster: RayCluster) -> None:
    [entry] = httpx.get(ray_cluster.directory_url).json()["replicas"]
    [rule] = manifests("dev-cpu").one("NetworkPolicy", "gateway")["spec"]["egress"]
    ports = next(port for port in rule["ports"] if "endPort" in port)
    assert ports["port"] <= entry["port"] <= ports["endPort"]
    assert entry["host"] == "127.0.0.1"  # tcp:node: the address of this Ray node, never 0.0.0.0
