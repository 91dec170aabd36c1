"""Where each tensor of a GGUF file belongs in Hugging Face's layout: names, shapes, the order of rows.

What llama.cpp's converter does to a checkpoint is undone here: it interleaves the rotary halves of query and key
rows (Llama and its relatives only), stacks experts, adds one to Gemma's norms, transposes GPT-2's linears, and sorts
GPT-NeoX's fused projection by q, k and v instead of by head.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from models.store.errors import StoreError
from models.store.gguf_config import FREQUENCY_TABLE, Sizes
from models.store.gguf_file import GgufFile, GgufTensor, Rows


class Layout(enum.Enum):
    """How llama.cpp stores a tensor."""

    PLAIN = enum.auto()
    QUERY = enum.auto()  # rows of each head interleaved for rotation by neighbours
    KEY = enum.auto()
    SHIFTED = enum.auto()  # 1 + weight
    TRANSPOSED = enum.auto()  # [out, in], where Hugging Face has [in, out]
    FUSED = enum.auto()  # rows by q, k, v, then by head, where Hugging Face has them by head, then by q, k, v
    EXPERTS = enum.auto()  # [experts, out, in], where Hugging Face has one tensor per expert


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the table. {layer} and {expert} in the names are numbers."""

    stem: str  # in the GGUF file
    name: str  # in Hugging Face's layout
    shape: tuple[int, ...]  # in the GGUF file, outermost first
    layout: Layout = Layout.PLAIN
    is_linear: bool = False  # a projection of a layer, which weight formats quantise


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """One tensor to be written, and where its values are."""

    name: str
    shape: tuple[int, ...]
    source: GgufTensor
    rows: Rows  # of the source; of a vector its elements
    is_linear: bool
    is_transposed: bool = False
    shift: float = 0.0  # to be added to every value


def find_targets(file: GgufFile, config: dict[str, Any], sizes: Sizes) -> list[Target]:
    """Every tensor of the model, in the order in which they lie in the file.

    Raises StoreError when a tensor is missing, unknown or has another shape than the configuration says.
    """
    expected = {part.stem: part for part in _parts(config, sizes)}
    if not config["tie_word_embeddings"]:
        name = "embed_out.weight" if config["model_type"] == "gpt_neox" else "lm_head.weight"
        expected["output.weight"] = Part("output.weight", name, (sizes.vocab, sizes.hidden))
    found: list[Target] = []
    for tensor in file.tensors.values():
        if tensor.name == FREQUENCY_TABLE or (tensor.name == "output.weight" and config["tie_word_embeddings"]):
            continue
        part = expected.pop(tensor.name, None)
        if part is None:
            raise StoreError(
                f"{file.path.name}: tensor {tensor.name!r} is not part of a {config['model_type']} model as configured"
            )
        if tensor.shape != part.shape:
            raise StoreError(
                f"{file.path.name}: tensor {tensor.name!r} is {list(tensor.shape)}, not {list(part.shape)}"
            )
        found.extend(_targets(tensor, part, sizes))
    if expected:
        first = next(iter(expected.values()))
        raise StoreError(f"{file.path.name}: {len(expected)} tensors are missing, the first {first.stem!r}")
    return found


def _targets(tensor: GgufTensor, part: Part, sizes: Sizes) -> Iterator[Target]:
    target = Target(part.name, part.shape, tensor, slice(None), part.is_linear)
    match part.layout:
        case Layout.PLAIN:
            yield target
        case Layout.QUERY:
            yield dataclasses.replace(target, rows=halves(sizes.heads, sizes.head))
        case Layout.KEY:
            yield dataclasses.replace(target, rows=halves(sizes.kv_heads, sizes.head))
        case Layout.SHIFTED:
            yield dataclasses.replace(target, shift=-1.0)
        case Layout.TRANSPOSED:
            yield dataclasses.replace(target, shape=part.shape[::-1], is_transposed=True)
        case Layout.FUSED:
            yield dataclasses.replace(target, rows=by_head(sizes.heads, sizes.head))
        case Layout.EXPERTS:
            num_experts, height, width = part.shape
            for expert in range(num_experts):
                yield Target(
                    part.name.replace("{expert}", str(expert)),
                    (height, width),
                    tensor,
                    slice(expert * height, (expert + 1) * height),
                    part.is_linear,
                )


