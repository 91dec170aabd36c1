"""Where every unfinished choice is: in its fingerprint's queue, or on a link to a replica (C1, C2, C22).

Synchronous and without sockets; time comes from the injected clock. The gateway wraps it in `Dispatch`;
a simulation (C18) calls `opened` and `tick` itself and gives it links to simulated replicas.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Callable

from serving.errors import ArgosyError, DeadlineExceeded, EngineError, GenerationTimeout, InvalidRequest, NoCapacity
from serving.gateway import routing
from serving.gateway.deadlines import Deadlines
from serving.gateway.fleet import Fleet
from serving.gateway.link import Cause, Link
from serving.gateway.pulse import Lag
from serving.gateway.queue import Queue
from serving.gateway.streams import Choice, Request
from serving.gateway.ticket import Job, Ticket, settled
from serving.metrics.histogram import LAG_SECONDS, Histogram
from serving.wire import Reject, WireError

logger = logging.getLogger("argosy.gateway")

TICK_S = 0.05
RETRYABLE = frozenset({"draining", "overfull", "no_capacity", "not_granted"})
"""Codes of a Reject that say "not here, not now": the choice goes back to the front of the queue."""
ENGINE_FAULT = "engine_fault"
"""Code of a Reject after unusable logits (F8): another replica may do better, within the bound of D7."""


def _error_classes(root: type[ArgosyError]) -> dict[str, type[ArgosyError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        for code, cls in _error_classes(child).items():
            found.setdefault(code, cls)
    return found


_ERRORS = _error_classes(ArgosyError) | {"request_too_large": InvalidRequest}


@dataclasses.dataclass(slots=True)
class Counts:
    """What happened since the start; the source of metrics."""

    submitted: int = 0  # choices
    started: int = 0  # submits sent, resumes included
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0  # choices of requests that found the queue full
    expired: int = 0
    resumed: int = 0
    rejected: int = 0
    links_ended: Counter[str] = dataclasses.field(default_factory=Counter)  # by cause
    faults: Counter[str] = dataclasses.field(default_factory=Counter)  # by kind, as serving/metrics/labels.py has them


class Placement:
    """Queues, links and journals of one gateway process. Every ticket is in exactly one place."""

    def __init__(
        self,
        *,
        max_queue_len: int,
        queue_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """max_queue_len: choices per fingerprint. queue_timeout_s: the longest wait for a permit.

        jitter: uniform in [0, 1), spreads the Retry-After of those that are refused.
        """
        self.fleet = Fleet()
        self.counts = Counts()
        self.is_closed = False
        self._max_queue_len = max_queue_len
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock
        self._jitter = jitter
        self._orders = itertools.count()
        self._queues: dict[str, Queue] = {}  # by fingerprint
        self._tickets: dict[Choice, Ticket] = {}  # of all unfinished choices
        self._deadlines = Deadlines()
        self._lag = Lag(clock(), TICK_S)
        self.loop_lag = Histogram(LAG_SECONDS)
        self.ready_in_s: Callable[[], float | None] = lambda: None  # until the first replica, which starts now, serves

    def close(self) -> None:
        """Fails what is unfinished and ends all links. Idempotent."""
        self.is_closed = True
        for ticket in list(self._tickets.values()):
            self._fail(ticket, _shutting_down())
        for link in self.fleet.all_links():
            link.end(Cause.CLOSED)

    # --- the API layer's side ---------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queues all choices of the request, or none.

        Raises NoCapacity (with retry_after_s) when the queue is full, DeadlineExceeded when the
        request's deadline has passed already.
        """
        now = self._clock()
        if self.is_closed:
            raise _shutting_down()
        if request.deadline <= now:
            raise DeadlineExceeded("The request's deadline passed before it was queued.", reason="ttl")
        fingerprint = request.card.fingerprint
        queue = self._queue(fingerprint)
        choices = [choice for choice in request.choices if not choice.is_done]
        num_choices = len(choices)
        if len(queue) + num_choices > queue.max_len:
            permits = sum(link.num_permits for link in self.fleet.links(fingerprint) if link.can_take)
            try:
                queue.check_room(num_choices, permits)
            except NoCapacity:
                self.counts.refused += num_choices
                raise
        job = Job(request)
        request.queued_at = now
        expires = min(request.deadline, now + self._queue_timeout_s)
        for choice in choices:
            ticket = Ticket(
                choice=choice,
                job=job,
                order=next(self._orders),
                priority=request.priority,
                enqueued_at=now,
                expires=expires,
            )
            job.tickets.append(ticket)
            self._tickets[choice] = ticket
            self._deadlines.add(ticket)
            self._push(queue, ticket, now)
        self.counts.submitted += num_choices
        self._pump(fingerprint, now)

    def cancel(self, choice: Choice) -> None:
        """See `Dispatcher.cancel`."""
        ticket = self._tickets.get(choice)
        if ticket is not None:
            self.counts.cancelled += 1
            self._forget(ticket)

    def queue_position(self, request: Request) -> tuple[int, float] | None:
        """(position, predicted wait in seconds) of its first choice, 1 = next; None once one has started."""
        best: tuple[int, float] | None = None
        for choice in request.choices:
            ticket = self._tickets.get(choice)
            if ticket is None or ticket.carrier is not None or ticket.goes_first:
                return None
            queue = self._queue(request.card.fingerprint)
            position = queue.position(ticket)
            if best is None or position < best[0]:
                best = position, self.ready_in_s() or queue.wait_s(position)
        return best

    @property
    def num_unfinished(self) -> int:
        """Choices in queues and on links."""
        return len(self._tickets)

    def num_queued(self) -> dict[str, int]:
        """Waiting choices by fingerprint."""
        return {fingerprint: len(queue) for fingerprint, queue in self._queues.items()}

    def waiting(self) -> dict[str, tuple[int, int]]:
        """(choices, prompt and journalled tokens) that wait, by model."""
        found: dict[str, tuple[int, int]] = {}
        for fingerprint, queue in self._queues.items():
            choices, tokens = found.get(model := self.fleet.model(fingerprint), (0, 0))
            found[model] = choices + len(queue), tokens + queue.num_tokens
        return found

    def num_queued_tokens(self) -> dict[str, int]:
        """Prompt and journalled tokens of waiting choices by fingerprint."""
        return {fingerprint: queue.num_tokens for fingerprint, queue in self._queues.items()}

    # --- the links' side (LinkOwner) --------------------------------------------------------------

    def opened(self, link: Link) -> None:
        """A replica has been connected."""
        if link.cause is not None:
            return
        self.fleet.opened(link)
        self._pump(link.card.fingerprint, self._clock())

    def advanced(self, link: Link) -> None:
        """See `LinkOwner`."""
        fingerprint = link.card.fingerprint
        queue = self._queues.get(fingerprint)
        if queue:
            self._pump(fingerprint, self._clock())

    def finished(self, ticket: Ticket) -> None:
        """See `LinkOwner`."""
        self.counts.finished += 1
        self._forget(ticket)

    def rejected(self, link: Link, ticket: Ticket, reject: Reject) -> None:
        """See `LinkOwner`."""
        self.counts.rejected += 1
        now = self._clock()
        if reject.code in RETRYABLE:
            link.refuse_until_beat()
            ticket.choice.life.returned(now, reject.code)
            self._requeue(ticket, ticket.enqueued_at)
        elif reject.code == ENGINE_FAULT:
            self.counts.faults["engine_fault"] += 1
            ticket.job.record_death()
            if ticket.job.is_convicted:
                self._convict(ticket.job, reject.message)
            else:
                ticket.choice.life.lost(now, link.replica, ENGINE_FAULT)
                self._resume(ticket, now)
        else:
            self._fail(ticket, _error_of(reject))
        self._pump(link.card.fingerprint, now)

    def ended(self, link: Link, cause: Cause, tickets: list[Ticket]) -> None:
        """Its choices go on elsewhere, from their journals (C2)."""
        self.fleet.ended(link)
        self.counts.links_ended[cause] += 1
        now = self._clock()
        fingerprint = link.card.fingerprint
        complete: list[Ticket] = []
        for ticket in tickets:
            end = settled(ticket.choice, link.card)
            if end is not None:
                ticket.choice.finish, ticket.choice.stop_token_id = end
                complete.append(ticket)
        if link.state != "draining" and cause is not Cause.CLOSED:
            self.counts.faults[f"replica_{cause}"] += 1
            for job in {ticket.job: None for ticket in tickets if ticket.is_admitted and not ticket.choice.is_done}:
                job.record_death()
        for ticket in tickets:
            if not ticket.choice.is_done:
                ticket.choice.life.lost(now, link.replica, cause)
                self._resume(ticket, now)
        for ticket in complete:
            if not ticket.is_over:
                self.finished(ticket)
                self._report(ticket)
        for job in {ticket.job: None for ticket in tickets}:
            if job.is_convicted:
                self._convict(job)
        self._pump(fingerprint, now)
        if not self._queues.get(fingerprint) and self.fleet.forget(fingerprint):
            self._queues.pop(fingerprint, None)

    # --- time -------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Judges every replica and ends every wait that is over. Called every `TICK_S`."""
        now = self._clock()
        was_late = self._lag.tick(now)
        self.loop_lag.observe(self._lag.late_s)
        for link in self.fleet.all_links():
            if was_late:
                link.pulse.restart(now)
            stall = link.pulse.stall(now)
            if stall is not None:
                link.end(Cause.STALLED, stall)
        for ticket in self._deadlines.due(now):
            if not ticket.is_over:
                self.counts.expired += 1
                self._fail(ticket, self._expiry(ticket, now))

    def _expiry(self, ticket: Ticket, now: float) -> ArgosyError:
        choice, request = ticket.choice, ticket.job.request
        if now >= request.deadline:
            if ticket.carrier is not None or choice.output_ids:
                return GenerationTimeout(f"The request's deadline passed after {len(choice.output_ids)} tokens.")
            return DeadlineExceeded("The request's deadline passed while it was queued.", reason="ttl")
        waited_s = now - ticket.enqueued_at
        queue = self._queue(request.card.fingerprint)
        retry_after_s = min(max(queue.wait_s(len(queue)), 1.0), 30.0)
        if not any(self.fleet.is_fresh(link, now) for link in self.fleet.links(request.card.fingerprint)):
            return NoCapacity(
                f"No replica became available within {waited_s:.0f} s.",
                retry_after_s=self.ready_in_s() or retry_after_s,
                reason="no_endpoints",
            )
        return DeadlineExceeded(
            f"The request was queued for {waited_s:.0f} s, the limit is {self._queue_timeout_s:g} s.",
            retry_after_s=retry_after_s,
            reason="ttl",
        )

    # --- tickets ----------------------------------------------------------------------------------

    def _queue(self, fingerprint: str) -> Queue:
        queue = self._queues.get(fingerprint)
        if queue is None:
            queue = Queue(self._max_queue_len, unknown_wait_s=self._queue_timeout_s, jitter=self._jitter)
            self._queues[fingerprint] = queue
        return queue

    def _pump(self, fingerprint: str, now: float) -> None:
        """Sends what waits to whoever may take it: binding is as late as it can be."""
        queue = self._queue(fingerprint)
        links = self.fleet.links(fingerprint)
        while len(queue):
            link = routing.pick(links)
            if link is None:
                return
            ticket = queue.pop(now)
            try:
                link.submit(ticket)
            except WireError as error:
                self._fail(ticket, EngineError(f"The request cannot be sent to the engine: {error}."))
                continue
            self.counts.started += 1
            if ticket.job.request.started_at is None:
                ticket.job.request.started_at = now
            self._deadlines.move(ticket, ticket.job.request.deadline)

    def _resume(self, ticket: Ticket, now: float) -> None:
        ticket.choice.num_resumes += 1
        self.counts.resumed += 1
        self._requeue(ticket, now)

    def _requeue(self, ticket: Ticket, waits_since: float) -> None:
        """Back to the front, in order of arrival, with a new limit of waiting counted from `waits_since`."""
        now = self._clock()
        ticket.goes_first = True
        ticket.enqueued_at = waits_since
        expires = min(ticket.job.request.deadline, waits_since + self._queue_timeout_s)
        self._deadlines.move(ticket, expires)
        self._push(self._queue(ticket.job.request.card.fingerprint), ticket, now)

    def _push(self, queue: Queue, ticket: Ticket, now: float) -> None:
        queue.push(ticket, now)
        why = self.fleet.why_waiting(ticket.job.request.card.fingerprint)
        ticket.choice.life.queued(now, why, queue.position(ticket), queue.tokens_ahead(ticket))

    def _convict(self, job: Job, why: str = "") -> None:
        """why: what the engine itself says of it, if it could say anything."""
        self.counts.faults["poisonous_request"] += 1
        logger.error("request %s failed %d engine steps. %s", job.request.id, job.num_short_lives, why)
        for ticket in job.tickets:
            if not ticket.is_over:
                said = f"The engine failed on this request, each time that it was tried. {why}".rstrip()
                self._fail(ticket, EngineError(said))

    def _forget(self, ticket: Ticket) -> None:
        """Takes the ticket out of wherever it is; nothing more is reported of it."""
        ticket.is_over = True
        del self._tickets[ticket.choice]
        self._deadlines.discard(ticket)
        if ticket.carrier is not None:
            ticket.carrier.cancel(ticket)
        elif ticket.is_queued:
            self._queue(ticket.job.request.card.fingerprint).discard(ticket, self._clock())

    def _fail(self, ticket: Ticket, error: ArgosyError) -> None:
        if ticket.is_over:
            return
        self.counts.failed += 1
        ticket.choice.error = error
        ticket.choice.life.end(self._clock(), "failed", {"code": error.error_code})
        self._forget(ticket)
        self._report(ticket)

    def _report(self, ticket: Ticket) -> None:
        try:
            ticket.job.request.on_progress(ticket.choice)
        except Exception:  # one request's bug must not stop the others
            logger.exception("on_progress of %s", ticket.job.request.id)


def _shutting_down() -> NoCapacity:
    return NoCapacity("The gateway is shutting down.", retry_after_s=1.0, reason="draining")


def _error_of(reject: Reject) -> ArgosyError:
    cls = _ERRORS.get(reject.code)
    if cls is None:
        return EngineError(reject.message, code=reject.code)
    return cls(reject.message, param=reject.param, code=reject.code)
