"""One request, measured from its arrival to its end."""

from __future__ import annotations

from typing import Protocol

from serving.errors import ArgosyError
from serving.metrics.page import Metrics


class Passage(Protocol):
    """When a request passed the stations before its first token, on the monotonic clock; None = not yet."""

    queued_at: float | None
    started_at: float | None


class RequestMeter:
    """Measures one request. Its times are `time.monotonic`'s, as the passage's are."""

    __slots__ = ("_arrived", "_first_token", "_is_ended", "_last_token", "_metrics", "_model", "_passage", "_series")

    def __init__(self, metrics: Metrics, model: str, arrived: float, passage: Passage) -> None:
        self._metrics = metrics
        self._model = model
        self._series = series = metrics.model(model)
        self._arrived = arrived
        self._passage = passage
        self._is_ended = False
        self._first_token: float | None = None
        self._last_token = arrived
        series.num_waiting += 1

    def on_tokens(self, num_new: int, gap_s: float | None, now: float) -> None:
        """A frame brought tokens of one choice; gap_s: since its previous frame, None for the first."""
        series = self._series
        series.generation_tokens += num_new
        self._last_token = now
        if gap_s is not None:
            series.inter_token_latency.observe(gap_s)
        elif self._first_token is None:
            self._first_token = now
            series.num_waiting -= 1
            series.num_running += 1
            series.time_to_first_token.observe(now - self._arrived)
            if self._passage.started_at is not None:
                series.prefill_time.observe(max(now - self._passage.started_at, 0.0))

    def on_choice_end(self, reason: str, num_resumes: int) -> None:
        self._series.finished[reason] += 1
        self._series.num_resumes += num_resumes

    def on_broken(self, error: ArgosyError) -> None:
        """The reply had begun and ends in an error."""
        self._metrics.count_broken(self._model, error)

    def on_end(self, now: float, prompt_tokens: int, cached_tokens: int, is_disconnect: bool) -> None:
        """The request is over, however it ended. Idempotent."""
        if self._is_ended:
            return
        self._is_ended = True
        series, passage = self._series, self._passage
        if self._first_token is None:
            series.num_waiting -= 1
        else:
            series.num_running -= 1
            series.decode_time.observe(self._last_token - self._first_token)
        if passage.queued_at is not None:
            series.queue_time.observe(max((passage.started_at or now) - passage.queued_at, 0.0))
        series.prompt_tokens += prompt_tokens
        series.cached_tokens += cached_tokens
        series.num_disconnects += is_disconnect
        series.request_latency.observe(now - self._arrived)
