"""Grafana's dashboard, from the same names as the rules it reads. Its JSON is what Grafana 10 and later import."""

from __future__ import annotations

import dataclasses
from typing import Any

from serving.metrics.promql import check
from serving.metrics.rules import GENERATION, LATENCIES, Objective, known_series

WIDTH = 24
_HEIGHT = 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_MODEL = 'model_name=~"$model"'


@dataclasses.dataclass(frozen=True, slots=True)
class Query:
    expression: str
    legend: str


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    title: str
    unit: str  # Grafana's name of it
    help: str
    queries: tuple[Query, ...]
    width: int = 8
    is_stacked: bool = False


def _quantiles(name: str) -> tuple[Query, ...]:
    return tuple(
        Query(f"argosy:{name}_seconds:{q}{{{_MODEL}}}", f"{q} {{{{model_name}}}}") for q in ("p50", "p95", "p99")
    )


def _per_replica(expression: str, legend: str = "{{replica}}") -> tuple[Query, ...]:
    return (Query(f"max by (replica) ({expression})", legend),)


def rows(objective: Objective) -> dict[str, tuple[Panel, ...]]:
    """Panels by the title of their row."""
    budget = round(1 - objective.target, 9)
    return {
        "Service": (
            Panel(
                "Requests",
                "reqps",
                "Generation requests by status.",
                (Query(f"sum by (status) (rate(argosy_responses_total{{{GENERATION}}}[1m]))", "{{status}}"),),
                is_stacked=True,
            ),
            Panel(
                "Under way",
                "short",
                "Requests with a token, and those that still wait for one.",
                (
                    Query(f"sum(argosy_requests_running{{{_MODEL}}})", "running"),
                    Query(f"sum(argosy_requests_waiting{{{_MODEL}}})", "waiting"),
                ),
            ),
            Panel(
                "Tokens",
                "short",
                "Tokens a second: generated, prompts computed, prompts found in the prefix cache.",
                (
                    Query(f"sum(rate(argosy_generation_tokens_total{{{_MODEL}}}[1m]))", "generated"),
                    Query(
                        f"sum(rate(argosy_prompt_tokens_total{{{_MODEL}}}[1m])) "
                        f"- sum(rate(argosy_cached_tokens_total{{{_MODEL}}}[1m]))",
                        "prompt, computed",
                    ),
                    Query(f"sum(rate(argosy_cached_tokens_total{{{_MODEL}}}[1m]))", "prompt, cached"),
                ),
            ),
            Panel(
                "Budget burn over an hour",
                "short",
                f"1 = exactly the objective of {objective.target:.4g} is met; 14.4 pages.",
                (
                    Query(f"argosy:ttft_slow:ratio_1h / {budget:g}", f"first token > {objective.ttft_s:g} s"),
                    Query(
                        f"argosy:inter_token_slow:ratio_1h / {budget:g}", f"next token > {objective.inter_token_s:g} s"
                    ),
                    Query(f"argosy:failed:ratio_1h / {budget:g}", "failed"),
                ),
                12,
            ),
            Panel(
                "Refused and failed",
                "reqps",
                "Errors by code; sheds (503 for want of capacity) by reason.",
                (
                    Query("sum by (code) (rate(argosy_errors_total[1m])) > 0", "{{code}}"),
                    Query("sum by (code) (rate(argosy_broken_replies_total[1m])) > 0", "broken: {{code}}"),
                    Query("sum by (reason) (rate(argosy_sheds_total[1m])) > 0", "shed: {{reason}}"),
                ),
                12,
            ),
        ),
        "Latency": (
            Panel("Time to first token", "s", "From arrival.", _quantiles("ttft")),
            Panel("Between tokens", "s", "Between two frames of one choice.", _quantiles("inter_token")),
            Panel("Whole request", "s", "From arrival to end.", _quantiles("request")),
            Panel(
                "Where the time goes",
                "s",
                "Means: the gateway's queue, then the replica's queue and the prompt, then decoding.",
                tuple(
                    Query(
                        f"sum(rate({LATENCIES[name]}_sum{{{_MODEL}}}[5m])) "
                        f"/ sum(rate({LATENCIES[name]}_count{{{_MODEL}}}[5m]))",
                        name,
                    )
                    for name in ("queue", "prefill", "decode")
                ),
                24,
                True,
            ),
        ),
        "Capacity": (
            Panel(
                "Queue",
                "short",
                "Choices that wait in the gateway.",
                (Query(f"sum by (model_name) (argosy_queue_choices{{{_MODEL}}})", "{{model_name}}"),),
            ),
            Panel(
                "Queue in tokens",
                "short",
                "Prompt and journalled tokens that wait.",
                (Query(f"sum by (model_name) (argosy_queue_tokens{{{_MODEL}}})", "{{model_name}}"),),
            ),
            Panel(
                "Rows",
                "short",
                "In the batch, and waiting inside the replica.",
                (
                    *_per_replica("argosy_replica_rows_running", "{{replica}} running"),
                    *_per_replica("argosy_replica_rows_waiting", "{{replica}} waiting"),
                ),
            ),
            Panel(
                "KV blocks owned", "percentunit", "By running rows.", (Query("argosy:kv_usage:ratio", "{{replica}}"),)
            ),
            Panel(
                "Preemptions and evictions",
                "short",
                "A second: rows put out of the batch, reusable prefixes overwritten.",
                (
                    *_per_replica("rate(argosy_replica_preemptions_total[1m])", "{{replica}} rows"),
                    *_per_replica("rate(argosy_replica_kv_blocks_evicted_total[1m])", "{{replica}} blocks"),
                ),
            ),
            Panel(
                "Prefix cache",
                "percentunit",
                "Share of the tokens of newly admitted rows that were found.",
                (Query("argosy:prefix_hit:ratio_5m", "{{replica}}"),),
            ),
        ),
        "Engine": (
            Panel(
                "Fraction of the hardware's limit",
                "percentunit",
                "Ideal over actual duration of steps; absent where the limit is not known.",
                (Query("argosy:hardware_fraction:5m", "{{replica}}"),),
            ),
            Panel(
                "Step time",
                "s",
                "99th percentile, and what is announced for the running step.",
                (
                    Query("argosy:step_seconds:p99", "{{replica}} p99"),
                    *_per_replica("argosy_replica_announced_step_seconds", "{{replica}} announced"),
                ),
            ),
            Panel(
                "Step time over prediction",
                "short",
                "Median and 95th percentile; 1 = as announced.",
                tuple(
                    Query(
                        f"histogram_quantile({share}, max by (le, replica) "
                        "(rate(argosy_replica_step_prediction_ratio_bucket[5m])))",
                        f"{{{{replica}}}} {name}",
                    )
                    for name, share in (("p50", 0.5), ("p95", 0.95))
                ),
            ),
            Panel(
                "Tokens computed",
                "short",
                "A second, in prompts and one per row.",
                (
                    *_per_replica("rate(argosy_replica_prefill_tokens_total[1m])", "{{replica}} prompts"),
                    *_per_replica("rate(argosy_replica_decode_tokens_total[1m])", "{{replica}} decoding"),
                ),
            ),
            Panel("Steps", "short", "A second.", _per_replica("rate(argosy_replica_steps_total[1m])")),
            Panel(
                "Ranks",
                "s",
                "Since each rank last made progress.",
                (Query("max by (replica, rank) (argosy_rank_age_seconds)", "{{replica}} rank {{rank}}"),),
            ),
        ),
        "Faults": (
            Panel(
                "Replicas",
                "short",
                "That a gateway knows, by state.",
                (Query("max by (state) (argosy_replicas)", "{{state}}"),),
                is_stacked=True,
            ),
            Panel(
                "Faults",
                "short",
                "In five minutes, by kind; choices that moved to another replica.",
                (
                    Query("sum by (kind) (increase(argosy_faults_total[5m]))", "{{kind}}"),
                    Query("sum(increase(argosy_resumes_total[5m]))", "choices resumed"),
                ),
            ),
            Panel(
                "Links that ended",
                "short",
                "In five minutes, by cause; replicas that were drained are among the lost.",
                (Query("sum by (cause) (increase(argosy_links_ended_total[5m]))", "{{cause}}"),),
            ),
            Panel(
                "Gateway's event loop",
                "s",
                "How late it runs what is due; every stream waits as long.",
                (
                    Query(
                        "histogram_quantile(0.99, sum by (le, instance) (rate(argosy_loop_lag_seconds_bucket[1m])))",
                        "{{instance}} p99",
                    ),
                ),
            ),
            Panel(
                "Clients",
                "short",
                "Open connections, and requests a second whose client left early.",
                (
                    Query("sum by (instance) (argosy_connections)", "{{instance}} connections"),
                    Query("sum(rate(argosy_disconnects_total[1m]))", "left early"),
                ),
            ),
            Panel(
                "Cold start",
                "s",
                "Phases of each replica's last start.",
                (Query("max by (replica, phase) (argosy_replica_start_seconds) > 0", "{{replica}} {{phase}}"),),
                is_stacked=True,
            ),
        ),
    }


