"""dev-cpu on one machine: a head, a worker and a gateway out of the images' trees, given what their pods are given."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Final

import yaml

from k8s import deployment, render
from k8s.images.containers import START_S, Failed, Image, ask, own_network, wait_for
from k8s.images.recipe import mount
from k8s.objects import AGENT_PORT, DASHBOARD_PORT, MODELS_PATH, SECRET_PATH, SERVE_PORT, SETTINGS_PATH, Object
from k8s.weights import MODEL_PATH

SECRET: Final = "5e" * 32
TOKEN: Final = "70" * 32
HEAD, WORKER = "10.9.0.1", "10.9.0.2"
GATEWAY_PORT: Final = 18000
MODEL: Final = "smollm2-135m-instruct"
NUM_TOKENS: Final = 400


def objects() -> dict[tuple[str, str], Object]:
    """(kind, name without its hash) -> object of dev-cpu."""
    found = deployment.objects(render.overlay_spec("dev-cpu"))
    return {
        (key[1], key[2].rpartition("-")[0] if thing.get("immutable") else key[2]): thing for key, thing in found.items()
    }


def gateway_pod(image: Image) -> list[str]:
    """Mounts what the gateway's pod mounts; its command."""
    things = objects()
    [container] = things["Deployment", "argosy-gateway"]["spec"]["template"]["spec"]["containers"]
    image.give(SETTINGS_PATH, things["ConfigMap", "argosy-gateway"]["data"])
    image.give(SECRET_PATH, {"secret": SECRET + "\n"})
    return [*image.stage.entrypoint, *container["args"]]


def rehearse(image: Image, gateway: Image, scratch: Path) -> None:
    """From fetching the weights to a stream that outlives the end of its worker's pod. Raises Failed."""
    things = objects()
    service = things["RayService", "argosy"]["spec"]
    cluster = service["rayClusterConfig"]
    [group] = cluster["workerGroupSpecs"]
    pod = group["template"]["spec"]
    begun = time.monotonic()
    _fetch(image, pod["initContainers"][0], things["ConfigMap", "argosy-model"]["data"])
    print(f"engine: weights fetched by the pod's script in {time.monotonic() - begun:.0f} s", flush=True)
    own_network(HEAD, WORKER)
    env = _values(pod["containers"][0]) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    head_words = ray_start(f"--head --port=6379 --node-ip-address={HEAD}", cluster["headGroupSpec"])
    worker_words = ray_start(f"--address={HEAD}:6379 --node-ip-address={WORKER}", group)
    gateway_words = [
        f"--directory-url=http://{WORKER}:{SERVE_PORT}/directory" if "--directory-url" in word else word
        for word in gateway_pod(gateway)
    ]
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(image.running(head_words, env, scratch / "head.log"))
        wait_for(AGENT_PORT, "/api/healthz", 200, head, host=HEAD)
        worker = stack.enter_context(image.running(worker_words, env, scratch / "worker.log"))
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            wait_for(AGENT_PORT, pod["containers"][0][kind]["httpGet"]["path"], 200, worker, host=WORKER)
        _deploy(yaml.safe_load(service["serveConfigV2"]))
        port = {"ARGOSY_PORT": str(GATEWAY_PORT)}
        process = stack.enter_context(gateway.running(gateway_words, port, scratch / "gateway.log"))
        wait_for(GATEWAY_PORT, "/readyz", 200, process)
        print(f"engine: ready {time.monotonic() - begun:.0f} s after its pod began", flush=True)
        body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        status, reply = ask(GATEWAY_PORT, "/v1/completions", "POST", body)
        if status != 200 or "Paris" not in reply:
            raise Failed(f"a completion: {status} {reply[:500]}")
        print(f"engine: {json.loads(reply)['choices'][0]['text']!r}", flush=True)
        _end_worker(worker, pod["terminationGracePeriodSeconds"])
        head.kill()


def ray_start(where: str, group: Object) -> list[str]:
    """The command that KubeRay makes of a group's rayStartParams."""
    params = " ".join(f"--{name}={value}" for name, value in sorted(group["rayStartParams"].items()))
    return ["/bin/bash", "-c", "--", f"ulimit -n 65536; ray start --block {where} {params}"]


def _fetch(image: Image, container: Object, data: dict[str, str]) -> None:
    image.give(MODEL_PATH, data)
    image.give(SECRET_PATH, {"secret": SECRET + "\n"})
    variables = {name: value for name, value in data.items() if name.replace("_", "").isupper()}
    image.run(container["command"], variables | _values(container), timeout_s=600)
    mount("-o", "remount,ro", str(image.stage.root / MODELS_PATH.strip("/")))


def _deploy(document: dict[str, Any]) -> None:
    """As KubeRay does."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    deadline = time.monotonic() + START_S
    while True:
        told = ask(DASHBOARD_PORT, "/api/serve/applications/", "PUT", document, host=HEAD, headers=headers)
        if told[0] == 200:
            return
        if time.monotonic() > deadline:
            raise Failed(f"Serve does not take the document: {told}")
        time.sleep(1)


class Stream(threading.Thread):
    """One client's stream."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.events: list[bytes] = []

    def run(self) -> None:
        body = {"model": MODEL, "prompt": "Once", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", GATEWAY_PORT, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data:"):
                self.events.append(line.strip())


def _end_worker(worker: subprocess.Popen[bytes], grace_s: float) -> None:
    """SIGTERM, as the kubelet sends it, while a stream is on the way: nothing may be cut."""
    stream = Stream()
    stream.start()
    deadline = time.monotonic() + 60
    while len(stream.events) < 20:
        if time.monotonic() > deadline:
            raise Failed("a stream does not begin")
        time.sleep(0.05)
    begun = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    stream.join(grace_s)
    ended_s = time.monotonic() - begun
    if not stream.events or stream.events[-1] != b"data: [DONE]":
        raise Failed(f"the end of its worker cut a stream after {len(stream.events)} events: {stream.events[-1:]}")
    try:
        worker.wait(grace_s - ended_s)
    except subprocess.TimeoutExpired:
        raise Failed(f"the worker is there {grace_s:.0f} s after SIGTERM: SIGKILL would end it") from None
    print(
        f"engine: SIGTERM in the middle of a stream: all {NUM_TOKENS} tokens within {ended_s:.0f} s, the worker ended "
        f"by itself after {time.monotonic() - begun:.0f} of {grace_s:.0f} s",
        flush=True,
    )


def _values(container: Object) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container.get("env", []) if "value" in entry}
