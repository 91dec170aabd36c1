"""From flags to a run: look at the server, write the plan, let locust make it in processes of its own."""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.console import Console

from loadtest import plan as plans
from loadtest.arrivals import Arrivals
from loadtest.fitting import Prober, fit
from loadtest.options import Asked
from loadtest.plan import Plan
from loadtest.progress import follow
from loadtest.spec import SpecError
from loadtest.tenants import Tenants
from loadtest.workloads import Workload

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def make_plan(asked: Asked) -> Plan:
    """Look at the server and at the files; refuse what cannot be. Raises SpecError."""
    arrivals = Arrivals(asked.arrivals)
    if arrivals.length_s == math.inf and asked.duration is None and asked.requests is None:
        raise SpecError("this load has no end: --duration or --requests")
    if not arrivals.is_open and arrivals.num_users < asked.workers:
        raise SpecError(f"--workers: at most one per user, got {asked.workers} for {arrivals.num_users} users")
    workload = asked.workload
    if workload.data is not None:
        workload = msgspec.structs.replace(workload, data=str(Path(workload.data).absolute()))
    plan = Plan(
        target=asked.target,
        model=asked.model or "",
        seed=asked.seed,
        arrivals=asked.arrivals,
        duration_s=asked.duration,
        num_requests=asked.requests,
        think_s=asked.think,
        drain_s=asked.drain,
        timeout_s=asked.timeout,
        workload=workload,
        limits=asked.limits,
        keys_file=None if asked.api_keys is None else str(Path(asked.api_keys).absolute()),
        file_hashes={
            str(Path(path).absolute()): plans.file_hash(path)
            for path in (workload.data, asked.api_keys, arrivals.file)
            if path is not None
        },
        verify_share=asked.verify,
        max_verified=asked.max_verified,
        record=str(asked.record.absolute()),
    )
    Workload(plan)  # refuses what cannot be before the server is asked
    try:
        prober = Prober(asked.target, Tenants(asked.api_keys).all[0], asked.timeout)
    except ValueError as error:
        raise SpecError(f"--target: {error}") from None
    try:
        model, entry = prober.model(asked.model)
        endpoints = tuple(
            name
            for name in ("chat", "completions")
            if workload.endpoint in (name, "mixed") and (name == "chat" or workload.prompt_format == "text")
        )
        words = plan.words
        if workload.data is None and endpoints:
            words = fit(prober, model, endpoints, workload.turns > 1)
    finally:
        prober.close()
    server = {name: entry[name] for name in ("id", "owned_by", "max_model_len") if name in entry}
    return msgspec.structs.replace(plan, target=prober.target.url, model=model, words=words, server=server)


def run(plan: Plan, asked: Asked, console: Console) -> int:
    """Make the run, showing its progress on `console`; returns locust's exit code, which the conductor has set.

    Raises SpecError when the record's folder cannot be made.
    """
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
        Path(plan.record).unlink(missing_ok=True)
    except OSError as error:
        raise SpecError(f"--out: {error}") from None
    with tempfile.TemporaryDirectory(prefix="argosy-loadtest-") as folder, _ctrl_c_is_for_the_child():
        path = Path(folder) / "plan.json"
        path.write_bytes(plans.encode(plan))
        reader, writer = socket.socketpair()
        with reader, tempfile.TemporaryFile() as output:
            with writer:
                process = subprocess.Popen(
                    locust_command(*_flags(plan, asked, path, writer.fileno())),
                    pass_fds=[writer.fileno()],
                    stdout=output,
                    stderr=None if asked.ui else output,
                    stdin=subprocess.DEVNULL,
                )
            if asked.ui:
                console.print(
                    f"locust's page: http://{asked.ui_host}:{asked.ui_port}/ (Ctrl-C ends it)", highlight=False
                )
            with reader.makefile("r") as lines:
                last = follow(lines, console, plan.duration_s, plan.num_requests)
            code = process.wait()
            output.seek(0)
            if not last or (code and not Path(plan.record).exists()):
                sys.stderr.write(output.read().decode(errors="replace")[-4000:])
    for reason in last.get("reasons", ()):
        console.print(f"not valid: {reason}", style="red", highlight=False, markup=False)
    return code


def locust_command(*args: str) -> list[str]:
    return [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *args]


def _flags(plan: Plan, asked: Asked, path: Path, progress_fd: int) -> list[str]:
    users = Arrivals(plan.arrivals).num_users or asked.workers
    flags = ["--argosy-plan", str(path), "--argosy-progress", str(progress_fd), "--host", plan.target]
    flags += ["--users", str(users), "--spawn-rate", str(users), "--loglevel", "WARNING", "--only-summary"]
    if asked.ui:
        flags += ["--web-host", asked.ui_host, "--web-port", str(asked.ui_port)]
        flags += ["--autostart"] if asked.autostart else []
    else:
        flags += ["--headless"]
    if asked.is_master:
        flags += ["--master", "--master-bind-host", asked.master_host, "--master-bind-port", str(asked.master_port)]
        flags += ["--expect-workers", str(asked.workers)]
    elif asked.workers > 1:
        port = str(_free_port())
        flags += ["--processes", str(asked.workers), "--master-bind-host", "127.0.0.1", "--master-bind-port", port]
        flags += ["--master-host", "127.0.0.1", "--master-port", port]
    return flags + asked.locust


@contextlib.contextmanager
def _ctrl_c_is_for_the_child() -> Iterator[None]:
    """Ctrl-C reaches the whole group: locust ends the run and writes its last line, and then we go on."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # unlike SIG_IGN, a child does not inherit it
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
