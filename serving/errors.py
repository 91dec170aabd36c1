"""The one error tree (C15). Each class knows its HTTP status, OpenAI `type` and string `code`.

The gateway's single handler turns an `ArgosyError` into
`{"error": {"message", "type", "param", "code"}}`. Messages say the limit and the given value and
never contain paths, addresses, stack traces or another tenant's text.
"""

from __future__ import annotations

from typing import Any, ClassVar

MAX_RETRY_AFTER_S = 120.0
"""The official client gives up when told to wait longer."""


class ArgosyError(Exception):
    """An error that a client may see."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    should_retry: ClassVar[bool | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.error_code = code or self.code
        self.retry_after_s = None if retry_after_s is None else min(max(retry_after_s, 0.0), MAX_RETRY_AFTER_S)
        self.reason = reason  # x-argosy-dropped-reason

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.error_code,
            }
        }


class InvalidRequest(ArgosyError):
    """A value out of range, of the wrong type, or in a wrong combination."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """A parameter that this server does not honour: refused by name, never ignored."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """Prompt and max_tokens do not fit. Other gateways match the sentence's beginning."""

    code = "context_length_exceeded"


class InvalidJson(InvalidRequest):
    code = "invalid_json"


class AuthenticationFailed(ArgosyError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class OperatorOnly(ArgosyError):
    status = 403
    type = "permission_error"
    code = "operator_only"


class NotFound(ArgosyError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(ArgosyError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(ArgosyError):
    """The client did not deliver its request in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class PayloadTooLarge(ArgosyError):
    status = 413
    type = "invalid_request_error"
    code = "payload_too_large"


class UrlTooLong(ArgosyError):
    status = 414
    type = "invalid_request_error"
    code = "url_too_long"


class HeadersTooLarge(ArgosyError):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class MalformedRequest(InvalidRequest):
    """Not HTTP/1.1 as a server may safely read it."""

    code = "malformed_http"


class UnsupportedMediaType(ArgosyError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class QuotaExceeded(ArgosyError):
    """429: the tenant's own limit."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class NoCapacity(ArgosyError):
    """503: our capacity. Carries Retry-After from the measured drain rate."""

    status = 503
    type = "server_error"
    code = "no_capacity"
    should_retry = True


class DeadlineExceeded(ArgosyError):
    """503: the queue wait passed the deadline before any work was done."""

    status = 503
    type = "server_error"
    code = "deadline_exceeded"


class GenerationTimeout(ArgosyError):
    """504: the deadline passed while generating. A blind retry would repeat the same work."""

    status = 504
    type = "server_error"
    code = "timeout"
    should_retry = False


class EngineError(ArgosyError):
    """The engine failed on this request."""

    status = 500
    type = "server_error"
    code = "engine_error"
    should_retry = False


class SettingsError(Exception):
    """A flag, file or environment value that cannot be honoured; the text says what to do."""


class ModelLoadError(Exception):
    """A model folder that cannot be loaded; the text names the tensor, file or field."""
