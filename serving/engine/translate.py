"""Between the engine protocol's messages and the engine's own types."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from serving import wire
from serving.block_hash import block_hashes, root_hash
from serving.engine.held import HeldRow
from serving.engine.output import StepOutput
from serving.engine.request import Request
from serving.engine.rows import MAX_STOP_IDS
from serving.errors import InvalidRequest
from serving.types import NO_LOGPROBS, ModelCard, SamplingParams

_MAX_PRIORITY = 1 << 20
_MAX_HANDLE = (1 << 32) - 1
_MAX_LOGPROBS = 20
_PIECE_BYTES = 256 << 10  # steps and beats wait for one piece at most
_HELD_TOKENS = 4096  # in a frame: with their log-probabilities far below the frame limit


def to_request(submit: wire.Submit, connection: int, card: ModelCard, *, hashes_blocks: bool = True) -> Request:
    """The choice as the scheduler takes it.

    hashes_blocks: hash the prompt here, in the caller's thread, and not between two steps.
    Raises WireError for a frame that no gateway of ours sends, InvalidRequest for ids that the model
    does not have: whatever the step loop could not bear must end here.
    """
    if not 0 <= submit.handle <= _MAX_HANDLE:
        raise wire.WireError(f"handle {submit.handle} is not a u32")
    prompt = np.array(wire.unpack_ids(submit.prompt_ids), np.int32)
    resume = np.array(wire.unpack_ids(submit.resume_ids), np.int32)
    if not len(prompt):
        raise wire.WireError("a submit without a prompt")
    tokens = np.concatenate((prompt, resume))
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= card.tokenizer_size:
        worst = low if low < 0 else high
        raise InvalidRequest(f"token id {worst} is not in 0..{card.tokenizer_size - 1}", param="prompt")
    sampling = submit.sampling
    _check_sampling(sampling, card)
    root = root_hash(card.fingerprint, submit.adapter, submit.salt)
    is_hashed = hashes_blocks and len(tokens) < card.max_model_len
    return Request(
        key=(connection, submit.handle),
        tokens=tokens,
        num_prompt=len(prompt),
        max_total=min(len(prompt) + sampling.max_tokens, card.max_model_len),
        sampling=sampling,
        stop_ids=sampling.stop_token_ids + (() if sampling.ignore_eos else card.eos_ids),
        priority=max(-_MAX_PRIORITY, min(submit.priority, _MAX_PRIORITY)),
        root=root,
        hashes=block_hashes(root, tokens.tobytes(), card.block_size) if is_hashed else [],
    )


def _check_sampling(sampling: SamplingParams, card: ModelCard) -> None:
    """The gateway has checked all of it; here only what would bring down the replica, with all its rows."""
    if sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {sampling.max_tokens}", param="max_tokens")
    if not NO_LOGPROBS <= sampling.logprobs <= _MAX_LOGPROBS:
        raise InvalidRequest(f"logprobs must be 0 to {_MAX_LOGPROBS}, got {sampling.logprobs}", param="logprobs")
    if len(sampling.stop_token_ids) > MAX_STOP_IDS:
        text = f"stop_token_ids has {len(sampling.stop_token_ids)} entries, the limit is {MAX_STOP_IDS}"
        raise InvalidRequest(text, param="stop_token_ids")
    ids = {
        "stop_token_ids": sampling.stop_token_ids,
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "logit_bias": tuple(token for token, _ in sampling.logit_bias),
    }
    for param, values in ids.items():
        if values and not 0 <= min(values) <= max(values) < card.logits_size:
            worst = min(values) if min(values) < 0 else max(values)
            raise InvalidRequest(f"{param}: token id {worst} is not in 0..{card.logits_size - 1}", param=param)


def to_step(output: StepOutput, connection: int, granted: int) -> wire.Step:
    """What `output` brought for one connection."""
    mine = output.connections == connection
    pairs = np.column_stack((output.handles[mine], output.tokens[mine])).astype("<u4")
    index = np.cumsum(mine) - 1
    return wire.Step(
        step=output.step,
        tokens=pairs.tobytes(),
        finished=[(handle, int(why), stop) for owner, handle, why, stop in output.finished if owner == connection],
        admitted=[(handle, cached) for owner, handle, cached in output.admitted if owner == connection],
        logprobs=[(int(index[at]), packed) for at, packed in output.logprobs.items() if mine[at]],
        granted=granted,
        record=output.record,
        notes=[(handle, int(kind), value) for owner, handle, kind, value in output.notes if owner == connection],
    )


def held_steps(held: HeldRow, find: wire.Find, step: int, granted: int) -> Iterator[wire.Step]:
    """What a held row brought from output position `find.position` on; at least one frame."""
    begin, total = find.position - held.first_position, len(held.tokens)
    for at in range(begin, max(total, begin + 1), _HELD_TOKENS):
        end = at + _HELD_TOKENS
        yield wire.Step(
            step=step,
            tokens=b"".join(wire.PAIR.pack(find.handle, token) for token in held.tokens[at:end]),
            finished=[(find.handle, *held.finished)] if held.finished and end >= total else [],
            admitted=[],
            logprobs=[(i - at, held.logprobs[i]) for i in range(at, min(end, total)) if i in held.logprobs],
            granted=granted,
        )


def asset_pieces(name: str, sha256: str, data: bytes) -> Iterator[wire.Asset]:
    """An asset in frames, in order."""
    for at in range(0, max(len(data), 1), _PIECE_BYTES):
        yield wire.Asset(name, sha256, data[at : at + _PIECE_BYTES], at, len(data))
