"""A node's taints follow the state of its GPUs, over the API server's own protocol."""

from __future__ import annotations

import http.server
import json
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from kubernetes import client

from k8s import gpu_guard
from k8s.gpu_guard import FAULT, UNVERIFIED, ApiNode, Guard

OTHER = {"key": "nvidia.com/gpu", "effect": "NoSchedule", "value": "present"}
FRESH = {"key": UNVERIFIED, "effect": "NoSchedule"}


class Gpus:
    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.found: list[str] = []

    def devices(self) -> list[str]:
        return [f"cuda:{i}" for i in range(self.count)]

    def faults(self) -> list[str]:
        found, self.found = self.found, []
        return found


class Memory:
    """A node without an API server."""

    def __init__(self, *taints: dict[str, Any]) -> None:
        self.now = list(taints)
        self.num_changes = 0

    def taints(self) -> list[dict[str, Any]]:
        return [dict(taint) for taint in self.now]

    def change(self, alter: Any) -> None:
        self.now = alter(self.taints())
        self.num_changes += 1

    @property
    def keys(self) -> set[str]:
        return {taint["key"] for taint in self.now}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def guard(node: Any, gpus: Gpus, problems: Sequence[str] = (), clock: Any = None) -> tuple[Guard, list[list[str]]]:
    tested: list[list[str]] = []

    def preflight(devices: Sequence[str]) -> list[str]:
        tested.append(list(devices))
        return list(problems)

    return Guard(node, gpus, preflight, clock or Clock()), tested


def test_a_fresh_node_is_opened_by_a_test_of_all_its_gpus() -> None:
    node = Memory(OTHER, FRESH)
    watch, tested = guard(node, Gpus(8))
    watch.look()
    assert tested == [[f"cuda:{i}" for i in range(8)]]
    assert node.now == [OTHER]
    watch.look()
    assert len(tested) == 1, "a node in use is never tested: the test takes all memory"


@pytest.mark.parametrize(("count", "problems"), [(8, ["cuda:3: 1 words of memory"]), (0, [])])
def test_a_node_that_fails_stays_closed_and_is_tried_again_later(count: int, problems: list[str]) -> None:
    node, clock = Memory(OTHER, FRESH), Clock()
    watch, tested = guard(node, Gpus(count), problems, clock)
    watch.look()
    clock.now = 30.0
    watch.look()
    assert UNVERIFIED in node.keys and len(tested) == (1 if count else 0)
    clock.now = 61.0
    watch.look()
    assert UNVERIFIED in node.keys and len(tested) == (2 if count else 0)


def test_a_fault_taints_the_node_once_and_for_all() -> None:
    node, gpus = Memory(OTHER), Gpus()
    watch, _ = guard(node, gpus)
    watch.look()
    assert node.num_changes == 0
    gpus.found = ["xid-79", "gpu-1-does-not-answer"]
    watch.look()
    assert {"key": FAULT, "effect": "NoExecute", "value": "xid-79"} in node.now and OTHER in node.now
    gpus.found = ["xid-79"]
    watch.look()
    watch.look()
    assert node.num_changes == 1, "nobody but a person takes it away"


def test_a_faulty_node_is_not_opened() -> None:
    node = Memory(FRESH, {"key": FAULT, "effect": "NoExecute"})
    watch, tested = guard(node, Gpus())
    watch.look()
    assert not tested and UNVERIFIED in node.keys


def test_in_any_order_of_events_a_node_takes_work_only_when_it_should() -> None:
    draw, clock = random.Random(3), Clock()
    for _ in range(300):
        node, gpus = Memory(OTHER, FRESH), Gpus()
        is_well = draw.random() < 0.5
        watch, _ = guard(node, gpus, [] if is_well else ["broken"], clock)
        was_faulty = False
        for _ in range(20):
            clock.now += draw.choice((1.0, 15.0, 70.0))
            if draw.random() < 0.1:
                gpus.found, was_faulty = ["xid-48"], True
            watch.look()
            assert OTHER in node.now
            assert (FAULT in node.keys) == was_faulty
            assert is_well or UNVERIFIED in node.keys


# --- the API ------------------------------------------------------------------------------------


class ApiServer(http.server.BaseHTTPRequestHandler):
    """One node of an API server: GET, and PATCH with the optimistic lock that resourceVersion is."""

    node: dict[str, Any]
    conflicts = 0
    status = 200
    patches: list[tuple[str, dict[str, Any]]]

    def do_GET(self) -> None:
        self._answer(type(self).status, type(self).node)

    def do_PATCH(self) -> None:
        server = type(self)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.patches.append((self.headers["content-type"], body))
        if server.conflicts:
            server.conflicts -= 1
            server.node["metadata"]["resourceVersion"] += "1"
        if body["metadata"]["resourceVersion"] != server.node["metadata"]["resourceVersion"]:
            self._answer(409, {"kind": "Status", "code": 409})
            return
        server.node["spec"]["taints"] = body["spec"]["taints"]
        self._answer(200, server.node)

    def _answer(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[type[ApiServer]]:
    taints = [dict(OTHER), {**FRESH, "timeAdded": "2026-11-27T01:02:03Z"}]
    node = {"metadata": {"name": "n1", "resourceVersion": "7"}, "spec": {"taints": taints}}
    handler = type("Handler", (ApiServer,), {"node": node, "patches": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        handler.port = server.server_address[1]
        yield handler
        server.shutdown()
        thread.join()


def a_node(api: Any) -> ApiNode:
    settings = client.Configuration(host=f"http://127.0.0.1:{api.port}")
    settings.retries = False
    return ApiNode("n1", client.CoreV1Api(client.ApiClient(settings)))


def test_taints_are_read_and_changed_through_the_client(api: Any) -> None:
    node = a_node(api)
    assert node.taints() == [OTHER, {**FRESH, "timeAdded": "2026-11-27T01:02:03Z"}]
    watch, _ = guard(node, Gpus())
    watch.look()
    assert api.node["spec"]["taints"] == [OTHER]
    [(content_type, body)] = api.patches
    assert "patch+json" in content_type and body["metadata"]["resourceVersion"] == "7"


def test_what_others_changed_meanwhile_is_kept(api: Any) -> None:
    api.conflicts = 2
    a_node(api).change(lambda taints: [t for t in taints if t["key"] != UNVERIFIED])
    assert len(api.patches) == 3 and api.node["spec"]["taints"] == [OTHER]
    api.conflicts = 100
    with pytest.raises(OSError, match="changed by others 5 times"):
        a_node(api).change(lambda taints: taints)


def test_a_server_that_refuses_is_an_error_with_its_words(api: Any) -> None:
    api.status = 403
    with pytest.raises(OSError, match="node n1: 403"):
        a_node(api).taints()


def test_without_a_driver_the_guard_says_so() -> None:
    with pytest.raises(OSError, match="driver"):
        gpu_guard.NvmlGpus()


def test_a_preflight_is_a_process_whose_words_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_guard, "PREFLIGHT_S", 60.0)
    [problem] = gpu_guard.preflight(["cuda:0"])
    assert problem.startswith("cuda:0: ")
