"""Every path of the real application, and who may ask it: what a way in from outside is held against."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from starlette.testclient import TestClient

from serving.config import GatewaySettings
from serving.gateway.app import build_app
from serving.gateway.dispatch import Dispatch

PUBLIC = "/v1/"
"""Below it lies what clients of the API ask; everything else is for operators and machines."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A method and a path as the application declares it, such as /v1/models/{model:path}."""

    method: str
    template: str
    is_public: bool

    @property
    def sample(self) -> str:
        """A path that it serves."""
        path = re.sub(r"\{\w+:path\}", "org/name", self.template)
        return re.sub(r"\{\w+\}", "name", path)


@functools.cache
def endpoints() -> tuple[Endpoint, ...]:
    """Of the gateway's application. One that refuses a stranger for being no operator is not public; whatever else
    one without a body and a data plane is answered says nothing."""
    settings = GatewaySettings(fd=-1, secret="00" * 16)
    app = build_app(settings, Dispatch(settings))
    stranger = TestClient(app, raise_server_exceptions=False, client=("203.0.113.9", 40000))
    found = []
    for method, template in _declared(app.routes):
        endpoint = Endpoint(method, template, template.startswith(PUBLIC))
        if endpoint.is_public and "operator_only" in stranger.request(method, endpoint.sample).text:
            endpoint = dataclasses.replace(endpoint, is_public=False)
        found.append(endpoint)
    return tuple(found)


def _declared(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    for route in routes:
        if hasattr(route, "path"):
            for method in sorted(route.methods - {"HEAD"}):
                yield method, route.path
        else:
            yield from _declared(route.original_router.routes)
