"""The page: exact numbers, everything that is described and nothing else, bounded whatever happens."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.errors import EngineError, InvalidRequest, NoCapacity
from serving.gateway.tenants import Tenants
from serving.metrics.catalogue import BY_NAME, METRICS
from serving.metrics.labels import MAX_MODELS, MAX_RANKS, MAX_REPLICAS
from serving.metrics.meter import RequestMeter
from serving.metrics.page import Metrics
from serving.types import ReplicaStats
from tests.metrics.world import Passage, plane, samples, stats, text, view


def test_a_request_is_measured_at_every_station() -> None:
    metrics = Metrics()
    passage = Passage(queued_at=101.0)
    meter = RequestMeter(metrics, "m", 100.0, passage)
    assert samples(metrics)["argosy_requests_waiting", "m"] == 1
    passage.started_at = 103.5
    meter.on_tokens(2, None, 104.0)
    running = samples(metrics)
    assert (running["argosy_requests_waiting", "m"], running["argosy_requests_running", "m"]) == (0, 1)
    meter.on_tokens(1, 0.5, 104.5)
    meter.on_tokens(3, 1.5, 106.0)
    meter.on_choice_end("stop", num_resumes=2)
    for _ in range(2):  # however often it is told of its end
        meter.on_end(107.0, prompt_tokens=11, cached_tokens=8, is_disconnect=True)
    found = samples(metrics)
    seconds = {
        "time_to_first_token": 4.0,
        "inter_token": 2.0,
        "queue": 2.5,
        "prefill": 0.5,
        "decode": 2.0,
        "request": 7.0,
    }
    assert {name: found[f"argosy_{name}_seconds_sum", "m"] for name in seconds} == seconds
    assert found["argosy_inter_token_seconds_count", "m"] == 2
    assert found["argosy_inter_token_seconds_bucket", "m", "0.6"] == 1
    assert found["argosy_inter_token_seconds_bucket", "m", "2.0"] == 2
    tokens = [found[f"argosy_{kind}_tokens_total", "m"] for kind in ("prompt", "cached", "generation")]
    assert tokens == [11, 8, 6]
    assert found["argosy_resumes_total", "m"] == 2
    assert found["argosy_disconnects_total", "m"] == 1
    assert found["argosy_requests_running", "m"] == 0
    assert found["argosy_choices_finished_total", "m", "stop"] == found["vllm:request_success_total", "m", "stop"] == 1
    assert found["argosy_choices_finished_total", "m", "length"] == 0


def test_a_request_that_gave_up_in_the_queue_has_waited_and_not_prefilled() -> None:
    metrics = Metrics()
    meter = RequestMeter(metrics, "m", 10.0, Passage(queued_at=10.0))
    meter.on_end(40.0, 5, 0, is_disconnect=False)
    found = samples(metrics)
    assert found["argosy_queue_seconds_sum", "m"] == 30.0
    assert found["argosy_prefill_seconds_count", "m"] == found["argosy_decode_seconds_count", "m"] == 0
    assert found["argosy_requests_waiting", "m"] == 0


def test_errors_and_sheds_are_counted_by_their_words() -> None:
    metrics = Metrics()
    metrics.count_error(NoCapacity("full", reason="saturated"))
    metrics.count_error(NoCapacity("full", reason="a reason of its own"))
    metrics.count_error(InvalidRequest("no"))
    metrics.count_error(EngineError("x", code="a code that a replica made up"))
    metrics.count_broken("m", EngineError("x"))
    metrics.count_broken("m", NoCapacity("late", reason="draining"))
    found = samples(metrics)
    assert found["argosy_errors_total", "no_capacity"] == 2
    assert found["argosy_errors_total", "invalid_value"] == found["argosy_errors_total", "other"] == 1
    assert found["argosy_broken_replies_total", "m", "engine_error"] == 1
    sheds = {reason: found["argosy_sheds_total", reason] for reason in ("saturated", "draining", "ttl", "other")}
    assert sheds == {"saturated": 1, "draining": 1, "ttl": 0, "other": 1}


def test_replicas_are_shown_as_they_describe_themselves() -> None:
    metrics = Metrics()
    metrics.plane = lambda: plane(view("r0", told=stats()), queued={"m": (3, 450), "unknown": (1, 9)})
    found = samples(metrics)

    def of(name: str, *labels: str) -> float:
        return found[f"argosy_replica_{name}", "r0", *labels]

    assert [of("rows_running"), of("rows_waiting"), of("kv_blocks_used"), of("kv_blocks")] == [4, 2, 30, 40]
    assert [of("beat_age_seconds"), of("step_age_seconds"), of("announced_step_seconds")] == [0.25, 0.004, 0.012]
    assert [of("steps_total"), of("prefill_tokens_total"), of("decode_tokens_total")] == [7, 100, 50]
    assert [of("preemptions_total"), of("kv_blocks_evicted_total")] == [3, 5]
    assert [of("prefix_queried_tokens_total"), of("prefix_hit_tokens_total")] == [96, 32]
    assert of("step_seconds_bucket", "0.008") == 0
    assert of("step_seconds_bucket", "0.015") == of("step_seconds_count") == 7
    assert of("step_prediction_ratio_sum") == 7 * 0.75
    assert [of("step_busy_seconds_total"), of("step_ideal_seconds_total"), of("hardware_fraction")] == [
        0.07,
        0.028,
        0.4,
    ]
    assert [of("start_seconds", "weights"), of("start_seconds", "kv_cache")] == [1.5, 0.25]
    assert found["argosy_rank_age_seconds", "r0", "1"] == 0.75
    assert found["vllm:kv_cache_usage_perc", "m"] == 0.75
    assert (found["argosy_queue_choices", "m"], found["argosy_queue_tokens", "m"]) == (3, 450)
    assert found["argosy_queue_choices", "other"] == 1
    assert found["vllm:num_requests_waiting", "m"] == 0, "an autoscaler sees a model before its first request"
    assert found["argosy_replicas", "down"] == 1
    assert found["argosy_faults_total", "replica_lost"] == 1
    assert found["argosy_faults_total", "poisonous_request"] == 0
    assert found["argosy_loop_lag_seconds_sum",] == 0.003


@pytest.mark.parametrize(
    "told",
    [None, msgspec.structs.replace(stats(), step_counts=[1, 2], hardware_fraction=None)],
    ids=["an older replica", "buckets of another version, no limit"],
)
def test_what_a_replica_does_not_know_is_absent(told: ReplicaStats | None) -> None:
    metrics = Metrics()
    metrics.plane = lambda: plane(view("r0", told=told))
    names = {name for name, *_ in samples(metrics)}
    assert "argosy_replica_rows_running" in names
    absent = ("hardware_fraction", "step_ideal", "step_busy", "replica_step_seconds")
    assert not {name for name in names if any(part in name for part in absent)}
    assert ("argosy_replica_steps_total" in names) == (told is not None)


def test_the_page_has_everything_described_and_nothing_else() -> None:
    metrics = Metrics()
    metrics.model("m").finished["stop"] += 1
    metrics.count_response("/v1/completions", 200)
    metrics.plane = lambda: plane(view("r0", told=stats()))
    families = {family.name: family for family in text_string_to_metric_families(text(metrics))}
    assert list(families) == [metric.name for metric in METRICS]
    assert len(BY_NAME) == len(METRICS)
    for metric in METRICS:
        family = families[metric.name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert family.samples, f"{metric.name} shows nothing"
        assert {sample.name for sample in family.samples} == set(metric.series)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.label_names)
        assert all(label.bound > 0 for label in metric.labels)
        assert metric.name.startswith(("argosy_", "vllm:"))
        assert not metric.bounds or list(metric.bounds) == sorted(metric.bounds)


def test_ten_thousand_tenants_add_no_line() -> None:
    metrics, tenants = Metrics(), Tenants("5ec2e7")

    def serve(key: str) -> None:
        tenant = tenants.of(f"Bearer {key}")
        assert tenant.cache_salt(None) is not None
        meter = RequestMeter(metrics, "m", 0.0, Passage())
        meter.on_tokens(1, None, 1.0)
        meter.on_choice_end("stop", 0)
        meter.on_end(2.0, 1, 0, is_disconnect=False)
        metrics.count_response("/v1/completions", 200)

    serve("sk-first")
    before = text(metrics).count("\n")
    for number in range(10_000):
        serve(f"sk-{number}")
    assert text(metrics).count("\n") == before
    assert samples(metrics)["argosy_request_seconds_count", "m"] == 10_001


def test_no_label_outgrows_its_bound() -> None:
    metrics = Metrics()
    for number in range(300):
        metrics.model(f"model-{number}").num_running += 1
        metrics.count_response(f"/route/{number}", 200)
        metrics.count_response("/v1/models", number)
        metrics.count_error(EngineError("x", code=f"code-{number}"))
        metrics.model("m").finished[f"reason-{number}"] += 1
    many = [view(f"r{number}", f"model-{number}", stats(), num_ranks=100) for number in range(100)]
    metrics.plane = lambda: plane(*many, queued={f"q{number}": (1, 1) for number in range(300)})
    values: dict[tuple[str, str], set[str]] = {}
    for family in text_string_to_metric_families(text(metrics)):
        for sample in family.samples:
            for label, value in sample.labels.items():
                values.setdefault((family.name, label), set()).add(value)
    bounds = {(metric.name, label.name): label for metric in METRICS for label in metric.labels}
    for key, label in bounds.items():
        assert len(values[key]) <= label.bound, key
        assert not label.values or values[key] <= set(label.values)
    assert len(values["argosy_requests_running", "model_name"]) == MAX_MODELS + 1
    assert len(values["argosy_replica_steps", "replica"]) == MAX_REPLICAS
    assert len(values["argosy_rank_age_seconds", "rank"]) == MAX_RANKS
    assert samples(metrics)["argosy_replicas_not_shown",] == 100 - MAX_REPLICAS
    assert samples(metrics)["argosy_queue_choices", "other"] == 300
