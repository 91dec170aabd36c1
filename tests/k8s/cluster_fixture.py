"""Fixtures of the tests of `argosy k8s`: an API server that answers, and the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s import render
from k8s.spec import ServingSpec
from k8s.tool import main
from k8s.tool.cluster import Cluster, connect
from tests.k8s.api_thread import Running
from tests.k8s.operators import Operators, make_node


@dataclasses.dataclass(slots=True)
class World:
    """A cluster with operators, a small node and the tool."""

    running: Running
    cluster: Cluster
    operators: Operators
    folder: Path

    def run(self, *arguments: str) -> tuple[int, str]:
        """(exit code, what `argosy k8s ...` prints, errors included)."""
        printed = io.StringIO()
        options = [] if arguments[0] == "render" else ["--kubeconfig", str(self.running.kubeconfig)]
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main.main([arguments[0], *options, *arguments[1:]])
        return code, printed.getvalue()

    def run_json(self, *arguments: str) -> tuple[int, Any]:
        code, text = self.run(*arguments, "-o", "json")
        return code, json.loads(text)

    def deploy(self, spec: str = "dev-cpu", *more: str) -> tuple[int, str]:
        return self.run("deploy", spec, "--settle", "0", "--patience", "0.2", "--timeout", "20", *more)

    def spec_file(self, overlay: str = "dev-cpu", **changes: Any) -> str:
        """A copy of an overlay's spec with other values: engine={"max_tokens": 5}."""
        text = (render.ROOT / "overlays" / overlay / render.SPEC_FILE).read_text(encoding="utf-8")
        document = yaml.safe_load(text)
        for section, values in changes.items():
            if isinstance(values, dict):
                document.setdefault(section, {}).update(values)
            else:
                document[section] = values
        path = self.folder / f"spec-{len(list(self.folder.glob('spec-*')))}.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        return str(path)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    yield made
    made.close()


@pytest.fixture
def world(running: Running, tmp_path: Path) -> Iterator[World]:
    operators = Operators()
    running.state.controllers.append(operators)
    running.put(make_node("node-1"))
    cluster = connect(running.kubeconfig, None, 5.0)
    yield World(running, cluster, operators, tmp_path)
    cluster.close()


def dev_spec() -> ServingSpec:
    return render.overlay_spec("dev-cpu")
