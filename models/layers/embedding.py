"""The two ends of the vocabulary: token ids to vectors, vectors to logits; ids shared among ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from models.config import ModelError
from models.layers.loader import Loader
from models.quant.method import WeightPart


class VocabParallelEmbedding:
    """Rows of the table by token id; a rank holds a contiguous range of ids."""

    def __init__(self, loader: Loader, name: str, vocab_size: int, hidden_size: int) -> None:
        self._group = loader.group
        self._own = _own_ids(loader, vocab_size)
        self._table = loader.table(f"{name}.weight", (vocab_size, hidden_size), self._own)
        self._activation_dtype = loader.kernels.activation_dtype

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int32 [T] -> [T, hidden]."""
        if self._group.size == 1:
            return F.embedding(token_ids, self._table).to(self._activation_dtype)
        local = token_ids - self._own.start
        is_other = (local < 0) | (local >= len(self._own))
        vectors = F.embedding(local.masked_fill(is_other, 0), self._table).to(self._activation_dtype)
        return self._group.all_reduce(vectors.masked_fill_(is_other.unsqueeze(1), 0.0))


class LMHead:
    """Logits over the vocabulary. `name` is the embedding's where the two are tied."""

    def __init__(self, loader: Loader, name: str, vocab_size: int, hidden_size: int) -> None:
        self._group = loader.group
        self._vocab_size = vocab_size
        own = _own_ids(loader, vocab_size)
        self._num_padding = -(-vocab_size // loader.group.size) - len(own)
        self._weight = loader.linear([WeightPart(name, (vocab_size, hidden_size), own, is_head=True)])
        self.num_bytes = self._weight.num_bytes

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] -> float32 [S, vocab_size]. Columns that even out the ranks are cut off again."""
        logits = self._weight.apply(hidden).float()
        if self._group.size == 1:
            return logits
        gathered = self._group.all_gather(F.pad(logits, (0, self._num_padding)))
        return gathered[:, : self._vocab_size].contiguous()


def _own_ids(loader: Loader, vocab_size: int) -> range:
    """Equal ranges but for the last rank's, so that a gather needs padding at the very end only. Raises ModelError."""
    size = -(-vocab_size // loader.group.size)
    if size * (loader.group.size - 1) >= vocab_size:
        raise ModelError(
            f"vocab_size {vocab_size} cannot be divided among {loader.group.size} ranks in parts of {size}"
        )
    start = size * loader.group.rank
    return range(start, min(start + size, vocab_size))
