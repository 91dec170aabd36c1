"""What is sampled: distributions, truncations, masks, log-probabilities, extremes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from serving.engine.noise import noise_key, uniforms
from serving.engine.sampler import NonFiniteLogits, Sampler
from serving.engine.sampling_rows import SamplingRows
from serving.types import SamplingParams
from serving.wire import unpack_logprobs
from tests.engine.sampling_world import NO_IDS, Floats, draws, int32, make_sampler, probabilities, sample

LOGITS = np.array([1.0, -0.5, 2.0, 0.3, 1.7, -3.0, 0.9, 2.0, -1.2, 0.0], np.float32)

CASES = {
    "temperature 1": SamplingParams(),
    "temperature 0.5": SamplingParams(temperature=0.5),
    "temperature 2": SamplingParams(temperature=2.0),
    "top_p": SamplingParams(top_p=0.7),
    "top_p small": SamplingParams(top_p=0.05),
    "top_k": SamplingParams(top_k=3),
    "top_k at a tie": SamplingParams(top_k=1),
    "min_p": SamplingParams(min_p=0.2),
    "all truncations": SamplingParams(temperature=1.3, top_k=6, top_p=0.8, min_p=0.1),
    "bias": SamplingParams(logit_bias=((5, 5.0), (2, -1.5))),
    "allowed": SamplingParams(allowed_token_ids=(1, 3, 9)),
    "allowed and top_p": SamplingParams(allowed_token_ids=(1, 3, 6, 9), top_p=0.6),
    "seed and choice": SamplingParams(seed=2**64 - 1, choice=3, top_k=5),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_follow_the_exact_distribution(name: str) -> None:
    """Chi-square over 20,000 positions of one seed; what the oracle excludes never occurs."""
    params = CASES[name]
    expected = probabilities(LOGITS, params)
    count = 20_000
    seen = np.bincount(draws(params, LOGITS, count), minlength=LOGITS.size)
    assert seen[expected == 0].sum() == 0
    possible = expected > 0
    degrees = int(possible.sum()) - 1
    chi_square = float(((seen - count * expected)[possible] ** 2 / (count * expected[possible])).sum())
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5 + 1e-9


def random_params(rng: np.random.Generator, size: int) -> SamplingParams:
    """Any mixture of features, each of them off half of the time."""

    def maybe(value: Any, off: Any) -> Any:
        return value if rng.random() < 0.5 else off

    some_ids = tuple(rng.choice(size, min(size, 5), replace=False).tolist())
    return SamplingParams(
        temperature=maybe(float(rng.uniform(0.05, 2)), maybe(1.0, 0.0)),
        top_p=maybe(float(rng.uniform(0.05, 1)), 1.0),
        top_k=maybe(int(rng.integers(1, size + 3)), 0),
        min_p=maybe(float(rng.uniform(0, 0.3)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2)), 1.0),
        logit_bias=maybe(tuple((i, float(rng.uniform(-100, 100))) for i in some_ids[:3]), ()),
        seed=int(rng.integers(2**63)),
        choice=int(rng.integers(4)),
        min_tokens=maybe(int(rng.integers(12)), 0),
        stop_token_ids=maybe(some_ids[3:], ()),
        allowed_token_ids=maybe(tuple(rng.choice(size, max(1, size // 3), replace=False).tolist()), None),
        logprobs=int(rng.integers(-1, 6)),
    )


@pytest.mark.parametrize("size", [3, 11, 700])
def test_every_mixture_of_features_agrees_with_the_oracle(size: int) -> None:
    """The token's interval of the oracle's CDF holds the row's uniform, to float32 rounding."""
    rng = np.random.default_rng(size)
    for _ in range(300):
        params = random_params(rng, size)
        tokenizer_size = int(rng.integers(size * 2 // 3, size)) + 1
        prompt_ids = rng.integers(0, size, 6).astype(np.int32)
        output_ids = rng.integers(0, size, int(rng.integers(10))).astype(np.int32)
        logits = (rng.standard_normal(size) * 2).astype(np.float32)
        world = {"tokenizer_size": tokenizer_size, "prompt_ids": prompt_ids, "output_ids": output_ids}
        sampler = make_sampler([params], size, **world)  # type: ignore[arg-type]
        token = int(sample(sampler, logits[None], [0], [output_ids.size]).ids[0])
        with np.errstate(invalid="ignore"):
            expected = probabilities(logits, params, **world)  # type: ignore[arg-type]
        if np.isnan(expected).any():  # everything is banned
            assert token == min(params.allowed_token_ids or (0,))
            continue
        (uniform,) = uniforms(np.array([noise_key(params.seed, params.choice)]), int32(output_ids.size))
        cdf = np.cumsum(expected)
        is_greedy = params.temperature == 0
        assert expected[token] > 0, params
        assert is_greedy or cdf[token] - expected[token] - 1e-5 <= uniform <= cdf[token] + 1e-5, params


# --- argmax ----------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(top_p=0.0)])
def test_temperature_or_top_p_zero_is_argmax_and_the_lowest_id_wins(params: SamplingParams) -> None:
    assert draws(params, LOGITS, 50).tolist() == [2] * 50


def test_ties_at_the_boundary_are_all_kept() -> None:
    tied = np.zeros(6, np.float32)
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.3), SamplingParams(min_p=1.0)):
        assert set(draws(params, tied, 500).tolist()) == set(range(6))


