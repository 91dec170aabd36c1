"""Files of a model card (tokenizer, chat template, …), fetched from replicas into a cache keyed by hash (C23)."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from serving.errors import NoCapacity
from serving.gateway.link import Link
from serving.types import ModelCard

logger = logging.getLogger("argosy.gateway")

ANSWER_TIMEOUT_S = 10.0
FETCH_TIMEOUT_S = 30.0
RETRY_S = 0.1


class Assets:
    """The cache directory may be shared by every gateway process of a machine, and survives them."""

    def __init__(self, folder: str, links: Callable[[str], list[Link]]) -> None:
        """folder: "" = a temporary one, until `close`. links: the open links of a fingerprint."""
        self._folder = Path(folder) if folder else None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._links = links
        self._present: dict[str, Path] = {}  # by sha256; checked once per process
        self._fetching: dict[str, asyncio.Task[Path]] = {}

    def missing(self, card: ModelCard) -> list[str]:
        """Names of the card's files that are not in the cache, as far as this process has looked."""
        return [name for name, sha256 in card.assets.items() if sha256 not in self._present]

    async def path(self, card: ModelCard, name: str) -> Path:
        """The file, fetched when it is missing.

        Raises FileNotFoundError when the card has no such file, NoCapacity when no replica delivered it
        in time. Concurrent callers share one fetch; a cancelled caller does not stop it.
        """
        sha256 = card.assets.get(name)
        if sha256 is None:
            raise FileNotFoundError(f"the model card of {card.model} has no file {name}")
        present = self._present.get(sha256)
        if present is not None:
            return present
        task = self._fetching.get(sha256)
        if task is None:
            task = self._fetching[sha256] = asyncio.create_task(self._fetch(card, name, sha256))
            task.add_done_callback(lambda done: self._fetched(sha256, done))
        return await asyncio.shield(task)

    async def close(self) -> None:
        tasks = list(self._fetching.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _path(self, sha256: str) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="argosy-assets-")
            self._folder = Path(self._temporary.name)
        return self._folder / sha256

    def _fetched(self, sha256: str, task: asyncio.Task[Path]) -> None:
        self._fetching.pop(sha256, None)
        if not task.cancelled() and task.exception() is None:
            self._present[sha256] = task.result()

    async def _fetch(self, card: ModelCard, name: str, sha256: str) -> Path:
        path = self._path(sha256)
        if await asyncio.to_thread(_has, path, sha256):
            return path
        give_up_at = asyncio.get_running_loop().time() + FETCH_TIMEOUT_S
        while asyncio.get_running_loop().time() < give_up_at:
            for link in list(self._links(card.fingerprint)):
                data = await _ask(link, name)
                if data is None:
                    continue
                if hashlib.sha256(data).hexdigest() == sha256:
                    await asyncio.to_thread(_store, path, data)
                    return path
                logger.warning("replica %s: asset %s differs from its card", link.replica, name)
            await asyncio.sleep(RETRY_S)
        raise NoCapacity(f"No replica delivered the model's file {name}.", retry_after_s=5.0, reason="no_endpoints")


async def _ask(link: Link, name: str) -> bytes | None:
    answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

    def done(data: bytes | None) -> None:
        if not answer.done():
            answer.set_result(data)

    link.request_asset(name, done)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return await answer
    except TimeoutError:
        return None


def _has(path: Path, sha256: str) -> bool:
    """Whether the cache holds the file, undamaged."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def _store(path: Path, data: bytes) -> None:
    """Atomic: other processes see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".asset-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
