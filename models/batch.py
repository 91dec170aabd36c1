"""What one forward pass computes, as flat device tensors. Knows no request and no policy."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(slots=True)
class Batch:
    """R rows with T query tokens in all: decodes, chunks of prompts and mixtures alike (C7, C9).

    Row r owns query tokens query_start_loc[r] : query_start_loc[r + 1]; they are the last tokens
    of its seq_lens[r] tokens of context. All int32 unless said.
    """

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T], absolute
    query_start_loc: torch.Tensor  # [R + 1]
    seq_lens: torch.Tensor  # [R], context length including this step's tokens
    block_table: torch.Tensor  # [R, width], block ids; entries past the context are never read
    slot_mapping: torch.Tensor  # [T], block id * block_size + offset: where K and V are written
    logits_indices: torch.Tensor  # [S], query tokens whose logits are wanted
    max_query_len: int
    max_seq_len: int
    scratch: object = None  # what the kernels worked out once for all layers; theirs alone
