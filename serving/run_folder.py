"""Where the sockets, the secret and the runtime's own files of one `argosy serve` lie."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

STARTING_S: Final = 60.0  # a folder that has no lock for so long belongs to nobody


class RunFolder:
    """A private folder for one run's sockets and secrets; removed at the end, and by the next run
    when this one was killed."""

    def __init__(self, root: Path | None = None) -> None:
        # Paths of Unix sockets end at 107 bytes and Ray nests 70 below this one, so never a long TMPDIR.
        root = root or Path(tempfile.gettempdir())
        if len(str(root)) > 24:
            root = Path("/tmp")
        self._remove_abandoned(root)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix="argosy-", dir=root))
            with contextlib.suppress(FileNotFoundError):  # another run saw it before it was locked, and removed it
                self._lock = self._locked(self.path / "lock")
                break
        self.secret = secrets.token_bytes(32)
        self.secret_file = self.path / "secret"
        self.secret_file.touch(0o600)
        self.secret_file.write_bytes(self.secret)

    @staticmethod
    def _locked(path: Path) -> int:
        """Raises FileNotFoundError when the file has gone before it was ours."""
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(lock), path.stat()):
                raise FileNotFoundError(path)
        except OSError:
            os.close(lock)
            raise
        return lock

    @staticmethod
    def _remove_abandoned(root: Path) -> None:
        for folder in root.glob("argosy-????????"):
            with contextlib.suppress(OSError):
                found = folder.stat()
                if found.st_uid != os.getuid():
                    continue
                if not (folder / "lock").exists():  # killed before it had one, or while it was removed
                    if time.time() - found.st_mtime > STARTING_S:
                        shutil.rmtree(folder, ignore_errors=True)
                    continue
                lock = os.open(folder / "lock", os.O_RDWR)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(lock)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
