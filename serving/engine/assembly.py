"""How a replica's engine comes together: model, scheduler, step loop.

All ranks of a gang load at the same time, agree, and begin (C11).
"""

from __future__ import annotations

import dataclasses
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from models.config import ModelError
from models.ops.select import select_kernels
from models.parallel import TransportError
from models.registry import load_config
from models.transports.connect import Rendezvous, connect, host_store
from models.transports.shared_memory import MAX_SLOT_BYTES, is_available
from serving.config import EngineSettings
from serving.engine.core import EngineCore
from serving.engine.cost import FIRST_PREFILL_TOKENS, StepCostModel
from serving.engine.executor import Executor, GangExecutor, LocalExecutor
from serving.engine.gang import Gang, GangFailed
from serving.engine.limit import find_limit
from serving.engine.output import StepOutput
from serving.engine.rank_wire import Begin, Loaded, Setup, message_frame
from serving.engine.scheduler import Scheduler
from serving.engine.worker import LoadCallback, PhaseCallback, Worker
from serving.errors import ModelLoadError, SettingsError


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """A loaded replica without its front."""

    worker: Worker
    core: EngineCore
    gang: Gang | None  # None = a single rank


def build_engine(
    settings: EngineSettings,
    sockets: Sequence[socket.socket],
    *,
    on_phase: PhaseCallback | None,
    on_load: LoadCallback | None,
    on_output: Callable[[StepOutput], None],
    on_failure: Callable[[BaseException], None],
) -> Engine:
    """Load the model on every rank. The step loop is not started yet.

    sockets: connected to ranks 1, 2, … in that order.
    Raises ModelLoadError, or SettingsError.
    """
    num_ranks = settings.tensor_parallel_size * settings.pipeline_parallel_size
    if len(sockets) != num_ranks - 1:
        raise SettingsError(f"a gang of {num_ranks} ranks needs connections to {num_ranks - 1}; got {len(sockets)}")
    gang = Gang(sockets) if sockets else None
    if gang is None:
        worker = Worker(settings, on_phase=on_phase, on_load=on_load)
    else:
        worker = assemble(settings, gang, on_phase=on_phase, on_load=on_load)
    scheduler = Scheduler(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=worker.found.max_model_len,
        num_blocks=worker.found.num_blocks,
        block_size=settings.block_size,
        enable_prefix_cache=settings.enable_prefix_cache,
        cost_model=StepCostModel(first_prefill=FIRST_PREFILL_TOKENS),
        num_stages=settings.pipeline_parallel_size,
        sends_inputs=gang is not None,
    )
    executor: Executor = LocalExecutor(worker) if gang is None else GangExecutor(worker, gang)
    # A gang's rows wait for their last sample, so more steps in flight than stages would find none to compute.
    depth = settings.pipeline_parallel_size - 1
    if gang is None:
        depth = int(settings.device == "cuda") if settings.async_depth is None else settings.async_depth
    limit = find_limit(settings, worker, on_phase or (lambda name, seconds: None))
    core = EngineCore(scheduler, executor, on_output=on_output, on_failure=on_failure, async_depth=depth, limit=limit)
    if gang is not None:
        gang.guard(on_failure, lambda: core.limit_s)
    return Engine(worker, core, gang)


def assemble(
    settings: EngineSettings,
    gang: Gang,
    *,
    on_phase: PhaseCallback | None = None,
    on_load: LoadCallback | None = None,
) -> Worker:
    """Load rank 0's share while the others load theirs; returns rank 0's worker when every rank is ready for plans.

    Raises ModelLoadError naming the rank and what it said, or SettingsError.
    """
    try:
        return _assemble(settings, gang, on_phase, on_load)
    except (GangFailed, OSError, TransportError) as error:
        cause = error if isinstance(error, GangFailed) else gang.cause_of(error)
        gang.end(str(cause))
        raise ModelLoadError(f"the gang did not come together: {cause}") from error
    except (ModelError, ValueError) as error:
        gang.close()
        raise ModelLoadError(str(error)) from error
    except BaseException:
        gang.close()
        raise


