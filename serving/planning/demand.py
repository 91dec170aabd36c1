"""What is to be served, and on what."""

from __future__ import annotations

import dataclasses

from models.config import ModelConfig
from models.footprint import Precision
from serving.planning.accelerators import Accelerator, Figure

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
QUANTIZATIONS = ("none", "int8", "int4")
BLOCK_SIZE = 16  # tokens of a KV block
_CPU_ACTIVATION_BYTES = 4


class PlanError(Exception):
    """A question without an answer; the text names the parameter, the limit and the value."""


@dataclasses.dataclass(frozen=True, slots=True)
class Demand:
    """A model and how it is to be served."""

    name: str
    config: ModelConfig
    context: int  # tokens of a request, prompt and output
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 256
    dtype: str = "bfloat16"
    quantization: str = "none"
    kv_dtype: str = "bfloat16"
    has_stored_codes: bool = False  # the checkpoint's linears are int4 already

    def __post_init__(self) -> None:
        limit = self.config.max_position_embeddings
        if not 1 <= self.context <= limit:
            raise PlanError(f"--context must be from 1 to the model's {limit} positions; got {self.context}")

    @property
    def kv_bytes(self) -> int:
        """Per value of the cache."""
        return DTYPE_BYTES[self.kv_dtype]


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """Equal devices in equal nodes."""

    accelerator: Accelerator
    num_gpus: int = 1
    gpus_per_node: int = 8

    def num_groups(self, tensor_size: int) -> int:
        """Tensor-parallel groups that find room, each within one node."""
        nodes, rest = divmod(self.num_gpus, self.gpus_per_node)
        return nodes * (self.gpus_per_node // tensor_size) + rest // tensor_size


def activation_bytes(demand: Demand, accelerator: Accelerator) -> int:
    return _CPU_ACTIVATION_BYTES if accelerator.is_cpu else DTYPE_BYTES[demand.dtype]


def precision_of(demand: Demand, accelerator: Accelerator) -> Precision:
    """Our CPU kernels compute in fp32 and widen everything but bf16 to it."""
    stored = DTYPE_BYTES[demand.dtype]
    is_widened = accelerator.is_cpu and demand.dtype != "bfloat16"
    return Precision(
        linear=4 if is_widened else stored,
        table=stored,
        vector=activation_bytes(demand, accelerator),
        quantization=demand.quantization,
    )


def linear_rate(demand: Demand, accelerator: Accelerator) -> Figure:
    """Operations/s of linears. Raises PlanError when the device has none or nobody knows."""
    if demand.quantization == "int8" or (demand.quantization == "int4" and accelerator.is_cpu):
        found, name = accelerator.int8, "int8"
    else:
        found, name = _float_rate(demand, accelerator)
    if found is None:
        raise PlanError(f"the {name} rate of {accelerator.name} is not known; give it with --flops")
    return found


def attention_rate(demand: Demand, accelerator: Accelerator) -> Figure:
    """Of attention, which no weight format changes."""
    found, _ = _float_rate(demand, accelerator)
    return found or linear_rate(demand, accelerator)


def _float_rate(demand: Demand, accelerator: Accelerator) -> tuple[Figure | None, str]:
    if demand.dtype == "float32":
        return accelerator.fp32, "float32"
    return accelerator.bf16, "bfloat16"
