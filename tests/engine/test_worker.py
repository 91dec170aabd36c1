"""How a worker loads: what it refuses, what it tells, and what it keeps for the next start."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file

from serving.engine.worker import tokenizer_size
from serving.errors import ModelLoadError
from tests.engine.real import make_worker
from tests.tiny import tiny_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def saved() -> None:
    """Wait for the background threads that write packed weights."""
    for thread in threading.enumerate():
        if thread.name == "save packed weights":
            thread.join(30)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_a_second_start_reads_what_the_first_packed(folder: Path, tmp_path: Path, quantization: str) -> None:
    loads: list[tuple[int, int, float]] = []

    def start() -> int:
        """The bytes read, as the last news says."""
        worker = make_worker(
            folder,
            quantization=quantization,
            weight_cache_dir=str(tmp_path / "cache"),
            on_load=lambda done, total, seconds: loads.append((done, total, seconds)),
        )
        saved()
        done, total, seconds = loads[-1]
        assert done == total
        assert seconds > 0
        assert worker.found.num_parameters == num_parameters
        return done

    tensors = load_file(folder / "model.safetensors")
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    first, second = start(), start()
    assert first == sum(tensor.nbytes for tensor in tensors.values())
    (entry,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    kept = (entry / "weights.bin").stat().st_size
    not_linear = sum(t.nbytes for name, t in tensors.items() if "embed_tokens" in name or t.dim() == 1)
    assert not_linear < second <= not_linear + kept
    assert len(loads) == 2  # a fast load is told of once, at its end


def test_nothing_is_kept_unless_asked(folder: Path) -> None:
    before = set(folder.parent.rglob("*"))
    make_worker(folder, quantization="int8")
    saved()
    assert set(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head_dim": 258}, "head_size must be even and at most 256; got 258"),
        ({"max_position_embeddings": 1 << 24}, "fewer than one request of 16777216: lower --max-model-len to"),
    ],
)
def test_what_cannot_run_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, fields: dict[str, int], words: str
) -> None:
    """There are none here."""
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ModelLoadError, match=words):
        make_worker(tmp_path, max_model_len=None)


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_a_tokenizer_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json (is not a tokenizer|has no tokens)"):
        tokenizer_size(str(tmp_path), 300)
