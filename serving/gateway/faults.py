"""Failures as clients see them (C15): one place turns whatever was raised into OpenAI's error object."""

from __future__ import annotations

import json
import math

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serving.errors import ArgosyError, InvalidRequest, MethodNotAllowed, NotFound
from serving.metrics.page import Metrics

DEFAULT_RETRY_AFTER_S = 1.0


def error_json(error: ArgosyError) -> bytes:
    """OpenAI's error object, in ASCII: a message may quote what UTF-8 cannot encode."""
    return json.dumps(error.body(), separators=(",", ":")).encode()


def as_error(raised: BaseException, method: str = "", path: str = "") -> ArgosyError:
    """The error that a client may see. Whatever is not ours says nothing of its cause."""
    if isinstance(raised, ArgosyError):
        return raised
    if isinstance(raised, HTTPException):
        if raised.status_code == 404:
            return NotFound(f"No such path: {method} {path[:128]!r}.")
        if raised.status_code == 405:
            return MethodNotAllowed(f"{method} is not allowed on {path[:128]!r}.")
        return InvalidRequest(str(raised.detail))
    if isinstance(raised, RequestValidationError):
        return InvalidRequest("The request is not valid.")
    return ArgosyError("The server failed; the failure has been logged.")


def error_headers(error: ArgosyError) -> dict[str, str]:
    """Headers that steer a client's retries."""
    headers = {}
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.status in (429, 503):
        retry_after_s = DEFAULT_RETRY_AFTER_S  # these two never go without (C15)
    if retry_after_s is not None:
        headers["retry-after"] = str(max(math.ceil(retry_after_s), 1))
        headers["retry-after-ms"] = str(max(math.ceil(1000 * retry_after_s), 1))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    if error.reason is not None:
        headers["x-argosy-dropped-reason"] = error.reason
    return headers


def error_response(raised: Exception, request: Request, metrics: Metrics) -> Response:
    """The reply to a request that failed before its reply began."""
    error = as_error(raised, request.method, request.url.path)
    metrics.count_error(error)
    headers = dict(raised.headers or {}) if isinstance(raised, HTTPException) else {}
    return Response(error_json(error), error.status, headers | error_headers(error), "application/json")
