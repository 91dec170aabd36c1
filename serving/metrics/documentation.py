"""The table of all metrics, for docs/observability.md."""

from __future__ import annotations

from serving.metrics.catalogue import METRICS
from serving.metrics.description import Label

BEGIN, END = "<!-- metrics: begin, written by `argosy metrics docs` -->", "<!-- metrics: end -->"


def render() -> str:
    """Two Markdown tables: metrics, and their labels."""
    lines = ["| metric | kind | unit | labels | what it says | counted by |", "|---|---|---|---|---|---|"]
    labels: dict[str, Label] = {}
    for metric in METRICS:
        names = ", ".join(f"`{name}`" for name in metric.label_names)
        shown = metric.series[0] if metric.kind != "histogram" else metric.name
        lines.append(f"| `{shown}` | {metric.kind} | {metric.unit} | {names} | {metric.help} | {metric.source} |")
        for label in metric.labels:
            known = labels.setdefault(label.name, label)
            if known != label:
                labels[f"{label.name} of {shown}"] = label
    lines += ["", "| label | values at most | what it says |", "|---|---|---|"]
    for name, label in labels.items():
        values = f": {', '.join(label.values)}" if 0 < len(label.values) <= 8 else ""
        lines.append(f"| `{name}` | {label.bound} | {label.help}{values} |")
    return "\n".join(lines) + "\n"


def insert(page: str) -> str:
    """The page with its tables renewed. Raises ValueError when it has no place for them."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"the page needs {BEGIN!r} and then {END!r}, once each")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{render()}{END}{rest.partition(END)[2]}"
