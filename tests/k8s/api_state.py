"""What a test sets on the emulated API server, and what it may look at."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.k8s.api_json import Object

if TYPE_CHECKING:
    from tests.k8s.api_server import ApiServer

Exec = Callable[[str, str, list[str]], tuple[int, str]]
"""(pod, container, command) -> (exit code, what it prints)."""

VERSION = "v1.36.2"


@dataclasses.dataclass(slots=True)
class Fault:
    """What happens to requests whose "METHOD path" fits a pattern of shell wildcards."""

    pattern: str
    status: int = 0
    delay_s: float = 0.0
    times: int = 1_000_000
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    message: str = ""


class State:
    """What a test sets and looks at."""

    def __init__(self) -> None:
        self.version = VERSION
        self.calls: list[str] = []
        self.faults: list[Fault] = []
        self.denied: list[str] = []
        self.absent: set[str] = set()  # plurals without a CRD
        self.controllers: list[Callable[[ApiServer, str, Object], None]] = []
        self.owners: dict[Any, dict[tuple[Any, ...], frozenset[tuple[str, str]]]] = {}
        self.versions = itertools.count(1000)
        self.log: list[tuple[int, str, Object]] = []  # (version, plural, event), from which watches go on
        self.num_expiries = 0
        self.num_watches = 0
        self.page_size = 0
        self.has_any_namespace = True
        self.evicted: list[str] = []
        self.on_evict: Callable[[ApiServer, Object], None] | None = None
        self.on_exec: Exec | None = None
        self.pages: dict[str, Any] = {}
