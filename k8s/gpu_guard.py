"""`python -m k8s.gpu_guard`: keeps one node's GPU taints true. The DaemonSet of the component gpu-health runs it.

A node that joins with the taint UNVERIFIED loses it once every GPU has passed `models.preflight`. A GPU that reports a
fault of its hardware (an Xid that no program causes, an uncorrected memory error, a row that could not be remapped)
gives its node the taint FAULT, which ends the pods there within their grace period; only a person takes it away.
"""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

logger = logging.getLogger("argosy.gpu_guard")

UNVERIFIED: Final = "argosy/gpu-unverified"
FAULT: Final = "argosy/gpu-fault"
FAULT_EFFECT: Final = "NoExecute"
BEAT_FILE: Final = Path("/tmp/beat")

LOOK_S: Final = 15.0
RETRY_S: Final = 60.0  # between preflights that fail
PREFLIGHT_S: Final = 900.0
CALL_S: Final = 10
MAX_CONFLICTS: Final = 5

PROGRAM_XIDS: Final = frozenset({13, 31, 43, 45, 68, 109})
"""Xids that programs cause (NVIDIA's device plugin leaves the same ones out): a bug of ours is no fault of a GPU."""


class Gpus(Protocol):
    """The GPUs of this node."""

    def devices(self) -> list[str]:
        """cuda:0, cuda:1, … of those that the driver shows."""

    def faults(self) -> list[str]:
        """Faults of hardware since the last call, and those that last; a line each."""


