"""An account in Chrome's trace event format, for chrome://tracing and Perfetto.

Source: "Trace Event Format", Google, 2016. Times are microseconds; the request has a lane ("thread"), and so
has each choice.
"""

from __future__ import annotations

from typing import Any

_OF_TIME = ("kind", "at_s", "for_s")


def chrome_trace(account: dict[str, Any]) -> dict[str, Any]:
    """account: as `account.account` makes it."""
    name = account["id"] or account["request_id"]
    lanes = [("request", account["events"], 0)]
    lanes += [(f"choice {choice['index']}", choice["events"], choice["index"] + 1) for choice in account["choices"]]
    events: list[dict[str, Any]] = [_named("process_name", f"argosy request {name}", 0)]
    for label, found, lane in lanes:
        events.append(_named("thread_name", label, lane))
        events += [_event(event, lane) for event in found]
    whole = {"name": account["state"], "cat": "argosy", "ph": "X", "ts": 0.0, "dur": 1e6 * account["elapsed_s"]}
    events.insert(1, whole | {"pid": 1, "tid": 0, "args": account["summary"]})
    return {
        "displayTimeUnit": "ms",
        "otherData": {key: account[key] for key in ("id", "request_id", "model", "arrived_at", "state")},
        "traceEvents": events,
    }


def _event(event: dict[str, Any], lane: int) -> dict[str, Any]:
    args = {key: value for key, value in event.items() if key not in _OF_TIME}
    cause = event.get("cause") or event.get("why")
    name = f"{event['kind']}: {cause}" if cause else event["kind"]
    common = {"name": name, "cat": "argosy", "ts": 1e6 * event["at_s"], "pid": 1, "tid": lane, "args": args}
    if "for_s" in event:
        return common | {"ph": "X", "dur": 1e6 * event["for_s"]}
    return common | {"ph": "i", "s": "t"}


def _named(kind: str, name: str, lane: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}}
