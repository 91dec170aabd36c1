"""What follows from a spec: every number of the manifests that nobody types.

Each property says its formula. Units are in the names: bytes, seconds (rounded up to whole ones, as Kubernetes
counts them), rows, choices.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

from k8s.amounts import GI, MI
from k8s.spec import ServingSpec, SpecError

BLOCK_TOKENS: Final = 16  # of a KV block (C8)
GPU_SHARE: Final = 0.9  # of a GPU's memory that we count on; the rest is fragments, NCCL and its driver
RANK_GPU_BYTES: Final = 2 * GI  # context, workspace, logits
RANK_HOST_BYTES: Final = {"cpu": 400 * MI, "cuda": 3 * GI}  # a rank's process with torch (serving/found.py) or CUDA
NODE_BYTES: Final = 1536 * MI  # raylet, agents, Serve's proxy on a worker
HEAD_BYTES: Final = {"dev": 3 * GI, "prod": 8 * GI}  # GCS, dashboard, Serve's controller; more pods, more to know
HEAD_CPUS: Final = {"dev": 0.5, "prod": 2.0}
OBJECT_STORE_BYTES: Final = 256 * MI  # no tensor and no token passes through it
NCCL_RANK_BYTES: Final = 512 * MI  # 4 MiB x 32 channels x 2 neighbours x 2 directions in /dev/shm
LOAD_FACTOR: Final = 1.05  # peak of a load over its share (measured: 1.03)
SAFETY: Final = 1.5

GATEWAY_PRE_STOP_S: Final = 10  # endpoints are taken out of load balancers meanwhile
SERVE_MARGIN_S: Final = 10  # graceful_shutdown_timeout_s beyond the drain (C19)
RAY_MARGIN_S: Final = 20  # Ray's node drain beyond the drain: it ends what Serve has not
GRACE_MARGIN_S: Final = 20  # SIGKILL beyond Ray's drain
STARTUP_PERIOD_S: Final = 5
MAX_DRAIN_S: Final = 3600  # of drain_timeout_s (serving/config.py)


@dataclasses.dataclass(frozen=True, slots=True)
class Sizing:
    """The derived values of one spec.

    Raises SpecError when the KV cache holds no context of full length, or a generation outlasts any drain.
    """

    spec: ServingSpec

    def __post_init__(self) -> None:
        model = self.spec.model
        if self.request_timeout_s > MAX_DRAIN_S:
            raise SpecError(
                f"engine.max_tokens: {self.spec.engine.max_tokens:,} at {self.spec.engine.slowest_tokens_per_s:g} per "
                f"second and the queue take {self.request_timeout_s:,} s, and a gateway drains for {MAX_DRAIN_S:,} s"
            )
        if self.kv_tokens < model.max_model_len:
            raise SpecError(
                f"model.max_model_len: a request of {model.max_model_len:,} tokens needs more than the KV cache of "
                f"{self.kv_tokens:,} tokens ({self.kv_cache_bytes / GI:.1f} GiB per rank, "
                f"{model.rank_kv_bytes_per_token:,} bytes per token)"
            )

    # --- where ranks go -----------------------------------------------------------------------

    @property
    def num_ranks(self) -> int:
        """Of one replica: tensor x pipeline."""
        return self.spec.engine.tensor_parallel_size * self.spec.engine.pipeline_parallel_size

    @property
    def hosts_per_replica(self) -> int:
        """Pods of one replica: ranks / GPUs of a host, rounded up; 1 on CPUs."""
        return math.ceil(self.num_ranks / self.spec.engine.gpus_per_host) if self.spec.has_gpus else 1

    @property
    def ranks_per_pod(self) -> int:
        return self.num_ranks // self.hosts_per_replica

    @property
    def gpus_per_pod(self) -> int:
        """One per rank; 0 on CPUs."""
        return self.ranks_per_pod if self.spec.has_gpus else 0

    @property
    def max_surge_percent(self) -> int:
        """100 where the autoscaler may make room for a replica beside its predecessor, else 0: stop, then start."""
        return 100 if self.spec.has("autoscale-ray") else 0

    @property
    def max_groups(self) -> int:
        """Most replicas' worth of pods: one more than replicas where an update may surge."""
        return self.spec.engine.max_replicas + (1 if self.max_surge_percent else 0)

    @property
    def quota_pods(self) -> int:
        """Of engine workers: twice `max_groups` where an upgrade builds a second cluster beside the first."""
        return self.max_groups * self.hosts_per_replica * (2 if self.spec.engine.upgrade == "new-cluster" else 1)

    @property
    def quota_gpus(self) -> int:
        """GPUs of `quota_pods` and of the balloons, which leave only when the real pod is already counted."""
        balloons = self.spec.num_balloons * self.hosts_per_replica if self.spec.has("balloons") else 0
        return self.gpus_per_pod * (self.quota_pods + balloons)

    # --- memory -------------------------------------------------------------------------------

    @property
    def rank_weights_bytes(self) -> int:
        """Of the fullest rank: as given, else an equal share of the files."""
        return self.spec.model.rank_weights_bytes or math.ceil(self.spec.model.weights_bytes / self.num_ranks)

    @property
    def kv_cache_bytes(self) -> int:
        """Of each rank: as given, else 0.9 x the GPU's memory - its weights - 2 GiB, in whole 256 MiB.

        Raises SpecError when nothing is left.
        """
        engine = self.spec.engine
        if engine.kv_cache_bytes:
            return engine.kv_cache_bytes
        left = GPU_SHARE * engine.gpu_memory_bytes - self.rank_weights_bytes - RANK_GPU_BYTES
        if left < 256 * MI:
            raise SpecError(
                f"engine.gpu_memory_bytes: {engine.gpu_memory_bytes / GI:.1f} GiB leave no room for a KV cache beside "
                f"{self.rank_weights_bytes / GI:.1f} GiB of weights per rank; use more ranks"
            )
        return int(left // (256 * MI)) * 256 * MI

    @property
    def shm_bytes(self) -> int:
        """/dev/shm of a worker: Ray's object store, and for a gang on GPUs 512 MiB per rank for NCCL."""
        nccl = NCCL_RANK_BYTES * self.ranks_per_pod if self.spec.has_gpus and self.ranks_per_pod > 1 else 0
        return 2 * OBJECT_STORE_BYTES + nccl

    @property
    def head_memory_bytes(self) -> int:
        return HEAD_BYTES[self.spec.environment]

    @property
    def head_cpus(self) -> float:
        return HEAD_CPUS[self.spec.environment]

    @property
    def worker_memory_bytes(self) -> int:
        """Request and limit: per rank its process, its weights x 1.05 (on GPUs: while they pass through the host)
        and on CPUs its KV cache; once per pod Ray's processes and /dev/shm, which counts as memory."""
        device = self.spec.engine.device
        rank = RANK_HOST_BYTES[device] + LOAD_FACTOR * self.rank_weights_bytes
        rank += 0 if self.spec.has_gpus else self.kv_cache_bytes
        return math.ceil(self.ranks_per_pod * rank + NODE_BYTES + self.shm_bytes)

    @property
    def worker_cpus(self) -> float:
        """Per rank its threads, and one for Ray's processes."""
        return self.spec.engine.cpus_per_rank * self.ranks_per_pod + 1

    @property
    def num_threads(self) -> int:
        """Threads that a rank computes with: its whole CPUs, at least 1."""
        return max(1, math.floor(self.spec.engine.cpus_per_rank))

    @property
    def weights_volume_bytes(self) -> int:
        """Where `argosy pull` writes: the files twice (a scratch copy is moved into place), and 10 %."""
        return math.ceil(2.2 * self.spec.model.weights_bytes)

    # --- rows and queues ----------------------------------------------------------------------

    @property
    def kv_blocks(self) -> int:
        """Of a rank's KV cache, without the one that takes the writes of padding (C8)."""
        return self.kv_cache_bytes // (BLOCK_TOKENS * self.spec.model.rank_kv_bytes_per_token) - 1

    @property
    def kv_tokens(self) -> int:
        return self.kv_blocks * BLOCK_TOKENS

    @property
    def num_rows(self) -> int:
        """Usual requests that a replica runs at once: KV blocks / blocks of a usual request, at most max_num_seqs."""
        by_kv = self.kv_blocks // math.ceil(self.spec.engine.typical_tokens / BLOCK_TOKENS)
        return max(1, min(self.spec.engine.max_num_seqs, by_kv))

    @property
    def max_ongoing_requests(self) -> int:
        """What Serve may hand a replica at once: its rows and the permits beyond them (C22: 2 x max_num_seqs)."""
        return self.num_rows + 2 * self.spec.engine.max_num_seqs

    @property
    def max_queue_len(self) -> int:
        """Choices that a gateway holds: what the largest fleet finishes within queue_timeout_s, shared among the
        fewest gateways, and at least the rows of the fleet. A longer queue would only time out."""
        engine, gateway = self.spec.engine, self.spec.gateway
        fleet_rows = engine.max_replicas * self.num_rows
        typical_s = engine.typical_tokens / engine.slowest_tokens_per_s
        finished = fleet_rows * gateway.queue_timeout_s / typical_s
        return min(1_000_000, max(fleet_rows, math.ceil(finished / gateway.min_replicas)))

    # --- times --------------------------------------------------------------------------------

    @property
    def longest_generation_s(self) -> int:
        """max_tokens / the slowest stream."""
        return math.ceil(self.spec.engine.max_tokens / self.spec.engine.slowest_tokens_per_s)

    @property
    def request_timeout_s(self) -> int:
        """A gateway's deadline: waiting, and the longest generation."""
        return math.ceil(self.spec.gateway.queue_timeout_s) + self.longest_generation_s

    @property
    def drain_timeout_s(self) -> int:
        """How long a replica that leaves waits for its rows: the longest generation, should no other take them."""
        return self.longest_generation_s

    @property
    def serve_shutdown_s(self) -> int:
        """graceful_shutdown_timeout_s: the drain + 10 s (C19)."""
        return self.drain_timeout_s + SERVE_MARGIN_S

    @property
    def ray_drain_s(self) -> int:
        """RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S: the drain + 20 s, so that Serve ends first."""
        return self.drain_timeout_s + RAY_MARGIN_S

    @property
    def engine_grace_s(self) -> int:
        """terminationGracePeriodSeconds of head and workers: Ray's drain + 20 s."""
        return self.ray_drain_s + GRACE_MARGIN_S

    @property
    def deletion_delay_s(self) -> int:
        """rayClusterDeletionDelaySeconds: the longest request, and never less than the engine's grace."""
        return max(self.request_timeout_s, self.engine_grace_s)

    @property
    def gateway_drain_s(self) -> int:
        """How long a gateway that leaves serves its streams: the longest request."""
        return self.request_timeout_s

    @property
    def gateway_grace_s(self) -> int:
        """terminationGracePeriodSeconds of gateways: preStop + drain + 20 s."""
        return GATEWAY_PRE_STOP_S + self.gateway_drain_s + GRACE_MARGIN_S

    @property
    def load_s(self) -> float:
        """A replica's start once its weights are on the node: bytes that a pod reads / disk, and what else it does."""
        read = self.rank_weights_bytes * self.ranks_per_pod / self.spec.engine.disk_bytes_per_s
        return read + self.spec.engine.prepare_s

    @property
    def fetch_s(self) -> float:
        """`argosy pull`: bytes / network, written and verified at the disk's speed; or the kubelet's pull of an image
        with them, written, read and unpacked. Before the engine's container starts, so in no budget of its probes."""
        model, engine = self.spec.model, self.spec.engine
        return model.weights_bytes / engine.fetch_bytes_per_s + 3 * model.weights_bytes / engine.disk_bytes_per_s

    @property
    def startup_failures(self) -> int:
        """failureThreshold of the engine's startup probe, every 5 s: 1.5 x `load_s`, at least 2 minutes."""
        return math.ceil(max(120.0, SAFETY * self.load_s) / STARTUP_PERIOD_S)

    @property
    def fetch_deadline_s(self) -> int:
        """activeDeadlineSeconds of the Job that pulls: 3 x `fetch_s`, at least 10 minutes."""
        return math.ceil(max(600.0, 3 * self.fetch_s))
