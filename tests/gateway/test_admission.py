"""What may enter, under which name, for whom."""

from __future__ import annotations

import dataclasses
from array import array

import msgspec
import pytest

from serving.errors import ContextLengthExceeded, DeadlineExceeded, InvalidRequest, NoCapacity
from serving.gateway.admission import Admission, make_request
from serving.gateway.bodies import Generation, parse_completion
from serving.gateway.clock import Clock, Ids
from serving.gateway.faults import error_headers
from serving.gateway.fields import Limits
from serving.gateway.streams import Request
from serving.gateway.tenants import Tenants
from serving.types import FinishReason
from serving.wire import unpack_ids
from tests.gateway.world import CARD, CONTEXT


def generation(**body: object) -> Generation:
    return parse_completion({"prompt": "x"} | body, Limits(CARD.tokenizer_size, CONTEXT)).generation


def request(num_prompt: int, copies: int = 1, **body: object) -> Request:
    return make_request(
        request_id="cmpl-0",
        created=0,
        card=CARD,
        deadline=1.0,
        generation=generation(**body),
        prompts=[array("i", range(num_prompt))] * copies,
        param="prompt",
        salt=b"s",
        draw_seed=lambda: 7,
    )


def test_preparation_is_bounded_and_given_back() -> None:
    admission = Admission(max_preparing=2)
    with admission.preparing(), admission.preparing():
        with pytest.raises(NoCapacity) as refused, admission.preparing():
            pass
        assert refused.value.retry_after_s == 1.0
    with pytest.raises(ValueError, match="fault"), admission.preparing():
        raise ValueError("fault")
    assert admission.num_preparing == 0


def test_a_request_is_fixed_at_admission() -> None:
    made = request(3, n=2, max_tokens=5)
    assert [choice.index for choice in made.choices] == [0, 1]
    assert [choice.sampling.choice for choice in made.choices] == [0, 1]
    assert {choice.sampling.seed for choice in made.choices} == {7}
    assert {choice.sampling.max_tokens for choice in made.choices} == {5}
    assert request(3, seed=-1).choices[0].sampling.seed == 2**64 - 1


def test_the_context_is_a_hard_limit_at_its_very_edge() -> None:
    assert request(CONTEXT - 16).choices[0].sampling.max_tokens == 16
    with pytest.raises(ContextLengthExceeded, match="This model's maximum context length is 512 tokens"):
        request(CONTEXT - 15)
    assert request(CONTEXT, max_tokens=0).choices[0].finish is FinishReason.LENGTH
    with pytest.raises(ContextLengthExceeded):
        request(CONTEXT + 1, max_tokens=0)


@pytest.mark.parametrize(("keep", "expected"), [(1, 1), (100, 100), (1000, 256), (-1, 256)])
def test_truncation_keeps_the_end_of_the_prompt(keep: int, expected: int) -> None:
    ids = unpack_ids(request(256, truncate_prompt_tokens=keep).choices[0].prompt_ids)
    assert list(ids) == list(range(256))[-expected:]


def test_truncation_leaves_room_for_the_completion() -> None:
    asked = generation(truncate_prompt_tokens=-1, max_tokens=12)
    made = make_request(
        request_id="", created=0, card=CARD, deadline=0.0, generation=asked,
        prompts=[array("i", [5] * 2000)], param="prompt", salt=b"", draw_seed=lambda: 0,
    )  # fmt: skip
    assert len(made.choices[0].prompt_ids) // 4 == CONTEXT - 12


def test_min_tokens_must_fit_in_what_is_left() -> None:
    asked = generation(max_tokens=100)
    sampling = msgspec.structs.replace(asked.sampling, min_tokens=50)
    asked = dataclasses.replace(asked, max_tokens=None, sampling=sampling)
    with pytest.raises(InvalidRequest, match="at most the 12 tokens left of the context, got 50"):
        make_request(
            request_id="", created=0, card=CARD, deadline=0.0, generation=asked,
            prompts=[array("i", [5] * 500)], param="messages", salt=b"", draw_seed=lambda: 0,
        )  # fmt: skip


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'prompt': the text has no tokens") as refused:
        request(0)
    assert refused.value.param == "prompt"


def test_something_must_be_left_to_sample_before_min_tokens() -> None:
    end = CARD.eos_ids[0]
    for body in ({"allowed_token_ids": [end]}, {"allowed_token_ids": [5, end], "stop_token_ids": [5]}):
        with pytest.raises(InvalidRequest, match=r"before min_tokens \(3\)") as refused:
            request(1, min_tokens=3, **body)
        assert refused.value.param == "allowed_token_ids"
        request(1, **body)
        request(1, min_tokens=3, **(body | {"allowed_token_ids": [5, 6, end]}))
    request(1, min_tokens=3, allowed_token_ids=[end], ignore_eos=True)


def test_log_probabilities_of_one_reply_are_bounded() -> None:
    request(1, n=128, max_tokens=500, copies=4)
    request(1, n=128, max_tokens=500, copies=4, logprobs=10)
    with pytest.raises(InvalidRequest, match="at most 4194304 log-probabilities") as refused:
        request(1, n=128, max_tokens=500, copies=4, logprobs=20)
    assert refused.value.param == "logprobs"


def test_salts_are_bound_to_tenant_and_deployment() -> None:
    tenant = Tenants("aa").of("Bearer anything")
    assert tenant == Tenants("aa").of(None)
    assert (
        len({tenant.salt, tenant.cache_salt("x"), tenant.cache_salt("y"), Tenants("bb").of(None).cache_salt("x")}) == 4
    )
    assert tenant.cache_salt("") == tenant.salt


def test_ids_begin_with_their_process_and_are_hexadecimal() -> None:
    assert Ids("gateway-17", lambda bits: 255).request("cmpl") == "cmpl-11" + "0" * 22 + "ff"
    assert Ids("odd name").request("cmpl") != Ids("odd name").request("cmpl")
    assert 0 <= Ids("g").seed() < 2**64


def test_created_never_runs_backwards() -> None:
    wall, monotonic = [1_000_000.0], [50.0]
    created = Clock(lambda: wall[0], lambda: monotonic[0]).steady()
    assert created() == 1_000_000
    wall[0] -= 3600
    monotonic[0] += 2
    assert created() == 1_000_002


def test_whoever_is_refused_for_capacity_learns_when_to_come_back() -> None:
    assert error_headers(DeadlineExceeded("late"))["retry-after"] == "1"
    assert error_headers(NoCapacity("full", retry_after_s=1000.0))["retry-after"] == "120"
    assert "retry-after" not in error_headers(InvalidRequest("no"))
