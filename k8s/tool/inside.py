"""Inside pods: a command in a container, and a page of an HTTP server that nothing outside can reach."""

from __future__ import annotations

import json
from typing import Any, Final
from urllib.parse import quote

from k8s.tool.cluster import Cluster, first_line
from k8s.tool.exits import ApiError, DeadlineError
from k8s.tool.kinds import POD

PAGE_S: Final = 5.0

_FETCH: Final = "import sys, urllib.request as r; sys.stdout.write(r.urlopen(sys.argv[1], timeout=4).read().decode())"


def run_in(cluster: Cluster, pod: str, namespace: str, container: str, command: list[str], timeout_s: float) -> str:
    """What a command in a container prints; needs create on pods/exec. Raises ApiError with what it said when it
    fails, DeadlineError when it does not end."""
    from kubernetes import client
    from kubernetes.client.exceptions import ApiException
    from kubernetes.stream import stream
    from websocket import WebSocketException

    action = f"run {command[0]} in Pod {pod}"
    call = client.CoreV1Api(cluster.api).connect_get_namespaced_pod_exec
    asked = {"container": container, "command": command, "stdout": True, "stderr": True, "stdin": False, "tty": False}
    channel: Any = None
    try:
        channel = stream(call, pod, namespace, **asked, _preload_content=False, _request_timeout=timeout_s)
        channel.run_forever(timeout=timeout_s)
        if channel.is_open():
            raise DeadlineError(f"{action}: no end within {timeout_s:g} s")
        printed, complaint = channel.read_stdout(0), channel.read_stderr(0)
        code = channel.returncode
    except ApiException as error:
        # The client gives a refused handshake no status of its own.
        text = str(error.reason or error.body or "")
        is_forbidden = error.status == 403 or "Handshake status 403" in text
        said = "needs create on pods/exec" if is_forbidden else first_line(text)
        raise ApiError(action, 403 if is_forbidden else int(error.status or 0), "Refused", said) from None
    except (OSError, WebSocketException, TypeError, KeyError) as error:
        raise ApiError(action, 0, "Disconnected", first_line(str(error))) from None
    finally:
        if channel is not None:
            channel.close()
            channel.sock.shutdown()
    if code:
        raise ApiError(action, 0, "Failed", f"exit code {code}: {first_line(complaint or printed)}")
    return str(printed)


def page(cluster: Cluster, pod: str, namespace: str, container: str, port: int, path: str) -> Any:
    """The JSON that a pod's server answers at `path`. Raises ApiError, DeadlineError.

    First through the API server's proxy, which reading rights allow; a NetworkPolicy may shut it out, so then from
    within the pod.
    """
    direct = POD.path(namespace, quote(f"{pod}:{port}"), f"proxy{path}")
    try:
        return cluster.raw(direct, timeout_s=PAGE_S)
    except (ApiError, DeadlineError) as first:
        command = ["python", "-c", _FETCH, f"http://127.0.0.1:{port}{path}"]
        try:
            return json.loads(run_in(cluster, pod, namespace, container, command, 2 * PAGE_S))
        except ValueError:
            raise ApiError(f"get {path} of Pod {pod}", 0, "Invalid", "it answered with something else") from None
        except ApiError as second:
            said = f"{first}; and from within: {second.message}"
            raise ApiError(f"get {path} of Pod {pod}", second.status, "Unreachable", said) from None