def test_tiny_temperature_is_argmax() -> None:
    logits = LOGITS.copy()
    logits[7] = 1.999
    for temperature in (1e-5, 1e-30, 1e-300, 5e-324):
        assert set(draws(SamplingParams(temperature=temperature), logits, 200).tolist()) == {2}


# --- masks -----------------------------------------------------------------------------------


def test_ids_beyond_the_tokenizer_are_never_sampled() -> None:
    logits = np.array([0.0, 1.0, 50.0, np.nan], np.float32)
    assert set(draws(SamplingParams(temperature=2.0), logits, 300, tokenizer_size=2).tolist()) == {0, 1}
    assert draws(SamplingParams(temperature=0.0), logits, 1, tokenizer_size=2).tolist() == [1]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_masks_end_of_sequence_and_stop_ids_until_reached(ignore_eos: bool) -> None:
    logits = np.array([9.0, 8.0, 7.0, 6.0], np.float32)
    params = SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=(1,), ignore_eos=ignore_eos)
    assert draws(params, logits, 6, eos_ids=(0,)).tolist() == [2, 2, 2, 0, 0, 0]


def test_bias_is_added_to_the_logit() -> None:
    """-100 is a ban in effect only: a logit that is 101 better still wins."""
    logits = np.array([0.0, 101.0], np.float32)
    assert draws(SamplingParams(temperature=0.0, logit_bias=((1, -100.0),)), logits, 1).tolist() == [1]
    assert draws(SamplingParams(temperature=0.0, logit_bias=((0, 100.0), (1, -100.0))), logits, 1).tolist() == [0]


def test_penalties_before_temperature_and_in_order() -> None:
    """Repetition over prompt and output, frequency and presence over the output alone."""
    logits = np.array([4.0, -4.0, 2.0, 2.0, 1.0], np.float32)
    params = SamplingParams(
        repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, temperature=0.5, top_k=4
    )
    world = {"prompt_ids": int32(0, 1, 0), "output_ids": int32(2, 2, 1)}
    expected = probabilities(logits, params, **world)  # type: ignore[arg-type]
    edited = np.array([4 / 2, -4 * 2 - 0.5 - 0.25, 2 / 2 - 2 * 0.5 - 0.25, 2.0, 1.0])
    weights = np.exp(edited / 0.5)
    weights[1] = 0  # the fifth best of five
    assert expected == pytest.approx(weights / weights.sum())
    seen = np.zeros(5)
    for seed in range(3000):
        seeded = make_sampler([_with_seed(params, seed)], 5, **world)  # type: ignore[arg-type]
        seen[sample(seeded, logits[None], [0], [3]).ids[0]] += 1
    assert seen / 3000 == pytest.approx(expected, abs=0.03)


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    values = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**{**values, "seed": seed})


