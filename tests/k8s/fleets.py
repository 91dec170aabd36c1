"""A deployment that runs, with gateways that tell of its replicas, for the tests of what operates it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from k8s.tool import exits
from tests.k8s.api_json import Object
from tests.k8s.cluster_fixture import World


@dataclasses.dataclass(slots=True)
class RunningFleet:
    """Replicas by their pods. rows: replica -> requests that it works on; falls by `pace` with every look."""

    world: World
    pods: list[str]
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    states: dict[str, str] = dataclasses.field(default_factory=dict)
    pace: int = 0
    commands: list[list[str]] = dataclasses.field(default_factory=list)

    def progress(self) -> Object:
        alive = {pod["metadata"]["name"] for pod in self.world.running.server.all("Pod", "argosy")}
        entries = []
        for i, pod in enumerate(self.pods):
            name = f"r{i}"
            if pod not in alive:
                continue
            rows = self.rows.get(name, 0)
            if self.states.get(name) == "draining":
                self.rows[name] = max(0, rows - self.pace)
            entries.append(
                {
                    "id": name,
                    "state": self.states.get(name, "ready"),
                    "epoch": 1,
                    "ranks": [{"rank": 0, "host": pod, "pid": 1, "step": 5, "age_s": 0.01}],
                    "num_running": rows,
                    "num_waiting": 0,
                    "blocks_used": 10,
                    "blocks_total": 100,
                    "tokens_per_s": 25.0,
                    "step_age_s": 0.02,
                }
            )
        return {"replicas": entries}

    def execute(self, pod: str, container: str, command: list[str]) -> tuple[int, str]:
        """The Ray commands that a drain runs in the head."""
        self.commands.append(command)
        assert container == "ray-head"
        addresses = {pod: f"10.0.1.{i}" for i, pod in enumerate(self.pods)}
        if command[1] == "list":
            nodes = [{"node_id": f"id-{pod}", "node_ip": ip, "state": "ALIVE"} for pod, ip in addresses.items()]
            return 0, json.dumps(nodes)
        node = command[command.index("--node-id") + 1]
        self.states[f"r{self.pods.index(node.removeprefix('id-'))}"] = "draining"
        return 0, ""


def start_fleet(world: World, *, replicas: int = 4, gateways: int = 2, spec: str = "") -> RunningFleet:
    """Deploys dev-cpu with so many replicas, each on a node of its own, and wires their gateways."""
    changes: dict[str, Any] = {
        "engine": {"min_replicas": replicas, "max_replicas": replicas},
        "gateway": {"min_replicas": gateways, "max_replicas": gateways},
    }
    code, text = world.deploy(spec or world.spec_file(**changes))
    assert code == exits.DONE, text
    workers = sorted(pod["metadata"]["name"] for pod in world.running.all("Pod") if "worker" in pod["metadata"]["name"])
    fleet = RunningFleet(world, workers)
    for i, name in enumerate(workers):
        pod = world.running.find("Pod", name)
        assert pod is not None
        pod["status"]["podIP"] = f"10.0.1.{i}"
        pod["spec"]["nodeName"] = f"worker-{i}"
        world.running.put(pod)
    world.running.state.pages["*/proxy/progressz"] = fleet.progress
    world.running.state.on_exec = fleet.execute
    for budget in world.running.all("PodDisruptionBudget"):
        budget["status"] = {"disruptionsAllowed": 1, "expectedPods": 2, "currentHealthy": 2, "desiredHealthy": 1}
        world.running.put(budget)
    return fleet
