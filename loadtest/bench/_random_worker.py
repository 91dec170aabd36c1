"""A rank whose weights are made up: speed depends on a model's shape, not on what it has learnt."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from models.random_weights import RandomWeights
from models.registry import CausalLM, build_model
from serving.config import EngineSettings
from serving.engine.worker import LoadCallback, Worker
from serving.planning.shapes import SHAPES


class RandomWorker(Worker):
    """Loads nothing: a shape's `config.json`, random weights, a tokenizer that knows every id."""

    def _load_model(self, on_load: LoadCallback | None, started: float) -> tuple[CausalLM, str]:
        model = build_model(
            self.config,
            RandomWeights(self.settings.seed),
            dtype=self.settings.dtype,
            quantization="none" if self.settings.quantization == "auto" else self.settings.quantization,
            device=self.settings.device,
            kernels=self._kernels,
            max_model_len=self.max_model_len,
        )
        return model, f"random{self.settings.seed}"


def random_worker(shape: str, **settings: object) -> RandomWorker:
    """shape: a name among `serving.planning.shapes`. settings: fields of EngineSettings."""
    folder = Path(tempfile.mkdtemp(prefix="argosy-shape-"))
    (folder / "config.json").write_text(json.dumps(dict(SHAPES[shape])))
    vocab = {f"t{i}": i for i in range(SHAPES[shape]["vocab_size"])}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return RandomWorker(EngineSettings(model_dir=str(folder), served_model_name=shape, **settings))  # type: ignore[arg-type]
