"""Spans of requests, told to an OpenTelemetry collector over OTLP/HTTP. Optional: nothing is imported while it is off.

A request's spans are made at once when its life ends, so tracing costs nothing while tokens flow; a request that is
not sampled costs a random number. What waits for the collector is bounded: a request whose spans find no room is
counted and dropped whole, and a collector that is slow, dead or hangs costs dropped spans and nothing else.

The caller's trace context is W3C's (https://www.w3.org/TR/trace-context/): a valid `traceparent` makes the request a
child of the caller's span, and the caller's decision to sample holds; an invalid one is as if it were absent.
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from starlette.datastructures import Headers

from serving.gateway.life import Life
from serving.gateway.request_log import status_of
from serving.gateway.spans import Part, parts_of

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

logger = logging.getLogger("argosy.tracing")

MAX_WAITING_SPANS: Final = 4096
MAX_BATCH_SPANS: Final = 512
DELAY_S: Final = 1.0  # a span waits for company
EXPORT_TIMEOUT_S: Final = 5.0  # for one batch, retries included
FLUSH_S: Final = 1.0  # for what waits, at the end
COMPLAINT_S: Final = 10.0  # between two lines about dropped spans
MAX_TRACESTATE_CHARS: Final = 512  # what W3C asks to be passed on at least
_MAX_MEMBER_CHARS: Final = 128  # longer ones go first, as W3C asks
_MAX_TRACEPARENT_CHARS: Final = 128
_OPERATIONS: Final = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_TRACES_PATH: Final = "/v1/traces"


def traces_url(endpoint: str) -> str:
    """Where spans are posted: the endpoint, with OTLP's own path when it names none."""
    scheme, _, rest = endpoint.rstrip("/").partition("://")
    return f"{scheme}://{rest}" if "/" in rest else f"{scheme}://{rest}{_TRACES_PATH}"


def bounded_tracestate(header: str) -> str:
    """At most MAX_TRACESTATE_CHARS of a tracestate: long members are left out first, then the last ones."""
    if len(header) <= MAX_TRACESTATE_CHARS:
        return header
    members = [member for member in header.split(",") if len(member) <= _MAX_MEMBER_CHARS]
    kept: list[str] = []
    length = -1
    for member in members:
        length += 1 + len(member)
        if length > MAX_TRACESTATE_CHARS:
            break
        kept.append(member)
    return ",".join(kept)


def caller_of(headers: Headers) -> tuple[str, str]:
    """(traceparent, tracestate) of a request, bounded: it is kept as long as the request's life. Several traceparents
    are none, several tracestates are one."""
    traceparents = headers.getlist("traceparent")
    if len(traceparents) != 1 or len(traceparents[0]) > _MAX_TRACEPARENT_CHARS:
        return "", ""
    return traceparents[0], bounded_tracestate(",".join(headers.getlist("tracestate")))


