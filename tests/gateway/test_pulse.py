"""When a replica counts as stalled (C13), on a clock of the test's own."""

from __future__ import annotations

from serving.gateway.pulse import Lag, Pulse
from serving.wire import Beat


def make_beat(*, state: str = "ready", step_age_s: float = 0.0, announced_s: float = 0.1, **fields: int) -> Beat:
    return Beat(
        **{
            "seq": 1,
            "step": 7,
            "num_running": 0,
            "num_waiting": 0,
            "blocks_used": 0,
            "blocks_total": 100,
            "granted": 0,
            **fields,
        },
        state=state,
        step_age_s=step_age_s,
        announced_s=announced_s,
        ranks=[],
    )


def test_silence_is_a_stall_after_a_second_and_a_half() -> None:
    pulse = Pulse(now=10.0)
    assert pulse.stall(11.5) is None
    assert "no beat" in (pulse.stall(11.51) or "")
    pulse.beat(make_beat(), 11.6)
    assert pulse.stall(13.0) is None
    assert pulse.stall(13.2) is not None


def test_a_step_may_take_three_times_what_it_announced() -> None:
    pulse = Pulse(now=0.0)
    for announced_s, age_s, is_stalled in [
        (0.1, 1.4, False),
        (0.1, 1.6, True),
        (0.6, 1.7, False),
        (0.6, 1.9, True),
    ]:
        pulse.beat(make_beat(step_age_s=age_s, announced_s=announced_s), 0.0)
        assert (pulse.stall(0.1) is not None) is is_stalled


def test_a_replica_that_is_loading_may_take_its_time() -> None:
    pulse = Pulse(now=0.0)
    pulse.beat(make_beat(state="loading", step_age_s=60.0), 0.0)
    assert pulse.stall(1.0) is None


def test_a_gateway_that_stood_still_blames_itself() -> None:
    pulse, lag = Pulse(now=0.0), Lag(now=0.0, tick_s=0.025)
    assert not lag.tick(0.025)
    assert not lag.tick(0.29)
    assert lag.tick(3.0)
    pulse.restart(3.0)
    assert pulse.stall(4.4) is None
    assert pulse.stall(4.6) is not None
