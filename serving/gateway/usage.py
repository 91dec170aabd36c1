"""What a request used, counted from what was rendered: the same however frames were cut (C21)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.gateway.rendering import Rendering


def usage(renderings: Sequence[Rendering], n: int) -> dict[str, Any]:
    """OpenAI's usage object. A prompt counts once, however many choices continue it; of its choices
    the first tells how much of it came from the prefix cache."""
    firsts = renderings[::n]
    prompt_tokens = sum(len(rendering.choice.prompt_ids) // 4 for rendering in firsts)
    cached_tokens = sum(rendering.choice.cached_tokens or 0 for rendering in firsts)
    completion_tokens = sum(rendering.continuation.num_tokens for rendering in renderings)
    return usage_json(prompt_tokens, completion_tokens) | {"prompt_tokens_details": {"cached_tokens": cached_tokens}}


def usage_json(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
