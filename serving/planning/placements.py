"""Ways to divide a model among devices: which fit, how much room they leave, and why the others do not."""

from __future__ import annotations

import dataclasses

from models.config import ModelError
from models.footprint import Place, Share, inner_size, kv_bytes_per_token, share
from serving.planning.demand import BLOCK_SIZE, Demand, Machine, PlanError, activation_bytes, precision_of
from serving.planning.limits import DecodeLimit, Limits, PrefillLimit
from serving.planning.quantities import shown_bytes

USABLE = 0.9
"""Part of a device's memory that is planned with; the rest is for fragmentation and what nobody foresees."""
RUNTIME_BYTES = {False: 1 << 30, True: 400 << 20}
"""Per rank, by whether it is a CPU: the process with torch and its context on the device."""
_LOGIT_COPIES = 2  # float32 logits and what the sampler makes of them


@dataclasses.dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank."""

    place: Place
    weights: int  # embeddings, norms, rotary tables and scales included
    workspace: int
    usable: int
    kv_per_token: int

    @property
    def free(self) -> int:
        """For the KV cache; negative when the weights alone do not fit."""
        return self.usable - self.weights - self.workspace

    @property
    def num_blocks(self) -> int:
        """KV blocks beside the one that takes the writes of padding."""
        return max(self.free // (BLOCK_SIZE * self.kv_per_token) - 1, 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """A way that fits."""

    tensor_size: int
    pipeline_size: int
    num_replicas: int
    num_idle: int  # devices that no replica uses
    fullest: RankMemory  # with the most weights
    tightest: RankMemory  # with room for the fewest tokens: it bounds the replica
    weight_bytes: int  # of all ranks of a replica
    num_contexts: int  # of the asked length that a replica holds at once
    prefill: PrefillLimit
    decode: tuple[DecodeLimit, ...]  # batches from 1 to the largest

    @property
    def num_ranks(self) -> int:
        return self.tensor_size * self.pipeline_size

    @property
    def kv_tokens(self) -> int:
        return self.tightest.num_blocks * BLOCK_SIZE

    @property
    def total_tokens_s(self) -> float:
        """Decode limit of all replicas at the largest batch."""
        return self.num_replicas * self.decode[-1].tokens_s


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """A way that does not fit. missing_bytes: of the fullest rank, 0 when memory is not the reason."""

    tensor_size: int
    pipeline_size: int
    reason: str
    missing_bytes: int = 0


def find_placements(demand: Demand, machine: Machine) -> tuple[list[Placement], list[Refusal]]:
    """Those that fit, the highest decode limit of all devices together first, and the others.

    Sizes considered: powers of two and divisors of the number of devices. Raises PlanError, or ModelError when
    the model's weights cannot be accounted for.
    """
    share(demand.config, Place(), 1)
    fitting: list[Placement] = []
    refused: list[Refusal] = []
    for tensor_size in _sizes(machine.num_gpus):
        for pipeline_size in _sizes(machine.num_gpus // tensor_size):
            found = _judge(demand, machine, tensor_size, pipeline_size)
            if isinstance(found, Placement):
                fitting.append(found)
            else:
                refused.append(found)
    fitting.sort(key=lambda p: (-p.total_tokens_s, p.num_ranks, p.pipeline_size))
    return fitting, refused


def _judge(demand: Demand, machine: Machine, tensor_size: int, pipeline_size: int) -> Placement | Refusal:
    def refuse(reason: str, missing_bytes: int = 0) -> Refusal:
        return Refusal(tensor_size, pipeline_size, reason, missing_bytes)

    per_node = machine.gpus_per_node
    if tensor_size > per_node:
        return refuse(f"a tensor-parallel group stays within a node, which has {per_node}")
    num_replicas = machine.num_groups(tensor_size) // pipeline_size
    if not num_replicas:
        groups = machine.num_groups(tensor_size)
        return refuse(f"nodes of {per_node} have room for {groups} groups of {tensor_size}, not for {pipeline_size}")
    places = [
        Place(tensor_size, pipeline_size, rank, stage) for stage in range(pipeline_size) for rank in range(tensor_size)
    ]
    try:
        shares = {place: share(demand.config, place, demand.context) for place in places}
    except ModelError as error:
        return refuse(str(error))
    if demand.has_stored_codes and any(held.ragged for held in shares.values()):
        return refuse("the checkpoint's int4 codes come in groups of 32 inputs, which this would cut")
    ranks = [_memory(demand, machine, place, held) for place, held in shares.items()]
    tightest = min(ranks, key=lambda rank: (rank.num_blocks, rank.free))
    if tightest.free < 0:
        return refuse(
            f"{shown_bytes(tightest.weights)} of weights and {shown_bytes(tightest.workspace)} of workspace per rank: "
            f"{shown_bytes(-tightest.free)} too many",
            -tightest.free,
        )
    blocks = -(-demand.context // BLOCK_SIZE)
    num_contexts = tightest.num_blocks // blocks
    if not num_contexts:
        missing = (blocks + 1) * BLOCK_SIZE * tightest.kv_per_token - tightest.free
        return refuse(
            f"no room for the KV cache of {demand.context:,} tokens: {shown_bytes(tightest.free)} left per rank, "
            f"{shown_bytes(missing)} too few",
            missing,
        )
    slowest = [_slowest(shares, stage) for stage in range(pipeline_size)]
    limits = Limits(demand, machine, slowest)
    largest = min(demand.max_num_seqs, num_contexts)
    return Placement(
        tensor_size,
        pipeline_size,
        num_replicas,
        machine.num_gpus - num_replicas * tensor_size * pipeline_size,
        max(ranks, key=lambda rank: rank.weights),
        tightest,
        sum(rank.weights for rank in ranks),
        num_contexts,
        limits.prefill(),
        tuple(limits.decode(batch) for batch in _batches(largest)),
    )


def _memory(demand: Demand, machine: Machine, place: Place, held: Share) -> RankMemory:
    accelerator = machine.accelerator
    if accelerator.memory_bytes is None:
        raise PlanError(f"the memory of {accelerator.name} is not known; give it with --memory")
    return RankMemory(
        place,
        held.num_bytes(precision_of(demand, accelerator)),
        _workspace_bytes(demand, machine, place),
        int(accelerator.memory_bytes.value * USABLE),
        kv_bytes_per_token(demand.config, place, demand.kv_bytes),
    )


def _workspace_bytes(demand: Demand, machine: Machine, place: Place) -> int:
    """Runtime, the widest layer's activations of a whole step, and the logits of every row."""
    config, is_cpu = demand.config, machine.accelerator.is_cpu
    attention = 2 * config.num_heads * config.head_size // place.tensor_size
    attention += 2 * max(config.num_kv_heads // place.tensor_size, 1) * config.head_size
    per_token = 3 * config.hidden_size + attention + 3 * inner_size(config, place)
    activations = demand.max_num_batched_tokens * per_token * activation_bytes(demand, machine.accelerator)
    is_last = place.stage == place.pipeline_size - 1
    logits = _LOGIT_COPIES * demand.max_num_seqs * config.vocab_size * 4 if is_last else 0
    return RUNTIME_BYTES[is_cpu] + activations + logits


def _slowest(shares: dict[Place, Share], stage: int) -> tuple[Place, Share]:
    """The rank of a stage that reads most."""
    return max(((p, s) for p, s in shares.items() if p.stage == stage), key=lambda item: item[1].linear)


def _sizes(limit: int) -> list[int]:
    powers = {1 << exponent for exponent in range(limit.bit_length())}
    return sorted(powers | {size for size in range(1, limit + 1) if limit % size == 0})


def _batches(largest: int) -> list[int]:
    """1, 4, 16, … and the largest."""
    return sorted({4**exponent for exponent in range(12) if 4**exponent < largest} | {largest})
