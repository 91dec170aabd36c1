"""A rank reads its share of the files and nothing else, in little more memory than the share takes."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoint import Checkpoint
from models.parallel import Group, Stages
from models.platform import device_facts
from models.registry import build_model, load_config
from models.weight_files import SINGLE_FILE
from tests.tiny import tiny_llama

HEADS, HEAD_SIZE, HIDDEN, INNER, VOCAB = 8, 6, 80, 97, 131


class NoTransport:
    """Nothing moves while a model is loaded."""

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        raise AssertionError("a rank asked the others for something while loading")

    def all_reduce(self, x: torch.Tensor) -> None:
        raise AssertionError("a rank asked the others for something while loading")

    def close(self) -> None:
        """Nothing was opened."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset, bytes) of every read of weights, as the system saw it."""
    seen: list[tuple[int, int]] = []
    real: Callable[..., int] = os.preadv

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        count = real(file, buffers, offset)
        seen.append((offset, count))
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return seen


def llama(folder: Path, *, is_tied: bool, num_kv_heads: int) -> Path:
    return tiny_llama(
        folder,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        vocab_size=VOCAB,
        tie_word_embeddings=is_tied,
    )


def share(total: int, rank: int, size: int) -> slice:
    return slice(total * rank // size, total * (rank + 1) // size)


def own_rectangle(name: str, shape: list[int], num_kv_heads: int, rank: int, size: int) -> tuple[slice, slice]:
    """Rows and columns of a tensor that are the rank's, by what Megatron-LM shards how."""
    everything = slice(None)
    if "embed_tokens" in name or "lm_head" in name:
        each = -(-VOCAB // size)
        return slice(each * rank, min(each * (rank + 1), VOCAB)), everything
    if "q_proj" in name or "gate_proj" in name or "up_proj" in name:
        return share(shape[0], rank, size), everything
    if "k_proj" in name or "v_proj" in name:
        if num_kv_heads >= size:
            return share(shape[0], rank, size), everything
        head = rank * num_kv_heads // size  # neighbours hold copies
        return slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE), everything
    if "o_proj" in name or "down_proj" in name:
        return everything, share(shape[1], rank, size)
    return everything, everything


def own_bytes(
    file: Path, num_kv_heads: int, rank: int, size: int, stages: Stages
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How often each byte of a safetensors file is to be read by a rank of a stage, from its header."""
    content = file.read_bytes()
    (header_size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_size])
    expected = np.zeros(len(content), np.int64)
    is_tied = "lm_head.weight" not in header
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        is_mine = stages.is_last
        if ".layers." in name:
            is_mine = int(name.split(".")[2]) in stages.layers(3)
        elif "embed_tokens" in name:
            is_mine = stages.is_first + (is_tied and stages.is_last)  # as table, and as head
        shape = entry["shape"] if len(entry["shape"]) == 2 else [1, *entry["shape"]]
        start, end = (8 + header_size + at for at in entry["data_offsets"])
        rows, columns = own_rectangle(name, shape, num_kv_heads, rank, size)
        tensor = expected[start:end].reshape(*shape, 4)
        tensor[rows, columns] += int(is_mine)
    return expected


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)], ids=lambda n: str(n))
def test_a_rank_reads_its_share_and_nothing_else(
    tmp_path: Path, reads: list[tuple[int, int]], size: int, count: int, num_kv_heads: int, is_tied: bool
) -> None:
    folder = llama(tmp_path, is_tied=is_tied, num_kv_heads=num_kv_heads)
    for stage in range(count):
        for rank in range(size):
            reads.clear()
            stages = Stages(stage, count)
            with Checkpoint(folder) as checkpoint:
                group = Group(rank, size, NoTransport() if size > 1 else None)
                build_model(load_config(folder), checkpoint, dtype="float32", group=group, stages=stages)
                checkpoint.finish()
            seen = np.zeros((folder / SINGLE_FILE).stat().st_size, np.int64)
            for offset, num_bytes in reads:
                seen[offset : offset + num_bytes] += 1
            expected = own_bytes(folder / SINGLE_FILE, num_kv_heads, rank, size, stages)
            assert np.array_equal(seen, expected)
            assert checkpoint.bytes_read == expected.sum()


def test_whole_rows_are_read_where_nearly_all_of_them_is_wanted(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    """At most a tenth too much."""
    folder = llama(tmp_path, is_tied=False, num_kv_heads=4)
    name = "model.layers.0.mlp.down_proj.weight"
    part = torch.empty(HIDDEN, 90)
    with Checkpoint(folder) as checkpoint:
        checkpoint.read_into(part, name, (HIDDEN, INNER), columns=range(2, 92))
        assert checkpoint.bytes_read == HIDDEN * INNER * 4 <= 1.1 * part.nbytes
        assert len(reads) == 1
        checkpoint.read_into(torch.empty(HIDDEN, 40), name, (HIDDEN, INNER), columns=range(2, 42))
        assert checkpoint.bytes_read == HIDDEN * (INNER + 40) * 4


# --- memory ----------------------------------------------------------------------------------------

TWO_BILLION = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 8192,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}

LOAD_AND_MEASURE = """
import json, sys
from pathlib import Path
import torch
from models.checkpoint import Checkpoint
from models.ops.select import set_num_threads
from models.parallel import Group
from models.registry import build_model, load_config
from tests.models.test_loading import NoTransport

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

folder, size = Path(sys.argv[1]), int(sys.argv[2])
set_num_threads(2)
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = kib("VmRSS")
with Checkpoint(folder) as checkpoint:
    group = Group(0, size, NoTransport() if size > 1 else None)
    model = build_model(load_config(folder), checkpoint, group=group)
print(json.dumps({
    "peak_bytes": 1024 * (kib("VmHWM") - before),
    "share_bytes": checkpoint.bytes_read,
    "num_parameters": model.num_parameters,
}))
"""


def sparse_llama(folder: Path, config: dict[str, int | str]) -> Path:
    """A folder whose weights are a header and a hole: bf16 zeros that take no room on the disk."""
    hidden, inner, vocab, head_size = (
        int(config[name]) for name in ("hidden_size", "intermediate_size", "vocab_size", "head_dim")
    )
    q, kv = (int(config[name]) * head_size for name in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(int(config["num_hidden_layers"])):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "self_attn.q_proj.weight": (q, hidden),
            layer + "self_attn.k_proj.weight": (kv, hidden),
            layer + "self_attn.v_proj.weight": (kv, hidden),
            layer + "self_attn.o_proj.weight": (hidden, q),
            layer + "mlp.gate_proj.weight": (inner, hidden),
            layer + "mlp.up_proj.weight": (inner, hidden),
            layer + "mlp.down_proj.weight": (hidden, inner),
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / SINGLE_FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)
    return folder


@pytest.fixture
def holes(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: holes in its files cost neither memory nor time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="argosy-test-", dir=memory) as folder:
        yield Path(folder)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("num_layers", "size", "num_parameters"), [(30, 2, 2_018_633_728), (14, 1, 1_011_935_232)], ids=["half of 2B", "1B"]
)
def test_a_large_model_loads_in_little_more_memory_than_it_takes(
    holes: Path, num_layers: int, size: int, num_parameters: int
) -> None:
    """2 GB of bf16 weights for the CPU's kernels: one of two ranks of two billion parameters, and half as many whole.

    All two billion on one rank hold the bound as well, but take twice the time.
    """
    if device_facts("cpu").free_memory_bytes < 4 << 30:
        pytest.skip("less than 4 GiB of memory are free")
    folder = sparse_llama(holes / "model", TWO_BILLION | {"num_hidden_layers": num_layers})
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(folder), str(size)]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["num_parameters"] == num_parameters
    assert found["share_bytes"] == pytest.approx(2 * num_parameters / size, rel=0.001)
    assert found["peak_bytes"] <= 1.2 * found["share_bytes"]