def halves(num_heads: int, head: int) -> Rows:
    """Source rows of query or key rows in Hugging Face's order.

    llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face (i, i + head / 2).
    """
    return np.arange(num_heads * head).reshape(num_heads, head // 2, 2).swapaxes(1, 2).ravel()


def by_head(num_heads: int, head: int) -> Rows:
    """Source rows, stored as [q | k | v], of a fused projection whose rows are q, k, v of each head in turn."""
    return np.arange(3 * num_heads * head).reshape(3, num_heads, head).swapaxes(0, 1).ravel()


def _parts(config: dict[str, Any], sizes: Sizes) -> Iterator[Part]:
    """All parts but the head."""
    whole, block, prefix = _FAMILIES[config["model_type"]]
    yield from whole(config, sizes)
    parts = list(block(config, sizes))
    for layer in range(sizes.layers):
        for part in parts:
            yield dataclasses.replace(part, stem=f"blk.{layer}.{part.stem}", name=f"{prefix}.{layer}.{part.name}")


def _linear(
    stem: str, name: str, shape: tuple[int, ...], layout: Layout = Layout.PLAIN, *, has_bias: bool = False
) -> Iterator[Part]:
    yield Part(f"{stem}.weight", f"{name}.weight", shape, layout, is_linear=True)
    if has_bias:
        ordered = layout in (Layout.QUERY, Layout.KEY, Layout.FUSED)
        yield Part(f"{stem}.bias", f"{name}.bias", shape[:1], layout if ordered else Layout.PLAIN)


def _norm(stem: str, name: str, size: int, layout: Layout = Layout.PLAIN, *, has_bias: bool = False) -> Iterator[Part]:
    yield Part(f"{stem}.weight", f"{name}.weight", (size,), layout)
    if has_bias:
        yield Part(f"{stem}.bias", f"{name}.bias", (size,))


def _llama_whole(config: dict[str, Any], sizes: Sizes) -> Iterator[Part]:
    norm = Layout.SHIFTED if config["model_type"] == "gemma3_text" else Layout.PLAIN
    yield Part("token_embd.weight", "model.embed_tokens.weight", (sizes.vocab, sizes.hidden))
    yield from _norm("output_norm", "model.norm", sizes.hidden, norm)


def _llama_block(config: dict[str, Any], sizes: Sizes) -> Iterator[Part]:
    """Llama's block and what its descendants add to it."""
    kind = config["model_type"]
    hidden, queries, keys = sizes.hidden, sizes.heads * sizes.head, sizes.kv_heads * sizes.head
    rotates_neighbours = kind in ("llama", "mistral", "mixtral")
    query, key = (Layout.QUERY, Layout.KEY) if rotates_neighbours else (Layout.PLAIN, Layout.PLAIN)
    norm = Layout.SHIFTED if kind == "gemma3_text" else Layout.PLAIN
    has_bias = kind == "qwen2" or config.get("attention_bias", False)
    yield from _norm("attn_norm", "input_layernorm", hidden, norm)
    yield from _linear("attn_q", "self_attn.q_proj", (queries, hidden), query, has_bias=has_bias)
    yield from _linear("attn_k", "self_attn.k_proj", (keys, hidden), key, has_bias=has_bias)
    yield from _linear("attn_v", "self_attn.v_proj", (keys, hidden), has_bias=has_bias)
    yield from _linear("attn_output", "self_attn.o_proj", (hidden, queries), has_bias=has_bias and kind != "qwen2")
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        yield from _norm("attn_q_norm", "self_attn.q_norm", sizes.head, norm)
        yield from _norm("attn_k_norm", "self_attn.k_norm", sizes.head, norm)
    if kind == "gemma3_text":
        yield from _norm("post_attention_norm", "post_attention_layernorm", hidden, norm)
        yield from _norm("ffn_norm", "pre_feedforward_layernorm", hidden, norm)
        yield from _norm("post_ffw_norm", "post_feedforward_layernorm", hidden, norm)
    else:
        yield from _norm("ffn_norm", "post_attention_layernorm", hidden, norm)
    match kind:
        case "mixtral":
            yield from _experts("block_sparse_moe", ("w1", "w3", "w2"), sizes)
        case "qwen3_moe":
            yield from _experts("mlp", ("gate_proj", "up_proj", "down_proj"), sizes)
        case _:
            has_bias = config.get("mlp_bias", False)
            yield from _linear("ffn_gate", "mlp.gate_proj", (sizes.inner, hidden), has_bias=has_bias)
            yield from _linear("ffn_up", "mlp.up_proj", (sizes.inner, hidden), has_bias=has_bias)
            yield from _linear("ffn_down", "mlp.down_proj", (hidden, sizes.inner), has_bias=has_bias)


def _experts(name: str, names: tuple[str, str, str], sizes: Sizes) -> Iterator[Part]:
    gate, up, down = (f"{name}.experts.{{expert}}.{part}" for part in names)
    wide, narrow = (sizes.experts, sizes.expert_inner, sizes.hidden), (sizes.experts, sizes.hidden, sizes.expert_inner)
    yield Part("ffn_gate_inp.weight", f"{name}.gate.weight", (sizes.experts, sizes.hidden))
    yield from _linear("ffn_gate_exps", gate, wide, Layout.EXPERTS)
    yield from _linear("ffn_up_exps", up, wide, Layout.EXPERTS)
    yield from _linear("ffn_down_exps", down, narrow, Layout.EXPERTS)


def _gpt2_whole(config: dict[str, Any], sizes: Sizes) -> Iterator[Part]:
    yield Part("token_embd.weight", "transformer.wte.weight", (sizes.vocab, sizes.hidden))
    yield Part("position_embd.weight", "transformer.wpe.weight", (sizes.context, sizes.hidden))
    yield from _norm("output_norm", "transformer.ln_f", sizes.hidden, has_bias=True)


def _gpt2_block(config: dict[str, Any], sizes: Sizes) -> Iterator[Part]:
    hidden, inner = sizes.hidden, sizes.inner
    yield from _norm("attn_norm", "ln_1", hidden, has_bias=True)
    yield from _linear("attn_qkv", "attn.c_attn", (3 * hidden, hidden), Layout.TRANSPOSED, has_bias=True)
    yield from _linear("attn_output", "attn.c_proj", (hidden, hidden), Layout.TRANSPOSED, has_bias=True)
    yield from _norm("ffn_norm", "ln_2", hidden, has_bias=True)
    yield from _linear("ffn_up", "mlp.c_fc", (inner, hidden), Layout.TRANSPOSED, has_bias=True)
    yield from _linear("ffn_down", "mlp.c_proj", (hidden, inner), Layout.TRANSPOSED, has_bias=True)


def _gpt_neox_whole(config: dict[str, Any], sizes: Sizes) -> Iterator[Part]:
    yield Part("token_embd.weight", "gpt_neox.embed_in.weight", (sizes.vocab, sizes.hidden))
    yield from _norm("output_norm", "gpt_neox.final_layer_norm", sizes.hidden, has_bias=True)


def _gpt_neox_block(config: dict[str, Any], sizes: Sizes) -> Iterator[Part]:
    hidden, inner = sizes.hidden, sizes.inner
    yield from _norm("attn_norm", "input_layernorm", hidden, has_bias=True)
    yield from _linear("attn_qkv", "attention.query_key_value", (3 * hidden, hidden), Layout.FUSED, has_bias=True)
    yield from _linear("attn_output", "attention.dense", (hidden, hidden), has_bias=True)
    yield from _norm("ffn_norm", "post_attention_layernorm", hidden, has_bias=True)
    yield from _linear("ffn_up", "mlp.dense_h_to_4h", (inner, hidden), has_bias=True)
    yield from _linear("ffn_down", "mlp.dense_4h_to_h", (hidden, inner), has_bias=True)


_Table = Callable[[dict[str, Any], Sizes], Iterator[Part]]
_LLAMA: tuple[_Table, _Table, str] = (_llama_whole, _llama_block, "model.layers")
_FAMILIES: dict[str, tuple[_Table, _Table, str]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"), _LLAMA),
    "gpt2": (_gpt2_whole, _gpt2_block, "transformer.h"),
    "gpt_neox": (_gpt_neox_whole, _gpt_neox_block, "gpt_neox.layers"),
}
"""By model_type: the tensors of the whole, those of a block, and where Hugging Face numbers the blocks."""
