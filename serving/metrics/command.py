"""`argosy metrics rules | dashboard | docs | write`: what is made from the catalogue, printed or in its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from serving.metrics import dashboard, documentation, rules
from serving.metrics.rules import Objective

HEADING = "# Written by `argosy metrics rules`; do not edit. Prometheus loads it as it is.\n"

RULES_FILE = "k8s/base/monitoring/argosy.rules.yaml"
DASHBOARD_FILE = "k8s/base/monitoring/dashboards/argosy.json"
DOCS_FILE = "docs/observability.md"
"""Where the repository keeps what the default objective makes; a test holds them equal."""


def rules_text(objective: Objective) -> str:
    import yaml

    return HEADING + yaml.safe_dump(rules.render(objective), sort_keys=False, width=1000)


def dashboard_text(objective: Objective) -> str:
    return json.dumps(dashboard.render(objective), indent=1) + "\n"


def docs_text(objective: Objective) -> str:
    return documentation.render()


KINDS: dict[str, Callable[[Objective], str]] = {"rules": rules_text, "dashboard": dashboard_text, "docs": docs_text}


def write_all(root: Path) -> None:
    """Renew the repository's own files. Raises OSError, or ValueError when the page of documentation has no place."""
    objective = Objective()
    page = root / DOCS_FILE
    documented = documentation.insert(page.read_text(encoding="utf-8"))
    for name, text in ((RULES_FILE, rules_text(objective)), (DASHBOARD_FILE, dashboard_text(objective))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    page.write_text(documented, encoding="utf-8")
