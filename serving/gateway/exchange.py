"""One request between its client and the data plane: what has changed, and who must be told."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from serving.errors import ArgosyError
from serving.gateway.life import Life
from serving.gateway.rendering import Rendering
from serving.gateway.streams import Choice, Dispatcher, Request
from serving.gateway.wakes import Wakes
from serving.metrics.meter import RequestMeter

DRAIN_BYTES = 16 << 10
"""Rendered at a time: what a client may have unsent stays near one buffer."""


class Exchange:
    """Owns a submitted request until it ends: drains its journals, cancels what nobody reads.

    The data plane calls `_on_progress` once per choice and engine frame. The listener (the reply)
    is then called once, by the loop and not by a task of its own: a token wakes no coroutine.
    """

    def __init__(
        self,
        request: Request,
        renderings: Sequence[Rendering],
        dispatcher: Dispatcher,
        meter: RequestMeter,
        wakes: Wakes,
        life: Life,
    ) -> None:
        self.request = request
        self.renderings = renderings
        self.meter = meter
        self.is_over = False  # every choice has been rendered to its end
        self.has_left = False  # the client is gone: nothing more is rendered
        self.failure: ArgosyError | None = None
        self._life = life
        self._dispatcher = dispatcher
        self._time = time.monotonic  # the data plane's clock; the loop's is cut to milliseconds
        self._wakes = wakes
        self._dirty: deque[Rendering] = deque()
        self._listener: Callable[[], None] = lambda: None
        self._is_awake = False  # the listener's call is due
        self._num_open = len(renderings)
        self._of_choice = {rendering.choice: rendering for rendering in renderings}
        request.on_progress = self._on_progress

    @property
    def has_more(self) -> bool:
        """Whether rendering could go on at once."""
        return bool(self._dirty)

    @property
    def queue_position(self) -> tuple[int, float] | None:
        return self._dispatcher.queue_position(self.request)

    def submit(self) -> None:
        """Queue the choices that want tokens; end the others here. Raises NoCapacity."""
        for rendering in self.renderings:
            if rendering.choice.finish is not None:
                self._mark(rendering)
        if any(choice.finish is None for choice in self.request.choices):
            self._dispatcher.submit(self.request)

    def _on_progress(self, choice: Choice) -> None:
        rendering = self._of_choice[choice]
        num_new = len(choice.output_ids) - rendering.num_known
        if num_new:
            now = self._time()
            grown_at = rendering.grown_at
            self.meter.on_tokens(num_new, None if grown_at is None else now - grown_at, now)
            rendering.grown_at = now
            rendering.num_known += num_new
        if not (rendering.is_dirty or rendering.is_over):
            self._mark(rendering)

    def _mark(self, rendering: Rendering) -> None:
        rendering.is_dirty = True
        self._dirty.append(rendering)
        if not self._is_awake:
            self._is_awake = True
            self._wakes.add(self._call_listener)

    def listen(self, listener: Callable[[], None]) -> None:
        """Have `listener` called soon after anything has changed: once, however much has. It renders
        until nothing is left or its client can take no more."""
        self._listener = listener
        self.wake()

    def wake(self) -> None:
        """Have the listener called soon."""
        if not self._is_awake:
            self._is_awake = True
            self._wakes.add(self._call_listener)

    def _call_listener(self) -> None:
        self._is_awake = False
        self._listener()

    def render(self) -> bytes:
        """About DRAIN_BYTES of events, in order per choice; b"" when nothing shows yet.

        Raises the ArgosyError of a choice that failed, after the events before it; every other
        choice is then cancelled.
        """
        if self.failure is not None:
            self.leave()
            raise self.failure
        dirty = self._dirty
        data = b""
        while dirty and len(data) < DRAIN_BYTES:
            rendering = dirty.popleft()
            event = rendering.drain(DRAIN_BYTES)
            data = data + event if data else event
            if rendering.is_over:
                self._end(rendering)
            elif rendering.has_more:
                dirty.append(rendering)
                if not event:
                    break  # a long stretch that shows nothing: let others run
                continue
            elif rendering.choice.error is not None:
                self.failure = rendering.choice.error
                break
            rendering.is_dirty = False
        if self.failure is not None and not data:
            self.leave()
            raise self.failure
        return data

    def _end(self, rendering: Rendering) -> None:
        self._num_open -= 1
        self.is_over = self._num_open == 0
        choice = rendering.choice
        if not choice.is_done:
            self._dispatcher.cancel(choice)
        reason = rendering.continuation.finish_reason or "unknown"
        self.meter.on_choice_end(reason, choice.num_resumes)
        choice.life.finish(self._time(), reason, rendering.continuation.num_tokens)

    def close(self, is_disconnect: bool, failure: ArgosyError | None = None) -> None:
        """Measure the request's end and close the account of its life. Idempotent.

        failure: what the reply ended in, unless that is `self.failure`.
        """
        choices = self.request.choices
        prompt_tokens = sum(len(choice.prompt_ids) // 4 for choice in choices)
        cached_tokens = sum(choice.cached_tokens or 0 for choice in choices)
        now = self._time()
        self.meter.on_end(now, prompt_tokens, cached_tokens, is_disconnect)
        self._life.end(now, failure or self.failure, has_left=is_disconnect)

    def fail(self, error: ArgosyError) -> None:
        """Have `render` raise this once it has nothing else to show."""
        self.failure = self.failure or error
        self.wake()

    def leave(self) -> None:
        """Nobody reads on: cancel every unfinished choice, now. Idempotent."""
        if not self.has_left:
            self.has_left = True
            for rendering in self.renderings:
                if not rendering.is_over and not rendering.choice.is_done:
                    self._dispatcher.cancel(rendering.choice)
        self.wake()
