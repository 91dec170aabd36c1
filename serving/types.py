"""Values that cross process boundaries. A leaf: imports neither torch, ray nor fastapi."""

from __future__ import annotations

import enum

import msgspec

NO_LOGPROBS = -1
"""`SamplingParams.logprobs` of a row that wants none (0 means: the sampled token's only)."""


class FinishReason(enum.IntEnum):
    """Why the engine ended a row. Stop *strings* are the gateway's: it cancels the row instead."""

    LENGTH = 1  # max_tokens or max_model_len reached
    STOP = 2  # an end-of-sequence or stop token id was sampled; it is the row's last token


class Note(enum.IntEnum):
    """What a step meant for one row beside its tokens (`wire.Step.notes`). Kinds are only ever added (C22)."""

    CHUNK = 1  # value: tokens of its prompt, or of what it has to compute again, that the step computed
    PREEMPTED = 2  # value: tokens whose keys and values were given up
    WAITED = 3  # value: a Wait; told with the row's admission


class Wait(enum.IntEnum):
    """Why a row that had reached its replica was not admitted at once."""

    SLOTS = 1  # every row of the batch was taken
    BLOCKS = 2  # the KV cache had no room
    BUDGET = 3  # others had the step's tokens
    PREFIX = 4  # another request was computing the same prompt


class SamplingParams(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """How one choice is sampled (C3). Validated by the gateway; the engine trusts the ranges.

    Token ids are below the card's `tokenizer_size`. Fields are only ever appended: the struct is
    encoded as an array and crosses versions (C22).
    """

    temperature: float = 1.0  # 0 = argmax
    top_p: float = 1.0  # 0 = argmax, 1 = off
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # 0 = off
    frequency_penalty: float = 0.0  # over output tokens only
    presence_penalty: float = 0.0  # over output tokens only
    repetition_penalty: float = 1.0  # over prompt and output, multiplicative, 1 = off
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # uint64; drawn by the gateway when the client gave none (C1)
    choice: int = 0  # index of the choice in its request: part of the noise counter (C3)
    max_tokens: int = 16  # output tokens, resume ids included; >= 1
    min_tokens: int = 0  # end-of-sequence and stop ids are masked before this many
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = NO_LOGPROBS  # 0..20 alternatives beside the sampled token
    allowed_token_ids: tuple[int, ...] | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica says about itself in `hello` (C23). Encoded as a map: fields may be added."""

    fingerprint: str  # hex; the resume domain (C4)
    model: str  # served model name
    max_model_len: int  # prompt and output tokens together
    max_num_seqs: int
    logits_size: int
    tokenizer_size: int  # ids >= this are masked before sampling
    eos_ids: tuple[int, ...]
    bos_id: int | None
    block_size: int
    determinism: str  # "exact" | "approximate"
    assets: dict[str, str]  # file name -> sha256 hex
    created: int = 0  # unix seconds; of the weights, equal on every replica
    adapters: tuple[str, ...] = ()
    dtype: str = ""


class RankState(msgspec.Struct, frozen=True, kw_only=True):
    """One rank of a gang as `/progressz` shows it."""

    rank: int
    host: str
    pid: int
    step: int
    age_s: float  # since that rank last made progress, on the replica's clock


class StepRecord(msgspec.Struct, array_like=True, frozen=True):
    """One engine step as its replica recorded it (C17). Fields are only ever appended (C22)."""

    started_s: float  # on the replica's monotonic clock
    duration_s: float
    announced_s: float  # predicted before it ran
    ideal_s: float | None  # at the hardware's limit; None = not known
    num_rows: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_waiting: int
    blocks_used: int


class ReplicaStats(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """What a replica has counted since its start, for /metrics. Fields are only ever appended (C22).

    Counts of histograms are per bucket, of the bounds in serving/metrics/histogram.py.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    prefix_queried: int = 0  # tokens of rows at their first admission
    prefix_hits: int = 0  # tokens of those found in the prefix cache
    blocks_evicted: int = 0
    step_counts: list[int] = []
    step_sum: float = 0.0  # seconds
    ratio_counts: list[int] = []  # duration over announced cost
    ratio_sum: float = 0.0
    limit_busy_s: float = 0.0  # of steps whose ideal cost is known
    ideal_s: float = 0.0  # of those steps together
    hardware_fraction: float | None = None  # of the last seconds; None = the limit is not known
    read_bytes_s: float | None = None  # ceilings that the ideal assumes
    flops_s: float | None = None
    phases: list[tuple[str, float]] = []  # of the cold start, in seconds
    weights_read_bytes: int = 0
