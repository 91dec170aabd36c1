"""What only an operator may see: other people's requests, though never their text.

Who asks from the same machine is one: a loopback peer that names a local host and comes through no proxy. Whoever else
shows the operator token is one, too. A browser on the machine that was lured to another name for it (DNS rebinding) is
not: its Host header says so.
"""

from __future__ import annotations

import hmac
import ipaddress

from starlette.requests import Request

from serving.errors import AuthenticationFailed, OperatorOnly
from serving.secret_file import SecretFile

_OF_PROXIES = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Operators:
    """Tells them from others."""

    def __init__(self, token_file: str = "") -> None:
        """token_file: "" = there is no token, and only the machine itself is trusted."""
        self._token = SecretFile(token_file) if token_file else None

    def check(self, request: Request) -> None:
        """Raises AuthenticationFailed when a token is asked for, OperatorOnly when none would help."""
        if _is_local(request):
            return
        token = b"" if self._token is None else self._token.read()
        if not token:
            raise OperatorOnly(
                "Only an operator may see this: ask from the machine itself, on a loopback address without a proxy. "
                "The server knows no operator token (setting operator_token_file)."
            )
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token):
            raise AuthenticationFailed(
                "Only an operator may see this: send the operator token as `Authorization: Bearer …`.",
                code="operator_only",
            )


def _is_local(request: Request) -> bool:
    if request.client is None or any(name in request.headers for name in _OF_PROXIES):
        return False
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    host = request.headers.get("host", "").lower()
    name = host if host.endswith("]") else host.rsplit(":", 1)[0]
    return (mapped or address).is_loopback and name in _LOCAL_NAMES
