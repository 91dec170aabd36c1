"""What the weight formats cost in quality, against bf16 on the same tokens.

Perplexity on chapters of a novel (data/README.md), in windows of 512 tokens without context before them; beside it the
change of the mean log-likelihood against bf16 with its standard error over tokens, the mean Kullback-Leibler divergence
from bf16's distribution, and how often the most probable token is the same. Then greedy continuations of passages of
the text by the engine: how many of the tokens equal bf16's at the same place, where the first differs (median), and how
many continuations are equal throughout. All formats are loaded at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from pathlib import Path

import torch
from tokenizers import Tokenizer

from loadtest.bench._engine import Bench
from loadtest.bench._formats import FORMATS, add_model_options, load_worker
from loadtest.bench._report import line, report
from models.batch import Batch
from models.kv_cache import KVCache
from serving.engine.worker import Worker

TEXT = Path(__file__).parent / "data" / "alice.txt"
REFERENCE = "bf16"
WINDOW, CHUNK, BLOCK = 512, 128, 16
PROMPT = 48


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="argosy bench quality", description=__doc__)
    add_model_options(parser, list(FORMATS))
    parser.add_argument("--windows", type=int, default=20, help=f"of {WINDOW} tokens, as far as the text reaches")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64, help="continued per prompt")
    options = parser.parse_args(argv)
    names = [REFERENCE, *(name for name in options.formats if name != REFERENCE)]
    longest = max(WINDOW, PROMPT + options.tokens) + 1
    loaded = {
        name: load_worker(options, FORMATS[name], max_num_seqs=options.prompts, max_model_len=longest, budget=256)
        for name in names
    }
    workers = {name: worker for name, worker in loaded.items() if worker is not None}
    reference = workers[REFERENCE]
    ids = text_ids(reference)
    with torch.inference_mode():
        scores = score(workers, ids[: options.windows * WINDOW])
    places = [len(ids) * at // options.prompts for at in range(options.prompts)]
    prompts = [ids[place : place + PROMPT].tolist() for place in places if place + PROMPT <= len(ids)]
    spoken = {name: continuations(worker, prompts, options.tokens) for name, worker in workers.items()}
    tell(workers, scores, spoken)
    return 0


def text_ids(worker: Worker) -> torch.Tensor:
    """int64 token ids of the text."""
    tokenizer = Tokenizer.from_file(str(Path(worker.settings.model_dir) / "tokenizer.json"))
    return torch.tensor(tokenizer.encode(TEXT.read_text(encoding="ascii"), add_special_tokens=False).ids)


@dataclasses.dataclass(slots=True)
class Score:
    """Of one format over all tokens that have one before them in their window."""

    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)  # -ln p of the text's token
    divergences: list[torch.Tensor] = dataclasses.field(default_factory=list)
    is_same: list[torch.Tensor] = dataclasses.field(default_factory=list)  # the most probable token is bf16's


def score(workers: dict[str, Worker], ids: torch.Tensor) -> dict[str, Score]:
    """Every format on the same chunks, the reference first."""
    scores = {name: Score() for name in workers}
    caches = {
        name: KVCache(
            worker.config, worker.model.kernels, WINDOW // BLOCK + 1, BLOCK, getattr(torch, worker.settings.dtype)
        )
        for name, worker in workers.items()
    }
    for window in ids.split(WINDOW):  # type: ignore[no-untyped-call]
        for start in range(0, len(window) - 1, CHUNK):
            batch = chunk_of(window, start, min(start + CHUNK, len(window) - 1))
            wanted = window[start + 1 : start + 1 + len(batch.token_ids)]
            base = torch.empty(0)
            for name, worker in workers.items():
                logs = torch.log_softmax(worker.model.forward(batch, caches[name]), dim=-1)
                base = logs if name == REFERENCE else base
                scores[name].losses.append(-logs.gather(1, wanted.unsqueeze(1)).squeeze(1))
                scores[name].divergences.append((base.exp() * (base - logs)).sum(-1))
                scores[name].is_same.append(base.argmax(-1) == logs.argmax(-1))
    return scores


def chunk_of(window: torch.Tensor, start: int, end: int) -> Batch:
    """Tokens [start, end) of a window that lies in blocks 1, 2, …; all of their logits are wanted."""
    positions = torch.arange(start, end, dtype=torch.int32)
    return Batch(
        token_ids=window[start:end].int(),
        positions=positions,
        query_start_loc=torch.tensor([0, end - start], dtype=torch.int32),
        seq_lens=torch.tensor([end], dtype=torch.int32),
        block_table=torch.arange(1, WINDOW // BLOCK + 1, dtype=torch.int32).unsqueeze(0),
        slot_mapping=positions + BLOCK,
        logits_indices=torch.arange(end - start, dtype=torch.int32),
        max_query_len=end - start,
        max_seq_len=end,
    )


def continuations(worker: Worker, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy, in one batch: rows do not depend on each other (C4)."""
    bench = Bench(worker, 256)
    for handle, prompt in enumerate(prompts):
        bench.add(handle, prompt, num_tokens)
    bench.run()
    return [bench.tokens[handle] for handle in range(len(prompts))]


def tell(workers: dict[str, Worker], scores: dict[str, Score], spoken: dict[str, list[list[int]]]) -> None:
    base = torch.cat(scores[REFERENCE].losses).double()
    shape = Path(workers[REFERENCE].settings.model_dir).name
    rows, lines = [], []
    for name, worker in workers.items():
        losses = torch.cat(scores[name].losses).double()
        change = losses - base
        error = float(change.std()) / math.sqrt(len(change))
        divergence = float(torch.cat(scores[name].divergences).double().mean())
        same = float(torch.cat(scores[name].is_same).double().mean())
        pairs = list(zip(spoken[name], spoken[REFERENCE], strict=True))
        num_tokens = len(pairs[0][0])
        equal = sum(a == b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))
        first = [next((i for i in range(num_tokens) if mine[i] != theirs[i]), num_tokens) for mine, theirs in pairs]
        whole = sum(at == num_tokens for at in first)
        found = {
            "perplexity": round(math.exp(float(losses.mean())), 4),
            "loss_change": round(float(change.mean()), 5),
            "loss_change_error": round(error, 5),
            "divergence": round(divergence, 6),
            "same_top": round(same, 4),
            "greedy_equal": round(equal / (len(pairs) * num_tokens), 4),
            "greedy_first_difference": statistics.median(first),
            "greedy_whole": whole,
        }
        rows.append(
            [
                name,
                f"{worker.model.weight_bytes / 1e6:.0f}",
                f"{found['perplexity']:.3f}",
                f"{found['loss_change']:+.4f} ± {error:.4f}",
                f"{divergence:.5f}",
                f"{same:.1%}",
                f"{found['greedy_equal']:.1%}",
                f"{found['greedy_first_difference']:.0f}",
                f"{whole}/{len(pairs)}",
            ]
        )
        lines.append(
            line(
                bench="quality",
                value=found.pop("perplexity"),
                unit="perplexity",
                shape=shape,
                fmt=name,
                kernels=worker.found.kernels,
                weight_bytes=worker.model.weight_bytes,
                text=TEXT.name,
                tokens=len(losses),
                prompts=len(pairs),
                continued=num_tokens,
                **found,
            )
        )
    columns = ["format", "MB", "perplexity", "change of loss", "KL", "same top", "greedy =", "first ≠", "whole"]
    title = f"{shape}: {len(base)} tokens of {TEXT.name}; {len(pairs)} greedy continuations of {num_tokens}"
    report(title, columns, rows, lines)
