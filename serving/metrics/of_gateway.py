"""What a gateway counts of itself and of its requests.

Names that begin with `vllm:` are those that routers and autoscalers built for vLLM read.
"""

from __future__ import annotations

from collections.abc import Callable

from serving.metrics import labels
from serving.metrics.description import Kind, Metric, Value
from serving.metrics.feeds import by_model, by_model_and, kv_usage, one, queued
from serving.metrics.histogram import LAG_SECONDS, SECONDS
from serving.metrics.labels import MODEL
from serving.metrics.series import ModelSeries

_GATEWAY = "gateway"


def _model(kind: Kind, name: str, unit: str, help: str, read: Callable[[ModelSeries], Value]) -> Metric:
    bounds = SECONDS if kind == "histogram" else ()
    return Metric(name, kind, unit, help, by_model(read), _GATEWAY, (MODEL,), bounds)


PROCESS_METRICS = (
    Metric(
        "argosy_responses",
        "counter",
        "responses",
        "Responses by route and status.",
        lambda snapshot: snapshot.responses.items(),
        _GATEWAY,
        (labels.ROUTE, labels.STATUS),
    ),
    Metric(
        "argosy_errors",
        "counter",
        "requests",
        "Requests refused or failed before their reply began, by error code.",
        lambda snapshot: labels.CODE.of(snapshot.errors),
        _GATEWAY,
        (labels.CODE,),
    ),
    Metric(
        "argosy_sheds",
        "counter",
        "requests",
        "Requests that found no capacity, by reason; they are among the errors too.",
        lambda snapshot: labels.SHED_REASON.of(snapshot.sheds),
        _GATEWAY,
        (labels.SHED_REASON,),
    ),
    Metric(
        "argosy_connections",
        "gauge",
        "connections",
        "Open client connections.",
        one(lambda snapshot: snapshot.num_connections),
        _GATEWAY,
    ),
    Metric(
        "argosy_trace_spans_dropped",
        "counter",
        "spans",
        "Spans that no collector has: it cannot be reached, refuses them or does not keep up. 0 where tracing is off.",
        one(lambda snapshot: snapshot.num_spans_dropped),
        _GATEWAY,
    ),
    Metric(
        "argosy_loop_lag_seconds",
        "histogram",
        "seconds",
        "How late the gateway's event loop ran a task that is due every 50 ms.",
        one(lambda snapshot: snapshot.plane.loop_lag),
        _GATEWAY,
        (),
        LAG_SECONDS,
    ),
    Metric(
        "argosy_replicas",
        "gauge",
        "replicas",
        "Replicas that this gateway knows, by state.",
        lambda snapshot: labels.STATE.of(snapshot.plane.replica_states),
        _GATEWAY,
        (labels.STATE,),
    ),
    Metric(
        "argosy_replicas_not_shown",
        "gauge",
        "replicas",
        f"Connected replicas beyond the {labels.MAX_REPLICAS} that have series of their own.",
        one(lambda snapshot: len(snapshot.plane.replicas) - len(snapshot.replicas)),
        _GATEWAY,
    ),
    Metric(
        "argosy_links_ended",
        "counter",
        "links",
        "Links to replicas that ended, drained ones included, by cause.",
        lambda snapshot: labels.CAUSE.of(snapshot.plane.links_ended),
        _GATEWAY,
        (labels.CAUSE,),
    ),
    Metric(
        "argosy_faults",
        "counter",
        "faults",
        "Faults that streams had to survive or died of, by kind.",
        lambda snapshot: labels.FAULT.of(snapshot.plane.faults),
        _GATEWAY,
        (labels.FAULT,),
    ),
    Metric(
        "argosy_queue_choices",
        "gauge",
        "choices",
        "Choices that wait in the gateway for a replica.",
        queued(0),
        _GATEWAY,
        (MODEL,),
    ),
    Metric(
        "argosy_queue_tokens",
        "gauge",
        "tokens",
        "Prompt and journalled tokens of those choices: work that is held back.",
        queued(1),
        _GATEWAY,
        (MODEL,),
    ),
)

