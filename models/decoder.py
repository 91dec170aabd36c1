"""What all decoders share: embedding, a stack of blocks, a final norm, the head; a stage's part of them (C11).

An architecture derives from `Decoder`, names its tensors, and says what its block is.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch

from models.batch import Batch
from models.config import ModelConfig, ModelError
from models.fields import Fields
from models.kv_cache import KVCache
from models.layers.embedding import LMHead, VocabParallelEmbedding
from models.layers.loader import Loader
from models.layers.norm import RMSNorm
from models.layers.rotary import RotaryTables
from models.ops.kernels import LayerKV
from models.parallel import Stages


class Block(Protocol):
    """One layer."""

    num_bytes: int  # of weights, that this rank reads in one decode step

    def __call__(self, x: torch.Tensor, kv: LayerKV, batch: Batch) -> torch.Tensor:
        """The residual stream x [T, hidden] -> its next value; x may be changed in place."""
        ...


class Norm(Protocol):
    """A normalisation with its weights."""

    num_bytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, size] -> a new [M, size]."""
        ...


class Decoder:
    """Parts that belong to other pipeline stages are None; `blocks` is keyed by global index (C11)."""

    ROOTS: ClassVar[tuple[str, ...]] = ("model.",)
    """Prefixes under which exports keep everything but the head; the first that holds something is taken."""
    EMBEDDING: ClassVar[str] = "embed_tokens"
    LAYERS: ClassVar[str] = "layers"
    NORM: ClassVar[str] = "norm"
    HEAD: ClassVar[str] = "lm_head"
    FIRST_STAGE: ClassVar[tuple[str, ...]] = ()  # further parts that only the first stage holds
    LAST_STAGE: ClassVar[tuple[str, ...]] = ()  # likewise the last
    BUFFERS: ClassVar[tuple[str, ...]] = ("self_attn.rotary_emb.",)  # in layers of old exports; never read

    @staticmethod
    def parse(fields: Fields) -> ModelConfig:
        """The architecture's `config.json`. Raises ModelError naming the field that we cannot compute."""
        raise NotImplementedError

    def load_block(self, loader: Loader, layer: int) -> Block:
        """The block of global index `layer`; `loader` is scoped to it."""
        raise NotImplementedError

    def load_norm(self, loader: Loader) -> Norm:
        """The final one; `loader` is scoped to the root."""
        return RMSNorm(loader, self.NORM, self.config.hidden_size, self.config.norm_eps)

    @property
    def embedding_size(self) -> int:
        """Width of the token vectors, in the embedding and in the head."""
        return self.config.hidden_size

    def load_first(self, loader: Loader) -> None:
        """Further parts of the first stage (FIRST_STAGE); `loader` is scoped to the root."""

    def embed(self, batch: Batch) -> torch.Tensor:
        """The residual stream [T, hidden] before the first block."""
        assert self.embedding is not None
        return self.embedding(batch.token_ids)

    def __init__(self, loader: Loader, config: ModelConfig, stages: Stages, max_model_len: int) -> None:
        """Load this rank's share through `loader`. Raises ModelError naming the tensor that is wrong."""
        self.config = config
        self.kernels = loader.kernels
        self.stages = stages
        self.weight_dtype = loader.dtype
        self.weight_format = loader.method.name
        self.logits_size = config.vocab_size
        self.max_model_len = max_model_len
        self.rotary = RotaryTables(config, max_model_len, loader.device)
        self._group = loader.group
        vocabulary = (config.vocab_size, self.embedding_size)
        root = self._root(loader)
        table, head = self._vocabulary(loader, root.prefix)
        self._own_layers = stages.layers(config.num_layers)

        self.embedding = VocabParallelEmbedding(loader, table, *vocabulary) if stages.is_first else None
        if stages.is_first:
            self.load_first(root)
        self.blocks: list[Block | None] = [None] * config.num_layers
        for i in range(config.num_layers):
            layer = root.at(f"{self.LAYERS}.{i}")
            for name in self.BUFFERS:
                loader.reader.skip(layer.prefix + name)
            if i in self._own_layers:
                self.blocks[i] = self.load_block(layer, i)
            else:
                loader.reader.skip(layer.prefix)
        self.norm = self.load_norm(root) if stages.is_last else None
        self.head = LMHead(loader, head, *vocabulary) if stages.is_last else None
        for name in self._elsewhere(root.prefix):
            loader.reader.skip(f"{name}.")

        self.num_parameters = loader.reader.num_parameters
        parts = (*self.blocks, self.norm, self.head)
        self.weight_bytes = sum(part.num_bytes for part in parts if part is not None)

    def forward(self, batch: Batch, kv_cache: KVCache, hidden_in: torch.Tensor | None = None) -> torch.Tensor:
        """Compute one step and write its keys and values.

        hidden_in: the previous stage's result, [T, hidden]; it may be overwritten. The first stage
            takes none.
        Returns float32 logits [S, vocab_size] of the tokens in batch.logits_indices, or, before the
        last stage, the residual stream [T, hidden].
        """
        if self.embedding is not None:
            x = self.embed(batch)
        elif hidden_in is not None:
            x = hidden_in
        else:
            raise ValueError("hidden_in is required: this stage does not hold the embedding")
        for i in self._own_layers:
            block, kv = self.blocks[i], kv_cache.layers[i]
            if block is None or kv is None:
                raise ModelError(f"layer {i} has no KV cache: it was allocated for another pipeline stage")
            x = block(x, kv, batch)
        if self.norm is None or self.head is None:
            return x
        logits = self.head(self.norm(x.index_select(0, batch.logits_indices)))
        cap = self.config.logits_softcap
        return self.kernels.soft_cap(logits, cap) if cap else logits

    def _root(self, loader: Loader) -> Loader:
        names = [f"{name}.weight" for name in (self.EMBEDDING, self.NORM)]
        roots = [root for root in self.ROOTS if any(loader.reader.has(root + name) for name in names)]
        prefix = roots[0] if roots else self.ROOTS[0]  # the missing tensor is named when it is read
        return loader.at(prefix.removesuffix(".")) if prefix else loader

    def _vocabulary(self, loader: Loader, root: str) -> tuple[str, str]:
        """Names of the embedding and of the head, as transformers 5 takes them.

        Tied, they are one weight under either name. An export that holds both may hold two: fine-tuning that knew
        nothing of the tie leaves such a pair, so each is what it is called.
        """
        table, head = root + self.EMBEDDING, self.HEAD
        if not self.config.tie_word_embeddings:
            return table, head
        has_head = any(loader.reader.has(f"{head}.{kind}") for kind in ("weight", "codes"))
        if not has_head:
            return table, table
        return (table if loader.reader.has(f"{table}.weight") else head), head

    def _elsewhere(self, root: str) -> list[str]:
        """Names of this model's tensors that this stage leaves unread."""
        names: list[str] = []
        if not self.stages.is_first:
            names += [root + name for name in (self.EMBEDDING, *self.FIRST_STAGE)]
        if not self.stages.is_last:
            names += [root + self.NORM, self.HEAD, *(root + name for name in self.LAST_STAGE)]
        return names
