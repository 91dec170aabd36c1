"""Memory of held rows: every byte that is counted is counted off again, and the bound holds."""

from __future__ import annotations

import numpy as np

from serving.engine.held import HeldRow, HeldRows
from serving.engine.output import StepOutput
from serving.engine.translate import held_steps
from serving.types import FinishReason, SamplingParams
from serving.wire import Find, Submit, unpack_logprobs


def held_row(handle: int, first_position: int = 0) -> HeldRow:
    submit = Submit(handle, f"request-{handle}", b"", b"", SamplingParams(), is_keyed=True)
    return HeldRow((1, handle), submit, first_position)


def output(handle: int, token: int, *, logprobs: bytes = b"", is_over: bool = False, fails: bool = False) -> StepOutput:
    return StepOutput(
        step=1,
        connections=np.array([1], np.int32),
        handles=np.array([handle], np.uint32),
        tokens=np.array([token], np.int32),
        logprobs={0: logprobs} if logprobs else {},
        finished=[(1, handle, FinishReason.LENGTH, -1)] if is_over else [],
        admitted=[],
        failed=[(1, handle)] if fails else [],
    )


def test_taking_and_holding_again_counts_once() -> None:
    rows = HeldRows(max_bytes=10_000)
    rows.hold(held_row(1))
    rows.keep(output(1, 7, logprobs=bytes(4000)), 60.0)
    for _ in range(10):
        row = rows.take((1, 1))
        assert row is not None
        rows.hold(row)
    row.until_s = 50.0
    assert rows.expire(now_s=0.0) == []
    rows.keep(output(1, 7, logprobs=bytes(8000)), 60.0)
    assert rows.expire(now_s=0.0) == [row]
    assert len(rows) == 0


def test_many_rows_without_a_token_are_bounded_too() -> None:
    rows = HeldRows(max_bytes=100_000)
    for handle in range(1000):
        rows.hold(held_row(handle))
        rows.orphan((1, handle), 60.0)
    dropped = rows.expire(now_s=0.0)
    assert len(rows) < 200
    assert [row.key[1] for row in dropped] == list(range(len(dropped))), "the oldest go first"


def test_a_failed_row_is_not_held() -> None:
    rows = HeldRows()
    rows.hold(held_row(1))
    rows.keep(output(2, 7, fails=False), 60.0)
    failing = output(1, 7, fails=True)
    rows.keep(failing, 60.0)
    assert len(rows) == 0


def test_a_long_row_comes_in_frames_that_fit() -> None:
    rows = HeldRows()
    row = held_row(1, first_position=100)
    rows.hold(row)
    for token in range(10_000):
        rows.keep(output(1, token, logprobs=token.to_bytes(4, "little"), is_over=token == 9_999), 60.0)
    steps = list(held_steps(row, Find(5, "request-1", 0, 350), step=3, granted=9))
    assert len(steps) == 3
    tokens = [token for step in steps for token in np.frombuffer(step.tokens, "<u4")[1::2].tolist()]
    assert tokens == list(range(250, 10_000))
    packed = [entry for step in steps for _, entry in step.logprobs]
    assert [int.from_bytes(entry, "little") for entry in packed] == tokens
    assert all(index < len(step.tokens) // 8 for step in steps for index, _ in step.logprobs)
    assert [step.finished for step in steps] == [[], [], [(5, FinishReason.LENGTH, -1)]]
    assert unpack_logprobs(packed[0])[1] == []


def test_a_reader_who_has_everything_still_hears_of_the_end() -> None:
    rows = HeldRows()
    row = held_row(1)
    rows.hold(row)
    rows.keep(output(1, 7, is_over=True), 60.0)
    (step,) = held_steps(row, Find(5, "request-1", 0, 1), step=3, granted=9)
    assert step.tokens == b"" and step.finished == [(5, FinishReason.LENGTH, -1)]
