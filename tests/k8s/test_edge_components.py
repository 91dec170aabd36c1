"""The components at a deployment's edge against the programs that read them, where an invariant cannot tell."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import crds
from tests.k8s.invariants_of_edge import ROUTE, rules
from tests.k8s.invariants_of_keda import SCALED, trigger
from tests.k8s.manifests import manifests
from tests.k8s.optional import OPTIONAL
from tests.k8s.paths_of_the_app import endpoints
from tests.k8s.test_schemas import needs_crds

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)"
)


# --- gateway-api --------------------------------------------------------------------------------


def test_the_application_tells_who_may_ask_what() -> None:
    """What routes are held against is not empty, and knows operators by their refusal."""
    public = {(endpoint.method, endpoint.template) for endpoint in endpoints() if endpoint.is_public}
    hidden = {endpoint.template for endpoint in endpoints() if not endpoint.is_public}
    assert ("POST", "/v1/chat/completions") in public and ("GET", "/v1/models/{model:path}") in public
    assert {"/v1/requests", "/v1/requests/{name}", "/console/state", "/metrics", "/progressz", "/readyz"} <= hidden


@needs_crds
@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"retry": {"attempts": 1}}, "retry"),  # of the experimental channel: the standard one drops it silently
        ({"timeouts": {"request": "10s", "backendRequest": "20s"}}, "cannot be longer"),
        ({"timeouts": {"request": "0"}}, "does not match"),
        ({"matches": [{"path": {"type": "Exact", "value": "v1/models"}}]}, "absolute path"),
    ],
)
def test_the_gateway_api_refuses(rule: dict[str, Any], words: str) -> None:
    route = copy.deepcopy(manifests("edge-all").objects[ROUTE])
    assert not list(crds.complaints(route))
    route["spec"]["rules"][0].update(rule)
    assert any(words in text for text in crds.complaints(route))


def test_a_generation_has_no_deadline_and_a_question_has_one() -> None:
    """A proxy that waits for ever for a list of models holds connections to a dead gateway."""
    generate, read = rules(manifests("edge-route"))
    assert generate["timeouts"]["request"] == "0s"
    assert read["timeouts"]["request"] == "30s"


# --- autoscale-keda -----------------------------------------------------------------------------


@needs_promtool
@pytest.mark.parametrize("edge", [edge for edge in OPTIONAL if SCALED in manifests(edge).objects])
def test_prometheus_counts_what_keda_asks_for(edge: str, tmp_path: Path) -> None:
    """Running and waiting streams of two gateways; none of another deployment, of workers, or of a namesake's."""
    m = manifests(edge)
    name = m.one("Deployment", "gateway")["metadata"]["name"]
    series = [
        _series("argosy_requests_running", m.spec.namespace, f"{name}-7c9d8b6f5d-x2x9q", 150),
        _series("argosy_requests_waiting", m.spec.namespace, f"{name}-7c9d8b6f5d-x2x9q", 20),
        _series("argosy_requests_running", m.spec.namespace, f"{name}-5d7c9d8b6f-abcde", 7),
        _series("argosy_requests_waiting", m.spec.namespace, f"{name}-5d7c9d8b6f-abcde", 0),
        _series("argosy_requests_running", "elsewhere", f"{name}-7c9d8b6f5d-x2x9q", 1000),
        _series("argosy_requests_running", m.spec.namespace, f"{name}-lab-7c9d8b6f5d-x2x9q", 10_000),
        _series("argosy_connections", m.spec.namespace, f"{name}-7c9d8b6f5d-x2x9q", 100_000),
    ]
    asked = {"expr": trigger(m, "prometheus")["metadata"]["query"], "eval_time": "1m"}
    tests = {
        "rule_files": [],
        "tests": [
            {
                "interval": "15s",
                "input_series": series,
                "promql_expr_test": [asked | {"exp_samples": [{"labels": "{}", "value": 177}]}],
            },
            {"interval": "15s", "input_series": series[-3:], "promql_expr_test": [asked | {"exp_samples": []}]},
        ],
    }
    file = tmp_path / "tests.yaml"
    file.write_text(yaml.safe_dump(tests))
    ran = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def _series(metric: str, namespace: str, pod: str, value: int) -> dict[str, str]:
    text = f'{metric}{{namespace="{namespace}",pod="{pod}",model_name="m"}}'
    return {"series": text, "values": f"{value}x20"}


def test_a_deployment_that_nothing_scaled_is_left_to_keda() -> None:
    """The base says one gateway; with the component nobody but KEDA may write the number."""
    m = manifests("edge-keda")
    assert "replicas" in manifests("dev-cpu").one("Deployment", "gateway")["spec"]
    assert "replicas" not in m.one("Deployment", "gateway")["spec"]
    assert not m.of_kind("HorizontalPodAutoscaler")
