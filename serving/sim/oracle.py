"""What somebody who knows the day would do: arrivals, lengths, failures and start-up times, all of them beforehand.

Found by search, not proved to be the best: from the slots that the rows will hold, minute by minute, replicas are added
where most choices would be late until enough are on time.
"""

from __future__ import annotations

import math
from typing import Final

from serving.sim.day import BEGINS, Day, Outcome, Service
from serving.sim.scalers import Schedule
from serving.sim.trace import Trace

MINUTE_S: Final = 60.0
MAX_ROUNDS: Final = 8


def oracle(trace: Trace, service: Service, *, attainment: float = 0.99, max_rounds: int = MAX_ROUNDS) -> Outcome:
    """The day under the cheapest schedule that was found; the last one tried where none is good enough."""
    minutes = _busy_minutes(trace, service)
    lead_s = service.start_s * service.start_spread[1]
    while True:
        schedule = Schedule(minutes, lead_s=lead_s, begins=BEGINS)
        outcome = Day(trace, service, schedule, first=max(minutes[0], 1)).run()
        max_rounds -= 1
        too_many = outcome.num_late - int((1.0 - attainment) * len(outcome.waits))
        if too_many <= 0 or not max_rounds:
            return outcome
        for minute, num_late in sorted(outcome.late_minutes.items(), key=lambda entry: -entry[1]):
            _raise(minutes, minute, num_late, service)
            too_many -= num_late
            if too_many <= 0:
                break


def _busy_minutes(trace: Trace, service: Service) -> list[int]:
    """Replicas that would hold the rows of each minute if none ever waited."""
    engine = service.engine
    busy_s = [0.0] * (math.ceil(trace.duration_s / MINUTE_S) + 1)
    for arrival in trace.arrivals:
        begin, end = arrival.at, arrival.at + engine.full_row_s(arrival.prompt, arrival.output)
        while begin < end and (minute := int(begin / MINUTE_S)) < len(busy_s):
            until = min(end, (minute + 1) * MINUTE_S)
            busy_s[minute] += until - begin
            begin = until
    needed = [math.ceil(seconds / MINUTE_S / engine.slots) for seconds in busy_s]
    return [min(max(count, service.min_replicas), service.max_replicas) for count in needed]


def _raise(minutes: list[int], minute: int, num_late: int, service: Service) -> None:
    """More replicas in a minute and in the one before it, from which its queue may come."""
    more = max(math.ceil(num_late / (2.0 * service.engine.slots)), 1)
    for at in (minute - 1, minute):
        if 0 <= at < len(minutes):
            minutes[at] = min(minutes[at] + more, service.max_replicas)
