"""Fixtures that are too slow to build per test."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving import config
from serving.deployments.cluster import ray_environment

# Triton reads it when it is first imported, which transformers does; its kernels run as numpy code where no GPU is.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ray reads its settings when it is first imported, which a test may do long before the cluster starts: without a token
# by then, nothing of the cluster would answer this process.
# The name is short, for the folder holds Unix sockets, and none that `argosy serve` takes for a dead run's and clears.
FOLDER = Path(tempfile.mkdtemp(prefix="argo-", dir="/tmp"))
SESSION = FOLDER / "ray"
config.set_environment(ray_environment(SESSION, SESSION / "token"))


def pytest_unconfigure() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class RayCluster:
    """A private local cluster with Serve on it, in this process's charge."""

    folder: Path
    directory_url: str
    secret_file: Path

    def deploy(self, document: dict[str, Any]) -> None:
        """Make the document (`document.serve_config`) what runs."""
        from serving.deployments.cluster import deploy

        deploy(document)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """One Ray cluster for the whole run: starting it takes seconds."""
    from serving.deployments.cluster import start_cluster
    from serving.supervisor import free_port

    secret_file = FOLDER / "secret"
    secret_file.write_bytes(secrets.token_bytes(32))
    port = free_port()
    with warnings.catch_warnings(action="ignore"):  # Ray's own deprecations, at import
        start_cluster(SESSION, cores=4, directory_port=port)
    try:
        yield RayCluster(FOLDER, f"http://127.0.0.1:{port}/directory", secret_file)
    finally:
        import ray

        ray.shutdown()
