"""Gangs under `--runtime local`: a rank that dies or hangs takes its replica along, and costs no token (C11, C13)."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.service import Service, kill_in_the_middle, serving
from tests.tiny import tiny_model_folder

MODEL = "tiny"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("local")
    # Wide enough that a step takes milliseconds: a blow must find streams running.
    model = tiny_model_folder(
        folder / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=8, max_position_embeddings=1024
    )
    flags = ("--runtime", "local", "--model", str(model), "--served-model-name", MODEL, "--max-model-len", "1024")
    sizes = ("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2", "--kv-cache-bytes", "64MiB")
    with serving(folder, *flags, *sizes) as service:
        yield service


def ranks_of(service: Service) -> list[tuple[int, int]]:
    """(rank, pid) of the one replica's processes."""
    (replica,) = service.replicas()
    return [(rank["rank"], rank["pid"]) for rank in replica["ranks"]]


@pytest.mark.parametrize(("rank", "blow"), [(0, signal.SIGKILL), (3, signal.SIGSTOP)])
def test_a_rank_that_is_killed_or_frozen_costs_no_token(service: Service, rank: int, blow: signal.Signals) -> None:
    """The front, and a rank of the stage that samples. Other ranks: tests/engine/test_gang.py."""
    before = ranks_of(service)
    assert [rank for rank, _ in before] == [0, 1, 2, 3]
    kill_in_the_middle(service, MODEL, max_tokens=150, number=blow, rank=rank)
    service.wait_until_ready(30)
    after = ranks_of(service)
    assert [rank for rank, _ in after] == [0, 1, 2, 3]
    assert not {pid for _, pid in before} & {pid for _, pid in after}, "the gang came back in parts"
    deadline = time.monotonic() + 5
    while left := [pid for _, pid in before if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.05)


def test_a_gang_that_cannot_be_says_so_with_the_numbers(tmp_path: Path) -> None:
    model = tiny_model_folder(tmp_path / "model")
    command = [sys.executable, "-m", "serving.cli", "serve", "--runtime", "local", "--port", "0", "--model", str(model)]
    flags = ["--tensor-parallel-size", "3", "--kv-cache-bytes", "64MiB"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "num_attention_heads 4 cannot be divided among 3 ranks" in done.stdout + done.stderr
