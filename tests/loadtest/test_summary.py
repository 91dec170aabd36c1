"""What a run comes to: exact figures of small runs, laws that hold for all, and a million tokens in a moment."""

from __future__ import annotations

import math
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from loadtest.goodput import Objective, within
from loadtest.record import Comparison, Observation, RecordError, RecordWriter, RunEnd
from loadtest.series import over_time
from loadtest.summary import MAX_GROUPS, REST, groups, spread, summarize
from loadtest.table import gather, load
from tests.loadtest.records import make_header, make_run, make_seen, make_stream_of_requests

ANY = Objective()


def test_percentiles_are_values_that_somebody_had() -> None:
    found = spread(np.arange(1.0, 101.0))
    assert (found.count, found.mean, found.p50, found.p90, found.p95, found.p99, found.max) == (
        *(100, 50.5),
        *(50, 90, 95, 99, 100),
    )
    assert spread(np.array([3.0, np.nan, 1.0])).p50 == 1.0
    assert math.isnan(spread(np.array([np.nan])).p99)


def test_figures_of_a_small_run() -> None:
    run = make_run(
        [
            make_seen(0, 0.0, [0.1, 0.2, 0.4], started_s=0.05, cached_tokens=4, num_resumes=2, queue_wait_s=0.03),
            make_seen(1, 1.0, [0.3, 0.4], end_s=3.0),
            make_seen(2, 2.0, error="overloaded", status=503),
        ],
        comparisons=[Comparison(id=0, is_equal=True, num_logprobs=3), Comparison(id=1, is_equal=False, is_failed=True)],
    )
    summary = summarize(run, Objective(ttft_s=0.2, itl_s=0.15, itl_percentile=100))
    whole = summary.all
    assert summary.is_valid and summary.duration_s == 3.0
    assert (whole.num_offered, whole.num_completed, whole.num_good) == (3, 2, 0)
    assert (whole.offered_per_s, whole.completed_per_s) == pytest.approx((1.0, 2 / 3))
    assert (whole.ttft_s.count, whole.ttft_s.p50, whole.ttft_s.max) == pytest.approx((2, 0.1, 0.3))
    assert whole.ttft_service_s.p50 == pytest.approx(0.05)
    assert (whole.itl_s.count, whole.itl_s.max) == pytest.approx((3, 0.2))
    assert sorted([whole.max_gap_s.p50, whole.max_gap_s.max]) == pytest.approx([0.1, 0.2])
    assert (whole.tpot_s.p50, whole.tpot_s.max) == pytest.approx((0.1, 0.15))
    assert (whole.e2e_s.p50, whole.e2e_s.max) == pytest.approx((0.4, 2.0))
    assert (whole.prompt_tokens, whole.output_tokens, whole.cached_tokens) == (30, 5, 4)
    assert (whole.output_tokens_per_s, whole.queue_wait_s.p50) == pytest.approx((5 / 3, 0.03))
    assert (whole.errors, whole.num_resumes, whole.num_resumed) == ({"overloaded": 1}, 2, 1)
    correct = summary.correctness
    assert (correct.num_compared, correct.num_equal, correct.num_failed, correct.num_logprobs) == (1, 1, 1, 3)


@pytest.mark.parametrize(
    ("objective", "num_good"),
    [
        (Objective(), 3),
        (Objective(ttft_s=0.1), 2),
        (Objective(itl_s=0.1, itl_percentile=100), 2),  # the long gap of the second
        (Objective(itl_s=0.1, itl_percentile=90), 3),  # one gap in ten may be longer
        (Objective(itl_s=0.1, itl_percentile=91), 2),
        (Objective(e2e_s=0.5), 2),
        (Objective(ttft_s=0.05), 0),
    ],
)
def test_who_is_within_an_objective(objective: Objective, num_good: int) -> None:
    steady = [0.1 + 0.03125 * i for i in range(11)]
    run = make_run(
        [
            make_seen(0, 0.0, steady),
            make_seen(1, 0.0, [*steady[:-1], steady[-1] + 0.25]),
            make_seen(2, 0.0, end_s=0.3, output_tokens=5, is_stream=False),  # shows its first token at its end
            make_seen(3, 0.0, steady, error="cut_off"),
        ]
    )
    assert within(run.table, objective).sum() == num_good


