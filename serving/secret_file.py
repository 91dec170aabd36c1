"""A secret in a file, as an operator keeps it or Kubernetes mounts it: read again whenever it has changed."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from serving.config import expanded
from serving.errors import SettingsError

logger = logging.getLogger(__name__)

MIN_BYTES = 16
MAX_BYTES = 4096


_HEX = re.compile(rb"[0-9a-fA-F]{32,}(\s+[0-9a-fA-F]{32,})*\s*")


def shared_secrets(path: str) -> tuple[bytes, ...]:
    """What gateways and replicas prove to each other (C22), from a file of hexadecimal lines or of 16 bytes and more.

    Replicas prove the first. Gateways know all of them, so that the first can change while replicas of both kinds run.
    Raises SettingsError.
    """
    try:
        found = Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"the engine secret in {path}: {error.strerror}") from None
    if _HEX.fullmatch(found):
        if any(len(line) % 2 for line in found.split()):
            raise SettingsError(f"the engine secret in {path}: a line has an odd number of hexadecimal digits")
        return tuple(bytes.fromhex(line.decode()) for line in found.split())
    if not MIN_BYTES <= len(found) <= MAX_BYTES:
        raise SettingsError(f"the engine secret in {path} has {len(found)} bytes, not {MIN_BYTES} to {MAX_BYTES}")
    return (found,)


class SecretFile:
    """White space around the secret is not part of it."""

    def __init__(self, path: str) -> None:
        self._path = expanded(path)
        self._version: tuple[int, int] | None = None  # modified, inode
        self._secret = b""

    def check(self, setting: str, *, may_come: bool = False) -> None:
        """Raises SettingsError, naming the setting, for a secret that nobody could show or anybody guess.

        may_come: a file that is not there yet is no mistake: a Secret of Kubernetes may be made later.
        """
        if may_come and not self._path.exists():
            return
        try:
            size = len(self._path.read_bytes().strip())
        except OSError as error:
            raise SettingsError(f"{setting}: {self._path}: {error.strerror}") from None
        if not MIN_BYTES <= size <= MAX_BYTES:
            raise SettingsError(
                f"{setting}: the secret in {self._path} has {size} bytes, not {MIN_BYTES} to {MAX_BYTES}"
            )

    def read(self) -> bytes:
        """b"" while the file cannot be read or holds too little: then nobody has the secret."""
        try:
            facts = self._path.stat()
            version = facts.st_mtime_ns, facts.st_ino
            if version != self._version:
                with self._path.open("rb") as file:
                    found = file.read(MAX_BYTES + 1).strip()
                self._secret = found if MIN_BYTES <= len(found) <= MAX_BYTES else b""
                self._version = version
        except OSError as error:
            if self._secret or self._version is None:
                logger.error("a secret cannot be read, so nobody has it: %s", error.strerror)
            self._version, self._secret = (0, 0), b""
        return self._secret
