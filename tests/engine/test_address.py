"""Where a replica may listen, and what it says where it may not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from serving.engine import address
from serving.errors import SettingsError


@pytest.mark.parametrize(
    "listen",
    [
        "",
        "unix",
        "tcp:",
        "tcp:127.0.0.1",
        "tcp::80",
        "tcp:127.0.0.1:x",
        "tcp:127.0.0.1:65536",
        "tcp:127.0.0.1:9-8",
        "x:y",
    ],
)
def test_an_address_that_is_none_is_named(listen: str) -> None:
    with pytest.raises(SettingsError, match="listen address must be"):
        address.bind(listen)


def test_a_path_that_is_too_long_or_nowhere_is_named(tmp_path: Path) -> None:
    for path in ("/" + "x" * 200, f"{tmp_path}/missing/s"):
        with pytest.raises(SettingsError, match="cannot listen on"):
            address.bind(f"unix:{path}")


def test_a_range_of_ports_gives_its_first_free_one(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        if port == 65535:
            pytest.skip("the last port: no range begins here")
        sock, found = address.bind(f"tcp:127.0.0.1:{port}-{min(port + 20, 65535)}")
        with sock:
            assert port < int(found.rpartition(":")[2]) <= port + 20
        with pytest.raises(SettingsError, match="is taken"):
            address.bind(f"tcp:127.0.0.1:{port}-{port}")


def test_the_file_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(f"{tmp_path}/s")
    stale.close()
    sock, found = address.bind(f"unix:{tmp_path}/s")
    with sock:
        assert found == f"unix:{tmp_path}/s"
    address.unlink(found)
    address.unlink(found)
    assert not (tmp_path / "s").exists()
