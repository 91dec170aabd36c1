"""One API server, through the official client: every call has a deadline, and what may be repeated is repeated.

Objects are plain dicts. Writing goes by server-side apply under our own field manager, so that the server knows which
fields are ours and says whose a field is that somebody else holds.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from k8s.objects import Object
from k8s.tool.exits import ApiError, DeadlineError, ToolError
from k8s.tool.kinds import POD, Kind, kind_of, title

FIELD_MANAGER: Final = "argosy"
PAGE: Final = 500
MAX_ANSWER_BYTES: Final = 256 << 20
FIRST_PAUSE_S: Final = 0.25
MAX_PAUSE_S: Final = 5.0
WATCH_S: Final = 60  # after which a watch is asked for anew

_BUSY: Final = (429, 500, 502, 503, 504)
_APPLY: Final = "application/apply-patch+yaml"
_MERGE: Final = "application/merge-patch+json"
_JSON_PATCH: Final = "application/json-patch+json"

Patch = Mapping[str, Any] | list[dict[str, Any]]
"""A merge patch, or a list of RFC 6902 operations."""


@dataclasses.dataclass(frozen=True, slots=True)
class Listing:
    """All objects of a kind that were asked for, at one version of the collection."""

    items: list[Object]
    version: str


def connect(kubeconfig: Path | None, context: str | None, timeout_s: float) -> Cluster:
    """The cluster of a kubeconfig, else the one that this pod runs in, where nobody named one. Raises ToolError.

    timeout_s: deadline of each call, with its repetitions.
    """
    if kubeconfig is not None and not kubeconfig.is_file():
        raise ToolError(f"--kubeconfig: there is no file {kubeconfig}")
    try:
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException
    except ImportError:
        raise ToolError("the kubernetes client is missing: pip install 'argosy[k8s]'") from None
    settings = client.Configuration()
    try:
        config.load_kube_config(  # type: ignore[no-untyped-call]
            config_file=str(kubeconfig) if kubeconfig else None, context=context, client_configuration=settings
        )
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        where = kubeconfig or config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION  # $KUBECONFIG, or ~/.kube/config
        raise ToolError(f"{where} is no kubeconfig: {' '.join(str(error).split())}") from None
    except (ConfigException, OSError, ValueError) as error:
        hint = "give --kubeconfig, --context or $KUBECONFIG"
        if kubeconfig is not None or context is not None:  # never another cluster than the one that was asked for
            raise ToolError(f"no cluster to talk to: {error}; {hint}") from None
        try:
            config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
        except (ConfigException, OSError):
            raise ToolError(f"no cluster to talk to: {error}; {hint}") from None
    settings.retries = False  # ours know which calls may be repeated
    return Cluster(client.ApiClient(settings), timeout_s)


class Cluster:
    """One API server. Every method raises ApiError or DeadlineError."""

    def __init__(self, api: Any, timeout_s: float) -> None:
        """api: kubernetes.client.ApiClient."""
        self._api = api
        self.timeout_s = timeout_s

    @property
    def address(self) -> str:
        return str(self._api.configuration.host)

    @property
    def api(self) -> Any:
        """kubernetes.client.ApiClient, for what is no plain request."""
        return self._api

    def close(self) -> None:
        self._api.rest_client.close()

    # --- reading ------------------------------------------------------------------------------

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        """None where there is none, or no such kind."""
        try:
            return self._ask("GET", kind.path(namespace, name), f"get {kind.name} {name}")
        except ApiError as error:
            if error.is_missing:
                return None
            raise

    def select(
        self, kind: Kind, namespace: str = "", *, labels: str = "", fields: str = "", is_cached: bool = False
    ) -> Listing:
        """Of one namespace, or of all. labels, fields: selectors. is_cached: the server may answer from its cache,
        which large lists should let it. A page that expires between two calls begins the list anew."""
        action = f"list {kind.resource} in {namespace or 'all namespaces'}"
        query = [("labelSelector", labels), ("fieldSelector", fields)]
        query.append(("resourceVersion", "0") if is_cached else ("limit", str(PAGE)))
        items: list[Object] = []
        page = ""
        deadline = time.monotonic() + self.timeout_s
        while True:
            asked = [(key, value) for key, value in (*query, ("continue", page)) if value]
            try:
                answer = self._ask("GET", kind.path(namespace), action, asked, deadline=deadline)
            except ApiError as error:
                if error.status == 410 and page:
                    items, page = [], ""
                    continue
                raise
            items += [{"apiVersion": kind.api_version, "kind": kind.name, **item} for item in answer.get("items") or []]
            metadata = answer.get("metadata") or {}
            page = metadata.get("continue") or ""
            if not page:
                return Listing(items, metadata.get("resourceVersion") or "")

    def watch(
        self, kind: Kind, namespace: str, version: str, stop: threading.Event, *, labels: str = ""
    ) -> Iterator[tuple[str, Object]]:
        """(ADDED | MODIFIED | DELETED | BOOKMARK, object) until the server ends the watch, at the latest after
        WATCH_S, or `stop` is set. Raises ApiError with status 410 when `version` is too old: list again."""
        action = f"watch {kind.resource} in {namespace or 'all namespaces'}"
        query = [("watch", "true"), ("timeoutSeconds", str(WATCH_S)), ("allowWatchBookmarks", "true")]
        query += [(key, value) for key, value in (("resourceVersion", version), ("labelSelector", labels)) if value]
        response = self._send("GET", kind.path(namespace), query, None, "", (self.timeout_s, WATCH_S + 10.0), action)
        if response.status != 200:
            self._refuse(action, response.status, _read(response, time.monotonic() + self.timeout_s), response)
        ended = threading.Event()
        guard = threading.Thread(target=_cut, args=(response, stop, ended), daemon=True)
        guard.start()
        try:
            for line in _lines(response):
                event = json.loads(line)
                thing = event.get("object") or {}
                if event.get("type") == "ERROR":
                    raise ApiError(
                        action, int(thing.get("code") or 500), str(thing.get("reason")), str(thing.get("message"))
                    )
                yield str(event.get("type")), {"apiVersion": kind.api_version, "kind": kind.name, **thing}
        except (OSError, ValueError, http_error()) as error:
            if not stop.is_set():
                raise ApiError(action, 0, "Disconnected", f"the watch broke: {error}") from None
        finally:
            ended.set()
            response.close()
            guard.join(5.0)

    def may(self, verb: str, kind: Kind, namespace: str = "", *, subresource: str = "") -> bool | None:
        """Whether this user may; None when the server will not say."""
        group, _, _ = kind.api_version.rpartition("/")
        asked = {"verb": verb, "group": group, "resource": kind.plural, "namespace": namespace}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {**asked, **({"subresource": subresource} if subresource else {})}},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        try:
            answer = self._ask("POST", path, f"ask whether you may {verb} {kind.resource}", body=body)
        except ApiError:
            return None
        allowed = (answer.get("status") or {}).get("allowed")
        return None if allowed is None else bool(allowed)

    def version(self) -> str:
        """v1.36.2, as the server calls itself."""
        return str(self._ask("GET", "/version", "ask for the server's version").get("gitVersion", ""))

    def raw(self, path: str, *, timeout_s: float | None = None) -> Object:
        """Any path that answers with JSON; asked once."""
        deadline = time.monotonic() + (timeout_s or self.timeout_s)
        return self._ask("GET", path, f"get {path}", deadline=deadline, repeats=False)

    # --- writing ------------------------------------------------------------------------------

    def apply(self, thing: Object, *, is_dry_run: bool = False, is_forced: bool = False) -> Object:
        """Server-side apply: creates it, or makes its fields ours. Status 409: another manager holds a field."""
        kind = kind_of(thing)
        metadata = thing["metadata"]
        query = [("fieldManager", FIELD_MANAGER), ("force", "true" if is_forced else "false")]
        query += [("dryRun", "All")] if is_dry_run else []
        path = kind.path(metadata.get("namespace", ""), metadata["name"])
        action = f"{'try' if is_dry_run else 'apply'} {title(thing)}"
        return self._ask("PATCH", path, action, query, json.dumps(thing), _APPLY)

    def create(self, thing: Object) -> Object:
        """Status 409: it exists."""
        kind = kind_of(thing)
        path = kind.path(thing["metadata"].get("namespace", ""))
        return self._ask("POST", path, f"create {title(thing)}", [("fieldManager", FIELD_MANAGER)], thing)

    def patch(self, kind: Kind, name: str, namespace: str, patch: Patch, *, subresource: str = "") -> Object:
        """Status 409 or 422: the object is no longer what the patch was made for."""
        content = _JSON_PATCH if isinstance(patch, list) else _MERGE
        path = kind.path(namespace, name, subresource)
        return self._ask("PATCH", path, f"patch {kind.name} {name}", [("fieldManager", FIELD_MANAGER)], patch, content)

    def delete(self, kind: Kind, name: str, namespace: str = "", *, uid: str = "") -> bool:
        """Whether there was one. uid: only that one, not a successor of its name."""
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            self._ask("DELETE", kind.path(namespace, name), f"delete {kind.name} {name}", body=body)
        except ApiError as error:
            if error.is_missing or (uid and error.status == 409):
                return False
            raise
        return True

    def evict(self, name: str, namespace: str) -> None:
        """Through the eviction API. Status 429: a PodDisruptionBudget does not allow it now; never repeated here."""
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": namespace},
        }
        path = POD.path(namespace, name, "eviction")
        self._ask("POST", path, f"evict Pod {name}", body=body, repeats=False)

    # --- one call -----------------------------------------------------------------------------

    def _ask(
        self,
        method: str,
        path: str,
        action: str,
        query: list[tuple[str, str]] | None = None,
        body: Any = None,
        content: str = "application/json",
        *,
        deadline: float | None = None,
        repeats: bool = True,
    ) -> Object:
        """The JSON of an answer. A server that is busy or gone is asked again until the deadline, as far as the call
        allows it: reading and applying always, other changes only when the server says that it did not begin."""
        deadline = time.monotonic() + self.timeout_s if deadline is None else deadline
        is_idempotent = method == "GET" or content == _APPLY or "dryRun" in dict(query or [])
        pause_s = FIRST_PAUSE_S
        last = "no answer"
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                response = self._send(method, path, query, body, content, (left_s, left_s), action)
                text = _read(response, deadline)
            except (OSError, http_error()) as error:
                last = first_line(str(error)) or type(error).__name__
                if "timed out" in last.lower():
                    break
                if not is_idempotent:
                    raise ApiError(action, 0, "Disconnected", f"{last}; whether it was done is not known") from None
            else:
                if 200 <= response.status < 300:
                    return json.loads(text) if text else {}
                wanted_s = _retry_after(response.headers.get("Retry-After"))
                can_wait = response.status == 429 or (response.status in _BUSY and is_idempotent)
                if not (repeats and can_wait) or response.status == 500:
                    self._refuse(action, response.status, text, response)
                last = f"{response.status} {response.reason}"
                pause_s = max(pause_s, wanted_s)
            if time.monotonic() + pause_s >= deadline:
                break
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
        raise DeadlineError(
            f"{action}: no answer from {self.address} within {self.timeout_s:g} s ({last}); "
            "--request-timeout allows more"
        )

    def _send(
        self,
        method: str,
        path: str,
        query: list[tuple[str, str]] | None,
        body: Any,
        content: str,
        timeout: tuple[float, float],
        action: str,
    ) -> Any:
        """The answer's head; its body is still to be read."""
        headers = {"Accept": "application/json"} | ({"Content-Type": content} if content else {})
        request = self._api.param_serialize(
            method,
            path,
            query_params=list(query or []),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            return self._api.call_api(*request, _request_timeout=timeout).response
        except Exception as error:
            if type(error).__name__ != "ApiException":
                raise
            raise ApiError(action, 0, "TLS", first_line(getattr(error, "reason", "") or str(error))) from None

    def _refuse(self, action: str, status: int, text: str, response: Any) -> None:
        try:
            said = json.loads(text)
        except ValueError:
            said = {}
        if not isinstance(said, dict):
            said = {}
        message = str(said.get("message") or first_line(text))
        reason = str(said.get("reason") or response.reason or "")
        if status == 403:
            message += "; ask for a Role that allows it"
        raise ApiError(action, status, reason, message)


def http_error() -> type[Exception]:
    from urllib3.exceptions import HTTPError

    return HTTPError


def _read(response: Any, deadline: float) -> str:
    """The body, in the time that is left. Raises OSError."""
    parts: list[bytes] = []
    size = 0
    try:
        while part := response.read1(1 << 20):
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise OSError(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
            if time.monotonic() > deadline:
                raise OSError("timed out in the middle of an answer")
            parts.append(part)
    except BaseException:
        response.close()
        raise
    response.release_conn()
    return b"".join(parts).decode("utf-8", "replace")


def _lines(response: Any) -> Iterator[bytes]:
    left = b""
    while part := response.read1(1 << 16):
        *whole, left = (left + part).split(b"\n")
        yield from (line for line in whole if line.strip())


def _cut(response: Any, stop: threading.Event, ended: threading.Event) -> None:
    """Ends a watch that nobody wants any more, though its reader waits in the kernel."""
    while not ended.is_set():
        if stop.wait(0.2):
            try:
                response.shutdown()
            except (OSError, ValueError, RuntimeError):
                return
            return


def _retry_after(header: str | None) -> float:
    """Seconds; 0 where a server says none, or a date."""
    try:
        return min(120.0, max(0.0, float(header or 0)))
    except ValueError:
        return 0.0


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]
