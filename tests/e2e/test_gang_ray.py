"""A gang of two over real Ray: a rank that dies or freezes ends it, it comes back whole, and no token is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.promises import SERVES_OWN, Promises
from tests.e2e.service import Service, kill_in_the_middle, serving
from tests.stand_in import eventually, is_alive
from tests.tiny import tiny_model_folder

pytestmark = pytest.mark.ray

MODEL = "tiny"
BACK_S = 60.0
"""Two fresh processes that import torch: 3 to 7 s on a quiet machine with two cores."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("gang")
    # Wide enough that a step takes milliseconds: a blow must find streams running.
    model = tiny_model_folder(
        folder / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=8, max_position_embeddings=1024
    )
    flags = ("--model", str(model), "--served-model-name", MODEL, "--max-model-len", "1024")
    with serving(folder, *flags, "--tensor-parallel-size", "2", "--kv-cache-bytes", "64MiB", timeout_s=180) as service:
        yield service  # stops at the end, and looks for processes left behind


def gang(service: Service) -> dict[int, int]:
    """rank -> pid of the one gang that serves; {} while there is none."""
    ready: list[dict[str, Any]] = [r for r in service.replicas() if r["state"] == "ready" and len(r["ranks"]) == 2]
    return {rank["rank"]: rank["pid"] for rank in ready[0]["ranks"]} if len(ready) == 1 else {}


def back_again(service: Service, before: dict[int, int]) -> dict[int, int]:
    """The gang after the one of `before`, which must be gone whole."""

    def successor() -> dict[int, int]:
        seen = gang(service)
        return seen if seen and seen[0] != before[0] else {}

    after = dict(eventually(successor, BACK_S))
    service.wait_until_ready(30)
    assert not set(before.values()) & set(after.values()), "the gang came back in parts"
    eventually(lambda: not [pid for pid in before.values() if is_alive(pid)], 10.0)
    return after


class TestSockets:
    """Those of the ranks are on loopback, too. The other promises do not depend on who computes: test_ray.py."""

    listens_everywhere = SERVES_OWN
    test_only_loopback_listens = Promises.test_only_loopback_listens


def test_rank_1_is_an_actor_of_its_own(service: Service) -> None:
    ranks = eventually(lambda: gang(service), BACK_S)
    titles = {rank: Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0] for rank, pid in ranks.items()}
    assert titles[0].startswith("ray::ServeReplica:model:Replica")
    assert titles[1].startswith("ray::Rank")


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_frozen_costs_no_token(service: Service, blow: signal.Signals) -> None:
    before = dict(eventually(lambda: gang(service), BACK_S))
    kill_in_the_middle(service, MODEL, max_tokens=150, number=blow, rank=1)
    back_again(service, before)
