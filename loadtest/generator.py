"""The part of one process in a run: takes its share of the arrivals, sends them, reports what it saw.

Share i of n takes conversations i, i + n, i + 2n, …; together they send what one process alone would.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import gevent.event
import gevent.pool
import msgspec

from loadtest import stats
from loadtest.arrivals import Arrival, Arrivals
from loadtest.call import Answer, Call, send
from loadtest.failures import CANCELLED, NOT_SENT, RequestFailed
from loadtest.health import Health
from loadtest.http import Pool, Target
from loadtest.plan import Plan
from loadtest.record import GeneratorHealth, Observation, encode_lines
from loadtest.verify import Sample, sample
from loadtest.workloads import Conversation, Workload

REPORT_EVERY_S = 0.5
MAX_UNREPORTED_TIMES = 1000


class Report(msgspec.Struct, kw_only=True):
    """What a process tells the conductor, twice a second."""

    lines: bytes = b""
    num_intended: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_output_tokens: int = 0
    in_flight: int = 0
    ttfts_s: list[float] = []
    """Since the last report, at most 1000; as are gaps."""
    itls_s: list[float] = []
    fingerprints: list[str] = []
    health: GeneratorHealth | None = None
    """In the last report of a run."""
    samples: list[Sample] = []
    """Likewise."""


class Generator:
    """One run in one process."""

    def __init__(self, plan: Plan, share: tuple[int, int], environment: Any, report: Callable[[Report], None]) -> None:
        """share: (number of this process, how many there are); environment: locust's.

        Raises SpecError or OSError when its files are not what the plan needs.
        """
        self.plan = plan
        self.arrivals = Arrivals(plan.arrivals)
        self.workload = Workload(plan)
        self.health = Health()
        self.is_running = gevent.event.Event()
        self._share = share
        self._environment = environment
        self._report = report
        self._start_at = 0.0
        self._pool = Pool(Target(plan.target), timeout_s=plan.timeout_s)
        self._greenlets = gevent.pool.Group()
        self._is_stopping = False
        self._lines: list[Observation] = []
        self._samples: list[Sample] = []
        self._pending = Report()
        self._fingerprints: set[str] = set()
        self._taken = self._mine()

    # --- both loops ------------------------------------------------------------------------------

    def run(self, start_at: float) -> None:
        """The whole run; returns when its last answer is in, or was given up. start_at: time.monotonic()."""
        gc.collect()
        gc.freeze()  # what is there stays there: no pause for looking at it again
        self._start_at = start_at
        gevent.sleep(max(start_at - time.monotonic(), 0))
        watches = [gevent.spawn(self.health.watch), gevent.spawn(self._report_now_and_then)]
        self.is_running.set()
        try:
            if self.arrivals.is_open:
                self._send_all()
            else:
                self._wait_for_users()
            self._greenlets.join(timeout=None if self.plan.drain_s == 0 else self.plan.drain_s)
        finally:
            self._is_stopping = True
            self._greenlets.kill()
            gevent.killall(watches)
            self._pool.close()
            self._pending.health = self.health.state()
            self._pending.samples = self._samples
            self._flush()

    def stop(self) -> None:
        """End early: nothing more is sent, what runs is given up."""
        self._is_stopping = True
        self._greenlets.kill(block=False)

    def _mine(self) -> Iterator[tuple[int, Arrival]]:
        """Conversations of this share that the plan lets begin, in order."""
        number, num_shares = self._share
        arrivals = self.arrivals.times(self.plan.seed) if self.arrivals.is_open else _unlimited()
        for index, arrival in enumerate(arrivals):
            is_over = self.plan.duration_s is not None and arrival.at_s >= self.plan.duration_s
            if is_over or (self.plan.num_requests is not None and index >= self.plan.num_requests):
                return
            if index % num_shares == number:
                yield index, arrival

    def _converse(self, conversation: Conversation, call: Call | None, intended_at: float | None) -> None:
        """A conversation to its end: its first call is ready, the others wait for answers. intended_at: None = now."""
        intended_at = time.monotonic() if intended_at is None else intended_at
        while call is not None:
            answer = Answer(call, intended_at)
            self.health.num_intended += 1
            self.health.sent(max(time.monotonic() - intended_at, 0.0))
            self._pending.num_intended += 1
            self.health.max_in_flight = max(self.health.max_in_flight, len(self._greenlets))
            try:
                send(answer, self._pool, conversation.tenant.headers)
            except gevent.GreenletExit:
                answer.failure = RequestFailed(CANCELLED, "the run ended")
                answer.end_at = time.monotonic()
                self._seen(answer)
                return
            self._seen(answer)
            if answer.failure is not None or self._is_stopping:
                return
            call = conversation.next("".join(answer.text))
            if call is not None:
                intended_at = (answer.end_at or time.monotonic()) + self.plan.think_s
                gevent.sleep(max(intended_at - time.monotonic(), 0))

    def _seen(self, answer: Answer) -> None:
        stats.fire(self._environment, answer)
        self._lines.append(answer.observation(self._start_at, self._share[0]))
        pending = self._pending
        pending.num_done += 1
        pending.num_failed += answer.failure is not None
        if answer.usage is not None:
            pending.num_output_tokens += answer.usage.completion_tokens or 0
        if answer.first_token_at is not None and len(pending.ttfts_s) < MAX_UNREPORTED_TIMES:
            pending.ttfts_s.append(answer.first_token_at - answer.intended_at)
        if len(answer.token_times) > 1 and len(pending.itls_s) < MAX_UNREPORTED_TIMES:
            times = answer.token_times
            pending.itls_s.append((times[-1] - times[0]) / (len(times) - 1))
        if answer.fingerprint and len(self._fingerprints) < 16 and answer.fingerprint not in self._fingerprints:
            self._fingerprints.add(answer.fingerprint)
            pending.fingerprints.append(answer.fingerprint)
        if answer.call.is_verified and answer.failure is None and len(self._samples) < self.plan.max_verified:
            self._samples.append(sample(answer))

    def _report_now_and_then(self) -> None:
        while True:
            gevent.sleep(REPORT_EVERY_S)
            self._flush()

    def _flush(self) -> None:
        pending, self._pending = self._pending, Report()
        lines, self._lines = self._lines, []
        pending.lines = encode_lines(list(lines))
        pending.in_flight = len(self._greenlets)
        self._report(pending)

    # --- open loop -------------------------------------------------------------------------------

    def _send_all(self) -> None:
        """Every arrival at its time, whatever has become of those before it."""
        for index, arrival in self._taken:
            conversation = self.workload.conversation(index, arrival)
            call = conversation.next()  # made ready before its time has come
            intended_at = self._start_at + arrival.at_s
            wait_s = intended_at - time.monotonic()
            if wait_s > 0:
                gevent.sleep(wait_s)
            if self._is_stopping:
                return
            if len(self._greenlets) >= self.plan.limits.max_in_flight:
                self._refuse(call, intended_at)
            else:
                self._greenlets.spawn(self._converse, conversation, call, intended_at)

    def _refuse(self, call: Call | None, intended_at: float) -> None:
        assert call is not None
        answer = Answer(call, intended_at)
        limit = self.plan.limits.max_in_flight
        answer.failure = RequestFailed(NOT_SENT, f"{limit} requests were in flight (--max-in-flight)")
        self.health.num_intended += 1
        self._pending.num_intended += 1
        self._seen(answer)

    # --- closed loop: locust's users are the clients ---------------------------------------------

    def converse(self) -> bool:
        """One user's next conversation, to its end; False when there is none left. Runs in the user's greenlet."""
        taken = None if self._is_stopping else next(self._taken, None)
        late = self.plan.duration_s is not None and time.monotonic() - self._start_at >= self.plan.duration_s
        if taken is None or late:
            return False
        conversation = self.workload.conversation(taken[0])
        greenlet = self._greenlets.spawn(self._converse, conversation, conversation.next(), None)
        greenlet.join()
        if self.arrivals.think_s:
            gevent.sleep(self.arrivals.think_s)
        return True

    def _wait_for_users(self) -> None:
        """Until the users have taken all there is, or time is up."""
        end_at = None if self.plan.duration_s is None else self._start_at + self.plan.duration_s
        while not self._is_stopping and not self._is_exhausted:
            if end_at is not None and time.monotonic() >= end_at:
                return
            gevent.sleep(0.02)

    _is_exhausted = False

    def users_are_done(self) -> None:
        """A user found nothing left to take."""
        self._is_exhausted = True


def _unlimited() -> Iterator[Arrival]:
    while True:
        yield Arrival(0.0)
