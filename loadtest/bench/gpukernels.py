"""Kernels of a GPU one by one: decode attention and linears against bandwidth, and whose bits depend on the batch.

Times are of CUDA graphs where the kernel can be captured, so launches are not in them. A linear is invariant at M when
its first row has the bits that it has in a batch of the largest M; attention when a row has them alone and in a batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from loadtest.bench._gpu import GpuCeilings, has_gpu, measure_ceilings, seconds
from loadtest.bench._report import line, report
from models.batch import Batch
from models.ops.kernels import LayerKV
from models.ops.triton import TritonKernels
from serving.engine.graphs import captured

HEADS = [(32, 8, 128), (16, 8, 128)]
LINEARS = {
    "llama-3.1-8b": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    "qwen3-0.6b": [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)],
}
BLOCK = 16


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench gpukernels", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--shapes", nargs="*", default=list(LINEARS), choices=list(LINEARS))
    options = parser.parse_args(argv)
    if not has_gpu():
        print("not measured: no CUDA device here", file=sys.stderr)
        return 0
    kernels = TritonKernels(torch.bfloat16, torch.device("cuda"))
    ceilings = measure_ceilings()
    rows, lines = [], []
    with torch.inference_mode():
        for heads in HEADS:
            for num_rows in options.rows:
                for context in options.contexts:
                    row, result = attention(kernels, heads, num_rows, context, ceilings)
                    rows.append(row)
                    lines.append(result)
        columns = ["attention", "rows", "context", "µs", "MB", "of read BW", "same bits alone"]
        report(f"decode attention, one layer; {ceilings.as_json()}", columns, rows, lines)
        for shape in options.shapes:
            rows, lines = [], []
            for size in LINEARS[shape]:
                row, result = linear(kernels, size, options.rows, ceilings)
                rows.append(row)
                lines.append(result)
            columns = ["linear", *(f"M={m}: of BW" for m in options.rows), "M with the bits of the largest"]
            report(f"bf16 linears of {shape}", columns, rows, lines)
    return 0


def graph_seconds(work: Callable[[], object], repeat: int = 20) -> float:
    """Of one call, replayed."""
    work()
    replay, _, _ = captured(lambda: [work() for _ in range(repeat)])
    return seconds(replay, repeat=3) / repeat


def attention(
    kernels: TritonKernels, heads: tuple[int, int, int], num_rows: int, context: int, ceilings: GpuCeilings
) -> tuple[list[str], dict[str, object]]:
    num_heads, num_kv_heads, size = heads
    width = -(-context // BLOCK)
    copies = max(1, min(8, (256 << 20) // (num_rows * context * num_kv_heads * size * 4)))  # beyond the L2 cache
    caches = []
    for _ in range(copies):
        shape = (1 + num_rows * width, BLOCK, num_kv_heads, size)
        caches.append(LayerKV(*(torch.randn(shape, device="cuda").bfloat16() for _ in range(2))))
    order = 1 + torch.randperm(num_rows * width, device="cuda").int().view(num_rows, width)
    q = torch.randn(num_rows, num_heads * size, device="cuda").bfloat16()

    def run(kv: LayerKV, first: int, count: int) -> torch.Tensor:
        """A new batch each time, as each step has one: what kernels keep in it is part of the step."""
        out, _ = kernels.attention(q[first : first + count], kv, batch_of(order, first, count), *heads, size**-0.5)
        return out

    def batch_of(table: torch.Tensor, first: int, count: int) -> Batch:
        made = batches.get((first, count))
        if made is None:
            ints = torch.arange(count + 1, dtype=torch.int32, device="cuda")
            lengths = torch.full((count,), context, dtype=torch.int32, device="cuda")
            own = table[first : first + count].contiguous()
            made = batches[first, count] = Batch(
                ints[:-1], lengths - 1, ints, lengths, own, ints[:-1], ints[:-1], 1, context
            )
        return made

    batches: dict[tuple[int, int], Batch] = {}
    whole = run(caches[0], 0, num_rows)
    is_same = all(torch.equal(run(caches[0], at, 1)[0], whole[at]) for at in {0, num_rows // 2, num_rows - 1})
    turn = iter(range(1 << 30))
    taken = graph_seconds(lambda: run(caches[next(turn) % copies], 0, num_rows))
    num_bytes = 2 * 2 * num_rows * context * num_kv_heads * size
    fraction = num_bytes / taken / ceilings.ceilings.read_bytes_s
    row = [f"{num_heads}/{num_kv_heads}", str(num_rows), str(context), f"{taken * 1e6:.1f}", f"{num_bytes / 1e6:.1f}"]
    result = line(
        bench="decode attention", value=round(taken * 1e6, 2), unit="us", fraction=round(fraction, 3), rows=num_rows,
        context=context, heads=heads, is_invariant=is_same, ceilings=ceilings.as_json(),
    )  # fmt: skip
    return [*row, f"{fraction:.0%}", str(is_same)], result


def linear(
    kernels: TritonKernels, size: tuple[int, int], counts: Sequence[int], ceilings: GpuCeilings
) -> tuple[list[str], dict[str, object]]:
    out_features, in_features = size
    num_bytes = 2 * out_features * in_features
    copies = max(1, min(16, (256 << 20) // num_bytes))
    weights = [kernels.pack(torch.randn(size, device="cuda").bfloat16() * 0.02) for _ in range(copies)]
    x = torch.randn(max(counts), in_features, device="cuda").bfloat16()
    fractions = []
    for count in counts:
        turn = iter(range(1 << 30))
        rows = x[:count]
        taken = graph_seconds(lambda rows=rows, turn=turn: kernels.linear(rows, weights[next(turn) % copies]))  # type: ignore[misc]
        fractions.append(num_bytes / taken / ceilings.ceilings.read_bytes_s)
    first = kernels.linear(x, weights[0])[0].clone()
    same = [m for m in range(1, max(counts) + 1) if torch.equal(kernels.linear(x[:m], weights[0])[0], first)]
    result = line(
        bench=f"linear {out_features}x{in_features}", value=None, unit="fraction", why="by M in fractions",
        fractions={m: round(f, 3) for m, f in zip(counts, fractions, strict=True)}, invariant_m=spans(same),
        ceilings=ceilings.as_json(),
    )  # fmt: skip
    return [f"{out_features}x{in_features}", *(f"{f:.0%}" for f in fractions), spans(same)], result


def spans(numbers: Sequence[int]) -> str:
    """[1, 3, 4, 5] as "1, 3–5"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in found) or "none"
