"""Over TLS, from locust's page, and from several processes that know of each other only by an address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.record import read_run
from serving.supervisor import free_port
from tests.loadtest.load import LENIENT, body, fake_server

COMMAND = [sys.executable, "-m", "serving.cli", "loadtest"]


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that is its own authority, with its key."""
    folder = tmp_path_factory.mktemp("tls")
    key, file = folder / "key.pem", folder / "certificate.pem"
    subject = ["-subj", "/CN=loadtest", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject,
         "-keyout", str(key), "-out", str(file)],
        check=True, capture_output=True,
    )  # fmt: skip
    both = folder / "both.pem"
    both.write_bytes(file.read_bytes() + key.read_bytes())
    return both


def test_over_tls_delays_are_measured_and_a_stranger_is_not_trusted(certificate: Path, tmp_path: Path) -> None:
    flags = ["--rate", "20", "--requests", "20", *body(ttft=0.05, itl=0.01, tokens=5)]
    with fake_server("--certificate", str(certificate)) as url:
        target = url.replace("http:", "https:")
        command = [*COMMAND, "--target", target, "--out", str(tmp_path), "--no-report", *LENIENT, *flags]
        refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert refused.returncode == 2 and "certificate" in (refused.stdout + refused.stderr).lower()
        trusting = os.environ | {"SSL_CERT_FILE": str(certificate)}
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=trusting)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    seen = read_run(tmp_path / "loadtest.jsonl").observations
    assert len(seen) == 20 and all(one.is_ok and len(one.token_times_s) == 5 for one in seen)
    assert all(0.05 <= (one.ttft_s or 0) < 0.5 for one in seen)


def test_the_start_button_of_locusts_page_makes_the_run(tmp_path: Path) -> None:
    port = free_port()
    with fake_server() as url:
        flags = ["--ui", "--ui-port", str(port), "--rate", "20", "--duration", "3", "--no-report", *LENIENT]
        process = subprocess.Popen(
            [*COMMAND, "--target", url, "--out", str(tmp_path), *flags, *body(ttft=0.02, tokens=3)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:

            def stats() -> Any:
                try:
                    return httpx.get(f"http://127.0.0.1:{port}/stats/requests").json()
                except httpx.TransportError:
                    return None

            assert until(stats)["state"] == "ready", "nothing begins before the button"
            # What the page's form sends.
            form = {"user_count": "1", "spawn_rate": "1", "host": url}
            assert httpx.post(f"http://127.0.0.1:{port}/swarm", data=form).json()["success"]
            until(lambda: stats()["state"] == "stopped")
            sent = {row["method"]: row["num_requests"] for row in stats()["stats"] if row["name"] != "Aggregated"}
        finally:
            os.killpg(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=30)
    run = read_run(tmp_path / "loadtest.jsonl")
    assert run.end is not None and not run.end.reasons, output.decode()
    assert sent["E2E"] == sent["TTFT"] == len(run.observations) > 30
    assert process.returncode == 0


def test_workers_that_were_started_elsewhere_share_the_load(tmp_path: Path) -> None:
    with fake_server() as url:
        address = ["--master-host", "127.0.0.1", "--master-port", str(free_port())]
        flags = ["--target", url, "--rate", "40", "--requests", "80", *LENIENT, *body(ttft=0.02, tokens=3)]

        def start(*role: str) -> subprocess.Popen[str]:
            command = [*COMMAND, *address, *flags, *role]
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        master = start("--master", "--workers", "2", "--no-report", "--out", str(tmp_path / "master"))
        workers = [start("--worker", "--out", str(tmp_path / f"worker-{number}")) for number in range(2)]
        try:
            said = master.communicate(timeout=60)[0]
            others = [worker.communicate(timeout=30)[0] for worker in workers]
        finally:
            for process in (master, *workers):
                process.kill()
    assert master.returncode == 0, said
    assert [worker.returncode for worker in workers] == [0, 0], others
    run = read_run(tmp_path / "master" / "loadtest.jsonl")
    assert len(run.observations) == 80 and all(one.is_ok for one in run.observations)
    assert run.end is not None and not run.end.reasons
