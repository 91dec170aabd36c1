"""The labels, each closed or bounded: no client, tenant or prompt can add a series."""

from __future__ import annotations

from serving import errors
from serving.metrics.description import OTHER, Label

MAX_MODELS = 64
MAX_REPLICAS = 64
MAX_RANKS = 64
MAX_ROUTES = 64
MAX_STATUSES = 32

_ENGINE_CODES = ("duplicate_handle", "engine_fault", "request_too_large")
_REQUEST_CODES = ("invalid_type", "missing_parameter")


def _codes(root: type[errors.ArgosyError]) -> set[str]:
    return {root.code}.union(*map(_codes, root.__subclasses__()))


MODEL = Label("model_name", f"served model; beyond {MAX_MODELS} all others are one, `{OTHER}`", (), MAX_MODELS + 1)
REPLICA = Label("replica", f"replica's own name; the {MAX_REPLICAS} longest connected", (), MAX_REPLICAS)
RANK = Label("rank", f"of a gang; the first {MAX_RANKS}", (), MAX_RANKS)
ROUTE = Label("route", f"path of a route; `{OTHER}` for what no route knows", (), MAX_ROUTES + 1)
STATUS = Label("status", "HTTP status", (), MAX_STATUSES + 1)
CODE = Label(
    "code",
    "OpenAI's error code",
    (*sorted(_codes(errors.ArgosyError).union(_ENGINE_CODES, _REQUEST_CODES)), OTHER),
)
SHED_REASON = Label("reason", "why capacity was refused", ("draining", "no_endpoints", "saturated", "ttl", OTHER))
FINISH_REASON = Label("reason", "why a choice ended", ("length", "stop", "unknown"))
FINISHED_REASON = Label("finished_reason", "why a choice ended", FINISH_REASON.values)
CAUSE = Label("cause", "why a link to a replica ended", ("closed", "faulty", "lost", "stalled"))
FAULT = Label(
    "kind",
    "what went wrong: a replica that left without a drain, one that made no progress, one that spoke nonsense, "
    "unusable numbers of one request, a request that every replica failed on",
    ("replica_lost", "replica_stalled", "replica_faulty", "engine_fault", "poisonous_request"),
)
STATE = Label("state", "of a replica", ("loading", "ready", "draining", "down"))
PHASE = Label("phase", "of a replica's start", ("weights", "kv_cache", "gang", "limit", OTHER))
