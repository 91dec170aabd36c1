"""What a model weighs, from its configuration alone: parameters, and the share of them that each rank holds.

An account of its own: it shares no code with the layers, whose allocations it must equal (tests/models/
test_footprint.py). It allocates nothing, so a trillion parameters take as long as a million.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from models.architectures.opt import OPTConfig
from models.config import ModelConfig, ModelError

_POSITION_ROWS_BEFORE_ZERO = 2  # of OPT's table; stored, never held
_INT4_GROUP = 32
_ANGLE_BYTES = 4  # rotary tables are float32
_WIDE_BYTES = 4
_INT8_SCALE_BYTES = 4
_INT4_SCALE_BYTES = 4  # a float16 scale and offset; codes stored without offsets need half


@dataclasses.dataclass(frozen=True, slots=True)
class _Family:
    """What configurations do not say because it is the architecture's."""

    is_gated: bool = True  # two inner projections per feed-forward network, not one
    has_layer_norm: bool = False  # norms have a bias beside their weight
    norms_per_block: int = 2
    has_positions: bool = False  # learned ones
    has_wide_norms: bool = False  # their weights are held in fp32 whatever the activations


_FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"), _Family()),
    "gemma3_text": _Family(norms_per_block=4, has_wide_norms=True),
    "gpt2": _Family(is_gated=False, has_layer_norm=True, has_positions=True),
    "gpt_neox": _Family(is_gated=False, has_layer_norm=True),
    "opt": _Family(is_gated=False, has_layer_norm=True, has_positions=True),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """One rank of a gang."""

    tensor_size: int = 1
    pipeline_size: int = 1
    tensor_rank: int = 0
    stage: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Precision:
    """Bytes per value."""

    linear: float  # of unquantised linears
    table: float  # of embeddings and learned positions
    vector: float  # of norms and biases, which are held in the activations' type
    quantization: str = "none"  # none | int8 | int4


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """Values that one rank holds."""

    linear: int = 0  # weights of linears in the model's format
    linear_outputs: int = 0  # of those linears together
    plain: int = 0  # of linears that are never quantised
    table: int = 0
    vector: int = 0
    angles: int = 0
    wide: int = 0  # of `vector`, those that are held in fp32
    ragged: int = 0  # of `linear`, those whose inputs here are not whole groups: int4 leaves them as they are
    head: int = 0  # of `linear`, the language-model head's, which have 8 bits where the others have 4
    head_outputs: int = 0  # of the head

    def __add__(self, other: Share) -> Share:
        return Share(
            self.linear + other.linear,
            self.linear_outputs + other.linear_outputs,
            self.plain + other.plain,
            self.table + other.table,
            self.vector + other.vector,
            self.angles + other.angles,
            self.wide + other.wide,
            self.ragged + other.ragged,
            self.head + other.head,
            self.head_outputs + other.head_outputs,
        )

    def __mul__(self, count: int) -> Share:
        return Share(
            count * self.linear,
            count * self.linear_outputs,
            count * self.plain,
            count * self.table,
            count * self.vector,
            count * self.angles,
            count * self.wide,
            count * self.ragged,
            count * self.head,
            count * self.head_outputs,
        )

    def linear_bytes(self, precision: Precision) -> int:
        """Of all linears with their scales: what a step reads, experts nobody chose included."""
        plain = self.plain * precision.linear
        if precision.quantization == "int8":
            return int(plain + self.linear + self.linear_outputs * _INT8_SCALE_BYTES)
        if precision.quantization == "int4":
            coded = self.linear - self.ragged - self.head
            kept = (self.plain + self.ragged) * precision.linear + self.head + self.head_outputs * _INT8_SCALE_BYTES
            return int(kept + coded // 2 + coded // _INT4_GROUP * _INT4_SCALE_BYTES)
        return int(plain + self.linear * precision.linear)

    def num_bytes(self, precision: Precision) -> int:
        """Of everything, without the padding of packed weights."""
        vectors = (self.vector - self.wide) * precision.vector + self.wide * _WIDE_BYTES
        others = self.table * precision.table + vectors + self.angles * _ANGLE_BYTES
        return self.linear_bytes(precision) + int(others)


@dataclasses.dataclass(frozen=True, slots=True)
class Parameters:
    """Of a whole model, tied weights counted once."""

    total: int
    active: int  # without the experts that a token does not choose
    head: int  # of the language-model head, tied or not
    body: int  # weights of linears in layers that every token meets
    expert: int  # of one expert of every layer that has them; 0 without


def count_parameters(config: ModelConfig) -> Parameters:
    """Raises ModelError for an architecture without an account."""
    place = Place()
    held = share(config, place, config.max_position_embeddings)
    head = config.vocab_size * _embedding_size(config)
    expert = _expert(config).linear * _num_expert_layers(config)
    experts = config.experts
    num_experts, num_chosen = (experts.num_experts, experts.num_experts_per_token) if experts else (0, 0)
    total = held.linear + held.plain + held.table + held.vector
    if isinstance(config, OPTConfig):
        total += _POSITION_ROWS_BEFORE_ZERO * config.hidden_size
        if not config.has_norm_weights:
            total -= _norms_without_weights(config)
    if config.tie_word_embeddings:
        total -= head
    return Parameters(
        total=total,
        active=total - expert * (num_experts - num_chosen),
        head=head,
        body=held.linear + held.plain - head - expert * num_experts,
        expert=expert,
    )


def share(config: ModelConfig, place: Place, max_model_len: int) -> Share:
    """What the rank at `place` holds when `max_model_len` positions are served.

    Raises ModelError when the model cannot be divided so, naming the number that does not divide.
    """
    family = _family(config)
    heads, kv_heads = heads_of_rank(config, place.tensor_size)
    total = Share()
    for is_dense, count in _layer_kinds(config, layers_of_stage(config, place)):
        total += _block(config, place, heads, kv_heads, is_dense) * count
    total += Share(angles=_angles(config) * max_model_len)
    width, ids = _embedding_size(config), _vocabulary_of_rank(config, place)
    if place.stage == 0:
        total += Share(table=ids * width)
        if family.has_positions:
            total += Share(table=max_model_len * config.hidden_size)
        if width != config.hidden_size:
            total += _linear(config.hidden_size, width)
    if place.stage == place.pipeline_size - 1:
        # A tied head is a copy, packed for multiplication.
        total += Share(linear=ids * width, linear_outputs=ids, head=ids * width, head_outputs=ids)
        if not isinstance(config, OPTConfig) or config.has_final_norm:
            total += _norm(config)
        if width != config.hidden_size:
            total += _linear(width, config.hidden_size)
    return total


def heads_of_rank(config: ModelConfig, tensor_size: int) -> tuple[int, int]:
    """Query and KV heads of every rank. Raises ModelError when they cannot be divided evenly."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % tensor_size:
        raise ModelError(f"{heads} query heads cannot be divided among {tensor_size} ranks")
    if kv_heads % tensor_size and tensor_size % kv_heads:
        raise ModelError(f"{kv_heads} KV heads cannot be divided among {tensor_size} ranks, nor copied evenly")
    return heads // tensor_size, max(kv_heads // tensor_size, 1)


def layers_of_stage(config: ModelConfig, place: Place) -> range:
    """Raises ModelError when a stage would be empty."""
    if config.num_layers < place.pipeline_size:
        raise ModelError(f"{config.num_layers} layers cannot be divided among {place.pipeline_size} stages")
    return _part(config.num_layers, place.stage, place.pipeline_size)


def kv_bytes_per_token(config: ModelConfig, place: Place, bytes_per_value: int) -> int:
    """Of keys and values of one token on the rank at `place`. Raises ModelError as `share`."""
    _, kv_heads = heads_of_rank(config, place.tensor_size)
    return 2 * len(layers_of_stage(config, place)) * kv_heads * config.head_size * bytes_per_value


def num_experts_of_rank(config: ModelConfig, place: Place) -> int:
    """Experts of each layer that the rank holds; 0 without a mixture."""
    return 0 if config.experts is None else len(_part(config.experts.num_experts, place.tensor_rank, place.tensor_size))


def expert_layers(config: ModelConfig, layers: range) -> int:
    """How many of `layers` are mixtures of experts."""
    return sum(count for is_dense, count in _layer_kinds(config, layers) if not is_dense)


def inner_size(config: ModelConfig, place: Place) -> int:
    """Inner values of a token's feed-forward network on the rank, the larger kind of layer."""
    dense = len(_part(config.intermediate_size, place.tensor_rank, place.tensor_size))
    if config.experts is None:
        return dense
    chosen = min(config.experts.num_experts_per_token, num_experts_of_rank(config, place))
    return max(dense if config.experts.dense_layers else 0, chosen * config.experts.intermediate_size)


# --- parts of the account --------------------------------------------------------------------------------


def _family(config: ModelConfig) -> _Family:
    found = _FAMILIES.get(config.model_type)
    if found is None:
        raise ModelError(f"model_type {config.model_type!r} has no account of its weights in models/footprint.py")
    return found


def _block(config: ModelConfig, place: Place, heads: int, kv_heads: int, is_dense: bool) -> Share:
    """One layer."""
    width, size, is_first = config.hidden_size, config.head_size, place.tensor_rank == 0
    qkv = (heads + 2 * kv_heads) * size
    block = _linear(qkv, width, qkv if config.has_qkv_bias else 0)
    # Row-parallel results are summed over the ranks, so one of them adds the bias.
    columns = range(place.tensor_rank * heads * size, (place.tensor_rank + 1) * heads * size)
    block += _linear(width, columns, width if config.has_output_bias and is_first else 0)
    block += _norm(config) * _family(config).norms_per_block
    if config.has_head_norm:
        block += _norm_weights(config, 2 * size)
    if not is_dense and config.experts is not None:
        router = Share(plain=config.experts.num_experts * width)
        return block + router + _expert(config) * num_experts_of_rank(config, place)
    inner = _part(config.intermediate_size, place.tensor_rank, place.tensor_size)
    up = (2 if _family(config).is_gated else 1) * len(inner)
    block += _linear(up, width, up if config.has_mlp_bias else 0)
    return block + _linear(width, inner, width if config.has_mlp_bias and is_first else 0)


def _expert(config: ModelConfig) -> Share:
    """One expert of one layer."""
    if config.experts is None:
        return Share()
    inner = config.experts.intermediate_size
    return _linear(2 * inner, config.hidden_size) + _linear(config.hidden_size, inner)


def _linear(outputs: int, inputs: int | range, num_biases: int = 0) -> Share:
    """inputs: those of the whole weight that this rank has; an int stands for all of them."""
    inputs = range(inputs) if isinstance(inputs, int) else inputs
    weights = outputs * len(inputs)
    is_whole = inputs.start % _INT4_GROUP == 0 == inputs.stop % _INT4_GROUP
    return Share(linear=weights, linear_outputs=outputs, vector=num_biases, ragged=0 if is_whole else weights)


def _norm(config: ModelConfig) -> Share:
    has_bias = _family(config).has_layer_norm and (not isinstance(config, OPTConfig) or config.has_norm_weights)
    return _norm_weights(config, config.hidden_size * (2 if has_bias else 1))


def _norm_weights(config: ModelConfig, count: int) -> Share:
    return Share(vector=count, wide=count if _family(config).has_wide_norms else 0)


def _norms_without_weights(config: OPTConfig) -> int:
    """Ones that the layers hold in place of weights."""
    return config.hidden_size * (2 * config.num_layers + (1 if config.has_final_norm else 0))


def _angles(config: ModelConfig) -> int:
    """Values of the rotary tables per position."""
    return sum(rotary.size for rotary in (config.rotary, config.local_rotary) if rotary is not None)


def _layer_kinds(config: ModelConfig, layers: range) -> Iterator[tuple[bool, int]]:
    """(whether the feed-forward network is dense, how many of `layers` are so)."""
    dense = len(layers) if config.experts is None else sum(layer in layers for layer in config.experts.dense_layers)
    yield True, dense
    yield False, len(layers) - dense


def _num_expert_layers(config: ModelConfig) -> int:
    return expert_layers(config, range(config.num_layers))


def _embedding_size(config: ModelConfig) -> int:
    return config.embedding_size if isinstance(config, OPTConfig) else config.hidden_size


def _vocabulary_of_rank(config: ModelConfig, place: Place) -> int:
    """Token ids: as many on every rank but the last ones."""
    size = -(-config.vocab_size // place.tensor_size)
    return max(min(size, config.vocab_size - size * place.tensor_rank), 0)


def _part(total: int, index: int, count: int) -> range:
    return range(total * index // count, total * (index + 1) // count)
