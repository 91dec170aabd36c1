"""The benchmark of loading loads what it says, and its ceiling is what was read."""

from __future__ import annotations

from pathlib import Path

from loadtest.bench.coldstart import weight_files
from loadtest.bench.load import made_up, read_rate
from models.registry import load_model


def test_a_made_up_model_loads(tmp_path: Path) -> None:
    folder = made_up(tmp_path / "model", 0.26)
    (file,) = weight_files(folder)
    assert 0.25e9 < file.stat().st_size < 0.27e9
    assert load_model(folder).num_parameters * 2 < file.stat().st_size
    assert 1e7 < read_rate([file, file], 2 * file.stat().st_size) < 1e12