class Tracing:
    """The way of spans out of one gateway process. `on_end` runs in the event loop, the rest in threads."""

    def __init__(self, endpoint: str, share: float, process: str) -> None:
        """endpoint: of an OTLP/HTTP collector. share: of requests without a caller's decision that are sampled.
        Raises ImportError when the extra `tracing` is not installed."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Its words quote headers, and come once per request; ours are counted.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        version = importlib.metadata.version("argosy")
        resource = {"service.name": "argosy", "service.version": version, "service.instance.id": process}
        self._exporter: SpanExporter = OTLPSpanExporter(endpoint=traces_url(endpoint), timeout=EXPORT_TIMEOUT_S)
        self._counted = _Counting(self._exporter)
        self._processor = BatchSpanProcessor(
            cast("SpanExporter", self._counted),
            max_queue_size=2 * MAX_WAITING_SPANS,  # never reached: `on_end` makes no spans that find no room
            schedule_delay_millis=1000 * DELAY_S,
            max_export_batch_size=min(MAX_BATCH_SPANS, MAX_WAITING_SPANS),
        )
        provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(share)),
            resource=Resource.create(resource),
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("argosy.gateway", version)
        self._propagator = TraceContextTextMapPropagator()
        self._num_made = 0
        self._num_refused = 0  # spans of requests that found no room
        self._num_told = 0
        self._told_at = -COMPLAINT_S

    @property
    def num_dropped(self) -> int:
        """Spans that no collector has."""
        return self._num_refused + self._counted.num_failed

    @property
    def num_exported(self) -> int:
        """Spans that a collector has taken."""
        return self._counted.num_taken - self._counted.num_failed

    def on_end(self, life: Life) -> str:
        """Make the spans of a life that has ended. Returns its trace's id in hex; "" when it is not sampled."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        offset = life.arrived_wall - life.arrived
        span = self._tracer.start_span(
            f"POST {life.endpoint}",
            self._caller(life),
            SpanKind.SERVER,
            start_time=_nanoseconds(life.arrived_wall),
        )
        if not span.is_recording():
            return ""
        parts = parts_of(life)
        if self._num_made - self._counted.num_taken + len(parts) > MAX_WAITING_SPANS:
            self._num_refused += len(parts)
            self._complain()
            return ""
        self._num_made += len(parts)
        span.set_attributes(_attributes(life))
        if life.error is not None and life.error.status >= 500:
            from opentelemetry.trace import Status, StatusCode

            span.set_status(Status(StatusCode.ERROR, life.error.error_code))
        made: dict[int, Any] = {id(parts[0]): span}
        for part in parts[1:]:
            made[id(part)] = self._tracer.start_span(
                part.name,
                set_span_in_context(made[id(part.parent)]),
                start_time=_nanoseconds(offset + part.at),
            )
        for part in parts:
            _fill(made[id(part)], part, offset)
        self._complain()
        return f"{span.get_span_context().trace_id:032x}"

    def _caller(self, life: Life) -> Context:
        from opentelemetry.context import Context

        return self._propagator.extract(dict(zip(("traceparent", "tracestate"), life.trace, strict=True)), Context())

    def _complain(self) -> None:
        now = time.monotonic()
        number = self.num_dropped - self._num_told
        if number and now - self._told_at >= COMPLAINT_S:
            self._num_told, self._told_at = self.num_dropped, now
            logger.warning(
                "%d spans dropped: the collector cannot be reached, refuses them or does not keep up", number
            )

    def close(self) -> None:
        """Hand over what waits, for about FLUSH_S. Blocks: call it in a thread."""
        # The processor's own end may take half a minute, and cannot be told to hurry.
        flushing = threading.Thread(target=self._processor.shutdown, name="flush spans", daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)
        if flushing.is_alive():
            self._exporter.shutdown()  # ends the retries
        self._told_at = -COMPLAINT_S
        self._complain()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _fill(span: Any, part: Part, offset: float) -> None:
    if part.num_points_left_out:
        part.attributes["argosy.events_left_out"] = part.num_points_left_out
    if part.attributes:
        span.set_attributes(part.attributes)
    for name, at, attributes in part.points:
        span.add_event(name, attributes, _nanoseconds(offset + at))
    span.end(_nanoseconds(offset + part.until))


def _attributes(life: Life) -> dict[str, Any]:
    """Of the request's own span: OpenTelemetry's conventions for HTTP and generative AI, and ours beside them."""
    summary = life.summary()
    found: dict[str, Any] = {
        "http.request.method": "POST",
        "http.route": life.endpoint,
        "http.response.status_code": status_of(life),
        "gen_ai.operation.name": _OPERATIONS.get(life.endpoint, life.endpoint),
        "gen_ai.provider.name": "argosy",
        "argosy.request_id": life.request_id,
        "argosy.state": life.state,
        "argosy.stream": life.is_stream,
        "argosy.resumes": summary["num_resumes"],
        "argosy.preemptions": summary["num_preemptions"],
        "argosy.gaps": summary["num_gaps"],
    }
    if life.error is not None:
        found["error.type"] = life.error.error_code
    if life.id:
        found |= {
            "gen_ai.request.model": life.model,
            "gen_ai.response.model": life.model,
            "gen_ai.response.id": life.id,
            "gen_ai.request.choice.count": life.n,
            "gen_ai.usage.input_tokens": life.num_prompt_tokens,
            "gen_ai.usage.output_tokens": life.num_tokens,
            "gen_ai.usage.cache_read.input_tokens": life.cached_tokens,
            "argosy.fingerprint": life.fingerprint,
            "argosy.replica": life.replica,
        }
    reasons = [choice.finish_reason for choice in life.choices]
    if any(reasons):
        found["gen_ai.response.finish_reasons"] = [reason or "unknown" for reason in reasons]
    if "time_to_first_token_s" in summary:
        found["gen_ai.response.time_to_first_chunk"] = summary["time_to_first_token_s"]
    gap = life.longest_gap
    if gap is not None:
        found |= {"argosy.longest_gap_s": gap.seconds, "argosy.longest_gap_cause": gap.cause}
    return found


class _Counting:
    """An exporter that counts what it was given and what of that was lost. Its base class is not imported for this."""

    def __init__(self, exporter: SpanExporter) -> None:
        self.num_taken = 0
        self.num_failed = 0
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        num_failed = len(spans)
        try:
            result = self._exporter.export(spans)
            if result.name == "SUCCESS":
                num_failed = 0
            return result
        finally:
            self.num_failed += num_failed
            self.num_taken += len(spans)

    def shutdown(self) -> None:
        self._exporter.shutdown()
