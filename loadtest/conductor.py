"""The part of a run that there is once: gives out the shares, writes the record, judges, compares, ends it.

It lives in locust's master, or in the only process, and speaks with the generators through locust's messages:

    argosy_plan   conductor -> generators   the plan and everybody's share
    argosy_ready  generator -> conductor    files read, or why not
    argosy_go     conductor -> generators   the time of second 0
    argosy_report generator -> conductor    what it saw; the last one holds its health
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, TextIO

import gevent
import msgspec
from locust.stats import CSV_STATS_INTERVAL_SEC

from loadtest import plan as plans
from loadtest.arrivals import Arrivals
from loadtest.generator import Report
from loadtest.health import complaints, percentile, worst
from loadtest.http import Pool, Target
from loadtest.plan import Plan
from loadtest.record import Comparison, GeneratorHealth, RecordWriter, RunEnd, RunHeader
from loadtest.tenants import Tenants
from loadtest.verify import Sample, again

LOG = logging.getLogger("argosy.loadtest")
LEAD_S = 0.3
"""From argosy_go to second 0: every generator has heard by then."""
MAX_READY_S = 120.0
RECENT = 2000

EXIT_OK, EXIT_FAILED, EXIT_INVALID = 0, 1, 3


class Conductor:
    """One after another, the runs of a locust master or of a lone process."""

    def __init__(self, environment: Any, plan: Plan, progress: TextIO | None) -> None:
        """progress: gets a JSON line twice a second; None = nobody looks."""
        self._environment = environment
        self._plan = plan
        self._progress = progress
        self._num_runs = 0
        self._shares: dict[str, tuple[int, int]] = {}
        self._is_over = True
        runner = environment.runner
        runner.register_message("argosy_ready", self._on_ready)
        runner.register_message("argosy_report", self._on_report)
        environment.events.test_start.add_listener(self._on_test_start)
        environment.events.test_stopping.add_listener(self._on_stopping)
        environment.events.quitting.add_listener(self._on_stopping)

    # --- the stages of a run ---------------------------------------------------------------------

    def _on_test_start(self, **_: Any) -> None:
        runner, plan = self._environment.runner, self._plan
        workers = sorted(getattr(runner, "clients", None) or ["local"])
        self._shares = {name: (at, len(workers)) for at, name in enumerate(workers)}
        self._ready: set[str] = set()
        self._ended: dict[str, GeneratorHealth] = {}
        self._problems: list[str] = []
        self._samples: list[Sample] = []
        self._fingerprints: list[str] = []
        self._counts = dict.fromkeys(("intended", "done", "failed", "tokens"), 0)
        self._in_flight: dict[str, int] = {}
        self._ttfts: list[float] = []
        self._itls: list[float] = []
        self._start_at = time.monotonic()
        self._end_at: float | None = None  # before comparisons
        self._has_begun = False
        self._is_over = False
        self._stage = "preparing"
        self._num_runs += 1
        path = Path(plan.record)
        if self._num_runs > 1:  # started again in the web page
            path = path.with_stem(f"{path.stem}-{self._num_runs}")
        self._writer: RecordWriter | None = None
        self._path = path
        gevent.spawn(self._watch)
        runner.send_message("argosy_plan", {"plan": plans.encode(plan), "shares": self._shares})

    def _on_ready(self, environment: Any, msg: Any, **_: Any) -> None:
        if self._is_over or msg.data["worker"] not in self._shares:
            return
        if msg.data["problem"]:
            self._problems.append(msg.data["problem"])
            gevent.spawn(self._finish)
            return
        self._ready.add(msg.data["worker"])
        if len(self._ready) == len(self._shares) and not self._has_begun:
            self._begin()

    def _begin(self) -> None:
        start_wall = time.time() + LEAD_S
        self._start_at = time.monotonic() + LEAD_S
        self._has_begun = True
        self._stage = "running"
        self._writer = RecordWriter(self._path, header_of(self._plan, start_wall, len(self._shares)))
        self._environment.runner.send_message("argosy_go", {"start_wall": start_wall})

    def _on_report(self, environment: Any, msg: Any, **_: Any) -> None:
        worker = msg.data["worker"]
        if self._is_over or self._writer is None or worker not in self._shares:
            return
        report = msgspec.msgpack.decode(msg.data["report"], type=Report)
        self._writer.write_encoded(report.lines)
        self._writer.flush()
        counts = self._counts
        counts["intended"] += report.num_intended
        counts["done"] += report.num_done
        counts["failed"] += report.num_failed
        counts["tokens"] += report.num_output_tokens
        self._in_flight[worker] = report.in_flight
        self._ttfts = (self._ttfts + report.ttfts_s)[-RECENT:]
        self._itls = (self._itls + report.itls_s)[-RECENT:]
        self._fingerprints += [name for name in report.fingerprints if name not in self._fingerprints]
        self._samples += report.samples
        if report.health is not None:
            self._ended[worker] = report.health
            if len(self._ended) == len(self._shares):
                gevent.spawn(self._finish)

    def _watch(self) -> None:
        """Progress, twice a second; and workers that vanish."""
        began_at = time.monotonic()
        while not self._is_over:
            self._say()
            clients = getattr(self._environment.runner, "clients", None)
            if clients is not None:
                lost = [
                    name for name in self._shares
                    if name not in self._ended and (name not in clients or clients[name].state == "missing")
                ]  # fmt: skip
                if lost:
                    self._problems.append(f"{len(lost)} of {len(self._shares)} workers were lost")
                    self._finish()
                    return
            if not self._has_begun and time.monotonic() - began_at > MAX_READY_S:
                self._problems.append(f"workers were not ready after {MAX_READY_S:g} s")
                self._finish()
                return
            gevent.sleep(0.5)

    def _on_stopping(self, **_: Any) -> None:
        if not self._is_over:
            self._problems.append("stopped before its end")
            self._close()

    def _finish(self) -> None:
        """All generators have ended: compare, close the record, end locust unless its page goes on."""
        if self._is_over or self._stage == "comparing":
            return
        if self._writer is not None and not self._problems:
            self._compare()
        self._close()
        options = self._environment.parsed_options
        if options.csv_prefix:
            gevent.sleep(CSV_STATS_INTERVAL_SEC + 0.1)  # its writer looks once in this time
        if options.headless:
            self._environment.runner.quit()
        else:
            self._environment.runner.stop()

    def _compare(self) -> None:
        assert self._writer is not None
        self._stage = "comparing"
        self._end_at = time.monotonic()
        self._comparisons: list[Comparison] = []
        tenants, pool = Tenants(self._plan.keys_file), Pool(Target(self._plan.target), timeout_s=self._plan.timeout_s)
        for before in sorted(self._samples, key=lambda taken: taken.call.id)[: self._plan.max_verified]:
            if self._is_over:
                return
            comparison = again(before, pool, tenants)
            if not self._is_over:
                self._comparisons.append(comparison)
                self._writer.write(comparison)
        pool.close()

    def _close(self) -> None:
        """Judge the run and write its last line. Once."""
        self._is_over = True
        health = worst(list(self._ended.values()))
        reasons = self._problems + (complaints(health, self._plan.limits) if self._ended else [])
        if self._writer is not None:
            end = RunEnd(
                duration_s=max((self._end_at or time.monotonic()) - self._start_at, 0.0),
                is_valid=not reasons,
                reasons=reasons,
                generator=health,
                fingerprints=self._fingerprints[:16],
            )
            self._writer.write(end)
            self._writer.close()
        has_failed = self._writer is None or self._counts["done"] == self._counts["failed"]
        has_failed |= any(not comparison.is_equal for comparison in getattr(self, "_comparisons", ()))
        self._environment.process_exit_code = EXIT_INVALID if reasons else EXIT_FAILED if has_failed else EXIT_OK
        for reason in reasons:
            LOG.warning("the run is not valid: %s", reason)
        self._stage = "over"
        self._say(reasons)

    def _say(self, reasons: list[str] | None = None) -> None:
        if self._progress is None:
            return
        ttfts, itls = sorted(self._ttfts), sorted(self._itls)
        line = {
            "stage": self._stage,
            "elapsed_s": max(time.monotonic() - self._start_at, 0.0) if self._has_begun else 0.0,
            **self._counts,
            "in_flight": sum(self._in_flight.values()),
            "ttft_s": [percentile(ttfts, 50), percentile(ttfts, 99)] if ttfts else None,
            "itl_s": [percentile(itls, 50), percentile(itls, 99)] if itls else None,
            "record": str(self._path),
            "reasons": reasons or [],
        }
        try:
            self._progress.write(json.dumps(line) + "\n")
            self._progress.flush()
        except OSError:
            self._progress = None  # nobody looks any more


def header_of(plan: Plan, start_wall: float, num_workers: int) -> RunHeader:
    """The record's first line."""
    arrivals = Arrivals(plan.arrivals)
    return RunHeader(
        started_wall_s=start_wall,
        target=Target(plan.target).url,
        model=plan.model,
        seed=plan.seed,
        mode="open" if arrivals.is_open else "closed",
        arrivals={
            "kind": arrivals.kind,
            "text": plan.arrivals,
            "duration_s": plan.duration_s,
            "num_requests": plan.num_requests,
            "steps": arrivals.steps,
        },
        workload=msgspec.to_builtins(plan.workload) | {"think_s": plan.think_s, "verify_share": plan.verify_share},
        limits=msgspec.to_builtins(plan.limits),
        num_workers=num_workers,
        server=plan.server,
        prompt_lengths=plan.prompt_lengths,
        labels=plan.labels,
    )
