"""Whether the generator keeps up. One that does not would measure itself and call it the server."""

from __future__ import annotations

import array
import math
import time
from collections.abc import Sequence

import gevent

from loadtest.plan import Limits
from loadtest.record import GeneratorHealth

TICK_S = 0.01
WINDOW_S = 2.0


class Health:
    """The lags of one process."""

    def __init__(self, window_s: float = WINDOW_S) -> None:
        """window_s: over which the use of the core is averaged; the busiest counts."""
        self._window_s = window_s
        self.num_intended = 0
        self.max_in_flight = 0
        self._send_lags = array.array("f")
        self._loop_lags = array.array("f")
        self._cpu_fraction = 0.0

    def sent(self, lag_s: float) -> None:
        """A request was taken up `lag_s` after it was intended."""
        self._send_lags.append(lag_s)

    def watch(self) -> None:
        """Runs in a greenlet of its own until it is killed: how late does the loop wake, how busy is the core?"""
        window_at, window_cpu = time.monotonic(), time.process_time()
        while True:
            before = time.monotonic()
            gevent.sleep(TICK_S)
            now = time.monotonic()
            self._loop_lags.append(max(now - before - TICK_S, 0.0))
            if now - window_at >= self._window_s:
                cpu = time.process_time()
                self._cpu_fraction = max(self._cpu_fraction, (cpu - window_cpu) / (now - window_at))
                window_at, window_cpu = now, cpu

    def state(self) -> GeneratorHealth:
        send, loop = sorted(self._send_lags), sorted(self._loop_lags)
        return GeneratorHealth(
            num_intended=self.num_intended,
            num_sent=len(send),
            send_lag_p50_s=percentile(send, 50),
            send_lag_p99_s=percentile(send, 99),
            send_lag_max_s=percentile(send, 100),
            loop_lag_p99_s=percentile(loop, 99),
            loop_lag_max_s=percentile(loop, 100),
            cpu_fraction=self._cpu_fraction,
            max_in_flight=self.max_in_flight,
        )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """By nearest rank, of sorted values; 0 when there are none."""
    if not ordered:
        return 0.0
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def worst(states: Sequence[GeneratorHealth]) -> GeneratorHealth:
    """Of several workers: sums of counts, maxima of lags."""
    if not states:
        return GeneratorHealth()
    names = ("send_lag_p50_s", "send_lag_p99_s", "send_lag_max_s", "loop_lag_p99_s", "loop_lag_max_s", "cpu_fraction")
    return GeneratorHealth(
        num_intended=sum(state.num_intended for state in states),
        num_sent=sum(state.num_sent for state in states),
        max_in_flight=sum(state.max_in_flight for state in states),
        **{name: max(getattr(state, name) for state in states) for name in names},
    )


def complaints(state: GeneratorHealth, limits: Limits) -> list[str]:
    """Why a run with this health is not valid; empty when it is."""
    found = []
    if state.num_sent < state.num_intended:
        found.append(f"{state.num_intended - state.num_sent} of {state.num_intended} requests were not sent")
    if state.send_lag_p99_s > limits.max_send_lag_s:
        found.append(
            f"requests left late: 99th percentile {1e3 * state.send_lag_p99_s:.1f} ms, "
            f"limit {1e3 * limits.max_send_lag_s:g} ms"
        )
    if state.loop_lag_p99_s > limits.max_loop_lag_s:
        found.append(
            f"the event loop woke late: 99th percentile {1e3 * state.loop_lag_p99_s:.1f} ms, "
            f"limit {1e3 * limits.max_loop_lag_s:g} ms"
        )
    if state.cpu_fraction > limits.max_cpu:
        found.append(
            f"the generator used {100 * state.cpu_fraction:.0f} % of its core, limit {100 * limits.max_cpu:g} %"
        )
    return found
