"""Stop strings that may span tokens: what may be shown already, and where to stop."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence


class StopSet:
    """The stop strings of one request as an Aho-Corasick automaton (CACM 18, 1975): one step per character,
    however many and however similar the strings are. Immutable; shared by the request's choices."""

    __slots__ = ("children", "depths", "fallbacks", "first", "matches")

    def __init__(self, stops: Iterable[str]) -> None:
        """Raises ValueError for an empty string."""
        self.children: list[dict[str, int]] = [{}]
        self.depths = [0]
        self.matches: list[str | None] = [None]
        self.fallbacks = [0]
        strings = list(dict.fromkeys(stops))
        for stop in strings:
            if not stop:
                raise ValueError("a stop string must not be empty")
            self._add(stop)
        self._link()
        self.first = re.compile(f"[{''.join(map(re.escape, self.children[0]))}]") if strings else None

    def step(self, node: int, character: str) -> int:
        """The node of the longest suffix read so far that begins a stop string."""
        while node and character not in self.children[node]:
            node = self.fallbacks[node]
        return self.children[node].get(character, 0)

    def _add(self, stop: str) -> None:
        node = 0
        for character in stop:
            child = self.children[node].get(character)
            if child is None:
                child = len(self.children)
                self.children[node][character] = child
                self.children.append({})
                self.depths.append(self.depths[node] + 1)
                self.matches.append(None)
                self.fallbacks.append(0)
            node = child
        self.matches[node] = stop

    def _link(self) -> None:
        """Breadth first: a node's fallback is shallower, hence linked before it."""
        queue = deque(self.children[0].values())
        while queue:
            node = queue.popleft()
            fallback = self.fallbacks[node]
            if self.matches[node] is None:  # the longest stop string that ends here; its own comes first
                self.matches[node] = self.matches[fallback]
            for character, child in self.children[node].items():
                self.fallbacks[child] = self.step(fallback, character)
                queue.append(child)


class StopMatcher:
    """Watches the text of one choice.

    The match is the one that is complete first; of several that end together, the longest. How the text is cut
    into pieces makes no difference (C21).
    """

    __slots__ = ("_held", "_include", "_matched", "_node", "_stops")

    def __init__(self, stops: StopSet | Sequence[str], include_in_output: bool = False) -> None:
        self._stops = stops if isinstance(stops, StopSet) else StopSet(stops)
        self._include = include_in_output
        self._node = 0
        self._held = ""  # the last depths[_node] characters
        self._matched: str | None = None

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that was completed or None).

        Held back is the longest suffix that can still become a stop string. After a match nothing is shown.
        """
        if self._matched is not None:
            return "", self._matched
        stops = self._stops
        if stops.first is None or (not self._node and stops.first.search(text) is None):
            return text, None
        node = self._node
        for place, character in enumerate(text):
            node = stops.step(node, character)
            matched = stops.matches[node]
            if matched is not None:
                self._matched = matched
                seen = self._held + text[: place + 1]
                self._held = ""
                return (seen if self._include else seen[: -len(matched)]), matched
        self._node = node
        seen = self._held + text
        cut = len(seen) - stops.depths[node]
        self._held = seen[cut:]
        return seen[:cut], None

    def flush(self) -> str:
        """What was held back, when no more text follows."""
        held, self._held, self._node = self._held, "", 0
        return held