def _assemble(
    settings: EngineSettings, gang: Gang, on_phase: PhaseCallback | None, on_load: LoadCallback | None
) -> Worker:
    begun = time.perf_counter()
    gang.wait(lambda: all(member.pulse is not None for member in gang.members))
    machines = [gang.machine, *(member.pulse.machine for member in gang.members if member.pulse is not None)]
    num_neighbours = Counter(machines)
    is_one_machine = len(num_neighbours) == 1
    host = "127.0.0.1" if is_one_machine else _address_towards_others(gang)
    store = host_store(host)
    places = _places(settings, is_one_machine=is_one_machine, host=host, port=store.port)
    for member in gang.members:
        setup = Setup(settings, places[member.rank], num_neighbours[machines[member.rank]])
        gang.tell(member, setup)
    worker = _load_own(settings, gang, places[0], num_neighbours[machines[0]], on_phase, on_load)
    gang.wait(lambda: all(member.loaded is not None for member in gang.members))
    del store  # everybody has connected
    shares = {member.rank: member.loaded for member in gang.members if member.loaded is not None}
    _check_agreement(worker, gang, shares)
    num_blocks = min(worker.num_blocks, *(share.num_blocks for share in shares.values()))
    gang.tell_all(message_frame(Begin(num_blocks)))
    worker.allocate(num_blocks)
    speakers = [shares[rank] for rank in shares if rank % settings.tensor_parallel_size == 0]
    num_parameters = worker.found.num_parameters + sum(share.num_parameters for share in speakers)
    worker.found = dataclasses.replace(worker.found, num_parameters=num_parameters)
    gang.wait(lambda: all(member.pulse is not None and not member.pulse.is_loading for member in gang.members))
    if on_phase is not None:
        on_phase(f"gang of {len(machines)} ranks", time.perf_counter() - begun)
    return worker


def _places(settings: EngineSettings, *, is_one_machine: bool, host: str, port: int) -> list[Rendezvous]:
    """Where each rank stands and what moves its tensors."""
    dtype = getattr(torch, settings.dtype)
    activations = select_kernels(torch.device(settings.device), dtype).activation_dtype
    hidden_size = load_config(settings.model_dir).hidden_size
    largest = settings.max_num_batched_tokens * hidden_size * activations.itemsize
    first = Rendezvous(
        rank=0,
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        kind=_collectives(settings, is_one_machine=is_one_machine),
        name=secrets.token_hex(8),
        host=host,
        port=port,
        slot_bytes=min(largest, MAX_SLOT_BYTES),
        dtype=str(activations).removeprefix("torch."),
    )
    return [dataclasses.replace(first, rank=rank) for rank in range(first.world_size)]


def _collectives(settings: EngineSettings, *, is_one_machine: bool) -> str:
    """Raises SettingsError when what was asked for cannot work here."""
    asked = settings.collectives
    if asked == "shared-memory" and not is_one_machine:
        raise SettingsError("--collectives shared-memory: the ranks are on several machines; use auto or gloo")
    if asked == "shared-memory" and not is_available():
        raise SettingsError("--collectives shared-memory: this installation was built without it; use auto or gloo")
    if asked != "auto":
        return asked
    if settings.device != "cpu":
        return "nccl"
    return "shared-memory" if is_one_machine and is_available() else "gloo"


def _address_towards_others(gang: Gang) -> str:
    """The address of ours at which ranks on other machines have reached us."""
    for member in gang.members:
        is_elsewhere = member.pulse is not None and member.pulse.machine != gang.machine
        if is_elsewhere and member.sock.family != socket.AF_UNIX:
            return str(member.sock.getsockname()[0])
    raise ModelLoadError("ranks that share no machine are connected by Unix sockets: they cannot meet elsewhere")


def _load_own(
    settings: EngineSettings,
    gang: Gang,
    place: Rendezvous,
    num_neighbours: int,
    on_phase: PhaseCallback | None,
    on_load: LoadCallback | None,
) -> Worker:
    """Rank 0's share, in a thread: it may wait for a rank that has failed."""
    outcome: list[Worker | BaseException] = []

    def load() -> None:
        try:
            ranks = connect(place)
            gang.at_the_end(ranks.close)
            outcome.append(
                Worker(settings, ranks=ranks, num_neighbours=num_neighbours, on_phase=on_phase, on_load=on_load)
            )
        except BaseException as error:
            outcome.append(error)
        gang.wake()

    threading.Thread(target=load, name="load", daemon=True).start()
    gang.wait(lambda: bool(outcome))
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _check_agreement(worker: Worker, gang: Gang, shares: dict[int, Loaded]) -> None:
    """Raises ModelLoadError naming what differs: such a gang would compute something that is in no fingerprint."""
    for member in gang.members:
        agreed = shares[member.rank].agreed
        for name, ours in worker.agreed.items():
            if agreed.get(name) != ours:
                raise ModelLoadError(
                    f"{member} differs from rank 0 in its {name}: {agreed.get(name)!r} instead of {ours!r}; "
                    "all ranks need the same installation, model folder and kind of processor"
                )
