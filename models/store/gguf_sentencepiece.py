"""SentencePiece's BPE, as Llama 2, Mistral and Gemma use it, as a pipeline of the `tokenizers` library.

SentencePiece (Kudo & Richardson 2018) joins, again and again, the two neighbours whose union has the highest score,
the leftmost at equal ones. The library wants an ordered list of merges: every way to cut a token into two tokens,
ordered by the score of the whole. Spaces are written as "▁"; characters without a token fall apart into byte tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "▁"
MAX_TOKEN_CHARS = 512  # merges are looked for at every cut of every token


def sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], mergeable: Sequence[bool], unknown: str | None, has_prefix: bool
) -> Tokenizer:
    """tokens, scores, mergeable: by id; tokens that are not mergeable are never made out of text.

    unknown: the token for what has no bytes, if there is one. has_prefix: whether a text, and what follows a special
    token, begins with a space of its own. Raises ValueError for scores that are no numbers or tokens of impossible
    length.
    """
    pieces = {token: score for token, score, wanted in zip(tokens, scores, mergeable, strict=True) if wanted}
    for token, score in pieces.items():
        if not math.isfinite(score):
            raise ValueError(f"the score of {token!r} is {score}")
        if len(token) > MAX_TOKEN_CHARS:
            raise ValueError(f"a token of {len(token)} characters; at most {MAX_TOKEN_CHARS} are allowed")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges(pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if has_prefix else escape
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if has_prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that join to a piece, the best first; of one piece the pair with the longest left part."""
    found = [
        (-score, -cut, token)
        for token, score in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    found.sort(key=lambda merge: merge[:2])
    return [(token[:-cut], token[-cut:]) for _, cut, token in found]