@pytest.mark.parametrize(
    ("params", "token"),
    [
        (SamplingParams(allowed_token_ids=()), 0),
        (SamplingParams(allowed_token_ids=(7, 3), min_tokens=5, stop_token_ids=(7, 3)), 3),
        (SamplingParams(allowed_token_ids=(7, 3), min_tokens=5, stop_token_ids=(7, 3), temperature=0.0), 3),
    ],
)
def test_a_row_without_any_legal_token_has_a_defined_result(params: SamplingParams, token: int) -> None:
    assert draws(params, LOGITS, 4).tolist() == [token] * 4


# --- log-probabilities -----------------------------------------------------------------------


@pytest.mark.parametrize("params", [SamplingParams(logprobs=5), SamplingParams(logprobs=5, temperature=0.0)])
def test_logprobs_are_the_models_own(params: SamplingParams) -> None:
    """Of the raw logits: neither temperature, bias nor truncation shows; ids beyond the tokenizer do not exist."""
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    steered = SamplingParams(**{**fields, "logit_bias": ((5, 100.0),), "top_k": 1, "min_tokens": 3})
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal((1, 3000)) * 3).astype(np.float32)
    logits[0, 2900:] = 80.0
    raw = logits[0, :2900].astype(np.float64)
    expected = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
    for row, token in ((params, None), (steered, 5)):
        sampled = sample(make_sampler([row], 3000, tokenizer_size=2900), logits, [0], [0])
        assert sampled.logprobs is not None
        logprob, alternatives = unpack_logprobs(sampled.logprobs[0])
        assert token is None or sampled.ids[0] == token
        assert logprob == pytest.approx(expected[sampled.ids[0]], abs=2e-6)
        best = np.argsort(-expected)[:5]
        assert [i for i, _ in alternatives] == best.tolist()
        assert [value for _, value in alternatives] == pytest.approx(expected[best], abs=2e-6)


def test_logprobs_only_where_asked_and_as_many() -> None:
    wanted = [-1, 0, 1, 20]
    sampler = make_sampler([SamplingParams(logprobs=k) for k in wanted], 30)
    sampled = sample(sampler, np.tile(np.arange(30, dtype=np.float32), (4, 1)), [0, 1, 2, 3], [0] * 4)
    assert sampled.logprobs is not None
    assert {i: len(unpack_logprobs(data)[1]) for i, data in sampled.logprobs.items()} == {1: 0, 2: 1, 3: 20}


def test_more_logprobs_than_tokens_gives_every_token_once() -> None:
    sampler = make_sampler([SamplingParams(logprobs=20)], 8, tokenizer_size=3)
    sampled = sample(sampler, np.zeros((1, 8), np.float32), [0], [0])
    assert sampled.logprobs is not None
    _, alternatives = unpack_logprobs(sampled.logprobs[0])
    assert [i for i, _ in alternatives] == [0, 1, 2]
    assert [value for _, value in alternatives] == pytest.approx([-np.log(3)] * 3)


def test_no_logprobs_is_none() -> None:
    assert sample(make_sampler([SamplingParams()], 10), LOGITS[None], [0], [0]).logprobs is None


# --- extremes --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.5, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 1000])
def test_huge_logits_and_extreme_parameters(temperature: float, top_p: float, top_k: int) -> None:
    rows = [
        [1e30, -1e30, 0.0, 1e30, 5.0],
        [-1e30, -1e30, -1e30, -1e30, -1e30],
        [3.4e38, -3.4e38, 0.0, 0.0, 0.0],
        [-np.inf, -np.inf, -np.inf, 0.0, -np.inf],
    ]
    legal = [{0, 3}, {0, 1, 2, 3, 4}, {0}, {3}]
    penalised = {"repetition_penalty": 1e-3, "frequency_penalty": 2.0, "presence_penalty": -2.0}
    vanishing = {"repetition_penalty": 1e-50}  # zero in float32
    for extra in ({}, {"logprobs": 3}, penalised, vanishing, {"logit_bias": ((1, 100.0),)}):
        params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, **extra)
        sampler = make_sampler([params] * 4, 5, output_ids=int32(0, 3))
        sampled = sample(sampler, np.array(rows, np.float32), range(4), [2] * 4)
        for i, token in enumerate(sampled.ids.tolist()):
            assert token in legal[i] or (extra and i == 1)
        for data in (sampled.logprobs or {}).values():
            logprob, alternatives = unpack_logprobs(data)
            assert not np.isnan([logprob, *(value for _, value in alternatives)]).any()


