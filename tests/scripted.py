"""What a scripted model says: tokens as a pure function of everything before them.

Tokens depend on (prompt, seed, choice, all that was sampled before), so a gateway that resumes from a
wrong journal is found out by the very next token; `undisturbed` says what a choice must become.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct

from serving import wire
from serving.types import NO_LOGPROBS, FinishReason, ModelCard, SamplingParams

EOS = 7
MASK = (1 << 64) - 1


def make_card(
    fingerprint: str = "f1",
    model: str = "tiny",
    assets: dict[str, bytes] | None = None,
    *,
    tokenizer_size: int = 300,
    max_model_len: int = 4096,
) -> ModelCard:
    """A small vocabulary, so that end-of-sequence comes up by itself now and then."""
    return ModelCard(
        fingerprint=fingerprint,
        model=model,
        max_model_len=max_model_len,
        max_num_seqs=32,
        logits_size=tokenizer_size + 20,
        tokenizer_size=tokenizer_size,
        eos_ids=(EOS,),
        bos_id=None,
        block_size=16,
        determinism="exact",
        assets={name: hashlib.sha256(data).hexdigest() for name, data in (assets or {}).items()},
    )


class Script:
    """What the model would say after a prompt."""

    def __init__(self, prompt_ids: bytes, sampling: SamplingParams, vocabulary: int) -> None:
        key = struct.pack("<QI", sampling.seed, sampling.choice)
        self._state = int.from_bytes(hashlib.blake2b(prompt_ids, key=key, digest_size=8).digest(), "little")
        self._vocabulary = vocabulary
        self._num_alternatives = sampling.logprobs

    def peek(self) -> int:
        return (self._state >> 33) % self._vocabulary

    def accept(self, token: int) -> None:
        """`token` was the one sampled: everything after depends on it."""
        self._state = (self._state * 6364136223846793005 + token + 1442695040888963407) & MASK

    def logprobs(self) -> bytes:
        """Of the token that `peek` shows, packed as in `wire.Step`."""
        fraction = (self._state & 0xFFFF) / 0x10000
        entries = [(self.peek() + k, -fraction - k) for k in range(self._num_alternatives)]
        return struct.pack("<f", -fraction) + b"".join(struct.pack("<If", *entry) for entry in entries)


@dataclasses.dataclass
class Row:
    handle: int
    submit: wire.Submit
    script: Script
    num_tokens: int
    was_admitted: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.submit.prompt_ids) // 4

    def finish(self, token: int, card: ModelCard) -> tuple[int, int, int] | None:
        sampling = self.submit.sampling
        if token in sampling.stop_token_ids or (token in card.eos_ids and not sampling.ignore_eos):
            return self.handle, FinishReason.STOP, token
        if self.num_tokens >= sampling.max_tokens:
            return self.handle, FinishReason.LENGTH, -1
        return None


def undisturbed(
    prompt_ids: bytes, sampling: SamplingParams, card: ModelCard
) -> tuple[list[int], list[bytes], FinishReason, int]:
    """(output ids, logprobs, finish reason, stop token id) of a choice that met no fault."""
    script = Script(prompt_ids, sampling, card.tokenizer_size)
    row = Row(0, wire.Submit(0, "", prompt_ids, b"", sampling), script, 0)
    ids: list[int] = []
    logprobs: list[bytes] = []
    while True:
        token = script.peek()
        if sampling.logprobs != NO_LOGPROBS:
            logprobs.append(script.logprobs())
        script.accept(token)
        ids.append(token)
        row.num_tokens += 1
        end = row.finish(token, card)
        if end is not None:
            return ids, logprobs, FinishReason(end[1]), end[2]
