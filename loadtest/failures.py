"""How a request can fail: one of a few words each, so that tables of errors stay short whatever a server says.

`http_STATUS` (any status but 2xx), and those below.
"""

from __future__ import annotations

MAX_DETAIL = 200

CONNECT = "connect"
"""No connection: refused, unreachable, no such host, TLS."""
TIMEOUT = "timeout"
"""Nothing came for `timeout_s`."""
RESET = "reset"
"""The connection ended in the middle of the response."""
TRUNCATED = "truncated"
"""A stream ended cleanly, but without its [DONE]."""
STREAM_ERROR = "stream_error"
"""The server sent an error event within a stream."""
MALFORMED = "malformed"
"""What came was not HTTP, not an event stream or not OpenAI's JSON, or went beyond our bounds."""
NOT_SENT = "not_sent"
"""The generator itself had no room left (`max_in_flight`)."""
CANCELLED = "cancelled"
"""The run ended first."""

OTHERS = (CONNECT, TIMEOUT, RESET, TRUNCATED, STREAM_ERROR, MALFORMED, NOT_SENT, CANCELLED)


class RequestFailed(Exception):
    """A request that did not succeed; `str()` is its class and, where there is one, the server's error code."""

    def __init__(self, failure: str, detail: str = "", code: str = "") -> None:
        """failure: class; detail: what was said; code: the server's own machine-readable word for it."""
        self.failure = failure
        self.code = code[:40]
        self.detail = detail[:MAX_DETAIL]
        super().__init__(f"{failure} {self.code}".strip())


def of_status(status: int) -> str:
    """Class of an HTTP status that is no success."""
    return f"http_{status}"
