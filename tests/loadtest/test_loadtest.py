"""`argosy loadtest` with real locust, against a server whose delays are known."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from loadtest.record import Observation
from tests.loadtest.load import Ran, body, fake_server, load, log_of


@pytest.fixture(scope="module")
def fake() -> Iterator[str]:
    with fake_server("--ttft", "0.12", "--itl", "0.03") as url:
        yield url


def rows_of(prefix: Path) -> dict[str, dict[str, str]]:
    """locust's own table, by request type."""
    with open(f"{prefix}_stats.csv", newline="") as file:
        return {row["Type"] or row["Name"]: row for row in csv.DictReader(file)}


def typical(values: list[float]) -> float:
    return statistics.median(values)


def test_known_delays_are_measured_as_they_were_in_the_record_and_in_locusts_tables(fake: str, tmp_path: Path) -> None:
    before = len(log_of(fake))
    ran = load(
        fake, tmp_path, "--arrivals", "constant:10", "--requests", "20", "--output-tokens", "12",
        *body(comment="queue position=3 wait_s=1.2"), "--locust", f"--csv {tmp_path}/locust",
    )  # fmt: skip
    assert ran.code == 0 and ran.run.is_valid, ran.output
    seen = sorted(ran.run.observations, key=lambda one: one.intended_s)
    assert len(seen) == 20 and all(one.output_tokens == 12 and one.prompt_tokens == 128 for one in seen)
    assert typical([one.ttft_s or 0 for one in seen]) == pytest.approx(0.12, abs=0.004)
    gaps = [gap for one in seen for gap in one.itl_s]
    assert len(gaps) == 20 * 11
    assert typical(gaps) == pytest.approx(0.03, abs=0.002)
    # Token by token against the times at which the server wrote, on the same clock.
    writes = [entry["writes"] for entry in log_of(fake)[before:]]
    by_id = {entry.server_id: entry for entry in seen}
    offsets = []
    for at, times in enumerate(writes, before + 1):
        mine = by_id[f"fake-{at}"].token_times_s
        offsets += [later - earlier for earlier, later in zip(times, mine, strict=True)]
    assert typical([abs(offset - typical(offsets)) for offset in offsets]) < 0.002
    rows = rows_of(tmp_path / "locust")
    assert int(rows["Aggregated"]["Request Count"]) == int(rows["E2E"]["Request Count"]) == 20
    assert int(rows["ITL"]["Request Count"]) == 220
    assert float(rows["ITL"]["Average Response Time"]) == pytest.approx(1e3 * statistics.fmean(gaps), abs=0.01)
    assert float(rows["TTFT"]["Average Response Time"]) == pytest.approx(
        1e3 * statistics.fmean([one.ttft_s or 0 for one in seen]), abs=0.01
    )
    assert float(rows["TPOT"]["Median Response Time"]) == pytest.approx(30, abs=2)
    assert float(rows["TOKENS-OUT"]["Average Response Time"]) == 12
    assert {(one.queue_position, one.queue_wait_s, one.num_comments) for one in seen} == {(3, 1.2, 1)}
    assert float(rows["QUEUE"]["Average Response Time"]) == 1200


def test_a_stall_shows_in_every_request_that_was_due_during_it(tmp_path: Path) -> None:
    """The server freezes for 2 s. A closed loop would see one slow request; those not sent meanwhile are the ones that
    users would have waited in."""
    with fake_server("--stall-at", "1.0", "--stall-for", "2.0") as url:
        ran = load(url, tmp_path, "--arrivals", "constant:20", "--requests", "80", "--output-tokens", "1")
    assert ran.run.is_valid, ran.output
    slow = [one for one in ran.run.observations if (one.ttft_s or 0) > 0.5]
    assert 25 <= len(slow) <= 35, "20 requests/s were due in the 1.5 s that were more than 0.5 s before its end"
    assert max(one.ttft_s or 0 for one in slow) == pytest.approx(2.0, abs=0.25)
    in_order = sorted(slow, key=lambda one: one.intended_s)
    assert all((one.ttft_s or 0) > (two.ttft_s or 0) for one, two in pairwise(in_order)), "later ones waited less"


