"""A run's folder is its own for as long as it lives, and nobody's for long afterwards."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.run_folder import STARTING_S, RunFolder


@pytest.fixture
def root() -> Iterator[Path]:
    """Short: sockets lie below."""
    with tempfile.TemporaryDirectory(prefix="rf", dir="/tmp") as folder:
        yield Path(folder)


def test_a_live_folder_is_left_alone_and_a_removed_one_is_gone(root: Path) -> None:
    live = RunFolder(root)
    other = RunFolder(root)
    other.remove()
    assert live.secret_file.read_bytes() == live.secret
    assert list(root.iterdir()) == [live.path]
    live.remove()
    assert not list(root.iterdir())


def test_a_folder_that_lost_its_lock_is_cleared_once_it_cannot_be_starting(root: Path) -> None:
    left = root / "argosy-abcdefgh"
    left.mkdir()
    (left / "secret").touch()
    RunFolder(root).remove()
    assert left.exists(), "its run may be about to lock it"
    long_ago = time.time() - STARTING_S - 1
    os.utime(left, (long_ago, long_ago))
    RunFolder(root).remove()
    assert not left.exists()


def test_a_folder_that_vanishes_before_it_is_locked_is_replaced(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = tempfile.mkdtemp

    def make_and_lose_the_first(**where: object) -> str:
        made.append(make(**where))  # type: ignore[call-overload]
        if len(made) == 1:
            shutil.rmtree(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose_the_first)
    folder = RunFolder(root)
    assert str(folder.path) == made[1]
    folder.remove()


def test_many_that_start_and_end_at_once_do_not_take_each_others(root: Path) -> None:
    failures: list[BaseException] = []

    def come_and_go() -> None:
        try:
            for _ in range(40):
                folder = RunFolder(root)
                assert folder.secret_file.read_bytes() == folder.secret
                assert (folder.path / "lock").exists()
                folder.remove()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=come_and_go) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not list(root.iterdir())
