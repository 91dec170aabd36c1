"""The step loop: what it tells, what it survives, and that steps in flight overlap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from serving.block_hash import root_hash
from serving.engine.core import EngineCore
from serving.engine.cost import features
from serving.engine.output import StepOutput
from serving.engine.plan import Plan
from serving.engine.request import Request
from serving.engine.runner import StepResult
from serving.engine.scheduler import Scheduler
from serving.types import SamplingParams
from tests.engine.world import FakeRanks, expected_output

PROMPT = [3, 1, 4, 1, 5]


class Step:
    """A submitted step: computed at once, told when `wait` returns."""

    def __init__(self, ids: np.ndarray, wait: Callable[[], None], busy_s: float = 0.0) -> None:
        self._ids, self._wait, self._busy_s = ids, wait, busy_s

    def result(self) -> StepResult:
        self._wait()
        return StepResult(self._ids, {}, self._busy_s)


class Device:
    """An executor like a GPU: steps run one after the other, `step_s` each, and the host does not wait."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.ranks = FakeRanks(4, 128, 64, 4)
        self.step_s = step_s
        self.free_at = 0.0
        self.most_in_flight = self.in_flight = 0
        self.may_end = threading.Event()
        self.may_end.set()
        self.failure: Exception | None = None

    def submit(self, plan: Plan) -> Step:
        ids = self.ranks.run(plan.encode())
        self.free_at = ends_at = max(time.monotonic(), self.free_at) + self.step_s
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

        def wait() -> None:
            self.may_end.wait(10.0)
            if self.failure is not None:
                raise self.failure
            time.sleep(max(0.0, ends_at - time.monotonic()))
            self.in_flight -= 1

        return Step(ids, wait)


class Pipe(Device):
    """Stages of `step_s` each, one after the other; every stage computes another step."""

    def __init__(self, step_s: float, num_stages: int) -> None:
        super().__init__(step_s)
        self.num_stages = num_stages
        self.stages_free_at = [0.0] * num_stages

    def submit(self, plan: Plan) -> Step:
        ids = self.ranks.run(plan.encode())
        at = time.monotonic()
        for stage, free_at in enumerate(self.stages_free_at):
            at = self.stages_free_at[stage] = max(at, free_at) + self.step_s
        return Step(ids, lambda: time.sleep(max(0.0, at - time.monotonic())), busy_s=self.num_stages * self.step_s)


class Loop:
    """A running step loop and what its reader saw."""

    def __init__(self, device: Device, depth: int = 0, host_s: float = 0.0, num_stages: int = 0) -> None:
        self.scheduler = Scheduler(
            max_num_seqs=4,
            max_num_batched_tokens=16,
            max_model_len=128,
            num_blocks=64,
            block_size=4,
            num_stages=num_stages or 1,
            sends_inputs=num_stages > 0,
        )
        self.tokens: list[int] = []
        self.failure: BaseException | None = None
        self.is_over = threading.Event()
        self.host_s = host_s
        self.core = EngineCore(self.scheduler, device, on_output=self._read, on_failure=self._fail, async_depth=depth)

    def __enter__(self) -> Loop:
        self.core.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.core.stop()
        assert not any(thread.name == "step-loop" for thread in threading.enumerate())

    def submit(self, max_tokens: int, handle: int = 1) -> None:
        tokens = np.array(PROMPT, np.int32)
        total = len(PROMPT) + max_tokens
        sampling = SamplingParams(max_tokens=max_tokens)
        request = Request((0, handle), tokens, len(PROMPT), total, sampling, (), 0, root_hash("core", "", b""))
        self.core.call(lambda: self.scheduler.add(request))

    def wait(self) -> None:
        assert self.is_over.wait(10.0), "the loop does not come to an end"

    def _read(self, output: StepOutput) -> None:
        time.sleep(self.host_s)
        self.tokens += output.tokens.tolist()
        if output.finished:
            self.is_over.set()

    def _fail(self, failure: BaseException) -> None:
        self.failure = failure
        self.is_over.set()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_row_is_computed_to_its_end_and_the_loop_rests(depth: int) -> None:
    with Loop(Device(), depth) as loop:
        loop.submit(20)
        loop.wait()
        until(lambda: loop.core.step_started_s is None)
        assert loop.tokens == expected_output(PROMPT, 20)
        assert loop.core.step_age_s == 0.0
        steps = loop.core.num_steps
        time.sleep(0.05)
        assert loop.core.num_steps == steps


def test_an_idle_loop_sleeps() -> None:
    with Loop(Device()) as loop:
        loop.submit(1)
        loop.wait()
        until(lambda: loop.core.step_started_s is None)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1


