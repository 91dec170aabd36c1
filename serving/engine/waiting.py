"""Requests without a slot, first served first; siblings of a prompt stand aside (C8)."""

from __future__ import annotations

import heapq

from serving.block_hash import BlockHash
from serving.engine.request import Phase, Request
from serving.engine.rows import rank


class WaitingQueue:
    """A heap by (priority, arrival). Cancelled entries are dropped lazily, at O(1) amortised.

    When several requests share a prompt that is not cached yet, the first to run is the *leader*;
    the others stand aside until it has committed the prompt's blocks, and then hit the cache.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, Request]] = []
        self._count = 0
        self._leaders: dict[BlockHash, Request] = {}
        self._followers: dict[BlockHash, list[Request]] = {}

    def __len__(self) -> int:
        """Waiting requests, those standing aside included."""
        return self._count

    def push(self, request: Request) -> None:
        request.phase = Phase.WAITING
        self._count += 1
        heapq.heappush(self._heap, (rank(request), request))

    def peek(self) -> Request | None:
        """The request to serve next, unless all stand aside."""
        while self._heap:
            request = self._heap[0][1]
            if request.phase is Phase.WAITING:
                return request
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Request:
        """Take out what `peek` returned, to run."""
        request = heapq.heappop(self._heap)[1]
        request.phase = Phase.RUNNING
        self._count -= 1
        return request

    def drop(self, request: Request) -> None:
        """The request is cancelled."""
        request.phase = Phase.DONE
        self._count -= 1
        if len(self._heap) > 2 * self._count + 64:
            self._heap = [entry for entry in self._heap if entry[1].phase is Phase.WAITING]
            heapq.heapify(self._heap)

    def lead(self, request: Request, prompt: BlockHash) -> None:
        """`request` runs and will commit the blocks up to `prompt`."""
        slower = self._leaders.get(prompt)
        if slower is not None:  # of lower priority; its followers go on with the new one
            slower.leads = None
        request.leads = prompt
        self._leaders[prompt] = request
        self._followers.setdefault(prompt, [])

    def has_leader(self, request: Request, prompt: BlockHash) -> bool:
        """Whether a sibling computes `prompt` already, and is not served after `request`."""
        leader = self._leaders.get(prompt)
        return leader is not None and leader.priority >= request.priority

    def stand_aside(self, prompt: BlockHash) -> None:
        """What `peek` returned waits for the leader of `prompt`."""
        self._followers[prompt].append(heapq.heappop(self._heap)[1])

    def release_followers(self, leader: Request) -> None:
        """The leader has committed its prompt, or has left: its siblings compete again."""
        if leader.leads is None:
            return
        del self._leaders[leader.leads]
        for request in self._followers.pop(leader.leads):
            if request.phase is Phase.WAITING:
                heapq.heappush(self._heap, (rank(request), request))
        leader.leads = None
