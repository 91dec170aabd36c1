"""A peer on the GPU: transformers' `generate` with a static cache and random weights, compiled if asked (minutes).

The time of a step is the difference between a long and a short run over the tokens between them: compilation, the
prompt and the call itself are in neither.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from loadtest.bench._gpu import has_gpu
from loadtest.bench._report import line, report
from serving.planning.shapes import SHAPES


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench gpupeer", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6b"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="have torch compile the decode step")
    options = parser.parse_args(argv)
    if not has_gpu():
        print("not measured: no CUDA device here", file=sys.stderr)
        return 0
    import transformers

    for name in options.shapes:
        values = dict(SHAPES[name])
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        rows, lines = [], []
        for streams in options.streams:
            taken = step_s(model, streams, options)
            value = streams / statistics.median(taken)
            rows.append([str(streams), f"{value:.1f}", f"{statistics.median(taken) * 1e3:.3f}"])
            peer = f"transformers {transformers.__version__}, static cache{', compiled' if options.compile else ''}"
            lines.append(
                line(bench=f"decode {streams}", value=round(value, 1), unit="tok/s", shape=name) | {"engine": peer}
            )
        report(f"{name}, transformers {transformers.__version__}", ["streams", "tok/s", "ms"], rows, lines)
        del model
    return 0


def step_s(model: Any, streams: int, options: argparse.Namespace) -> list[float]:
    """Seconds of a decode step, by repetition."""
    ids = torch.randint(10, 1000, (streams, options.prompt), device="cuda")
    mask = torch.ones_like(ids)

    def generate_s(count: int) -> float:
        torch.accelerator.synchronize()
        started = time.perf_counter()
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
            disable_compile=not options.compile,
            max_length=None,
        )
        torch.accelerator.synchronize()
        return time.perf_counter() - started

    few, many = 8, options.tokens + 8
    generate_s(many), generate_s(few)
    return [(generate_s(many) - generate_s(few)) / options.tokens for _ in range(options.repeat)]
