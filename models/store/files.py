"""Files of the store: durable writes, bounded JSON reads, the lock of one folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from models.store.errors import StoreError

MAX_JSON_BYTES = 64 << 20
LOCK_TIMEOUT_S = 1800.0
_POLL_S = 0.05


def write_synced(path: Path, data: bytes) -> None:
    """Create `path` with `data` and wait until the disk has it."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the folder's entries (a rename, a new file)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises StoreError when it is missing, too large or not an object."""
    where = f"{path.parent.name}/{path.name}"
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise StoreError(f"{where} has {size} bytes; at most {MAX_JSON_BYTES} are allowed")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{where} is missing") from None
    except OSError as error:
        raise StoreError(f"{where} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise StoreError(f"{where} is not a JSON object")
    return content


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[], None], timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the exclusive lock `path` between processes; it dies with its holder.

    on_wait: called once if another process has it. Raises StoreError after `timeout_s`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + timeout_s
        waited = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    on_wait()
                    waited = True
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"another process has been pulling the same model for {timeout_s:.0f} s; "
                        "wait for it or end it, then pull again"
                    ) from None
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(handle)