def render(objective: Objective) -> dict[str, Any]:
    """The dashboard's document. Raises PromqlError when a panel names what is not there."""
    known = known_series(objective)
    panels: list[dict[str, Any]] = []
    y = 0
    for title, members in rows(objective).items():
        place = {"h": 1, "w": WIDTH, "x": 0, "y": y}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place, "collapsed": False, "panels": []}
        )
        x, y = 0, y + 1
        for panel in members:
            if x + panel.width > WIDTH:
                x, y = 0, y + _HEIGHT
            for query in panel.queries:
                check(query.expression, known)
            place = {"h": _HEIGHT, "w": panel.width, "x": x, "y": y}
            panels.append(_panel(len(panels) + 1, panel, place))
            x += panel.width
        y += _HEIGHT
    return {
        "uid": "argosy",
        "title": "Argosy",
        "tags": ["argosy"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_DATASOURCE, _MODELS]},
        "panels": panels,
    }


_DATASOURCE = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
_MODELS = {
    "name": "model",
    "type": "query",
    "label": "Model",
    "datasource": _SOURCE,
    "query": {"query": "label_values(argosy_requests_running, model_name)", "refId": "model"},
    "refresh": 2,
    "includeAll": True,
    "multi": True,
    "allValue": ".*",
    "current": {"text": "All", "value": "$__all"},
}


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    stacking = {"mode": "normal", "group": "A"} if panel.is_stacked else {"mode": "none", "group": "A"}
    custom = {
        "drawStyle": "line",
        "fillOpacity": 25 if panel.is_stacked else 5,
        "showPoints": "never",
        "stacking": stacking,
    }
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + at), "datasource": _SOURCE, "expr": query.expression, "legendFormat": query.legend}
            for at, query in enumerate(panel.queries)
        ],
    }