class Node(Protocol):
    """This node, as the API server knows it."""

    def taints(self) -> list[dict[str, Any]]:
        """As they stand in spec.taints."""

    def change(self, alter: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        """Have spec.taints be what `alter` makes of them. Raises OSError when that cannot be told."""


@dataclasses.dataclass(slots=True)
class Guard:
    """One node's guard. `preflight` returns what is wrong; it may take minutes."""

    node: Node
    gpus: Gpus
    preflight: Callable[[Sequence[str]], list[str]]
    clock: Callable[[], float] = time.monotonic
    _next_preflight: float = 0.0

    def look(self) -> None:
        """One round. Raises OSError when the API server does not answer; the next round comes anyway."""
        faults = self.gpus.faults()
        keys = {taint["key"] for taint in self.node.taints()}
        if faults:
            logger.error("%s", "; ".join(faults))
        if faults and FAULT not in keys:
            taint = {"key": FAULT, "effect": FAULT_EFFECT, "value": _label_value(faults[0])}
            self.node.change(lambda taints: [*(t for t in taints if t["key"] != FAULT), taint])
            return
        if UNVERIFIED not in keys or FAULT in keys or self.clock() < self._next_preflight:
            return
        devices = self.gpus.devices()
        problems = self.preflight(devices) if devices else ["the driver shows no GPU"]
        if problems:
            self._next_preflight = self.clock() + RETRY_S
            logger.error("preflight: %s", "; ".join(problems))
            return
        logger.info("preflight: %d GPUs are well", len(devices))
        self.node.change(lambda taints: [taint for taint in taints if taint["key"] != UNVERIFIED])


def _label_value(text: str) -> str:
    """At most 63 characters that a taint's value may have."""
    kept = "".join(character if character.isalnum() and character.isascii() else "-" for character in text.lower())
    return kept[:63].strip("-")


# --- the real ones ------------------------------------------------------------------------------


class NvmlGpus:
    """GPUs through NVIDIA's management library, which needs no rights."""

    def __init__(self) -> None:
        """Raises OSError when there is no driver."""
        import pynvml

        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            self._events = pynvml.nvmlEventSetCreate()
            for handle in self._handles:
                self._ask("nvmlDeviceRegisterEvents", handle, pynvml.nvmlEventTypeXidCriticalError, self._events)
        except pynvml.NVMLError as error:
            raise OSError(f"the NVIDIA driver does not answer: {error}") from None

    def devices(self) -> list[str]:
        return [f"cuda:{i}" for i in range(len(self._handles))]

    def faults(self) -> list[str]:
        nvml = self._nvml
        found = []
        while event := self._ask("nvmlEventSetWait_v2", self._events, 0):  # having none is an error to it
            if event.eventData not in PROGRAM_XIDS:
                found.append(f"xid-{event.eventData}")
        uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        for i, handle in enumerate(self._handles):
            if self._ask("nvmlDeviceGetTotalEccErrors", handle, *uncorrected):
                found.append(f"gpu-{i}-uncorrected-memory-error")
            rows = self._ask("nvmlDeviceGetRemappedRows", handle)
            if rows and rows[3]:
                found.append(f"gpu-{i}-row-remapping-failed")
            if self._ask("nvmlDeviceGetUUID", handle) is None:
                found.append(f"gpu-{i}-does-not-answer")
        return found

    def _ask(self, function: str, *arguments: Any) -> Any:
        """None for what this GPU does not know or tell."""
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError:
            return None


class ApiNode:
    """A node through the official client, with an optimistic lock: whoever else changed it first is not overwritten."""

    def __init__(self, name: str, api: Any) -> None:
        """api: kubernetes.client.CoreV1Api."""
        self._name = name
        self._api = api

    def taints(self) -> list[dict[str, Any]]:
        return self._read()[0]

    def change(self, alter: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        from kubernetes.client.exceptions import ApiException

        for _ in range(MAX_CONFLICTS):
            taints, version = self._read()
            body = {"metadata": {"resourceVersion": version}, "spec": {"taints": alter(taints)}}
            try:
                self._api.patch_node(self._name, body, _request_timeout=CALL_S)
            except ApiException as error:
                if error.status != 409:
                    raise OSError(f"node {self._name}: {error.status} {error.reason}") from None
            else:
                return
        raise OSError(f"node {self._name}: changed by others {MAX_CONFLICTS} times in a row")

    def _read(self) -> tuple[list[dict[str, Any]], str]:
        from kubernetes.client.exceptions import ApiException

        try:
            node = self._api.read_node(self._name, _request_timeout=CALL_S)
        except ApiException as error:
            raise OSError(f"node {self._name}: {error.status} {error.reason}") from None
        listed = node.spec.taints or []
        fields = ("key", "value", "effect", "time_added")
        found = [{name: getattr(taint, name) for name in fields if getattr(taint, name)} for taint in listed]
        for taint in found:
            if added := taint.pop("time_added", None):
                taint["timeAdded"] = added.isoformat().replace("+00:00", "Z")
        return found, node.metadata.resource_version


def preflight(devices: Sequence[str]) -> list[str]:
    """`models.preflight` in a process of its own: a fault may kill it, and its memory must be free again."""
    command = [sys.executable, "-m", "models.preflight", *devices]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=PREFLIGHT_S)
    except subprocess.TimeoutExpired:
        return [f"no end within {PREFLIGHT_S:g} s"]
    if ran.returncode == 0:
        return []
    return [*ran.stdout.splitlines(), *ran.stderr.splitlines()[-1:]] or [f"exit code {ran.returncode}"]


def main(arguments: list[str]) -> int:
    """Runs until it is ended. arguments: the node's name."""
    from kubernetes import client, config
    from urllib3.exceptions import HTTPError

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    if len(arguments) != 1:
        print("usage: python -m k8s.gpu_guard NODE", file=sys.stderr)
        return 2
    config.load_incluster_config()  # type: ignore[no-untyped-call]
    guard = Guard(ApiNode(arguments[0], client.CoreV1Api()), NvmlGpus(), preflight)
    while True:
        try:
            guard.look()
        except (OSError, HTTPError) as error:
            logger.warning("%s", error)
        BEAT_FILE.touch()
        time.sleep(LOOK_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
