"""`argosy explain`: where the time of a request went, read from GET /v1/requests, as a timeline in the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serving.chat import error_of
from serving.logs import printable
from serving.secret_file import SecretFile

TIMEOUT = httpx.Timeout(30.0, connect=5.0)
LINE = 44  # characters of a timeline
_COLOURS = {
    "read": "blue",
    "model": "yellow",
    "tokenizer": "yellow",
    "tokenised": "blue",
    "queued": "yellow",
    "waited": "yellow",
    "chunk": "cyan",
    "decode": "green",
    "gap": "red",
    "preempted": "magenta",
    "lost": "red",
    "returned": "magenta",
    "failed": "red",
}
_WHY = {
    "no_permit": "every replica had as many choices as it takes",
    "no_replica": "no replica was connected",
    "not_ready": "no replica was ready",
    "slots": "every row of the replica's batch was taken",
    "blocks": "the replica's KV cache had no room",
    "budget": "other requests had the tokens of the step",
    "prefix": "another request was computing the same prompt",
}


class ExplainFailed(Exception):
    """The text is for the person at the terminal."""


class Explainer:
    """Asks one server."""

    def __init__(self, url: str, token_file: str = "") -> None:
        """token_file: of the operator token, for a server on another machine. Raises SettingsError."""
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {}
        if token_file:
            secret = SecretFile(token_file)
            secret.check("--operator-token-file")
            self._headers["authorization"] = f"Bearer {secret.read().decode(errors='replace')}"

    def recent(self, limit: int = 20) -> dict[str, Any]:
        """Running requests and those that ended lately, newest first."""
        return self._get("/v1/requests", {"limit": str(limit)})

    def account(self, name: str, form: str = "json") -> dict[str, Any]:
        """form: json or chrome."""
        return self._get(f"/v1/requests/{quote(name, safe='')}", {"format": form})

    def _get(self, path: str, query: Mapping[str, str]) -> dict[str, Any]:
        try:
            response = httpx.get(self._url + path, params=query, headers=self._headers, timeout=TIMEOUT)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ExplainFailed(f"{self._url} does not answer: {error}; is `argosy serve` running?") from None
        if response.status_code != 200:
            raise ExplainFailed(error_of(response))
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ExplainFailed(f"{self._url} is no Argosy server: it answers with something else than JSON")
        return found


def run(explainer: Explainer, name: str | None, form: str, chrome: Path | None, console: Console) -> None:
    """Print one account, or the list without a name. Raises ExplainFailed."""
    if chrome is not None:
        if name is None:
            raise ExplainFailed("--chrome: name the request")
        try:
            chrome.write_text(json.dumps(explainer.account(name, "chrome")))
        except OSError as error:
            raise ExplainFailed(f"--chrome {chrome}: {error.strerror}") from None
        console.print(f"written to {chrome}: open it in chrome://tracing or ui.perfetto.dev", markup=False)
        return
    found = explainer.recent() if name is None else explainer.account(name)
    if form == "json":
        console.print_json(json.dumps(found))
    elif name is None:
        console.print(_list(found["data"]))
    else:
        _tell(found, console)


def _list(entries: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("id", "state", "arrived", "took", "first token", "longest gap", "tokens in, out", "replica"):
        table.add_column(title, justify="left" if title in ("id", "state", "replica") else "right", no_wrap=True)
    for entry in entries:
        state = entry["state"] + (f": {entry['error_code']}" if entry["error_code"] else "")
        arrived = time.strftime("%H:%M:%S", time.localtime(entry["arrived_at"]))
        times = (_time(entry[key]) for key in ("elapsed_s", "time_to_first_token_s", "longest_gap_s"))
        tokens = f"{entry['prompt_tokens']:,}, {entry['completion_tokens']:,}"
        cells = (entry["id"] or entry["request_id"], state, arrived, *times, tokens, entry["replica"])
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _tell(found: dict[str, Any], console: Console) -> None:
    summary = found["summary"]
    arrived = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["arrived_at"]))
    head = f"{found['id'] or found['request_id']}  {found['state']} after {_time(found['elapsed_s'])}"
    console.print(Text(printable(head), "bold"))
    kind = "streamed" if found["stream"] else "whole"
    cached = f", {found['cached_tokens']:,} of them cached" if found["cached_tokens"] else ""
    console.print(
        Text(
            printable(
                f"{found['endpoint']} of {found['model'] or 'no model'}, {kind}, n = {found['n']}; arrived {arrived}; "
                f"{found['prompt_tokens']:,} tokens in{cached}, {found['completion_tokens']:,} out"
            )
        )
    )
    if found["error"]:
        console.print(Text(printable(f"{found['error']['code']}: {found['error']['message']}"), "red"))
    parts = [
        f"{title} {_time(summary[key])}"
        for title, key in (("queue", "queue_s"), ("prefill", "prefill_s"), ("decode", "decode_s"))
        if key in summary
    ]
    if "time_to_first_token_s" in summary:
        parts.insert(0, f"first token after {_time(summary['time_to_first_token_s'])}")
    if "longest_gap_s" in summary:
        gaps = f"{summary['num_gaps']} long gap" + ("s" if summary["num_gaps"] > 1 else "")
        parts.append(f"{gaps}, the longest {_time(summary['longest_gap_s'])} ({found['longest_gap_cause']})")
    if parts:
        console.print(Text(printable("; ".join(parts))))
    console.print(_timeline(found))
    for choice in found["choices"]:
        if choice["num_events_left_out"]:
            console.print(f"choice {choice['index']}: {choice['num_events_left_out']} more events were not kept")


def _timeline(found: dict[str, Any]) -> Table:
    whole_s = max(found["elapsed_s"], 1e-9)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("at", justify="right", no_wrap=True)
    table.add_column("for", justify="right", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column(f"0 to {_time(whole_s)}", width=LINE, no_wrap=True)
    table.add_column("why", overflow="fold")
    lanes = [("", found["events"])] + [(f"choice {choice['index']}", choice["events"]) for choice in found["choices"]]
    for lane, events in lanes:
        if lane and len(lanes) > 2:
            table.add_row("", "", Text(lane, "bold"), "", "")
        for event in events:
            colour = _COLOURS.get(event["kind"], "default")
            table.add_row(
                _time(event["at_s"]),
                _time(event.get("for_s")),
                Text(printable(event["kind"]), colour),
                Text(_bar(event["at_s"], event.get("for_s"), whole_s), colour),
                Text(printable(_why(event))),
            )
    return table


def _bar(at_s: float, for_s: float | None, whole_s: float) -> str:
    """A moment is a dot, a stretch a bar of at least one cell."""
    begin = min(int(LINE * at_s / whole_s), LINE - 1)
    if for_s is None:
        return " " * begin + "·"
    return " " * begin + "━" * max(min(round(LINE * for_s / whole_s), LINE - begin), 1)


def _why(event: dict[str, Any]) -> str:
    kind = event["kind"]
    if kind == "gap":
        if "gaps" in event:
            several = f"{event['gaps']} gaps with a token between each, the longest {_time(event['longest_s'])}"
            return f"{event['cause']}: {several}: {event['detail']}"
        return f"{event['cause']}: {event['detail']}"
    if kind == "queued":
        why = _WHY.get(event["why"], event["why"])
        return f"{why}; {event['position']}. in the queue, {event['tokens_ahead']:,} tokens ahead"
    if kind == "waited":
        return str(_WHY.get(event["why"], event["why"]))
    if kind == "chunk":
        steps = f"{event['steps']} steps from {event['step']}" if "steps" in event else f"step {event['step']}"
        return f"{event['tokens']:,} tokens in {steps} of {event['rows']} rows, announced {_time(event['announced_s'])}"
    if kind == "decode":
        return f"{event['tokens']:,} tokens, steps {event['first_step']} to {event['last_step']}"
    if kind == "preempted":
        return f"the KV cache was full; {event['tokens']:,} tokens to be computed again"
    if kind == "lost":
        return f"{event['replica']}: {event['cause']}"
    return ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("kind", "at_s", "for_s"))


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
