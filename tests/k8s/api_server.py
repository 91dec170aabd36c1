"""An API server for the tests of `argosy k8s`: kmock's emulator over HTTP, with what kmock leaves out.

kmock keeps objects and serves them. Added here, as the real server does it: server-side apply with owners of fields and
conflicts, dry runs, JSON patches, selectors, versions that count up, watches that miss nothing, the eviction API with
PodDisruptionBudgets, exec, and faults on demand (a status, a delay, an expired watch).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import copy
import dataclasses
import datetime
import fnmatch
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp.web
import jsonpatch
import kmock
import yaml

from tests.k8s.api_json import CLUSTER_SCOPED, PLURALS, Object, chosen, laid, leaves, merge, remove, without_identity
from tests.k8s.api_state import State


@dataclasses.dataclass(slots=True)
class _Call:
    """A request as the verbs below see it; kmock does not know that a namespace is an object, too."""

    method: str
    kind: str
    namespace: str
    name: str
    subresource: str
    params: dict[str, str]
    content: str
    body: Any

    @classmethod
    def of(cls, request: Any) -> _Call | None:
        if request.resource is None:
            return None
        plural, namespace, name = _plural(request), request.namespace or "", request.name or ""
        if plural == "v1/None":
            plural, namespace, name = "v1/namespaces", "", namespace
        kind = next((kind for kind, known in PLURALS.items() if known == plural), None)
        if kind is None:
            return None
        content = request.headers.get("Content-Type", "")
        body = yaml.load(request.text, yaml.CSafeLoader) if request.text else None
        return cls(
            request.method.value,
            kind,
            namespace,
            name,
            request.subresource or "",
            dict(request.params),
            content,
            body,
        )


class _Fan:
    """In the place of kmock's bus, which forgets what happens between a list and its watch."""

    def __init__(self) -> None:
        self.queues: set[asyncio.Queue[Object | None]] = set()

    async def put(self, event: Object) -> None:
        for queue in self.queues:
            queue.put_nowait(event)


