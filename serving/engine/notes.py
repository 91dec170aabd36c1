"""What steps mean for rows beside their tokens: told to their readers, who keep the account of a request's life."""

from __future__ import annotations

from serving.engine.output import StepOutput
from serving.engine.plan import Plan
from serving.engine.request import Request
from serving.engine.rows import Rows
from serving.types import Note


class Notes:
    """Kept from when it happens until a step's output carries it. The step loop's own."""

    def __init__(self) -> None:
        self._admitted: list[tuple[int, int, int]] = []
        self._notes: list[tuple[int, int, Note, int]] = []

    def entered(self, request: Request, num_cached: int) -> None:
        """The request has got a slot; what it waited for is over."""
        if not request.was_admitted:
            request.was_admitted = True
            self._admitted.append((*request.key, num_cached))
        if request.waits_for is not None:
            self._notes.append((*request.key, Note.WAITED, request.waits_for))
            request.waits_for = None

    def preempted(self, request: Request, num_computed: int) -> None:
        self._notes.append((*request.key, Note.PREEMPTED, num_computed))

    def hand_over(self, output: StepOutput, plan: Plan, rows: Rows) -> None:
        """Everything since the last call, and the chunks of the completed `plan`, go out with `output`."""
        output.admitted, self._admitted = self._admitted, []
        output.notes, self._notes = self._notes, []
        is_chunk = plan.num_tokens > 1
        if not is_chunk.any():
            return
        slots = plan.slots[is_chunk]
        columns = (rows.is_live[slots], rows.connection[slots], rows.handle[slots], plan.num_tokens[is_chunk])
        for is_live, connection, handle, count in zip(*(column.tolist() for column in columns), strict=True):
            if is_live:
                output.notes.append((connection, handle, Note.CHUNK, count))
