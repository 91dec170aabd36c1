"""Plans: what fits and why the rest does not, by figures that can be checked by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from models.fields import Fields
from models.footprint import Place, Precision, share
from models.registry import parse_config
from serving.planning.accelerators import ACCELERATORS, Accelerator, Figure
from serving.planning.demand import Demand, Machine, PlanError
from serving.planning.placements import RUNTIME_BYTES, USABLE, Placement, Refusal, find_placements
from serving.planning.plan import make_plan
from serving.planning.shapes import SHAPES


def make_demand(name: str, **fields: Any) -> Demand:
    return Demand(**{"name": name, "config": parse_config(Fields(SHAPES[name])), "context": 2048, **fields})


def make_machine(name: str = "a100-80gb", num_gpus: int = 1, gpus_per_node: int = 8, **figures: float) -> Machine:
    given = {key: Figure(value, "given") for key, value in figures.items()}
    return Machine(dataclasses.replace(ACCELERATORS[name], **given), num_gpus, gpus_per_node)


def find(demand: Demand, machine: Machine) -> tuple[dict[tuple[int, int], Placement], dict[tuple[int, int], Refusal]]:
    fitting, refused = find_placements(demand, machine)
    return (
        {(found.tensor_size, found.pipeline_size): found for found in fitting},
        {(found.tensor_size, found.pipeline_size): found for found in refused},
    )


def test_gpt3_needs_eight_of_sixteen() -> None:
    fitting, refused = find(make_demand("gpt3-175b"), make_machine(num_gpus=16))
    assert set(fitting) == {(8, 1), (8, 2), (4, 2), (4, 4), (2, 4), (2, 8), (1, 8), (1, 16)}
    assert (fitting[8, 1].num_replicas, fitting[8, 2].num_replicas) == (2, 1)
    assert refused[16, 1].reason == "a tensor-parallel group stays within a node, which has 8"
    assert "350 GB of weights" in refused[1, 1].reason


def test_memory_adds_up() -> None:
    """Weights, workspace and cache of every rank are the usable part of its memory, to less than a block."""
    demand, machine = make_demand("llama-3.1-70b"), make_machine(num_gpus=4)
    fitting, refused = find(demand, machine)
    placement, rank = fitting[4, 1], fitting[4, 1].tightest
    weights = share(demand.config, Place(4, 1, rank.place.tensor_rank, 0), 2048).num_bytes(Precision(2, 2, 2))
    assert rank.weights == weights
    assert rank.kv_per_token == 2 * 80 * 2 * 128 * 2
    assert rank.usable == int(80e9 * USABLE)
    left = rank.usable - weights - rank.workspace - (rank.num_blocks + 1) * 16 * rank.kv_per_token
    assert 0 <= left < 16 * rank.kv_per_token
    assert placement.num_contexts == rank.num_blocks // 128
    assert rank.workspace > RUNTIME_BYTES[False]
    missing = refused[1, 1].missing_bytes
    whole = share(demand.config, Place(), 2048).num_bytes(Precision(2, 2, 2))
    assert 0 < missing - (whole - rank.usable) < 2 << 30  # the workspace


def test_what_is_missing_is_what_would_make_it_fit() -> None:
    """A little more memory than the missing bytes say, and it fits; a little less, and it does not."""
    demand = make_demand("llama-3.1-8b", context=8192)
    _, refused = find(demand, make_machine(memory_bytes=19.5e9))
    refusal = refused[1, 1]
    assert refusal.reason.startswith("no room for the KV cache of 8,192 tokens")
    enough = 19.5e9 + refusal.missing_bytes / USABLE
    assert (1, 1) in find(demand, make_machine(memory_bytes=enough + 10))[0]
    assert (1, 1) in find(demand, make_machine(memory_bytes=enough - 10))[1]
    weights = find(demand, make_machine(memory_bytes=10e9))[1][1, 1]
    assert "GB too many" in weights.reason
    assert 15e9 < weights.missing_bytes + 10e9 * USABLE < 19e9


@pytest.mark.parametrize(
    ("name", "num_gpus", "per_node", "sizes", "words"),
    [
        ("smollm2-135m", 2, 8, (2, 1), "9 query heads cannot be divided among 2 ranks"),
        ("llama-3.2-3b", 12, 12, (12, 1), "8 KV heads cannot be divided among 12 ranks, nor copied evenly"),
        ("gpt2", 16, 8, (1, 16), "12 layers cannot be divided among 16 stages"),
        ("llama-3.1-8b", 8, 4, (8, 1), "a tensor-parallel group stays within a node, which has 4"),
        ("llama-3.1-8b", 8, 3, (2, 4), "nodes of 3 have room for 3 groups of 2, not for 4"),
    ],
)
def test_why_not(name: str, num_gpus: int, per_node: int, sizes: tuple[int, int], words: str) -> None:
    demand = make_demand(name, context=128)
    _, refused = find(demand, make_machine(num_gpus=num_gpus, gpus_per_node=per_node))
    assert refused[sizes].reason == words
    assert refused[sizes].missing_bytes == 0


def test_groups_stay_in_nodes_and_idle_devices_are_counted() -> None:
    fitting, _ = find(make_demand("llama-3.2-1b"), make_machine(num_gpus=7, gpus_per_node=3))
    assert (fitting[2, 1].num_replicas, fitting[2, 1].num_idle) == (2, 3)
    assert (fitting[1, 2].num_replicas, fitting[1, 2].num_idle) == (3, 1)


def test_the_highest_limit_comes_first_and_limits_hold_together() -> None:
    fitting, _ = find_placements(make_demand("llama-3.1-70b"), make_machine(num_gpus=8))
    assert [p.total_tokens_s for p in fitting] == sorted((p.total_tokens_s for p in fitting), reverse=True)
    for placement in fitting:
        assert placement.decode[0].batch == 1
        assert placement.decode[-1].batch == min(32, placement.num_contexts)
        throughput = [limit.tokens_s for limit in placement.decode]
        assert throughput == sorted(throughput)
        for limit in placement.decode:
            assert limit.tokens_s == pytest.approx(limit.batch / limit.inter_token_s)


def test_one_row_reads_every_ranks_weights_at_once() -> None:
    """Without a link to count: half of the bytes per rank at twice the bandwidth in all."""
    demand = make_demand("llama-3.1-8b", context=1)
    accelerator = dataclasses.replace(ACCELERATORS["h100-80gb"], link=None)
    fitting, _ = find(demand, Machine(accelerator, 2))
    linears = 7_504_658_432 * 2
    assert fitting[1, 1].decode[0].inter_token_s == pytest.approx(linears / 3.0e12, rel=1e-3)
    assert fitting[2, 1].decode[0].inter_token_s == pytest.approx(linears / 2 / 3.0e12, rel=1e-3)
    # Stages follow each other: one row gains nothing, two rows go through both at once.
    assert fitting[1, 2].decode[0].inter_token_s == pytest.approx(linears / 3.0e12, rel=1e-3)
    # The second stage has the head as well: 7 % more than its half.
    assert fitting[1, 2].decode[-1].tokens_s == pytest.approx(32 / 1.07 * fitting[1, 2].decode[0].tokens_s, rel=5e-3)


def test_ranks_wait_for_each_others_parts() -> None:
    """65 sums of 4,096 bf16 values of the other rank, and its half of the logits in fp32."""
    demand = make_demand("llama-3.1-8b", context=1)
    machine = make_machine(num_gpus=2)
    slow = dataclasses.replace(machine, accelerator=dataclasses.replace(machine.accelerator, link=Figure(1e9)))
    none = dataclasses.replace(machine, accelerator=dataclasses.replace(machine.accelerator, link=None))
    times = [find(demand, on)[0][2, 1].decode[0].inter_token_s for on in (slow, none)]
    assert times[0] - times[1] == pytest.approx((65 * 4096 * 2 + 128256 / 2 * 4) / 1e9)


def test_formats_save_what_they_say() -> None:
    machine = make_machine("cpu", memory_bytes=64e9)
    weights = {}
    for quantization in ("none", "int8", "int4"):
        plan = make_plan(make_demand("llama-3.2-1b", quantization=quantization), machine)
        weights[quantization] = plan.weight_bytes
    body, head = 973_078_528, 262_668_288
    linears = body + head
    held = share(make_demand("llama-3.2-1b").config, Place(), 2048)
    assert held.linear == linears
    scales = 4 * held.linear_outputs
    assert weights["none"] - weights["int8"] == linears - scales
    body_scales = scales - 4 * 128_256  # int4 has its head in 8 bits
    assert weights["int8"] - weights["int4"] == body + body_scales - body * 0.625


def test_int8_computes_faster_and_attention_does_not() -> None:
    plain, int8 = (make_demand("llama-3.1-8b", quantization=q, context=2048) for q in ("none", "int8"))
    machine = make_machine()
    times = [find(demand, machine)[0][1, 1].prefill.first_token_s for demand in (plain, int8)]
    attention = 4 * 32 * 32 * 128 * 2048 * 2048 / 2 / 312e12
    linear = 2 * (6_979_321_856 * 2048 + 525_336_576) / 312e12
    assert times[0] == pytest.approx(attention + linear)
    assert times[1] == pytest.approx(attention + linear / 2)


def test_codes_of_a_checkpoint_are_not_cut() -> None:
    demand = make_demand("llama-3.2-1b", quantization="int4", has_stored_codes=True)
    odd = dataclasses.replace(demand.config, intermediate_size=8192 + 32)
    fitting, refused = find(dataclasses.replace(demand, config=odd), make_machine(num_gpus=4))
    assert (1, 1) in fitting
    assert "groups of 32 inputs" in refused[4, 1].reason
    rounded = dataclasses.replace(demand, config=odd, has_stored_codes=False)
    assert (4, 1) in find(rounded, make_machine(num_gpus=4))[0]


def test_what_cannot_be_known_is_asked_for() -> None:
    unknown = Accelerator("mystery", Figure(80e9), Figure(1e12), None, None, None, None, None)
    with pytest.raises(PlanError, match="the bfloat16 rate of mystery is not known; give it with --flops"):
        make_plan(make_demand("gpt2", context=1024), Machine(unknown))
    with pytest.raises(PlanError, match="the memory of cpu is not known; give it with --memory"):
        make_plan(make_demand("gpt2", context=1024), Machine(ACCELERATORS["cpu"]))
    with pytest.raises(PlanError, match="--context must be from 1 to the model's 1024 positions; got 2000"):
        make_demand("gpt2", context=2000)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_can_be_planned(name: str) -> None:
    plan = make_plan(make_demand(name, context=512), make_machine("b200", num_gpus=8))
    assert plan.placements
    assert plan.parameters.active <= plan.parameters.total
