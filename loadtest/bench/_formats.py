"""The weight formats that benchmarks compare, and the model of the options in each of them."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from serving.config import EngineSettings
from serving.engine.worker import Worker


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    name: str
    dtype: str = "bfloat16"
    quantization: str = "none"
    is_stored: bool = False  # codes as the model's file has them, not rounded from its 16-bit weights


FORMATS = {
    found.name: found
    for found in (
        Format("bf16"),
        Format("fp16", dtype="float16"),
        Format("fp32", dtype="float32"),
        Format("int8", quantization="int8"),
        Format("int4", quantization="int4"),
        Format("int4-stored", quantization="int4", is_stored=True),
    )
}


def add_model_options(parser: argparse.ArgumentParser, formats: list[str]) -> None:
    """formats: measured unless the command line names others."""
    parser.add_argument("--model", default=None, help="as for argosy serve")
    parser.add_argument("--formats", nargs="+", default=formats, choices=list(FORMATS))
    parser.add_argument("--threads", type=int, default=None)


def load_worker(
    options: argparse.Namespace, format: Format, *, max_num_seqs: int, max_model_len: int, budget: int
) -> Worker | None:
    """The model behind the options, pulled first if need be; None when its file holds no 4-bit codes to be served."""
    from models.store import pull
    from serving import config

    found = config.load({"model": options.model})
    folder = pull(found.model, store=Path(found.store))
    if format.is_stored:
        whole, folder = folder, pull(found.model, store=Path(found.store), quantization="int4")
        if folder == whole:
            return None
    return Worker(
        EngineSettings(
            model_dir=str(folder),
            served_model_name="bench",
            dtype=format.dtype,
            quantization=format.quantization,
            num_threads=options.threads,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=budget,
            enable_prefix_cache=False,
        )
    )
