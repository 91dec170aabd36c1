"""A second start reads packed weights as they are multiplied, or loads as if there were no cache."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import packed_cache
from models.checkpoint import Checkpoint
from models.ops.select import select_kernels
from models.packed_cache import PackedCache
from models.packed_file import DATA_FILE, INDEX_FILE, Checksum
from models.quant.method import WeightPart
from models.quant.packer import Packer
from models.random_weights import RandomWeights
from models.registry import CausalLM, load_model, weights_fingerprint
from tests.models.paged import Sequences
from tests.tiny import tiny_llama

KERNELS = select_kernels(torch.device("cpu"), torch.bfloat16)
PARTS = [WeightPart("q", (70, 50)), WeightPart("k", (10, 50), range(3, 8))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


class Start:
    """A load with a cache; what is to be written later is written before the load returns."""

    def __init__(self, folder: Path, cache_dir: Path | None, **options: Any) -> None:
        self.notes: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.has_saved = False

        def save(work: Callable[[], object]) -> None:
            self.has_saved = bool(work())

        self.model: CausalLM = load_model(
            folder,
            cache_dir=cache_dir,
            on_note=self.notes.append,
            run_later=save,
            progress=lambda done, total: self.progress.append((done, total)),
            **options,
        )

    @property
    def logits(self) -> torch.Tensor:
        sequences = Sequences(self.model, [torch.arange(30)], self.model.weight_dtype)
        sequences.step([(0, 30)])
        return sequences.all_logits(0)


def only_entry(cache_dir: Path) -> Path:
    (entry,) = [path for path in cache_dir.iterdir() if path.is_dir()]
    return entry


def bytes_read_by(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """bytes_read of every checkpoint when it was closed."""
    counts: list[int] = []
    close = Checkpoint.__exit__

    def closing(self: Checkpoint, *error: Any) -> None:
        counts.append(self.bytes_read)
        close(self, *error)

    monkeypatch.setattr(Checkpoint, "__exit__", closing)
    return counts


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_second_start_reads_no_linear_weight(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    plain = Start(folder, None, dtype=dtype)
    counts = bytes_read_by(monkeypatch)
    first, second = Start(folder, tmp_path, dtype=dtype), Start(folder, tmp_path, dtype=dtype)
    assert (first.has_saved, second.has_saved) == (True, False)
    assert torch.equal(first.logits, plain.logits)
    assert torch.equal(second.logits, plain.logits)
    assert second.model.num_parameters == plain.model.num_parameters
    assert second.model.weight_bytes == plain.model.weight_bytes
    table_and_norms = 4 * (131 * 80 + 7 * 80)
    assert counts[1] == table_and_norms < counts[0]
    assert second.progress[-1][0] == second.progress[-1][1]
    assert not first.notes
    assert not second.notes


def test_other_weights_types_and_ranks_have_entries_of_their_own(folder: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", seed=1, tie_word_embeddings=True)
    cache = tmp_path / "cache"
    for model_folder, dtype in ((folder, "bfloat16"), (folder, "float32"), (other, "bfloat16")):
        assert Start(model_folder, cache, dtype=dtype).has_saved
    assert Start(folder, cache, kernels=select_kernels(torch.device("cpu"), torch.bfloat16, "reference")).has_saved
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 4


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda entry: flip(entry / DATA_FILE, 3), "have changed"),
        (lambda entry: flip(entry / DATA_FILE, -1), "have changed"),
        (lambda entry: flip(entry / INDEX_FILE, 100), "index.json is not what was written"),
        (lambda entry: os.truncate(entry / DATA_FILE, 9000), "weights.bin has 9000 bytes of"),
        (lambda entry: (entry / INDEX_FILE).write_bytes(b""), "index.json is not what was written"),
        (lambda entry: (entry / INDEX_FILE).unlink(), ""),
        (lambda entry: (entry / DATA_FILE).unlink(), ""),
    ],
)
def test_a_damaged_entry_is_replaced(
    folder: Path, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    expected = Start(folder, tmp_path).logits
    damage(only_entry(tmp_path))
    start = Start(folder, tmp_path)
    assert torch.equal(start.logits, expected)
    assert words in " ".join(start.notes)
    assert start.has_saved
    again = Start(folder, tmp_path)
    assert not again.has_saved
    assert not again.notes
    assert torch.equal(again.logits, expected)


def test_an_entry_in_anothers_place_is_not_taken_for_it(folder: Path, tmp_path: Path) -> None:
    """Two models of one architecture have entries of one layout."""
    other = tiny_llama(tmp_path / "other", seed=1, tie_word_embeddings=True)
    cache = tmp_path / "cache"
    Start(folder, cache)
    moved = only_entry(cache)
    aside = moved.rename(tmp_path / "aside")
    expected = Start(other, cache).logits
    place = only_entry(cache)
    shutil.rmtree(place)
    aside.rename(place)
    start = Start(other, cache)
    assert torch.equal(start.logits, expected)
    assert "index.json is not what was written" in " ".join(start.notes)


def test_weights_edited_in_place_are_read_again(tmp_path: Path) -> None:
    """Between the samples that the fingerprint of a folder without a manifest takes."""
    folder = tiny_llama(tmp_path / "model", intermediate_size=1000)
    before, fingerprint = Start(folder, tmp_path / "cache").logits, weights_fingerprint(folder)
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        for i in range(20, 60):
            file.seek((size - 4096) * (2 * i + 1) // 126 + 2048)
            file.write(bytes(4096))
    assert weights_fingerprint(folder) == fingerprint
    after = Start(folder, tmp_path / "cache").logits
    assert not torch.equal(after, before)
    assert torch.equal(after, Start(folder, None).logits)


def test_a_cache_that_cannot_be_written_is_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Start(folder, tmp_path).logits

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    start = Start(folder, tmp_path)
    assert torch.equal(start.logits, expected)
    assert (start.has_saved, start.notes) == (False, [])


def test_zeroed_and_swapped_pages_change_the_checksum() -> None:
    content = os.urandom(20_000)
    page = 4096

    def sum_of(data: bytes) -> str:
        checksum = Checksum()
        checksum.update(memoryview(data)[:8192])
        checksum.update(memoryview(data)[8192:])
        return checksum.hexdigest()

    assert sum_of(content) == sum_of(bytes(content))
    assert sum_of(bytes(page) + content[page:]) != sum_of(content)
    assert sum_of(content[page : 2 * page] + content[:page] + content[2 * page :]) != sum_of(content)
    assert sum_of(content[:-1] + bytes([content[-1] ^ 1])) != sum_of(content)


def cache_of(root: Path, name: str, **options: Any) -> PackedCache:
    return PackedCache(root, {"weights": name}, **options)


def kept(cache: PackedCache) -> PackedCache:
    """With one packed weight that is not saved yet."""
    packed = KERNELS.empty_packed(75, 50, torch.bfloat16)
    with Packer(KERNELS, torch.bfloat16) as packer:
        packer.pack(RandomWeights(), PARTS, packed)
    assert cache.load(PARTS, RandomWeights(), KERNELS) is None
    cache.keep(PARTS, packed)
    return cache


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    for age, name in enumerate(("old", "older", "new")):
        cache = kept(cache_of(tmp_path, name))
        assert cache.save()
        if name != "new":
            os.utime(cache.folder, (1000 - age, 1000 - age))
    size = sum(path.stat().st_size for path in cache.folder.iterdir())
    assert kept(cache_of(tmp_path, "newest", max_bytes=3 * size + size // 2)).save()
    exists = {}
    for name in ("older", "old", "new", "newest"):
        with cache_of(tmp_path, name) as cache:
            exists[name] = cache.folder.exists()
    assert exists == {"older": False, "old": True, "new": True, "newest": True}


def test_what_is_not_the_caches_stays(tmp_path: Path) -> None:
    """Somebody may name a folder that holds other things."""
    others = [tmp_path / "photos", tmp_path / "work.tmp"]
    for folder in others:
        folder.mkdir()
        (folder / "large").write_bytes(bytes(100_000))
    assert kept(cache_of(tmp_path, "one", max_bytes=30_000)).save()
    assert all((folder / "large").exists() for folder in others)


def test_using_an_entry_makes_it_young(tmp_path: Path) -> None:
    cache = kept(cache_of(tmp_path, "one"))
    cache.save()
    os.utime(cache.folder, (1000, 1000))
    with cache_of(tmp_path, "one"):
        pass
    assert cache.folder.stat().st_mtime > 1_000_000


def test_limits_of_size_and_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    assert not kept(cache_of(tmp_path, "one", max_bytes=100, on_note=notes.append)).save()
    assert "bytes are over the cache's 100" in notes[-1]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda path: usage._replace(free=usage.total // 10))
    assert not kept(cache_of(tmp_path, "one", on_note=notes.append)).save()
    assert "would leave too little" in notes[-1]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    root.chmod(0o777)
    notes: list[str] = []
    assert not kept(cache_of(root, "one", on_note=notes.append)).save()
    assert "is not this user's alone (mode 777)" in notes[-1]
    assert not list(root.iterdir())


def test_what_is_made_is_private(tmp_path: Path) -> None:
    cache = kept(cache_of(tmp_path / "a" / "b", "one"))
    assert cache.save()
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in cache.folder.iterdir()} == {0o600}


def test_several_writers_leave_one_good_entry(tmp_path: Path) -> None:
    caches = [kept(cache_of(tmp_path, "one")) for _ in range(4)]
    results: list[bool] = []
    threads = [threading.Thread(target=lambda cache=cache: results.append(cache.save())) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == [False, False, False, True]
    with cache_of(tmp_path, "one") as again:
        assert again.load(PARTS, RandomWeights(), KERNELS) is not None


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    cache = kept(cache_of(tmp_path, "one"))
    left = [tmp_path / f"{cache.folder.name}.tmp", tmp_path / f"{'f' * 32}.tmp"]
    for folder in left:
        folder.mkdir()
        (folder / DATA_FILE).write_bytes(b"half")
    assert cache.save()
    assert not any(folder.exists() for folder in left)
