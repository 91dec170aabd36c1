"""Who sends a request, and what must not be shared between senders."""

from __future__ import annotations

import dataclasses
import hmac
from hashlib import blake2b

SALT_BYTES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Tenant:
    """One sender. `salt` separates its prefix cache from every other tenant's (C8)."""

    id: str
    salt: bytes

    def cache_salt(self, own: str) -> bytes:
        """Salt of a request that carries its own `cache_salt`: bound to the tenant, so that
        guessing another tenant's value opens nothing."""
        if not own:
            return self.salt
        return blake2b(own.encode(), key=self.salt, digest_size=SALT_BYTES).digest()


class Tenants:
    """Without keys there is one tenant; the Authorization header is ignored."""

    def __init__(self, secret: str) -> None:
        digest = hmac.digest(secret.encode(), b"argosy tenant: anonymous", "sha256")
        self.anonymous = Tenant("anonymous", digest[:SALT_BYTES])

    def of(self, authorization: str | None) -> Tenant:
        """The tenant that a request's Authorization header names."""
        del authorization  # clients must send one; it means nothing until there are keys
        return self.anonymous