@pytest.mark.parametrize("wrong", [{"ttft_s": 0}, {"itl_s": -1}, {"e2e_s": math.inf}, {"itl_percentile": 101}])
def test_an_objective_names_what_is_wrong(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Objective(**wrong)


def test_stalled_requests_count_from_when_they_were_due() -> None:
    """A server stops for two seconds under a generator that waits for it: from the actual sends nothing is seen."""
    seen = [make_seen(i, i / 10, [max(2.0 - i / 10, 0.0) + 0.01], started_s=max(i / 10, 2.0)) for i in range(100)]
    whole = summarize(make_run(seen), ANY).all
    assert whole.ttft_service_s.p99 == pytest.approx(0.01)
    assert whole.ttft_s.p90 == pytest.approx(1.01, abs=0.11)
    assert whole.ttft_s.max == pytest.approx(2.01)


@pytest.mark.parametrize("seed", range(5))
def test_laws_that_hold_for_every_run(seed: int) -> None:
    random = np.random.default_rng(seed)
    seen = []
    for i in range(int(random.integers(1, 200))):
        tokens = np.cumsum(random.exponential(0.02, int(random.integers(0, 30)))).tolist()
        error = "timeout" if random.random() < 0.1 else None
        label, tenant = f"class-{random.integers(3)}", f"tenant-{random.integers(2)}"
        at = float(random.uniform(0, 10))
        seen.append(make_seen(i, at, tokens, error=error, label=label, tenant=tenant, is_stream=random.random() < 0.9))
    run = make_run(seen)
    objective = Objective(ttft_s=0.02, itl_s=0.05)
    summary = summarize(run, objective)
    for group in (summary.all, *summary.by_class.values(), *summary.by_tenant.values()):
        assert group.num_good <= group.num_completed <= group.num_offered
        assert group.goodput_per_s <= group.completed_per_s
        assert group.num_completed + sum(group.errors.values()) == group.num_offered
        for row in (group.ttft_s, group.itl_s, group.max_gap_s, group.tpot_s, group.e2e_s):
            ordered = [row.p50, row.p90, row.p95, row.p99, row.max]
            assert row.count == 0 or ordered == sorted(ordered)
    for parts in (summary.by_class, summary.by_tenant):
        if parts:
            assert sum(group.num_offered for group in parts.values()) == len(seen)
            assert sum(group.itl_s.count for group in parts.values()) == summary.all.itl_s.count
    over = over_time(run.table, within(run.table, objective))
    length = float(np.diff(over.edges_s)[0])
    assert over.offered_per_s.sum() * length == pytest.approx(len(seen))
    assert (over.completed_per_s + over.failed_per_s).sum() * length == pytest.approx(len(seen))


def test_in_flight_is_the_time_that_requests_spend() -> None:
    """40 requests, one a second, each waiting 0.5 s and running 2 s: 0.5 wait and 2 run, at all times but the ends."""
    seen = [make_seen(i, float(i), [0.5, 2.5]) for i in range(400)]
    run = make_run(seen)
    over = over_time(run.table, within(run.table, ANY))
    assert over.num_waiting[1:-1] == pytest.approx(0.5, abs=0.02)
    assert over.num_running[1:-1] == pytest.approx(2.0, abs=0.05)
    assert over.ttft_s[99] == pytest.approx(0.5)
    assert over.itl_s[50] == pytest.approx(2.0)


def test_order_of_lines_does_not_matter() -> None:
    seen = [make_seen(i, i / 7, [0.1, 0.2 + i / 100]) for i in range(20)]
    objective = Objective(ttft_s=1, itl_s=0.2)
    first, second = (summarize(make_run(lines), objective) for lines in (seen, seen[::-1]))
    assert msgspec.json.encode(first) == msgspec.json.encode(second)


def test_empty_and_single_runs() -> None:
    empty = summarize(make_run([]), Objective(ttft_s=1, itl_s=1))
    assert empty.all.num_offered == 0 and math.isnan(empty.all.goodput_share) and empty.by_class == {}
    single = summarize(make_run([make_seen(0, 5.0, [0.25])]), Objective(ttft_s=1, itl_s=1))
    assert (single.all.num_good, single.duration_s, single.all.ttft_s.p99) == (1, 0.25, 0.25)
    assert math.isnan(single.all.tpot_s.p50) and math.isnan(single.all.offered_per_s)


def test_a_run_without_an_end_or_with_a_late_generator_is_invalid() -> None:
    cut = gather([make_header(), make_seen(0, 0.0, [0.1])])
    assert summarize(cut, ANY).reasons == ["the record has no end: the run was cut off"]
    late = make_run([make_seen(0, 0.0, [0.1])], is_valid=False)
    assert summarize(late, ANY).reasons == ["the generator lagged"]


def test_thousands_of_classes_are_no_thousands_of_rows() -> None:
    found = groups(np.array([f"class-{i}" for i in range(3000)] + ["big"] * 5, dtype=object))
    assert len(found) == MAX_GROUPS and next(iter(found)) == "big"
    assert sum(int(rows.sum()) for rows in found.values()) == 3005 and found[REST].sum() == 3000 - (MAX_GROUPS - 2)


def test_warm_up_is_left_out() -> None:
    run = make_run([make_seen(i, float(i), [0.1, 0.2 if i < 5 else 0.3]) for i in range(10)]).since(5.0)
    whole = summarize(run, ANY).all
    assert (whole.num_offered, whole.itl_s.count, whole.itl_s.p50) == pytest.approx((5, 5, 0.2))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b'{"kind":"end","duration_s":1,"is_valid":true}\n', "begin with a run line"),
        (b"not json\n", ":1:"),
        (b'{"kind":"run","format_version":99,"started_wall_s":0,"target":"","model":"","seed":0}\n', "format 99"),
    ],
)
def test_files_that_are_no_record(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "record.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=words):
        load(path)


def test_two_hundred_thousand_requests_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    writer = RecordWriter(path, make_header())
    tokens = [0.1, 0.12, 0.14, 0.16, 0.2]
    for i in range(200_000):
        at = i / 100
        writer.write(
            Observation(
                id=i,
                intended_s=at,
                started_s=at,
                first_token_s=at + 0.1,
                token_times_s=[at + token for token in tokens],
                end_s=at + 0.2,
                output_tokens=5,
                label=("chat", "batch")[i % 2],
            )
        )
    writer.write(RunEnd(duration_s=2000, is_valid=True))
    writer.close()
    started = time.process_time()
    run = load(path)
    summary = summarize(run, Objective(ttft_s=0.2, itl_s=0.05))
    over_time(run.table, within(run.table, summary.objective))
    assert time.process_time() - started < 15  # 2 s on a quiet machine
    assert (summary.all.output_tokens, summary.all.itl_s.count) == (1_000_000, 800_000)
    assert summary.all.ttft_s.p99 == pytest.approx(0.1) and summary.all.goodput_share == 1.0


def test_random_runs_have_the_percentiles_that_numpy_finds() -> None:
    run = make_stream_of_requests(500)
    whole = summarize(run, ANY).all
    assert whole.itl_s.p99 == np.quantile(run.table.gap_s, 0.99, method="inverted_cdf")
    assert whole.itl_s.count == 500 * 19