MODEL_METRICS = (
    _model("gauge", "argosy_requests_running", "requests", "Requests that have a token.", lambda s: s.num_running),
    _model(
        "gauge",
        "argosy_requests_waiting",
        "requests",
        "Requests submitted that have no token yet.",
        lambda s: s.num_waiting,
    ),
    _model("counter", "argosy_prompt_tokens", "tokens", "Prompt tokens of ended requests.", lambda s: s.prompt_tokens),
    _model(
        "counter",
        "argosy_cached_tokens",
        "tokens",
        "Prompt tokens of ended requests that the prefix cache held.",
        lambda s: s.cached_tokens,
    ),
    _model("counter", "argosy_generation_tokens", "tokens", "Tokens generated.", lambda s: s.generation_tokens),
    _model(
        "counter", "argosy_resumes", "choices", "Times that a choice moved to another replica.", lambda s: s.num_resumes
    ),
    _model(
        "counter", "argosy_disconnects", "requests", "Requests whose client left early.", lambda s: s.num_disconnects
    ),
    _model(
        "histogram",
        "argosy_time_to_first_token_seconds",
        "seconds",
        "From the request's arrival to its first token.",
        lambda s: s.time_to_first_token,
    ),
    _model(
        "histogram",
        "argosy_inter_token_seconds",
        "seconds",
        "Between two frames of one choice.",
        lambda s: s.inter_token_latency,
    ),
    _model("histogram", "argosy_request_seconds", "seconds", "From arrival to end.", lambda s: s.request_latency),
    _model(
        "histogram",
        "argosy_queue_seconds",
        "seconds",
        "In the gateway's queue, until a replica took the request's first choice or it ended.",
        lambda s: s.queue_time,
    ),
    _model(
        "histogram",
        "argosy_prefill_seconds",
        "seconds",
        "From there to the first token: waiting inside the replica, and the prompt.",
        lambda s: s.prefill_time,
    ),
    _model(
        "histogram",
        "argosy_decode_seconds",
        "seconds",
        "From the first token to the last of all choices.",
        lambda s: s.decode_time,
    ),
    Metric(
        "argosy_choices_finished",
        "counter",
        "choices",
        "Finished choices by reason.",
        by_model_and(labels.FINISH_REASON, lambda s: s.finished),
        _GATEWAY,
        (MODEL, labels.FINISH_REASON),
    ),
    Metric(
        "argosy_broken_replies",
        "counter",
        "requests",
        "Replies that had begun and ended in an error, by its code.",
        by_model_and(labels.CODE, lambda s: s.broken),
        _GATEWAY,
        (MODEL, labels.CODE),
    ),
)

VLLM_METRICS = (
    _model("gauge", "vllm:num_requests_running", "requests", "Requests that have a token.", lambda s: s.num_running),
    _model(
        "gauge",
        "vllm:num_requests_waiting",
        "requests",
        "Requests submitted that have no token yet.",
        lambda s: s.num_waiting,
    ),
    Metric(
        "vllm:kv_cache_usage_perc",
        "gauge",
        "1",
        "Share of the KV blocks of all connected replicas that rows own; 1 = full.",
        kv_usage,
        "replicas' beats",
        (MODEL,),
    ),
    _model("counter", "vllm:prompt_tokens", "tokens", "Prompt tokens of ended requests.", lambda s: s.prompt_tokens),
    _model("counter", "vllm:generation_tokens", "tokens", "Tokens generated.", lambda s: s.generation_tokens),
    _model(
        "histogram",
        "vllm:time_to_first_token_seconds",
        "seconds",
        "Arrival to first token.",
        lambda s: s.time_to_first_token,
    ),
    _model(
        "histogram",
        "vllm:inter_token_latency_seconds",
        "seconds",
        "Between two frames of one choice.",
        lambda s: s.inter_token_latency,
    ),
    _model("histogram", "vllm:e2e_request_latency_seconds", "seconds", "Arrival to end.", lambda s: s.request_latency),
    Metric(
        "vllm:request_success",
        "counter",
        "choices",
        "Finished choices by reason.",
        by_model_and(labels.FINISHED_REASON, lambda s: s.finished),
        _GATEWAY,
        (MODEL, labels.FINISHED_REASON),
    ),
)
