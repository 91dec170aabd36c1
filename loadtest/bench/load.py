"""How fast weights are loaded, beside what the disk and the page cache can deliver, with and without packed weights.

Every load is a fresh process, as a start is: it counts from `load_model` to its return, imports apart. Warm = the files
are in the page cache; cold = their pages were given back before (fadvise; other users of the machine keep theirs). The
ceiling is one pass of plain reads over the same bytes into memory that is already there. Without --model, a made-up
Llama of --gigabytes is written first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.bench._report import line, report
from loadtest.bench.coldstart import drop_from_cache, model_folder, weight_files

_LOAD = """
import json, sys, time
from pathlib import Path
from models.ops.select import set_num_threads
from models.registry import load_model
folder, cache, dtype, quantization, num_threads = sys.argv[1:]
set_num_threads(int(num_threads))
done, saved = [0], []
started, cpu_started = time.perf_counter(), time.process_time()
load_model(
    folder, dtype=dtype, quantization=quantization, cache_dir=Path(cache) if cache else None, on_note=print,
    progress=lambda count, total: done.__setitem__(0, count), run_later=saved.append,
)
seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
started = time.perf_counter()
for save in saved:
    save()
save_s = time.perf_counter() - started if saved else 0.0
print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "bytes": done[0], "save_s": save_s}))
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench load", description=__doc__)
    parser.add_argument("--model", default=None, help="as for argosy serve; made up when it is not given")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the made-up model's bf16 weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="none", choices=["none", "int8", "int4"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="argosy-bench-") as scratch:
        folder = model_folder(options.model) if options.model else made_up(Path(scratch) / "model", options.gigabytes)
        measure(folder, Path(scratch) / "packed", options)
    return 0


def measure(folder: Path, cache: Path, options: argparse.Namespace) -> None:
    """Prints the table and the lines."""

    def load(cache_dir: Path | None) -> dict[str, Any]:
        arguments = [str(folder), str(cache_dir or ""), options.dtype, options.quantization, str(options.threads)]
        ran = subprocess.run([sys.executable, "-c", _LOAD, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        return result

    fmt = options.dtype if options.quantization == "none" else options.quantization
    first = load(cache)  # writes the packed weights
    packed = sorted(cache.rglob("weights.bin"))
    rows, lines = [], []
    for temperature in ("cold", "warm"):
        for name, files, cache_dir in (
            ("checkpoint", weight_files(folder), None),
            ("packed", [*packed, *weight_files(folder)], cache),
        ):

            def prepared(files: Sequence[Path] = files, is_cold: bool = temperature == "cold") -> None:
                if is_cold:
                    drop_from_cache(files)

            loads = []
            for _ in range(options.repeat):
                prepared()
                loads.append(load(cache_dir))
            num_bytes = loads[0]["bytes"]
            ceiling = 0.0
            for _ in range(options.repeat):
                prepared()
                ceiling = max(ceiling, read_rate(files, num_bytes))
            seconds = statistics.median(found["seconds"] for found in loads)
            cpu_s = statistics.median(found["cpu_s"] for found in loads)
            rate = num_bytes / seconds
            rows.append(
                [
                    f"{temperature}, {name}",
                    f"{num_bytes / 1e9:.2f}",
                    f"{seconds:.2f}",
                    f"{cpu_s:.2f}",
                    f"{rate / 1e9:.2f}",
                    f"{ceiling / 1e9:.2f}",
                    f"{rate / ceiling:.0%}",
                ]
            )
            lines.append(
                line(
                    bench=f"load {temperature} {name}",
                    shape=folder.name,
                    fmt=fmt,
                    value=round(rate / 1e9, 3),
                    unit="GB/s",
                    seconds=round(seconds, 3),
                    seconds_all=[round(found["seconds"], 3) for found in loads],
                    cpu_s=round(cpu_s, 3),
                    bytes=num_bytes,
                    limit=round(ceiling / 1e9, 3),
                    fraction=round(rate / ceiling, 3),
                    ceilings={"read_gb_s": round(ceiling / 1e9, 3)},
                    threads=options.threads,
                    save_s=round(first["save_s"], 2),
                    n=options.repeat,
                )
            )
    title = f"loading {folder.name} as {fmt}, {options.threads} threads; "
    title += f"packed weights took {first['save_s']:.1f} s to write"
    report(title, ["", "GB read", "s", "CPU s", "GB/s", "ceiling", "fraction"], rows, lines)


def read_rate(files: Sequence[Path], num_bytes: int) -> float:
    """Bytes per second of reading the first `num_bytes` of the files."""
    buffer = memoryview(bytearray(16 << 20))
    left, started = num_bytes, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while left > 0 and (count := file.readinto(buffer[: min(left, len(buffer))])):
                left -= count
    return (num_bytes - max(left, 0)) / (time.perf_counter() - started)


def made_up(folder: Path, gigabytes: float) -> Path:
    """A Llama of about so many bytes in bf16, written to the disk."""
    import torch
    from safetensors.torch import save_file

    from models.fields import Fields
    from models.random_weights import RandomWeights
    from models.registry import build_model, parse_config

    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "vocab_size": 16384,
        "max_position_embeddings": 2048,
    }
    per_layer = 62.9e6 * 2
    config["num_hidden_layers"] = max(1, round((gigabytes * 1e9 - 4 * 16384 * 2048) / per_layer))

    class Shapes(RandomWeights):
        """Remembers what the model consists of."""

        def claim(self, name: str, shape: tuple[int, ...]) -> None:
            super().claim(name, shape)
            shapes[name] = shape

    shapes: dict[str, tuple[int, ...]] = {}
    build_model(parse_config(Fields(config)), Shapes(), device="meta")
    reader, tensors = RandomWeights(), {}
    for name, shape in shapes.items():
        tensors[name] = torch.empty(shape, dtype=torch.bfloat16)
        reader.read_into(tensors[name], name, shape)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder
