"""What a step would cost at the hardware's limit, and the counts behind a replica's series."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from serving.config import EngineSettings
from serving.engine import ceilings
from serving.engine.core import EngineCore
from serving.engine.executor import LocalExecutor
from serving.engine.limit import StepLimit, find_limit, shape_of
from serving.engine.tally import Tally
from serving.engine.worker import Worker
from serving.planning.roofline import Ceilings, ExpertShape, Shape, decode_time_min, prefill_time_min, step_time_min
from serving.types import SamplingParams
from tests.engine.real import Engine, Job, make_worker
from tests.engine.world import World
from tests.tiny import tiny_model_folder

CEILINGS = Ceilings(read_bytes_s=2e10, flops_s=4e11)
SHAPE = Shape(
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_size=64,
    body_parameters=10_000_000,
    head_parameters=2_000_000,
    weight_bytes=2.0,
    kv_bytes=2.0,
)
WINDOWED = Shape(4, 8, 2, 64, 10_000_000, 2_000_000, 2.0, 2.0, windows=(100, 100, 0, 100))


def seconds(shape: Shape, rows: list[tuple[int, int, int]], measured: Ceilings = CEILINGS) -> float:
    """rows: (tokens before, tokens of the step, samples)."""
    starts, counts, samples = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    return StepLimit(shape, measured).seconds(starts, counts, samples, int(counts[counts > 1].sum()))


@pytest.mark.parametrize("shape", [SHAPE, WINDOWED], ids=["dense", "windows"])
def test_a_step_of_decoding_costs_what_the_planner_says(shape: Shape) -> None:
    contexts = [5, 99, 100, 101, 5_000]
    ideal = seconds(shape, [(context, 1, 1) for context in contexts])
    assert ideal == pytest.approx(decode_time_min(shape, contexts, CEILINGS), rel=1e-9)


@pytest.mark.parametrize("shape", [SHAPE, WINDOWED], ids=["dense", "windows"])
@pytest.mark.parametrize(("before", "new"), [(0, 64), (0, 2_000), (1_500, 2), (160, 512)])
def test_a_part_of_a_prompt_costs_the_planners_and_the_keys_it_writes(shape: Shape, before: int, new: int) -> None:
    ideal = seconds(shape, [(before, new, 1)])
    planned = prefill_time_min(shape, new, before if shape is SHAPE else min(before, 99), CEILINGS)
    writing = shape.kv_bytes_per_token * new / CEILINGS.read_bytes_s
    reading = shape.kv_bytes_per_token * before / CEILINGS.read_bytes_s
    assert planned <= ideal * (1 + 1e-9)
    assert ideal <= prefill_time_min(shape, new, before, CEILINGS) + writing + reading


def test_prompts_and_decoding_together_read_the_weights_once() -> None:
    prompt, rows = (0, 64, 1), [(500, 1, 1)] * 8
    together, apart = seconds(SHAPE, [prompt, *rows]), seconds(SHAPE, [prompt]) + seconds(SHAPE, rows)
    assert apart - SHAPE.parameters * 2 / CEILINGS.read_bytes_s < together < apart
    assert seconds(SHAPE, [(0, 64, 0)]) < seconds(SHAPE, [(0, 64, 1)], Ceilings(2e10, 1e11))


def test_a_mixed_step_by_hand() -> None:
    """Slow memory, so that bytes decide: weights once, the keys and values that each row reads and writes."""
    slow = Ceilings(read_bytes_s=1e6, flops_s=1e18)
    rows = [(160, 32, 0), (50, 1, 1), (300, 1, 1)]
    per_token = 2 * 2 * 64 * 2  # keys and values of one layer: two heads of 64, two bytes each
    weights = 12_000_000 * 2
    written = 4 * per_token * (32 + 1 + 1)
    dense = 4 * per_token * (160 + 50 + 300)
    assert seconds(SHAPE, rows, slow) == pytest.approx((weights + written + dense) / 1e6)
    windowed = per_token * (3 * (99 + 50 + 99) + (160 + 50 + 300))
    assert seconds(WINDOWED, rows, slow) == pytest.approx((weights + written + windowed) / 1e6)


def test_a_mixed_step_by_hand_where_arithmetic_decides() -> None:
    slow = Ceilings(read_bytes_s=1e18, flops_s=1e9, attention_flops_s=1e8)
    rows = [(160, 32, 0), (50, 1, 1), (300, 1, 1)]
    linears = 2 * 10_000_000 * 34 + 2 * 2_000_000 * 2
    pair = 4 * 8 * 64
    pairs = 4 * (32 * 160 + 32 * 32 / 2 + 50 + 300)
    assert seconds(SHAPE, rows, slow) == pytest.approx(linears / 1e9 + pair * pairs / 1e8)


def test_a_mixture_reads_what_evenly_choosing_tokens_are_expected_to() -> None:
    experts = ExpertShape(num_experts=8, num_held=8, num_chosen=2, parameters=1_000_000)
    mixture = Shape(4, 8, 2, 64, 10_000_000, 2_000_000, 2.0, 2.0, experts=experts)
    slow_reads = Ceilings(1e9, 1e15)
    one, many = (step_time_min(mixture, slow_reads, num_tokens=n, num_logits=n, decode_pairs=0) for n in (1, 100))
    assert one == pytest.approx((12e6 + 2e6) * 2 / 1e9, rel=0.01)
    assert many == pytest.approx((12e6 + 8e6) * 2 / 1e9, rel=0.02)


# --- on a real, tiny model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return make_worker(tiny_model_folder(tmp_path_factory.mktemp("limit") / "model"), num_threads=1)


def jobs() -> list[Job]:
    lengths = (40, 3, 17, 64)
    return [
        Job(tuple(range(3, 3 + length)), SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
        for length in lengths
    ]


def with_limit(worker: Worker, limit: StepLimit | None) -> Engine:
    engine = Engine(worker)
    engine.core.limit = limit
    for handle, job in enumerate(jobs()):
        engine.add(handle, job)
    engine.run()
    return engine


def test_the_fraction_of_the_limit_lies_between_nothing_and_one(worker: Worker) -> None:
    phases: list[str] = []
    limit = find_limit(worker.settings, worker, lambda name, _: phases.append(name))
    assert limit is not None
    assert phases == ["hardware limit"]
    engine = with_limit(worker, limit)
    records = engine.core.records.last(100)
    tally = engine.scheduler.tally
    assert (records["ideal_s"] > 0).all()
    assert tally.limit_busy_s == pytest.approx(float(records["duration_s"].sum()), rel=1e-3)
    assert tally.ideal_s == pytest.approx(float(records["ideal_s"].sum()), rel=1e-3)
    assert 0.0 < tally.ideal_s / tally.limit_busy_s <= 1.05
    assert tally.hardware_fraction is not None and 0.0 < tally.hardware_fraction <= 1.05


def test_without_a_limit_nothing_is_invented(worker: Worker) -> None:
    engine = with_limit(worker, None)
    assert np.isnan(engine.core.records.last(100)["ideal_s"]).all()
    assert engine.scheduler.tally.hardware_fraction is None
    assert engine.scheduler.tally.limit_busy_s == 0.0


def test_every_step_and_token_is_counted(worker: Worker) -> None:
    engine = with_limit(worker, None)
    records, tally = engine.core.records.last(100), engine.scheduler.tally
    assert tally.num_steps == len(records) == engine.core.num_steps == tally.step_seconds.count
    assert tally.prefill_tokens == records["num_prefill_tokens"].sum()
    assert tally.prefill_tokens + tally.decode_tokens == 40 + 3 + 17 + 64 + 4 * 19
    assert tally.prediction.sum == pytest.approx(
        float((records["duration_s"] / records["announced_s"]).sum()), rel=1e-3
    )


def test_given_rates_are_taken_as_they_are(worker: Worker) -> None:
    import dataclasses

    def asked(**values: object) -> EngineSettings:
        return dataclasses.replace(worker.settings, **values)  # type: ignore[arg-type]

    def find(settings: EngineSettings) -> StepLimit | None:
        return find_limit(settings, worker, lambda name, _: None)

    given = {"read_limit_gb_s": 20.0, "compute_limit_tflops": 0.4}
    limit = find(asked(**given))
    assert limit is not None and (limit.ceilings.read_bytes_s, limit.ceilings.flops_s) == (2e10, 4e11)
    half = find(asked(read_limit_gb_s=20.0))
    assert half is not None and half.ceilings.read_bytes_s == 2e10 != half.ceilings.flops_s
    assert find(asked(tensor_parallel_size=2)) is None, "what one rank measures alone is not what it has in company"
    assert find(asked(tensor_parallel_size=2, **given)) is not None
    assert find(asked(pipeline_parallel_size=2, **given)) is None


def test_a_measurement_that_fails_costs_the_limit_and_not_the_start(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> Ceilings:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("serving.engine.limit.measure", fail)
    assert find_limit(worker.settings, worker, lambda name, _: None) is None
    assert "no room" in caplog.text


def test_the_shape_is_the_models(worker: Worker) -> None:
    shape, config = shape_of(worker), worker.config
    assert shape.parameters * shape.weight_bytes == pytest.approx(worker.model.weight_bytes)
    assert shape.head_parameters == config.vocab_size * config.hidden_size
    assert (shape.num_layers, shape.num_kv_heads, shape.kv_bytes) == (config.num_layers, config.num_kv_heads, 2)


def test_ceilings_are_measured_once(worker: Worker) -> None:
    device = torch.device("cpu")
    first = ceilings.measure(device, 1 << 20, is_integer=True)
    begun = time.perf_counter()
    assert ceilings.measure(device, 1 << 10, is_integer=True) is first
    assert time.perf_counter() - begun < 0.01
    assert first.read_bytes_s > 1e8 and first.flops_s > 1e8 and first.attention_flops_s is not None


def test_a_loop_takes_its_limit_from_its_maker(worker: Worker) -> None:
    limit = StepLimit(shape_of(worker), CEILINGS)
    core = EngineCore(
        Engine(worker).scheduler,
        LocalExecutor(worker),
        on_output=lambda output: None,
        on_failure=lambda failure: None,
        limit=limit,
    )
    assert core.limit is limit


# --- counts ---------------------------------------------------------------------------------------


def test_the_fraction_forgets_what_is_long_ago() -> None:
    tally = Tally()
    assert tally.hardware_fraction is None
    for _ in range(10):
        tally.stepped(0.1, 0.1, 0.01, 0, 1)
    assert tally.hardware_fraction == pytest.approx(0.1)
    for _ in range(400):
        tally.stepped(0.1, 0.1, 0.05, 0, 1)
    assert tally.hardware_fraction == pytest.approx(0.5, rel=1e-3)
    assert tally.ideal_s / tally.limit_busy_s == pytest.approx((10 * 0.01 + 400 * 0.05) / 41)


def test_prefix_hits_are_counted_once_per_admitted_row() -> None:
    world = World(block_size=4)
    prompt = list(range(10, 23))  # 13 tokens: three whole blocks may be shared
    world.add(1, prompt)
    world.run()
    assert (world.scheduler.tally.prefix_queried, world.scheduler.tally.prefix_hits) == (13, 0)
    world.add(2, prompt)
    world.add(3, [90] * 5)
    world.run()
    assert (world.scheduler.tally.prefix_queried, world.scheduler.tally.prefix_hits) == (31, 12)


def test_preemptions_and_evictions_are_counted() -> None:
    world = World(num_blocks=9, block_size=4, max_num_seqs=4)
    requests = [world.add(handle, [handle] * 8, max_tokens=16) for handle in range(4)]
    world.run()
    assert world.scheduler.tally.num_preemptions == sum(request.num_preemptions for request in requests) > 0
    before = world.scheduler.pool.num_evicted
    world.add(9, list(range(24)), max_tokens=6)  # 30 tokens: all eight blocks, and all hold prefixes of nobody
    world.run()
    assert world.scheduler.pool.num_evicted - before > 0
