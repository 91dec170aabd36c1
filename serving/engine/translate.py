"""Between the engine protocol's messages and the engine's own types."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from serving import wire
from serving.block_hash import root_hash
from serving.engine.held import HeldRow
from serving.engine.output import StepOutput
from serving.engine.request import Request
from serving.errors import InvalidRequest
from serving.types import ModelCard

_MAX_PRIORITY = 1 << 20
_PIECE_BYTES = 8 << 20  # below the frame limit


def to_request(submit: wire.Submit, connection: int, card: ModelCard) -> Request:
    """The choice as the scheduler takes it.

    Raises WireError for a frame that no gateway of ours sends, InvalidRequest for ids that the model
    does not have.
    """
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
    return Request(
        key=(connection, submit.handle),
        tokens=tokens,
        num_prompt=len(prompt),
        max_total=min(len(prompt) + sampling.max_tokens, card.max_model_len),
        sampling=sampling,
        stop_ids=sampling.stop_token_ids + (() if sampling.ignore_eos else card.eos_ids),
        priority=max(-_MAX_PRIORITY, min(submit.priority, _MAX_PRIORITY)),
        root=root_hash(card.fingerprint, submit.adapter, submit.salt),
    )


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
    )


def held_step(held: HeldRow, find: wire.Find, step: int, granted: int) -> wire.Step:
    """What a held row brought from output position `find.position` on."""
    skip = find.position - held.first_position
    return wire.Step(
        step=step,
        tokens=b"".join(wire.PAIR.pack(find.handle, token) for token in held.tokens[skip:]),
        finished=[(find.handle, *held.finished)] if held.finished else [],
        admitted=[],
        logprobs=[(at - skip, packed) for at, packed in held.logprobs.items() if at >= skip],
        granted=granted,
    )


def asset_pieces(name: str, sha256: str, data: bytes) -> Iterator[wire.Asset]:
    """An asset in frames, in order."""
    for at in range(0, max(len(data), 1), _PIECE_BYTES):
        yield wire.Asset(name, sha256, data[at : at + _PIECE_BYTES], at, len(data))