def test_a_failing_step_is_told_once_and_ends_the_loop() -> None:
    device = Device()
    device.failure = RuntimeError("the device is on fire")
    with Loop(device) as loop:
        loop.submit(5)
        loop.wait()
        assert loop.failure is device.failure
        assert loop.tokens == []


def test_a_failing_reader_ends_the_loop_too() -> None:
    with Loop(Device()) as loop:
        loop.core._on_output = lambda output: 1 / 0
        loop.submit(5)
        loop.wait()
        assert isinstance(loop.failure, ZeroDivisionError)


def test_the_age_of_a_hanging_step_grows_and_others_may_read_it() -> None:
    device = Device()
    device.may_end.clear()
    with Loop(device) as loop:
        loop.submit(3)
        until(lambda: loop.core.step_age_s > 0.2)
        assert loop.core.num_steps == 0 and loop.core.announced_s == 0.25
        device.may_end.set()
        loop.wait()
        until(lambda: loop.core.step_age_s == 0.0)


def test_the_age_of_a_hanging_call_grows_too() -> None:
    """Work between steps, such as taking in a long prompt, is part of the turn that it delays."""
    may_end = threading.Event()
    with Loop(Device()) as loop:
        loop.core.call(lambda: may_end.wait(10.0))  # type: ignore[arg-type, return-value]
        until(lambda: loop.core.step_age_s > 0.2)
        may_end.set()
        until(lambda: loop.core.step_age_s == 0.0)


@pytest.mark.parametrize("depth", [0, 1])
def test_every_step_leaves_a_record_and_feeds_the_cost_model(depth: int) -> None:
    with Loop(Device(step_s=0.005), depth) as loop:
        loop.submit(40)
        loop.wait()
        until(lambda: loop.core.step_started_s is None)
    records = loop.core.records.last(1000)
    assert len(records) == loop.core.num_steps >= 40
    assert records["num_prefill_tokens"].sum() == len(PROMPT)
    assert records["num_decode_tokens"].sum() >= 39
    assert (np.diff(records["step"]) == 1).all() and (np.diff(records["started_s"]) > 0).all()
    assert loop.scheduler.cost_model.is_fitted
    # Steps that overlap are not counted twice: neither as cost nor as time.
    assert 0.004 < np.median(records["duration_s"]) < 0.009
    assert 0.003 < records["announced_s"][-1] < 0.03
    assert loop.core.tokens_per_s > 0


def test_with_a_step_in_flight_the_host_works_while_the_device_does() -> None:
    """20 ms on the device and 20 ms on the host per step: 40 ms in turns, 20 ms overlapped."""
    took = {}
    for depth in (0, 1):
        device = Device(step_s=0.02)
        with Loop(device, depth, host_s=0.02) as loop:
            started = time.monotonic()
            loop.submit(20)
            loop.wait()
            took[depth] = time.monotonic() - started
            assert loop.tokens == expected_output(PROMPT, 20)
        assert device.most_in_flight == depth + 1
    assert took[0] > 20 * 0.04
    assert took[1] < 0.8 * took[0]


def test_a_pipe_is_busy_in_every_stage_and_announces_what_all_stages_take() -> None:
    """Results come every 10 ms, a step takes 40: a step that is alone in the pipe must not look like a stalled one."""
    with Loop(Pipe(0.01, 4), depth=3, num_stages=4) as loop:
        started = time.monotonic()
        for handle in range(4):
            loop.submit(30, handle)
        until(lambda: len(loop.tokens) == 4 * 30)
        took_s = time.monotonic() - started
        assert took_s < 0.6 * 4 * 30 * 0.04, "the rows went through the pipe one after the other"
        assert np.median(loop.core.records.last(60)["duration_s"]) < 0.02
        predicted_s = loop.scheduler.cost_model.predict(features(np.ones(1, np.int32), np.full(1, 30, np.int32)))
        assert 0.03 < predicted_s < 0.06
        assert 0.03 < loop.core.announced_s < 0.06


def test_the_limit_of_a_turn_is_that_of_the_longest_step_in_flight() -> None:
    """The turn that submits a short step waits for the long one before it."""
    device = Device()
    device.may_end.clear()
    with Loop(device, depth=1) as loop:
        cost = iter([0.9, 0.1])
        loop.scheduler.cost_model.predict = lambda step: next(cost, 0.1)  # type: ignore[method-assign]
        loop.submit(20)
        until(lambda: device.in_flight == 2)
        assert loop.core.announced_s == 0.9 and loop.core.limit_s == pytest.approx(2.7)
        device.may_end.set()
        loop.wait()
        assert loop.core.announced_s == 0.1 and loop.core.limit_s == 1.5


def test_stopping_wakes_a_resting_loop_at_once() -> None:
    with Loop(Device()) as loop:
        until(lambda: loop.core.step_started_s is None)
        started = time.monotonic()
    assert time.monotonic() - started < 1.0