def test_a_trace_is_replayed_at_its_times(fake: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    times = [round(n * 0.02 + (0.007 if n % 2 else 0.0), 4) for n in range(150)]
    trace.write_text(
        "".join(
            f'{{"timestamp": {at}, "input_length": {n % 9 + 1}, "output_length": 1}}\n' for n, at in enumerate(times)
        )
    )
    ran = load(fake, tmp_path, "--arrivals", f"trace:{trace}", "--whole", *body(ttft=0.0))
    assert ran.run.is_valid, ran.output
    seen = sorted(ran.run.observations, key=lambda one: one.id)
    assert [one.prompt_tokens for one in seen] == [n % 9 + 1 for n in range(150)]
    assert [one.intended_s for one in seen] == pytest.approx(times, abs=1e-6)
    off = [abs((one.sent_s or 0) - at) for one, at in zip(seen, times, strict=True)]
    assert typical(off) < 0.01 * times[-1]
    elapsed = (seen[-1].sent_s or 0) - (seen[0].sent_s or 0)
    assert elapsed == pytest.approx(times[-1] - times[0], rel=0.01)


def test_200_streams_of_20_tokens_per_second_keep_one_core_idle_enough(tmp_path: Path) -> None:
    with fake_server("--ttft", "0.1", "--itl", "0.05") as url:
        for attempt in range(3):  # neighbours of this machine can stop any process for longer than the limit
            ran = load(
                url, tmp_path / str(attempt), "--arrivals", "constant:100", "--requests", "200",
                "--prompt-tokens", "8", "--output-tokens", "60", cores="1", is_strict=True,
            )  # fmt: skip
            if ran.run.is_valid:
                break
    assert ran.run.is_valid and ran.code == 0, ran.output
    seen = ran.run.observations
    assert all(one.is_ok and len(one.token_times_s) == 60 for one in seen)
    assert max(sum((one.sent_s or 0) < at < (one.end_s or 0) for one in seen) for at in (2.0, 2.3, 2.6)) == 200
    assert typical([gap for one in seen for gap in one.itl_s]) == pytest.approx(0.05, abs=0.005)


def test_beyond_what_it_can_the_generator_says_so(fake: str, tmp_path: Path) -> None:
    ran = load(
        fake, tmp_path, "--arrivals", "constant:8000", "--requests", "4000", "--whole",
        "--prompt-tokens", "500", "--output-tokens", "1", *body(ttft=0.0), cores="1", is_strict=True,
    )  # fmt: skip
    assert ran.code == 3 and not ran.run.is_valid
    assert ran.run.end is not None and any("left late" in reason for reason in ran.run.end.reasons)
    assert "not valid" in ran.output
    assert len(ran.run.observations) == 4000, "it is late, and loses nothing"


def test_requests_beyond_the_room_for_them_are_counted_and_not_sent(fake: str, tmp_path: Path) -> None:
    ran = load(fake, tmp_path, "--arrivals", "constant:50", "--requests", "20", "--max-in-flight", "5", *body(ttft=0.6))
    assert ran.code == 3
    errors = [one.error for one in ran.run.observations]
    assert errors.count("not_sent") == 15 and len(errors) == 20


def test_failures_are_told_apart(fake: str, tmp_path: Path) -> None:
    cases: dict[str, dict[str, object]] = {
        "http_503": {"status": 503},
        "reset": {"cut_after": 3, "itl": 0.01},
        "truncated": {"cut_after": 3, "itl": 0.01, "is_clean": True},
    }

    def run(case: tuple[str, dict[str, object]]) -> None:
        error, fake_body = case
        out = tmp_path / error
        csv_flags = ("--locust", f"--csv {out}/locust")
        ran = load(fake, out, "--users", "2", "--requests", "3", *body(**fake_body), *csv_flags)
        assert ran.code == 1, "nothing succeeded"
        assert {one.error for one in ran.run.observations} == {error}
        assert error != "http_503" or {one.error_detail for one in ran.run.observations} == {"fake_error no"}
        with open(out / "locust_failures.csv", newline="") as file:
            (row,) = csv.DictReader(file)
        assert error in row["Error"] and row["Occurrences"] == "3"

    with ThreadPoolExecutor() as threads:
        list(threads.map(run, cases.items()))


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    from loadtest import command

    assert command.main(["--target", "http://127.0.0.1:9", "--requests", "1", "--out", str(tmp_path)]) == 2


def test_the_same_seed_sends_the_same_requests_with_one_process_or_two(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one sk-1\ntwo sk-2\n")
    flags = [
        "--arrivals",
        "poisson:40",
        "--requests",
        "40",
        "--endpoint",
        "mixed",
        "--sampling",
        "mixed",
        "--turns",
        "2",
    ]
    flags += ["--stream-share", "0.5", "--prompt-tokens", "uniform:min=10,max=40", "--api-keys", str(keys)]

    def run(name: str, *more: str) -> tuple[Ran, list[tuple[str, str, str]]]:
        with fake_server("--keep-bodies") as url:
            ran = load(url, tmp_path / name, *flags, *more)
            return ran, [(entry["headers"]["authorization"], entry["path"], entry["body"]) for entry in log_of(url)]

    with ThreadPoolExecutor() as threads:
        first, second = threads.submit(run, "a"), threads.submit(run, "b", "--workers", "2")
        (alone, sent), (two, again) = first.result(), second.result()
    other = load_hashes(alone.run.observations), load_hashes(two.run.observations)
    assert len(alone.run.observations) == 80 and other[0] == other[1]
    assert sorted(sent) == sorted(again), "byte for byte, probes included"
    assert {one.worker for one in two.run.observations} == {0, 1} and two.run.header.num_workers == 2
    assert all(one.prompt_tokens == one.wanted_prompt_tokens for one in alone.run.observations)
    assert b"sk-" not in (tmp_path / "a" / "loadtest.jsonl").read_bytes()


def load_hashes(observations: list[Observation]) -> dict[int, str]:
    return {one.id: one.request_hash for one in observations}


def test_requests_sent_again_alone_are_compared(tmp_path: Path) -> None:
    flags = ("--users", "4", "--requests", "12", "--output-tokens", "5", "--verify", "0.5")

    def run(name: str, *server_flags: str) -> Ran:
        with fake_server(*server_flags) as url:
            return load(url, tmp_path / name, *flags)

    with ThreadPoolExecutor() as threads:
        first, second = threads.submit(run, "good"), threads.submit(run, "bad", "--drift")
        good, bad = first.result(), second.result()
    assert good.run.comparisons and all(one.is_equal and one.num_logprobs == 5 for one in good.run.comparisons)
    assert bad.code == 1 and len(bad.run.comparisons) == len(good.run.comparisons)
    assert all(one.difference.startswith("token 0: logprob") for one in bad.run.comparisons)


def test_a_search_for_the_knee_makes_runs_and_reports_them(fake: str, tmp_path: Path) -> None:
    from loadtest import command

    flags = ["--target", fake, "--out", str(tmp_path), "--rate", "10", "--max-rate", "10", "--duration", "1"]
    flags += ["--output-tokens", "2", "--slo-ttft", "5", "--max-send-lag", "1", "--max-loop-lag", "1"]
    assert command.main(["knee", *flags]) == 0
    assert (tmp_path / "00-10" / "loadtest.jsonl").exists()
    assert "knee" in (tmp_path / "report.json").read_text()
    assert command.main(["knee", "--rate", "1", "--duration", "1"]) == 2, "no promise to hold"
