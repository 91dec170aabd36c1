"""Prometheus' recording and alerting rules, from the catalogue and a stated objective.

Burn rates over several windows follow "Alerting on SLOs" of the Site Reliability Workbook (chapter 5): an alert needs
a long window, so that it means something, and a short one, so that it ends when the trouble does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from serving.metrics.catalogue import BY_NAME
from serving.metrics.promql import check, series_labels

GENERATION = 'route=~"/v1/(chat/)?completions"'
WINDOWS = ("5m", "30m", "1h", "6h")
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
LATENCIES = {
    "ttft": "argosy_time_to_first_token_seconds",
    "inter_token": "argosy_inter_token_seconds",
    "request": "argosy_request_seconds",
    "queue": "argosy_queue_seconds",
    "prefill": "argosy_prefill_seconds",
    "decode": "argosy_decode_seconds",
}
"""Recorded as argosy:<name>_seconds:<quantile>."""


class ObjectiveError(ValueError):
    """An objective that the buckets cannot measure; the text names the limit and the value."""


@dataclasses.dataclass(frozen=True, slots=True)
class Objective:
    """`target` of all first tokens come within ttft_s, of all later ones within inter_token_s, and of all requests
    without a failure of ours. Times are bounds of buckets: between two, nobody knows.
    """

    ttft_s: float = 2.0
    inter_token_s: float = 0.15
    target: float = 0.99

    def __post_init__(self) -> None:
        for name, given in (("ttft", self.ttft_s), ("inter_token", self.inter_token_s)):
            bounds = BY_NAME[LATENCIES[name]].bounds
            if given not in bounds:
                shown = ", ".join(f"{bound:g}" for bound in bounds)
                raise ObjectiveError(f"{name}: {given:g} s is not the bound of a bucket; choose of {shown}")
        if not 0.5 <= self.target < 1.0:
            raise ObjectiveError(f"target: {self.target:g} is outside 0.5 to below 1")


@dataclasses.dataclass(frozen=True, slots=True)
class Recording:
    name: str
    expression: str
    labels: tuple[str, ...] = ()  # that the result has

    def as_yaml(self) -> dict[str, Any]:
        return {"record": self.name, "expr": self.expression}


@dataclasses.dataclass(frozen=True, slots=True)
class Alert:
    name: str
    expression: str
    severity: str  # page | ticket
    summary: str
    description: str
    lasting: str = ""  # how long it must hold

    def as_yaml(self) -> dict[str, Any]:
        rule: dict[str, Any] = {"alert": self.name, "expr": self.expression}
        if self.lasting:
            rule["for"] = self.lasting
        annotations = {"summary": self.summary, "description": self.description}
        return rule | {"labels": {"severity": self.severity}, "annotations": annotations}


def recordings(objective: Objective) -> Iterator[Recording]:
    """What the alerts and the dashboard read, computed once. Several gateways tell of the same replica: the highest
    counts."""
    for name, metric in LATENCIES.items():
        for quantile, share in QUANTILES.items():
            buckets = f"sum by (le, model_name) (rate({metric}_bucket[5m]))"
            yield Recording(
                f"argosy:{name}_seconds:{quantile}", f"histogram_quantile({share}, {buckets})", ("model_name",)
            )
    for window in WINDOWS:
        for name, limit in (("ttft", objective.ttft_s), ("inter_token", objective.inter_token_s)):
            metric = LATENCIES[name]
            good = f'sum(rate({metric}_bucket{{le="{limit}"}}[{window}]))'
            yield Recording(f"argosy:{name}_slow:ratio_{window}", f"1 - {good} / sum(rate({metric}_count[{window}]))")
        failed = f'(sum(rate(argosy_responses_total{{{GENERATION},status=~"5.."}}[{window}])) or vector(0))'
        broken = f"(sum(rate(argosy_broken_replies_total[{window}])) or vector(0))"
        served = f"sum(rate(argosy_responses_total{{{GENERATION}}}[{window}]))"
        yield Recording(f"argosy:failed:ratio_{window}", f"({failed} + {broken}) / {served}")
    replica = ("replica",)
    yield Recording(
        "argosy:kv_usage:ratio",
        "max by (replica) (argosy_replica_kv_blocks_used / argosy_replica_kv_blocks)",
        replica,
    )
    yield Recording(
        "argosy:hardware_fraction:5m",
        "max by (replica) (rate(argosy_replica_step_ideal_seconds_total[5m]) "
        "/ (rate(argosy_replica_step_busy_seconds_total[5m]) > 0))",
        replica,
    )
    yield Recording(
        "argosy:prefix_hit:ratio_5m",
        "max by (replica) (rate(argosy_replica_prefix_hit_tokens_total[5m]) "
        "/ (rate(argosy_replica_prefix_queried_tokens_total[5m]) > 0))",
        replica,
    )
    yield Recording(
        "argosy:step_seconds:p99",
        "histogram_quantile(0.99, max by (le, replica) (rate(argosy_replica_step_seconds_bucket[5m])))",
        replica,
    )
    yield Recording(
        "argosy:generation_tokens:rate_5m",
        "sum by (model_name) (rate(argosy_generation_tokens_total[5m]))",
        ("model_name",),
    )


_BURNS = {
    "ttft_slow": ("FirstToken", "first tokens are late"),
    "inter_token_slow": ("InterToken", "streams are slow"),
    "failed": ("Errors", "requests fail"),
}
_SPEEDS = (
    ("Fast", 14.4, "1h", "5m", "page", "2 %", "an hour"),
    ("Slow", 6.0, "6h", "30m", "ticket", "5 %", "six hours"),
)


def alerts(objective: Objective) -> Iterator[Alert]:
    """What somebody should look at; `page` at once, `ticket` within a day."""
    budget = round(1 - objective.target, 9)
    for series, (what, text) in _BURNS.items():
        for speed, factor, long, short, severity, spent, within in _SPEEDS:
            limit = f"{factor:g} * {budget:g}"
            yield Alert(
                f"Argosy{what}Budget{speed}",
                f"argosy:{series}:ratio_{long} > {limit} and argosy:{series}:ratio_{short} > {limit}",
                severity,
                f"{text}: {spent} of the month's error budget went in {within}",
                f"{{{{ $value | humanizePercentage }}}} miss the objective of {objective.target:.4g}; see where the "
                "time goes on the dashboard (queue, prefill, decode), then faults and sheds.",
            )
    yield Alert(
        "ArgosyNoReplica",
        'max(argosy_replicas{state="ready"}) == 0',
        "page",
        "no gateway has a replica that is ready",
        "Requests wait for the queue's time-out, then get 503. Look at the replicas' logs and /readyz.",
        "1m",
    )
    yield Alert(
        "ArgosyReplicaStalled",
        'max(increase(argosy_faults_total{kind="replica_stalled"}[10m])) > 0 or '
        "max by (replica) (argosy_replica_step_age_seconds > 1.5 and "
        "argosy_replica_step_age_seconds > 3 * argosy_replica_announced_step_seconds) > 0",
        "ticket",
        "a replica stopped making progress",
        "Its streams went on elsewhere. Its log holds the stacks of the step that hung.",
    )
    yield Alert(
        "ArgosyReplicaRestarts",
        'max(sum by (instance) (increase(argosy_faults_total{kind=~"replica_.*"}[30m]))) > 3',
        "page",
        "replicas or their gangs die again and again",
        "{{ $value | humanize }} in half an hour. A rank that dies takes its gang with it: look for the first to go.",
    )
    yield Alert(
        "ArgosyRankSilent",
        "max by (replica, rank) (argosy_rank_age_seconds) > 5",
        "ticket",
        "rank {{ $labels.rank }} of {{ $labels.replica }} makes no progress",
        "For {{ $value | humanizeDuration }}. Its gang should have ended by now.",
        "30s",
    )
    yield Alert(
        "ArgosyKvPressure",
        "argosy:kv_usage:ratio > 0.9 and max by (replica) (rate(argosy_replica_preemptions_total[5m])) > 0.1",
        "ticket",
        "{{ $labels.replica }} preempts rows for want of KV blocks",
        "{{ $value | humanizePercentage }} of its blocks are owned and rows are computed twice: add replicas, raise "
        "--kv-cache-bytes or lower --max-num-seqs.",
        "5m",
    )
    yield Alert(
        "ArgosyQueueGrows",
        "sum by (model_name) (argosy_queue_choices) > 20 and "
        "sum by (model_name) (deriv(argosy_queue_choices[5m])) > 0.1",
        "ticket",
        "the queue of {{ $labels.model_name }} grows",
        "{{ $value | humanize }} choices wait and more come than go: add replicas before they are refused.",
        "5m",
    )
    yield Alert(
        "ArgosySheds",
        "sum by (reason) (rate(argosy_sheds_total[5m])) > 0.1",
        "ticket",
        "requests are refused for want of capacity: {{ $labels.reason }}",
        "{{ $value | humanize }} a second, each with 503 and Retry-After.",
        "5m",
    )
    yield Alert(
        "ArgosyGatewayLags",
        "histogram_quantile(0.99, sum by (le, instance) (rate(argosy_loop_lag_seconds_bucket[5m]))) > 0.25",
        "ticket",
        "a gateway's event loop is late",
        "Every stream of {{ $labels.instance }} waits as long: it lacks CPU, or something blocks it.",
        "5m",
    )


def known_series(objective: Objective) -> dict[str, frozenset[str]]:
    """Labels of everything that an alert or a panel may name: the page's series and what is recorded."""
    return series_labels() | {rule.name: frozenset(rule.labels) for rule in recordings(objective)}


def render(objective: Objective) -> dict[str, Any]:
    """The rules file's document. Raises PromqlError when a rule names what is not there."""
    page, known = series_labels(), known_series(objective)
    recorded, raised = list(recordings(objective)), list(alerts(objective))
    for recording in recorded:
        check(recording.expression, page)
    for alert in raised:
        check(alert.expression, known)
    return {
        "groups": [
            {"name": "argosy.recording", "interval": "15s", "rules": [rule.as_yaml() for rule in recorded]},
            {"name": "argosy.alerts", "rules": [rule.as_yaml() for rule in raised]},
        ]
    }