def test_vocabulary_of_one() -> None:
    params = SamplingParams(temperature=0.7, top_p=0.5, top_k=1, min_p=0.1, min_tokens=4, logprobs=5)
    sampled = sample(make_sampler([params], 1), np.array([[3.0]], np.float32), [0], [0])
    assert sampled.ids.tolist() == [0]
    assert sampled.logprobs is not None
    assert unpack_logprobs(sampled.logprobs[0]) == (0.0, [(0, 0.0)])


def test_no_rows() -> None:
    sampled = sample(make_sampler([], 10), np.zeros((0, 10), np.float32), [], [])
    assert sampled.ids.shape == (0,)
    assert sampled.ids.dtype == np.int32


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [[np.nan, 1.0, 2.0], [1.0, 2.0, np.inf], [-np.inf] * 3, [5.0, np.nan, np.inf]])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(frequency_penalty=2.0, logprobs=1)])
def test_garbage_logits_name_their_slots_and_leave_the_others_untouched(
    garbage: list[float], params: SamplingParams
) -> None:
    healthy: Floats = np.array([[1.0, 1.1, 0.9]] * 3, np.float32)
    broken = healthy.copy()
    broken[1] = garbage
    undisturbed = sample(make_sampler([params] * 3, 3), healthy, [0, 1, 2], [0] * 3)
    sampler = make_sampler([params] * 3, 3)
    with pytest.raises(NonFiniteLogits, match=r"slots \[1\]") as caught:
        sample(sampler, broken, [0, 1, 2], [0] * 3)
    assert caught.value.slots.tolist() == [1]
    others = sample(sampler, broken[[0, 2]], [0, 2], [0, 0])
    assert others.ids.tolist() == undisturbed.ids[[0, 2]].tolist()


def test_logits_of_another_shape_or_type_are_refused() -> None:
    sampler = make_sampler([SamplingParams()], 10)
    with pytest.raises(ValueError, match=r"float32 \[1, 9\], not float32 \[1, 10\]"):
        sample(sampler, LOGITS[None, :9], [0], [0])
    with pytest.raises(ValueError, match="float64"):
        sample(sampler, LOGITS[None].astype(np.float64), [0], [0])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(logit_bias=((10, 1.0),)), "logit_bias: token id 10 is not below the logits size of 10"),
        (SamplingParams(allowed_token_ids=(1, -1)), "allowed_token_ids: token id -1"),
        (SamplingParams(stop_token_ids=(99,), min_tokens=1), "stop_token_ids: token id 99"),
        (SamplingParams(presence_penalty=1.0), "output_ids: token id 10"),
    ],
)
def test_token_ids_out_of_range_are_refused_and_the_old_row_stays(params: SamplingParams, message: str) -> None:
    rows = SamplingRows(1, 10, 10, (0,))
    rows.set_row(0, SamplingParams(temperature=0.0, allowed_token_ids=(4,)), NO_IDS, NO_IDS)
    with pytest.raises(ValueError, match=message):
        rows.set_row(0, params, NO_IDS, int32(10))
    assert sample(Sampler(rows), LOGITS[None], [0], [0]).ids.tolist() == [4]


def test_contradictory_sizes_and_slots_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer_size 11 is not in 1\.\.10"):
        SamplingRows(1, 10, 11, ())
    with pytest.raises(ValueError, match="eos_ids: token id 10"):
        SamplingRows(1, 10, 10, (10,))
    for slot in (-1, 1):
        with pytest.raises(IndexError, match=rf"slot {slot} is not in 0\.\.0"):
            SamplingRows(1, 10, 10, ()).set_row(slot, SamplingParams(), NO_IDS, NO_IDS)


def test_sampled_tokens_is_a_plain_record() -> None:
    sampled = sample(make_sampler([SamplingParams()], 10), LOGITS[None], [0], [0])
    assert {field.name for field in dataclasses.fields(sampled)} == {"ids", "logprobs"}
    assert sampled.ids.dtype == np.int32
