"""The ring of step records."""

from __future__ import annotations

import numpy as np

from serving.engine.records import RECORD, StepRecords


def record(step: int) -> tuple[float, ...]:
    return (step, 10.0 + step, 0.5, 0.25, 3, 100, 2, 5_000_000_000, 7, 42, 0.125)


def test_it_keeps_the_newest_oldest_first() -> None:
    records = StepRecords(capacity=8)
    assert len(records.last(5)) == 0
    for step in range(21):
        records.append(*record(step))
        newest = records.last(100)["step"].tolist()
        assert newest == list(range(max(0, step - 7), step + 1))
    assert records.last(3)["step"].tolist() == [18, 19, 20]
    assert records.last(0).size == 0


def test_every_field_keeps_its_value() -> None:
    records = StepRecords(capacity=2)
    records.append(*record(3))
    (found,) = records.last(1).tolist()
    assert found == record(3)
    assert len(found) == len(RECORD.names)


def test_what_was_read_does_not_change_under_the_reader() -> None:
    records = StepRecords(capacity=2)
    records.append(*record(0))
    before = records.last(2)
    for step in range(1, 5):
        records.append(*record(step))
    np.testing.assert_array_equal(before["step"], [0])
