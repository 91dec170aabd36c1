"""Which metrics and labels a PromQL expression names: whatever is rendered is checked against the catalogue.

Not a parser: tokens alone tell names from functions, selectors and groupings. `promtool` checks the grammar.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from serving.metrics.catalogue import METRICS

TARGET_LABELS = frozenset({"job", "instance", "namespace", "pod", "alertstate", "alertname"})
"""Added by Prometheus, not by us."""

_TOKEN = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\])*")|(?P<range>\[[^]]*])|(?P<number>\d[\w.]*)|(?P<name>[a-zA-Z_:$][\w:]*)"""
    r"""|(?P<sign>=~|!~|!=|==|<=|>=|[-+*/%^<>=(){},@])|(?P<space>\s+)"""
)
_GROUPING = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})
_WORDS = frozenset({"and", "or", "unless", "bool", "offset", "inf", "nan"})


class PromqlError(ValueError):
    """An expression names something that does not exist."""


def series_labels() -> dict[str, frozenset[str]]:
    """The labels of every series that /metrics may show, by its stored name."""
    return {
        name: frozenset(metric.label_names) | ({"le"} if name.endswith("_bucket") else set())
        for metric in METRICS
        for name in metric.series
    }


def check(expression: str, known: Mapping[str, Collection[str]]) -> set[str]:
    """Metric names in the expression. known: labels by metric name.

    Raises PromqlError for a metric that is not known, for a label that none of its metrics has, and for none at all.
    """
    tokens = list(_tokens(expression))
    metrics: set[str] = set()
    grouped: set[str] = set()
    current = ""
    at = 0
    while at < len(tokens):
        kind, text = tokens[at]
        following = tokens[at + 1][1] if at + 1 < len(tokens) else ""
        if text == "{":
            end = tokens.index(("sign", "}"), at)
            names = {name for (token, name) in tokens[at:end] if token == "name"}
            _refuse(expression, names - set(known[current]) - TARGET_LABELS, f"{current} has no label")
            at = end
        elif text in _GROUPING:
            end = tokens.index(("sign", ")"), at)
            grouped |= {name for (token, name) in tokens[at + 1 : end] if token == "name"}
            at = end
        elif kind == "name" and following != "(" and text not in _WORDS and following not in _GROUPING:
            _refuse(expression, {text} - set(known), "there is no metric")
            current = text
            metrics.add(text)
        at += 1
    if not metrics:
        raise PromqlError(f"{expression!r} names no metric")
    labels = set().union(*(known[metric] for metric in metrics))
    _refuse(expression, grouped - labels - TARGET_LABELS, "its metrics have no label")
    return metrics


def _tokens(expression: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(expression):
        found = _TOKEN.match(expression, at)
        if found is None or found.lastgroup is None:
            raise PromqlError(f"{expression!r} at {at}: not PromQL")
        if found.lastgroup != "space":
            yield found.lastgroup, found.group()
        at = found.end()


def _refuse(expression: str, names: set[str], why: str) -> None:
    if names:
        raise PromqlError(f"{why} {', '.join(sorted(names))}: {expression}")
