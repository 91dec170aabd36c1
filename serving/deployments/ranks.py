"""The ranks of a gang beyond rank 0, as Ray actors in the replica's own placement group (C11).

Ray places and starts them, nothing more: plans go over a socket, and a rank ends by that socket's end
even when Ray is dead. They are never restarted one by one: a gang comes back whole.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serving.deployments.placement import describe
from serving.deployments.rank_listener import RankListener, introduce
from serving.errors import ModelLoadError
from serving.secret_file import shared_secrets

START_S: Final = 120.0  # from asking for a rank to its connection: a process, torch, a handshake
_CALL_S: Final = 5.0


class Rank:
    """One rank's process."""

    def __init__(self) -> None:
        import serving.engine.rank  # noqa: F401  # seconds, while rank 0 imports the same

    def join(self, address: tuple[str, int], rank: int, gang: str, secret_file: str) -> None:
        """Connect to rank 0 and obey it from then on. Raises OSError; the process ends with the connection."""
        from serving.engine.rank import run_rank

        sock = introduce(address, rank, gang, shared_secrets(secret_file)[0])
        threading.Thread(target=run_rank, args=(sock,), name="rank", daemon=True).start()


class RankActors:
    """The ranks 1 … N-1 of one start of a gang, seen from rank 0. Threads may share it."""

    def __init__(self, placement: PlacementGroup, gang: str, host: str, secret_file: str) -> None:
        """Asks Ray for one rank per bundle beyond the first and returns at once.

        gang: unique per start. host: where rank 0 listens for them.
        """
        self._placement = placement
        self._listener = RankListener(host, gang, shared_secrets(secret_file)[0])
        self._actors: dict[int, Any] = {}
        self._calls: dict[int, Any] = {}
        remote = ray.remote(Rank)
        for rank, bundle in enumerate(placement.bundle_specs):
            if rank == 0:
                continue
            actor = remote.options(
                num_cpus=bundle.get("CPU", 0.0),
                num_gpus=bundle.get("GPU", 0.0),
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=rank),
            ).remote()
            self._actors[rank] = actor
            self._calls[rank] = actor.join.remote(self._listener.address, rank, gang, secret_file)

    def sockets(self, timeout_s: float = START_S) -> list[Any]:
        """Connections to ranks 1, 2, …, all proved. Raises ModelLoadError naming the rank and the reason."""
        deadline_s = time.monotonic() + timeout_s
        try:
            return self._listener.admit(len(self._actors), deadline_s, self._look)
        except ModelLoadError as error:
            state = describe(_placement_entry(self._placement), ray.available_resources())
            raise ModelLoadError(f"{error}: {state}") from error
        finally:
            self._listener.close()

    def kill(self) -> None:
        """Have Ray end the processes. They end by themselves, too, with their connections."""
        for actor in self._actors.values():
            with contextlib.suppress(RayError, ValueError):
                ray.kill(actor)

    def _look(self, missing: set[int]) -> None:
        """Raises ModelLoadError when Ray knows that a missing rank will not come."""
        for rank in missing:
            call = self._calls[rank]
            if not ray.wait([call], timeout=0)[0]:
                continue
            try:
                ray.get(call, timeout=_CALL_S)
            except GetTimeoutError:
                continue
            except (RayTaskError, RayActorError) as error:
                raise ModelLoadError(f"rank {rank} did not start: {_last_line(error)}") from error


def waiting_placement() -> str:
    """The first placement group that Ray cannot place now, described; "" when there is none."""
    for entry in ray.util.placement_group_table().values():
        if entry.get("state") == "PENDING":
            return describe(entry, ray.available_resources())
    return ""


def _placement_entry(placement: PlacementGroup) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = ray.util.placement_group_table(placement)
    return entry


def _last_line(error: BaseException) -> str:
    """Of Ray's long texts: what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
