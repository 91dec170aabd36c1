"""Packed weights kept for the next start (`packed_file`), by everything that their bytes depend on.

A second start of a quantised model need not round 16-bit weights again. The cache is a convenience and never in the
way: whatever is missing, damaged, full or forbidden about it, the weights are loaded as if there were none, and a note
says why.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from models.ops.cpu import CpuKernels
from models.ops.kernels import Kernels, PackedLinear
from models.packed_file import DamagedFile, PackedFile, packed_bytes, write_packed
from models.quant.method import WeightPart, claim_part
from models.weight_reader import WeightReader

VERSION = 2  # of the files
MAX_BYTES = 64 << 30
_LEAST_FREE = 0.1  # of the file system, after a model has been written
_LOCK_FILE = "lock"
_UNFINISHED = ".tmp"
_OURS = re.compile(r"[0-9a-f]{32}(\.tmp)?")


class PackedCache:
    """The packed weights of one rank of one model, for one load."""

    def __init__(
        self,
        root: Path,
        identity: Mapping[str, object],
        *,
        max_bytes: int = MAX_BYTES,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        """root: shared by all models; made if it is not there, for this user alone.

        identity: everything that the packed bytes depend on. max_bytes: of all models; the longest unused go first.
        """
        described = "\0".join(f"{key}={identity[key]}" for key in sorted(identity))
        self._root = root
        self._key = hashlib.blake2b(f"{VERSION}\0{described}".encode(), digest_size=16).hexdigest()
        self._max_bytes = max_bytes
        self._note = on_note or (lambda text: None)
        self._kept: dict[str, PackedLinear] = {}
        self._is_complete = True
        self._is_damaged = False
        self._file: PackedFile | None = None
        self._on_read: Callable[[int], None] = lambda num_bytes: None
        self.bytes_read = 0
        self._is_usable = True
        try:
            _make_private(root)
        except OSError as error:
            self._is_usable = False
            self._give_up(error)
            return
        try:
            self._file = PackedFile(self.folder, self._key)
            with contextlib.suppress(OSError):  # it may lie where we only read
                os.utime(self.folder)  # used just now
        except FileNotFoundError:
            self._is_complete = False
        except (OSError, DamagedFile) as error:
            self._give_up(error)

    @property
    def folder(self) -> Path:
        """Where this rank's weights are or will be."""
        return self._root / self._key

    def load(self, parts: Sequence[WeightPart], reader: WeightReader, kernels: Kernels) -> PackedLinear | None:
        """What `keep` was once given for the same parts, which are claimed; None when it is not there.

        Raises ModelError when a part does not belong to the model.
        """
        key = _key(parts)
        if self._file is None or not self._file.has(key):
            self._is_complete = False
            return None
        try:
            packed, num_bytes = self._file.load(key, kernels)
        except (OSError, DamagedFile) as error:
            self._give_up(error)
            return None
        for part in parts:
            claim_part(reader, part)
        self.bytes_read += num_bytes
        self._on_read(self.bytes_read)
        self.keep(parts, packed)
        return packed

    def keep(self, parts: Sequence[WeightPart], packed: PackedLinear) -> None:
        """To be written by `save`. Its values may follow until then; without values (meta) it is not kept."""
        if packed.data.device.type == "cpu":
            self._kept[_key(parts)] = packed

    def rewind(self, on_read: Callable[[int], None]) -> None:
        """As if nothing had been loaded. on_read: told bytes_read as it rises from now on."""
        self.bytes_read = 0
        self._on_read = on_read

    @property
    def is_stale(self) -> bool:
        """Whether `save` has something to write: not everything was loaded from here."""
        return self._is_usable and bool(self._kept) and not self._is_complete

    def __enter__(self) -> PackedCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing more is loaded."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def save(self) -> bool:
        """Write what was kept, unless it was all loaded from here. Returns whether it was written.

        May take minutes and wait for other processes that write; no process sees a half of it.
        """
        if not self.is_stale:
            return False
        try:
            with _locked(self._root):
                if not self._is_damaged and self._is_there():
                    return False  # another replica has written it meanwhile
                return self._write(packed_bytes(self._kept))
        except OSError as error:
            self._note(f"packed weights were not kept in {self._root}: {error}")
            return False
        finally:
            self._kept.clear()

    def _is_there(self) -> bool:
        try:
            file = PackedFile(self.folder, self._key)
        except (OSError, DamagedFile):
            return False
        file.close()
        return all(file.has(key) for key in self._kept)

    def _write(self, num_bytes: int) -> bool:
        unfinished = self._root / (self._key + _UNFINISHED)
        for folder in self._folders():
            if folder == self.folder or folder.suffix == _UNFINISHED:  # under the lock, nobody writes it
                shutil.rmtree(folder, ignore_errors=True)
        if num_bytes > self._max_bytes:
            self._note(f"packed weights were not kept: {num_bytes:,} bytes are over the cache's {self._max_bytes:,}")
            return False
        self._evict(self._max_bytes - num_bytes)
        disk = shutil.disk_usage(self._root)
        if disk.free - num_bytes < _LEAST_FREE * disk.total:
            self._note(
                f"packed weights were not kept: {num_bytes:,} bytes would leave too little of {disk.free:,} free"
            )
            return False
        unfinished.mkdir(mode=0o700)
        try:
            write_packed(unfinished, self._key, self._kept)
            unfinished.rename(self.folder)
            _sync(self._root)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return True

    def _folders(self) -> list[Path]:
        """Ours alone, whatever else lies beside them."""
        return [path for path in self._root.iterdir() if _OURS.fullmatch(path.name) and path.is_dir()]

    def _evict(self, room: int) -> None:
        """Remove the longest unused models until the others fit into `room` bytes."""
        sizes: list[tuple[float, int, Path]] = []
        for folder in self._folders():
            with contextlib.suppress(OSError):
                size = sum(path.stat().st_size for path in folder.iterdir())
                sizes.append((folder.stat().st_mtime, size, folder))
        total = sum(size for _, size, _ in sizes)
        for _, size, folder in sorted(sizes):
            if total <= room:
                return
            shutil.rmtree(folder, ignore_errors=True)
            total -= size

    def _give_up(self, error: Exception) -> None:
        self._is_complete, self._is_damaged = False, True
        self._note(f"packed weights in {self.folder} are not used: {error}")
        self._close()


def layout_of(kernels: Kernels) -> str:
    """What the bytes of packed weights depend on beside the weights: part of a cache's identity."""
    if isinstance(kernels, CpuKernels):  # built from source: the name says nothing about the version
        binary = Path(str(kernels.extension.__file__)).read_bytes()
        return f"{kernels.name} {hashlib.blake2b(binary, digest_size=16).hexdigest()}"
    return f"{kernels.name} {kernels.activation_dtype}"


def _key(parts: Sequence[WeightPart]) -> str:
    return " + ".join(
        f"{part.name} {list(part.shape)} {part.rows} {part.columns}{' transposed' if part.is_transposed else ''}"
        for part in parts
    )


def _make_private(root: Path) -> None:
    """Raises PermissionError where somebody else could change what is kept."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = root.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise PermissionError(f"{root} is not this user's alone (mode {stat.S_IMODE(found.st_mode):03o})")


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    descriptor = os.open(root / _LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
