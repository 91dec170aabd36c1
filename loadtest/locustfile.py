"""What `argosy loadtest` gives to locust. Importing it patches the standard library: for locust's processes only."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import gevent
import msgspec
from locust import User, events, task
from locust.runners import MasterRunner, WorkerRunner

from loadtest import plan as plans
from loadtest.conductor import Conductor
from loadtest.generator import Generator, Report
from loadtest.spec import SpecError


class Seat:
    """Where a process's generator sits: nowhere before a run begins."""

    generator: Generator | None = None


SEAT = Seat()


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_options(parser: Any) -> None:
    parser.add_argument("--argosy-plan", metavar="FILE", help="the run, as JSON", include_in_web_ui=False)
    parser.add_argument("--argosy-progress", metavar="FD", type=int, help="for progress", include_in_web_ui=False)


def _interrupt() -> None:
    raise KeyboardInterrupt


@events.init.add_listener  # type: ignore[untyped-decorator]
def _on_init(environment: Any, runner: Any, **_: Any) -> None:
    # Python raises Ctrl-C wherever it happens to be; in a finaliser or a callback of the collector it is printed and
    # forgotten, and the run goes on. From gevent's loop it always reaches locust's main greenlet.
    gevent.signal_handler(signal.SIGINT, _interrupt)
    if not isinstance(runner, WorkerRunner):
        options = environment.parsed_options
        plan = plans.decode(Path(options.argosy_plan).read_bytes())
        environment.host = plan.target
        progress = None if options.argosy_progress is None else os.fdopen(options.argosy_progress, "w")
        Conductor(environment, plan, progress)
    if not isinstance(runner, MasterRunner):
        runner.register_message("argosy_plan", _on_plan)
        runner.register_message("argosy_go", _on_go)


def _on_plan(environment: Any, msg: Any, **_: Any) -> None:
    """Read what the plan needs, and say whether it is there."""
    runner = environment.runner
    name = runner.client_id if isinstance(runner, WorkerRunner) else "local"
    if name not in msg.data["shares"]:
        return
    problem = ""
    try:
        plan = plans.decode(bytes(msg.data["plan"]))
        plans.check_files(plan)

        def report(seen: Report) -> None:
            if seen.health is not None and isinstance(runner, WorkerRunner):
                runner._send_stats()  # otherwise the last three seconds would miss locust's tables
            runner.send_message("argosy_report", {"worker": name, "report": msgspec.msgpack.encode(seen)})

        number, num_shares = msg.data["shares"][name]
        SEAT.generator = Generator(plan, (number, num_shares), environment, report)
    except (SpecError, OSError, ValueError) as error:
        problem = str(error)
    runner.send_message("argosy_ready", {"worker": name, "problem": problem})


def _on_go(environment: Any, msg: Any, **_: Any) -> None:
    assert SEAT.generator is not None
    start_at = time.monotonic() + msg.data["start_wall"] - time.time()
    gevent.spawn(SEAT.generator.run, start_at)


@events.test_stop.add_listener  # type: ignore[untyped-decorator]
def _on_stop(**_: Any) -> None:
    if SEAT.generator is not None:
        SEAT.generator.stop()


class Client(User):
    """In a closed loop, one of the clients; in an open loop it only stands for them all."""

    @task
    def work(self) -> None:
        generator = SEAT.generator
        if generator is None or not generator.is_running.wait(timeout=0.1):
            gevent.sleep(0.02)
            return
        if generator.arrivals.is_open:
            gevent.sleep(1.0)
        elif not generator.converse():
            generator.users_are_done()
            gevent.sleep(1.0)
