"""One open connection to a replica, above the bytes: rows in flight, permits, journalling of steps.

Knows neither sockets nor the event loop: simulated replicas (C18) drive it with the same messages.
"""

from __future__ import annotations

import enum
import logging
from array import array
from collections.abc import Callable
from typing import Protocol

from serving import wire
from serving.gateway.pulse import Pulse
from serving.gateway.steps import StepLog
from serving.gateway.ticket import Ticket
from serving.types import NO_LOGPROBS, FinishReason, ReplicaStats

logger = logging.getLogger("argosy.gateway")

MAX_HANDLE = (1 << 32) - 1
MAX_ASSET_BYTES = 256 << 20
ROW_TOKENS = 256
"""A row counts in `load` as much as this many prompt tokens that are still to be computed."""


class Cause(enum.StrEnum):
    """Why a link ended."""

    LOST = "lost"  # the socket closed
    STALLED = "stalled"  # no progress (C13)
    FAULTY = "faulty"  # garbage (F8)
    CLOSED = "closed"  # by this gateway, shutting down


class LinkOwner(Protocol):
    """Who hears from a link. Called in the event loop, must not raise."""

    def advanced(self, link: Link) -> None:
        """Permits, state or load may have changed."""
        ...

    def finished(self, ticket: Ticket) -> None:
        """The engine ended the row; its journal is complete. Progress is reported by the link."""
        ...

    def rejected(self, link: Link, ticket: Ticket, reject: wire.Reject) -> None:
        """The submit did not run; the ticket is off the link."""
        ...

    def ended(self, link: Link, cause: Cause, tickets: list[Ticket]) -> None:
        """The link is over and fenced; `tickets` were on it, in order of submission."""
        ...


