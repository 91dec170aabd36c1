"""Where a replica listens: "unix:<path>" or "tcp:<host>:<port>[-<last port>]" (C20)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from serving.errors import SettingsError


def bind(address: str) -> tuple[socket.socket, str]:
    """A bound socket that does not listen yet, and its actual address.

    A port range takes its first free port. A stale Unix socket of a dead process is replaced.
    Raises SettingsError.
    """
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        return _bind_unix(rest), address
    if kind == "tcp":
        host, _, ports = rest.rpartition(":")
        first, _, last = ports.partition("-")
        last = last or first
        if host and first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 1 << 16:
            return _bind_tcp(host, int(first), int(last))
    raise SettingsError(f"listen address must be unix:<path> or tcp:<host>:<port>[-<last port>], got {address!r}")


def unlink(address: str) -> None:
    """Remove the file of a Unix address."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(address.removeprefix("unix:"))  # noqa: PTH108


def _bind_unix(path: str) -> socket.socket:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            is_taken = probe.connect_ex(path) == 0
    except OSError as error:  # a path that is too long
        raise SettingsError(f"cannot listen on {path}: {error}") from error
    if is_taken:
        raise SettingsError(f"another process listens on {path}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        unlink(path)
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise SettingsError(f"cannot listen on {path}: {error.strerror or error}") from error
    return sock


def _bind_tcp(host: str, first: int, last: int) -> tuple[socket.socket, str]:
    for port in range(first, last + 1):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            # No SO_REUSEADDR: two replicas must never share a port.
            sock.bind((host, port))
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        else:
            return sock, f"tcp:{host}:{sock.getsockname()[1]}"
    raise SettingsError(f"every port of {host}:{first}-{last} is taken")
