"""The record of a run: what is written is what is read, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.record import (
    Chapter,
    Comparison,
    GeneratorHealth,
    Observation,
    RecordError,
    RecordWriter,
    RunEnd,
    RunHeader,
    read_run,
)

HEADER = RunHeader(started_wall_s=1.5e9, target="http://127.0.0.1:1", model="m", seed=7, workload={"kind": "fixed"})
SEEN = Observation(
    id=3,
    intended_s=1.0,
    started_s=1.25,
    sent_s=1.26,
    first_token_s=1.5,
    token_times_s=[1.5, 1.75, 2.5],
    end_s=2.5,
    output_tokens=5,
    status=200,
)


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    lines = [SEEN, Comparison(id=3, is_equal=True), Chapter(name="2/s", at_s=1.0)]
    end = RunEnd(duration_s=3.0, is_valid=False, reasons=["late"], generator=GeneratorHealth(num_sent=1))
    writer = RecordWriter(tmp_path / "run.jsonl", HEADER)
    for line in (*lines, end):
        writer.write(line)
    writer.close()
    run = read_run(tmp_path / "run.jsonl")
    assert run.header == HEADER
    assert [*run.observations, *run.comparisons, *run.chapters] == lines
    assert run.end == end and not run.is_valid


def test_latencies_count_from_the_intended_time() -> None:
    assert SEEN.ttft_s == 0.5
    assert SEEN.e2e_s == 1.5
    assert SEEN.service_s == 1.25
    assert SEEN.itl_s == [0.25, 0.75]
    assert SEEN.tpot_s == 0.25, "by tokens, not by events"
    nothing = Observation(id=0, intended_s=0.0, error="connect")
    assert (nothing.ttft_s, nothing.e2e_s, nothing.itl_s, nothing.tpot_s) == (None, None, [], None)


def test_a_run_that_was_cut_off_is_not_valid(tmp_path: Path) -> None:
    RecordWriter(tmp_path / "run.jsonl", HEADER).close()
    assert not read_run(tmp_path / "run.jsonl").is_valid


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"kind":"request","id":1,"intended_s":0}\n', "does not begin with a run line"),
        ("{\n", ":1:"),
        ('{"kind":"run","format_version":9,"started_wall_s":0,"target":"","model":"","seed":0}\n', "format 9"),
    ],
)
def test_damage_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(RecordError, match=message):
        read_run(path)