class Link:
    """Rows of one gateway process on one replica.

    write: sends a frame. abort: drops the connection at once, unsent bytes included. defer: runs a
    function once, later in the same turn of the event loop.
    """

    def __init__(
        self,
        hello: wire.HelloReply,
        owner: LinkOwner,
        *,
        write: Callable[[bytes], None],
        abort: Callable[[], None],
        defer: Callable[[Callable[[], None]], object],
        clock: Callable[[], float],
    ) -> None:
        self.card = hello.card
        self.replica = hello.replica
        self.epoch = hello.epoch
        self.pulse = Pulse(clock())
        self.opened_at = clock()
        self.stats: ReplicaStats | None = None  # the latest heard
        self.steps = StepLog()
        self.cause: Cause | None = None
        self.load = 0  # of this connection's rows, in tokens; see ROW_TOKENS
        self.foreign_load = 0  # of other gateways' rows there, as of the last beat
        self.suspect: Ticket | None = None  # runs here apart from other newcomers (D7)
        self.is_draining = False  # by the word of the directory; beats say it as well
        self._owner = owner
        self._write = write
        self._abort = abort
        self._defer = defer
        self._clock = clock
        self._granted = 0
        self._next_handle = 0
        self._is_refusing = False  # until the next beat, after it took back a permit
        self._rows: dict[int, Ticket] = {}
        self._appends: dict[int, Callable[[int], None]] = {}
        self._cancels: list[int] = []
        self._assets: dict[str, bytearray] = {}  # on their way
        self._asset_waiters: dict[str, list[Callable[[bytes | None], None]]] = {}

    # --- what the router asks ---------------------------------------------------------------------

    @property
    def state(self) -> str:
        """loading | ready | draining, as last heard."""
        beat = self.pulse.last_beat
        if beat is None:
            return "loading"
        return "draining" if self.is_draining and beat.state == "ready" else beat.state

    @property
    def num_permits(self) -> int:
        """Submits that may be sent now. A handle is a submit: `_next_handle` counts what was sent."""
        if self.cause is not None or self._is_refusing or self._next_handle > MAX_HANDLE:
            return 0
        return max(self._granted - self._next_handle, 0)

    @property
    def can_take(self) -> bool:
        """Whether new work may go here now."""
        return self.num_permits > 0 and self.suspect is None and self.state == "ready"

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    # --- towards the replica ----------------------------------------------------------------------

    def submit(self, ticket: Ticket) -> None:
        """Sends the choice with its journal so far (C2). Spends one permit.

        Raises WireError when the choice does not fit into a frame; nothing was sent then.
        """
        choice, request = ticket.choice, ticket.job.request
        frame = wire.encode(
            wire.Submit(
                handle=self._next_handle,
                request_id=request.id,
                prompt_ids=choice.prompt_ids,
                resume_ids=choice.output_ids.tobytes(),
                sampling=choice.sampling,
                priority=request.priority,
                salt=request.salt,
            )
        )
        ticket.carrier = self
        ticket.handle = self._next_handle
        ticket.is_admitted = False
        self._rows[ticket.handle] = ticket
        self._appends[ticket.handle] = choice.output_ids.append
        self._next_handle += 1
        if ticket.job.is_suspect:
            self.suspect = ticket
        ticket.num_uncomputed = ticket.num_prompt_tokens + len(choice.output_ids)
        self.load += ROW_TOKENS + ticket.num_uncomputed
        choice.life.sent(self._clock(), self.replica, len(choice.output_ids))
        self._write(frame)

    def cancel(self, ticket: Ticket) -> None:
        """Frees the row. One frame carries all cancels of a turn of the event loop."""
        self._release(ticket)
        self._cancels.append(ticket.handle)
        if len(self._cancels) == 1:
            self._defer(self._flush_cancels)

    def _flush_cancels(self) -> None:
        handles, self._cancels = self._cancels, []
        if self.cause is None:
            self._write(wire.encode(wire.Cancel(handles)))

    def request_asset(self, name: str, done: Callable[[bytes | None], None]) -> None:
        """Asks for a file of the model card; `done` gets it, or None when the link ends first."""
        if self.cause is not None:
            done(None)
            return
        self._asset_waiters.setdefault(name, []).append(done)
        self._write(wire.encode(wire.AssetRequest(name)))

    def end(self, cause: Cause, detail: str = "") -> None:
        """Fences the replica: nothing it sends from now on is read. Idempotent."""
        if self.cause is not None:
            return
        self.cause = cause
        self._abort()
        level = logging.INFO if cause is Cause.CLOSED else logging.WARNING
        logger.log(level, "replica %s: link %s with %d rows: %s", self.replica, cause, len(self._rows), detail)
        tickets = list(self._rows.values())
        self._rows.clear()
        self._appends.clear()
        self.load = 0
        for ticket in tickets:
            ticket.carrier = None
        waiters, self._asset_waiters = self._asset_waiters, {}
        for done in [done for waiting in waiters.values() for done in waiting]:
            done(None)
        self._assets.clear()
        self._owner.ended(self, cause, tickets)

    # --- from the replica -------------------------------------------------------------------------

    def receive(self, message: wire.FromReplica) -> None:
        """Raises WireError when the replica speaks nonsense; the journals hold none of it."""
        if self.cause is not None:
            return
        if type(message) is wire.Step:
            self._step(message)
        elif type(message) is wire.Beat:
            self.pulse.beat(message, self._clock())
            self.stats = message.stats or self.stats
            self._is_refusing = False
            self._granted = max(self._granted, message.granted)
            others = message.num_running + message.num_waiting - len(self._rows)
            self.foreign_load = max(others, 0) * ROW_TOKENS
            if self._next_handle > MAX_HANDLE and not self._rows:
                self.end(Cause.LOST, "every handle has been used")
                return
            self._owner.advanced(self)
        elif type(message) is wire.Reject:
            self._reject(message)
        elif type(message) is wire.Asset:
            self._asset(message)
        else:
            raise wire.WireError(f"unexpected {type(message).__name__}")

    def _step(self, step: wire.Step) -> None:
        """The hot path: per token one look-up and one append; per changed choice one call."""
        pairs = array("I")
        try:
            pairs.frombytes(step.tokens)
        except ValueError:
            raise wire.WireError(f"step of {len(step.tokens)} bytes: not a multiple of 8") from None
        if len(pairs) % 2:
            raise wire.WireError(f"step of {len(step.tokens)} bytes: not a multiple of 8")
        values = pairs.tolist()
        handles, tokens = values[::2], values[1::2]
        if handles:
            self._check_bounds(max(handles), max(tokens))
        now = self._clock()
        seen = None if step.record is None else self.steps.add(step.step, step.record, now)
        for handle, kind, value in step.notes:
            if seen is not None and (ticket := self._rows.get(handle)) is not None:
                ticket.choice.life.noted(kind, value, seen)
        for handle, cached_tokens in step.admitted:
            self._admit(handle, cached_tokens, now if seen is None else seen.started_at)
        if step.logprobs:
            self._journal_logprobs(step.logprobs, handles)
        appends = self._appends
        for handle, token in zip(handles, tokens, strict=True):
            append = appends.get(handle)
            if append is not None:  # None: cancelled, and the replica does not know yet
                append(token)
        rows, steps = self._rows, self.steps
        changed = [ticket for handle in dict.fromkeys(handles) if (ticket := rows.get(handle)) is not None]
        fault = self._trim(changed)
        if fault is None:
            fault = self._finish(step.finished, changed)
        self._granted = max(self._granted, step.granted)
        if self.suspect is not None and not self.suspect.job.is_suspect:
            self.suspect = None  # it progressed
        for ticket in changed:
            if ticket.is_over:
                continue  # cancelled by a sibling's progress, this very frame
            ticket.choice.life.grew(now, len(ticket.choice.output_ids), steps)
            if ticket.choice.finish is not None:
                self._owner.finished(ticket)
            try:
                ticket.job.request.on_progress(ticket.choice)
            except Exception:  # one request's bug must not cost the others their link
                logger.exception("on_progress of %s", ticket.job.request.id)
        if fault is not None:
            raise wire.WireError(fault)
        self._owner.advanced(self)

    def _check_bounds(self, handle: int, token: int) -> None:
        if handle >= self._next_handle:
            raise wire.WireError(f"step for handle {handle}: never submitted")
        if token >= self.card.tokenizer_size:
            raise wire.WireError(f"token id {token} of {self.card.tokenizer_size}")

    def _admit(self, handle: int, cached_tokens: int, now: float) -> None:
        ticket = self._rows.get(handle)
        if ticket is None:
            return
        if not 0 <= cached_tokens <= ticket.num_prompt_tokens + len(ticket.choice.output_ids):
            raise wire.WireError(f"handle {handle}: {cached_tokens} cached tokens")
        if not ticket.is_admitted:
            ticket.is_admitted = True
            self.load -= ticket.num_uncomputed
            ticket.num_uncomputed = 0
            ticket.choice.life.admitted(now, cached_tokens)
        if ticket.choice.cached_tokens is None:
            ticket.choice.cached_tokens = cached_tokens

    def _journal_logprobs(self, entries: list[tuple[int, bytes]], handles: list[int]) -> None:
        """Checked whole before the first is kept: they stand beside tokens that are not yet journalled."""
        in_order = sorted(entries)
        previous = -1
        for index, packed in in_order:
            if not previous < index < len(handles) or len(packed) % 8 != 4:
                raise wire.WireError(f"logprobs entry {index} of {len(handles)} tokens, {len(packed)} bytes")
            previous = index
        for index, packed in in_order:
            ticket = self._rows.get(handles[index])
            if ticket is not None and ticket.choice.sampling.logprobs != NO_LOGPROBS:
                ticket.choice.logprobs.append(packed)

    def _trim(self, changed: list[Ticket]) -> str | None:
        """Takes back what no correct replica sends, so that the journals stay whole; says what it was."""
        fault = None
        for ticket in changed:
            choice = ticket.choice
            sampling = choice.sampling
            length = len(choice.output_ids)
            keep = min(length, sampling.max_tokens)
            if sampling.logprobs != NO_LOGPROBS:
                keep = min(keep, len(choice.logprobs))
                if len(choice.logprobs) != length:
                    fault = f"handle {ticket.handle}: {len(choice.logprobs)} logprobs for {length} tokens"
                    del choice.logprobs[keep:]
            if keep < length:
                fault = fault or f"handle {ticket.handle}: {length} tokens of {sampling.max_tokens}"
                del choice.output_ids[keep:]
                del choice.logprobs[keep:]
        return fault

    def _finish(self, finished: list[tuple[int, int, int]], changed: list[Ticket]) -> str | None:
        seen = set(changed) if finished else set()
        for handle, reason, stop_token_id in finished:
            ticket = self._rows.get(handle)
            if ticket is None:
                continue
            fault = self._finish_fault(ticket, reason, stop_token_id)
            if fault is not None:
                return fault
            choice = ticket.choice
            choice.finish = FinishReason(reason)
            choice.stop_token_id = stop_token_id
            self._release(ticket)
            if ticket not in seen:
                changed.append(ticket)
        return None

    def _finish_fault(self, ticket: Ticket, reason: int, stop_token_id: int) -> str | None:
        """A row that ended where it should not have: tokens are missing."""
        ids = ticket.choice.output_ids
        if reason == FinishReason.LENGTH:
            total = ticket.num_prompt_tokens + len(ids)
            if len(ids) < ticket.choice.sampling.max_tokens and total < self.card.max_model_len - 1:
                return f"handle {ticket.handle}: ended by length after {len(ids)} tokens"
            return None
        if reason != FinishReason.STOP:
            return f"handle {ticket.handle}: finish reason {reason}"
        if not ids or (stop_token_id != -1 and ids[-1] != stop_token_id):
            return f"handle {ticket.handle}: ended by stop token {stop_token_id}, which is not its last"
        return None

    def _reject(self, reject: wire.Reject) -> None:
        ticket = self._rows.get(reject.handle)
        if ticket is None:
            if reject.handle >= self._next_handle:
                raise wire.WireError(f"reject of handle {reject.handle}: never submitted")
            return
        self._release(ticket)
        self._owner.rejected(self, ticket, reject)

    def _asset(self, piece: wire.Asset) -> None:
        if piece.name not in self._asset_waiters:
            return  # whoever asked has got it already
        if piece.offset == 0:
            self._assets[piece.name] = bytearray()
        data = self._assets.get(piece.name)
        total = piece.total or len(piece.data)
        if data is None or piece.offset != len(data) or len(data) + len(piece.data) > total or total > MAX_ASSET_BYTES:
            raise wire.WireError(f"asset {piece.name!r}: {len(piece.data)} bytes at {piece.offset} of {total}")
        data += piece.data
        if len(data) == total:
            del self._assets[piece.name]
            for done in self._asset_waiters.pop(piece.name):
                done(bytes(data))

    def refuse_until_beat(self) -> None:
        """The replica took back a permit: offer it nothing until it has spoken again."""
        self._is_refusing = True

    def _release(self, ticket: Ticket) -> None:
        del self._rows[ticket.handle]
        del self._appends[ticket.handle]
        self.load -= ROW_TOKENS + ticket.num_uncomputed
        ticket.num_uncomputed = 0
        ticket.carrier = None
        if ticket is self.suspect:
            self.suspect = None
