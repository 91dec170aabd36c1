"""What gateways tell the directory: how much waits in them for replicas, signed with the secret that they share (C22).

A report is JSON in a POST, its HMAC in a header. It counts until a newer one of the same gateway comes or a few seconds
have passed, and carries the time of its sending, so that an old one cannot be sent again by somebody else.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

import msgspec

PROOF_HEADER: Final = "x-argosy-proof"
MAX_REPORT_BYTES: Final = 16 << 10
MAX_SKEW_S: Final = 60.0
"""Clocks of two hosts may differ by so much."""


class DemandReport(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway process's held work."""

    gateway: str
    sent_at: float  # unix seconds
    choices: dict[str, int] = {}  # that wait, by model
    tokens: dict[str, int] = {}  # of their prompts and journals


class DemandReply(msgspec.Struct, frozen=True, kw_only=True):
    """The directory's answer."""

    num_ready: int  # replicas
    ready_in_s: float | None = (
        None  # until one that starts from zero will serve, as the last start took; None = unknown
    )


def sign(secret: bytes, body: bytes) -> str:
    """The header's value for a report."""
    return hmac.new(secret, b"demand\0" + body, hashlib.sha256).hexdigest()


def is_signed(secrets: Sequence[bytes], body: bytes, proof: str) -> bool:
    """Whether one of the secrets was used; each is compared in constant time."""
    given = proof.encode(errors="replace")
    return any(hmac.compare_digest(sign(secret, body).encode(), given) for secret in secrets)
