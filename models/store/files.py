"""Files of the store: durable writes, bounded JSON reads, the lock of one folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
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


def take(source: Path, target: Path, *, may_link: bool) -> None:
    """Copy `source` to `target`; with `may_link` and on one file system they share their bytes."""
    if may_link:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """The UTF-8 text in `path`. Raises StoreError when it is missing, no plain file, too large or not UTF-8."""
    where = f"{path.parent.name}/{path.name}"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever
            raise StoreError(f"{where} is not a plain file")
        if status.st_size > limit:
            raise StoreError(f"{where} has {status.st_size} bytes; at most {limit} are allowed")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StoreError(f"{where} is missing") from None
    except OSError as error:
        raise StoreError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StoreError(f"{where} is not UTF-8") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for JSON that raises ValueError when a name appears twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result


def read_json(path: Path, *, is_strict: bool = False) -> dict[str, Any]:
    """The JSON object in `path`. Raises StoreError when it is missing, too large or not an object.

    is_strict: an object that has a name twice is refused, too.
    """
    where = f"{path.parent.name}/{path.name}"
    text = read_text(path)
    try:
        content = json.loads(text, object_pairs_hook=unique if is_strict else None)
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