class ApiServer(kmock.KubernetesEmulator):
    """Runs in a thread of its own; every method may be called from any other."""

    @classmethod
    def make(cls) -> ApiServer:
        server = cls()
        object.__setattr__(server, "state", State())
        server._buses = collections.defaultdict(_Fan)  # type: ignore[assignment]
        for plural in PLURALS.values():
            server.resources[plural] = {}
        return server

    # attrs classes have slots, and kmock's subclasses may not: what is ours is kept apart.
    state: State

    async def __call__(self, raw_request: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        line = f"{raw_request.method} {raw_request.path}"
        self.state.calls.append(line + (f"?{raw_request.query_string}" if raw_request.query_string else ""))
        for fault in self.state.faults:
            if fault.times > 0 and fnmatch.fnmatchcase(line, fault.pattern):
                fault.times -= 1
                await asyncio.sleep(fault.delay_s)
                if fault.status:
                    return _status(fault.status, fault.message or "injected", fault.headers)
        if raw_request.path.endswith("/exec"):
            return await self._exec(raw_request)
        if raw_request.path.endswith("/selfsubjectaccessreviews"):
            return self._review(await raw_request.json())
        if raw_request.path == "/version":
            return aiohttp.web.json_response({"gitVersion": self.state.version})
        if line == "GET /api/v1/namespaces":  # which kmock's parser of paths stumbles over
            return aiohttp.web.json_response({"metadata": {}, "items": self.all("Namespace")})
        if "/proxy/" in raw_request.path:
            return self._proxy(raw_request.path)
        return await super().__call__(raw_request)

    async def _handle(self, request: Any) -> aiohttp.web.StreamResponse:
        self._requests[:] = [request]  # kmock filters all requests that it remembers, anew for each one
        call = _Call.of(request)
        if call is None or PLURALS[call.kind] in self.state.absent:
            return _status(404, "the server could not find the requested resource")
        if call.method == "POST" and call.subresource == "eviction":
            return self._evict(call)
        if call.method == "PATCH":
            return self._patch(call)
        if call.method == "POST":
            return self._create(call)
        if call.method == "DELETE" and call.name:
            return self._delete(call)
        if call.name:
            found = self.find(call.kind, call.name, call.namespace)
            return _status(404, "not found", reason="NotFound") if found is None else aiohttp.web.json_response(found)
        return await super()._handle(request)

    # --- the store ----------------------------------------------------------------------------

    def store(self, thing: Object, event: str = "") -> Object:
        """Put an object as it is, as a controller would. Only in the server's thread."""
        key = _key(thing)
        old = self.find(thing["kind"], thing["metadata"]["name"], thing["metadata"].get("namespace", ""))
        thing = copy.deepcopy(thing)
        metadata = thing["metadata"]
        metadata["resourceVersion"] = str(next(self.state.versions))
        metadata.setdefault("uid", f"uid-{metadata['resourceVersion']}")
        metadata.setdefault("creationTimestamp", _now())
        spec_changed = old is None or old.get("spec") != thing.get("spec")
        metadata["generation"] = (old or {}).get("metadata", {}).get("generation", 0) + (1 if spec_changed else 0)
        self.objects[key] = thing
        self._tell(event or ("MODIFIED" if old else "ADDED"), thing)
        return thing

    def drop(self, thing: Object) -> None:
        """Take an object away. Only in the server's thread."""
        with contextlib.suppress(KeyError):
            del self.objects[_key(thing)]
            self._tell("DELETED", thing)

    def find(self, kind: str, name: str, namespace: str = "") -> Object | None:
        try:
            found = self.objects[PLURALS[kind], namespace or None, name]
        except KeyError:
            return None
        return None if found.deleted else copy.deepcopy(found.raw)

    def all(self, kind: str, namespace: str | None = None) -> list[Object]:
        wanted = PLURALS[kind]
        return [
            copy.deepcopy(thing.raw)
            for (resource, place, _), thing in list(self.objects.items())
            if _text(resource) == wanted and (namespace is None or place == namespace) and not thing.deleted
        ]

    def _tell(self, event: str, thing: Object) -> None:
        plural = PLURALS[thing["kind"]]
        told = {"type": event, "object": copy.deepcopy(thing)}
        self.state.log.append((next(self.state.versions), plural, told))
        for resource, fan in list(self._buses.items()):
            if _text(resource) == plural:
                for queue in fan.queues:  # type: ignore[attr-defined]
                    queue.put_nowait(told)
        for controller in self.state.controllers:
            controller(self, event, copy.deepcopy(thing))

    # --- verbs --------------------------------------------------------------------------------

    def _create(self, call: _Call) -> aiohttp.web.Response:
        thing = call.body
        if call.namespace:
            thing["metadata"].setdefault("namespace", call.namespace)
        if self.find(thing["kind"], thing["metadata"]["name"], thing["metadata"].get("namespace", "")):
            return _status(409, f"{thing['metadata']['name']} already exists", reason="AlreadyExists")
        self._own(thing, call.params.get("fieldManager", "unknown"), "Update")
        return aiohttp.web.json_response(self.store(thing), status=201)

    def _delete(self, call: _Call) -> aiohttp.web.Response:
        thing = self.find(call.kind, call.name, call.namespace)
        if thing is None:
            return _status(404, f"{call.name} not found", reason="NotFound")
        wanted = ((call.body or {}).get("preconditions") or {}).get("uid")
        if wanted and wanted != thing["metadata"]["uid"]:
            return _status(409, "the UID in the precondition does not match", reason="Conflict")
        self.drop(thing)
        if (call.body or {}).get("propagationPolicy") in ("Background", "Foreground"):
            for pod in self.all("Pod", call.namespace):
                owners = pod["metadata"].get("ownerReferences") or []
                if any(owner["uid"] == thing["metadata"]["uid"] for owner in owners):
                    self.drop(pod)
        return aiohttp.web.json_response({"kind": "Status", "status": "Success"})

    def _patch(self, call: _Call) -> aiohttp.web.Response:
        old = self.find(call.kind, call.name, call.namespace)
        if call.content == "application/apply-patch+yaml":
            return self._apply(call, old)
        if old is None:
            return _status(404, f"{call.name} not found", reason="NotFound")
        body = call.body
        try:
            new = jsonpatch.apply_patch(old, body) if isinstance(body, list) else merge(old, body)
        except jsonpatch.JsonPatchException as error:
            return _status(422, f"the patch does not fit: {error}", reason="Invalid")
        if new["metadata"].get("resourceVersion") != old["metadata"]["resourceVersion"]:
            return _status(409, "the object has been modified", reason="Conflict")
        self._own(new, call.params.get("fieldManager", "unknown"), "Update", old)
        return aiohttp.web.json_response(self.store(new))

    def _apply(self, call: _Call, old: Object | None) -> aiohttp.web.Response:
        thing: Object = call.body
        namespace = thing["metadata"].get("namespace", "")
        is_global = thing["kind"] in CLUSTER_SCOPED
        is_dry = call.params.get("dryRun") == "All"
        if not is_global and self.find("Namespace", namespace) is None and not self.state.has_any_namespace:
            return _status(404, f'namespaces "{namespace}" not found', reason="NotFound")
        manager = (call.params["fieldManager"], "Apply")
        wanted = dict(leaves(without_identity(thing)))
        key = _key(thing)
        owners = self.state.owners.setdefault(key, {}) if not is_dry else dict(self.state.owners.get(key, {}))
        before = dict(leaves(without_identity(old or {})))
        taken = [
            (path, owner)
            for path, value in wanted.items()
            for owner in owners.get(path, ())
            if owner != manager and before.get(path, value) != value
        ]
        if taken and call.params.get("force") != "true":
            said = "; ".join(f'conflict with "{owner[0]}": .{".".join(map(str, path))}' for path, owner in taken[:3])
            return _status(
                409, f"Apply failed with {len(taken)} conflict{'s' * (len(taken) > 1)}: {said}", reason="Conflict"
            )
        if old and old.get("immutable") and "data" in thing and thing["data"] != old.get("data"):
            return _status(422, "data: Forbidden: field is immutable when `immutable` is set", reason="Invalid")
        new = copy.deepcopy(old) if old else {"apiVersion": thing["apiVersion"], "kind": thing["kind"], "metadata": {}}
        for path, held in list(owners.items()):
            if manager in held and path not in wanted:
                held = held - {manager}
                if not held:
                    remove(new, path)
                    owners.pop(path)
                elif not is_dry:
                    owners[path] = held
        new = laid(new, thing)
        if is_dry:
            new["metadata"].setdefault("resourceVersion", "0")
            return aiohttp.web.json_response(new, status=200 if old else 201)
        for path, value in wanted.items():
            kept = {owner for owner in owners.get(path, frozenset()) if before.get(path) == value}
            owners[path] = frozenset(kept | {manager})
        return aiohttp.web.json_response(self.store(new), status=200 if old else 201)

    def _own(self, thing: Object, manager: str, operation: str, old: Object | None = None) -> None:
        owners = self.state.owners.setdefault(_key(thing), {})
        before = dict(leaves(without_identity(old or {})))
        for path, value in leaves(without_identity(thing)):
            if before.get(path) != value:
                owners[path] = frozenset({(manager, operation)})

    def _evict(self, call: _Call) -> aiohttp.web.Response:
        pod = self.find("Pod", call.name, call.namespace)
        if pod is None:
            return _status(404, f'pods "{call.name}" not found', reason="NotFound")
        for budget in self.all("PodDisruptionBudget", call.namespace):
            chosen = budget["spec"]["selector"]["matchLabels"].items()
            if chosen <= pod["metadata"].get("labels", {}).items():
                if budget.get("status", {}).get("disruptionsAllowed", 0) < 1:
                    said = "Cannot evict pod as it would violate the pod's disruption budget."
                    return _status(429, said, reason="TooManyRequests")
                budget["status"]["disruptionsAllowed"] -= 1
                self.store(budget)
        self.state.evicted.append(call.name)
        if self.state.on_evict is None:
            self.drop(pod)
        else:
            self.state.on_evict(self, pod)
        return aiohttp.web.json_response({"kind": "Status", "status": "Success"}, status=201)

    # --- reading ------------------------------------------------------------------------------

    async def _serve_list(self, request: Any) -> Object:
        items = [thing for thing in self.all(_kind(request), request.namespace) if chosen(thing, request.params)]
        if self.state.page_size:
            start = int(request.params.get("continue", 0))
            after = start + self.state.page_size
            left = {"continue": str(after)} if after < len(items) else {}
            return {"metadata": {"resourceVersion": "1", **left}, "items": items[start:after]}
        version = str(next(self.state.versions))
        return {"metadata": {"resourceVersion": version}, "items": items}

    async def _serve_watch(self, request: Any) -> AsyncIterator[Any]:
        queue: asyncio.Queue[Object | None] = asyncio.Queue()
        fan: Any = self._buses[request.resource]
        fan.queues.add(queue)
        self.state.num_watches += 1
        since = request.params.get("resourceVersion")
        if since:
            first = [
                told for version, plural, told in self.state.log if plural == _plural(request) and version > int(since)
            ]
        else:
            first = [{"type": "ADDED", "object": thing} for thing in self.all(_kind(request), request.namespace)]
        try:
            yield b""
            if self.state.num_expiries > 0:
                self.state.num_expiries -= 1
                gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                yield {"type": "ERROR", "object": gone}
                return
            for event in first:
                if _is_wanted(event, request):
                    yield event
            while (event := await queue.get()) is not None:
                if _is_wanted(event, request):
                    yield event
        finally:
            fan.queues.discard(queue)

    def end_watches(self) -> None:
        """As a server does after a while, or when it restarts. Only in the server's thread."""
        for fan in self._buses.values():
            for queue in fan.queues:  # type: ignore[attr-defined]
                queue.put_nowait(None)

    def _review(self, body: Object) -> aiohttp.web.Response:
        asked = body["spec"]["resourceAttributes"]
        line = f"{asked['verb']} {asked['resource']}" + (f"/{asked['subresource']}" if "subresource" in asked else "")
        denied = any(fnmatch.fnmatchcase(line, pattern) for pattern in self.state.denied)
        return aiohttp.web.json_response({**body, "status": {"allowed": not denied}}, status=201)

    def _proxy(self, path: str) -> aiohttp.web.Response:
        for pattern, answer in self.state.pages.items():
            if fnmatch.fnmatchcase(path, pattern):
                return aiohttp.web.json_response(answer() if callable(answer) else answer)
        return _status(503, "error trying to reach service: dial tcp: i/o timeout", reason="ServiceUnavailable")

    async def _exec(self, raw_request: aiohttp.web.BaseRequest) -> aiohttp.web.StreamResponse:
        pod = raw_request.path.split("/")[-2]
        command = raw_request.query.getall("command")
        if self.state.on_exec is None:
            return _status(403, "pods/exec is forbidden")
        code, printed = self.state.on_exec(pod, raw_request.query.get("container", ""), command)
        socket = aiohttp.web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(raw_request)
        if printed:
            await socket.send_bytes(b"\x01" + printed.encode())
        status: Object = {"status": "Success"}
        if code:
            status = {"status": "Failure", "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]}}
        await socket.send_bytes(b"\x03" + json.dumps(status).encode())
        await socket.close()
        return socket


def _plural(request: Any) -> str:
    return _text(request.resource)


def _text(resource: Any) -> str:
    return f"{resource.group + '/' if resource.group else ''}{resource.version}/{resource.plural}"


def _is_wanted(event: Object, request: Any) -> bool:
    place = event["object"]["metadata"].get("namespace")
    return request.namespace in (None, place) and chosen(event["object"], request.params)


def _kind(request: Any) -> str:
    wanted = _plural(request)
    return next(kind for kind, plural in PLURALS.items() if plural == wanted)


def _key(thing: Object) -> tuple[str, str | None, str]:
    return PLURALS[thing["kind"]], thing["metadata"].get("namespace") or None, thing["metadata"]["name"]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _status(code: int, message: str, headers: dict[str, str] | None = None, reason: str = "") -> aiohttp.web.Response:
    body = {"kind": "Status", "status": "Failure", "code": code, "message": message, "reason": reason or "Injected"}
    return aiohttp.web.json_response(body, status=code, headers=headers)
