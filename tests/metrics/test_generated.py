"""Rules, dashboard and documentation: they name only what exists, and the committed files are what is rendered."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from serving import cli
from serving.metrics import command, dashboard, documentation, rules
from serving.metrics.catalogue import METRICS
from serving.metrics.promql import PromqlError, check, series_labels
from serving.metrics.rules import Objective, ObjectiveError

ROOT = Path(__file__).parent.parent.parent
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")


def test_the_committed_files_are_what_is_rendered() -> None:
    objective = Objective()
    assert (ROOT / command.RULES_FILE).read_text() == command.rules_text(objective)
    assert (ROOT / command.DASHBOARD_FILE).read_text() == command.dashboard_text(objective)
    page = (ROOT / command.DOCS_FILE).read_text()
    assert documentation.insert(page) == page, "run `argosy metrics write`"


def test_the_documentation_names_every_alert_and_metric() -> None:
    page = (ROOT / command.DOCS_FILE).read_text()
    assert all(f"`{metric.series[0]}`" in page or f"`{metric.name}`" in page for metric in METRICS)
    for alert in rules.alerts(Objective()):
        assert alert.name in page or alert.name.endswith(("BudgetFast", "BudgetSlow"))


@pytest.mark.parametrize(
    ("expression", "metrics"),
    [
        ("rate(argosy_prompt_tokens_total[5m])", {"argosy_prompt_tokens_total"}),
        (
            'histogram_quantile(0.9, sum by (le) (rate(argosy_queue_seconds_bucket{model_name=~"a.*"}[1m])))',
            {"argosy_queue_seconds_bucket"},
        ),
        (
            "max by (replica) (argosy_replica_kv_blocks_used / argosy_replica_kv_blocks) > bool 0.5",
            {"argosy_replica_kv_blocks_used", "argosy_replica_kv_blocks"},
        ),
        (
            'sum(rate(argosy_errors_total{code="argosy_not_a_metric"}[5m] offset 1h)) or vector(0)',
            {"argosy_errors_total"},
        ),
    ],
)
def test_expressions_are_read(expression: str, metrics: set[str]) -> None:
    assert check(expression, series_labels()) == metrics


@pytest.mark.parametrize(
    "expression",
    [
        "rate(argosy_prompt_tokens[5m])",  # the family, not the series
        "argosy_requests_runing",
        'argosy_requests_running{modle_name="m"}',
        "sum by (tenant) (argosy_requests_running)",
        "sum by (le) (argosy_requests_running)",
        "argosy_requests_running > argosy_limit",
        "vector(1)",
        "argosy_requests_running ; 1",
    ],
)
def test_what_does_not_exist_is_refused(expression: str) -> None:
    with pytest.raises(PromqlError):
        check(expression, series_labels())


def test_an_objective_between_two_buckets_is_refused_by_name() -> None:
    with pytest.raises(ObjectiveError, match=r"ttft: 1\.7 s .* choose of 0\.005"):
        Objective(ttft_s=1.7)
    with pytest.raises(ObjectiveError, match=r"target: 1 is outside"):
        Objective(target=1.0)
    tight = command.rules_text(Objective(ttft_s=0.3, inter_token_s=0.04, target=0.999))
    assert 'le="0.3"' in tight and 'le="0.04"' in tight and "14.4 * 0.001" in tight


def test_the_command_prints_what_is_committed_and_refuses_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def argosy(*arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(cli.app, ["metrics", *arguments])
        return done.exit_code, done.stdout, done.stderr

    assert argosy("rules") == (0, (ROOT / command.RULES_FILE).read_text(), "")
    for arguments, words in ((("panels",), "no 'panels'"), (("rules", "--ttft", "1.7"), "1.7 s is not the bound")):
        code, _, complaint = argosy(*arguments)
        assert code == 2 and words in complaint
    monkeypatch.chdir(tmp_path)
    code, _, complaint = argosy("write")
    assert code == 2 and "no checkout" in complaint
    assert not list(tmp_path.iterdir())


def test_the_dashboard_is_laid_out_without_gaps_or_overlaps() -> None:
    document: dict[str, Any] = json.loads(command.dashboard_text(Objective()))
    panels = document["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
        assert place["x"] + place["w"] <= dashboard.WIDTH
        for target in panel.get("targets", ()):
            check(target["expr"], rules.known_series(Objective()))
        references = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(references)) == len(references)


def test_a_panel_of_a_metric_that_does_not_exist_cannot_be_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dashboard.Panel("x", "s", "x", (dashboard.Query("argosy_gone_total", ""),))
    monkeypatch.setattr(dashboard, "rows", lambda objective: {"x": (wrong,)})
    with pytest.raises(PromqlError, match="there is no metric argosy_gone_total"):
        dashboard.render(Objective())


@needs_promtool
def test_promtool_accepts_the_rules_and_every_panel(tmp_path: Path) -> None:
    """Panels have no check of their own: each expression is given as a rule."""
    panels = json.loads((ROOT / command.DASHBOARD_FILE).read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    shown = [{"record": f"panel:{at}", "expr": text.replace("$model", ".*")} for at, text in enumerate(expressions)]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": shown}]}))
    for file in (ROOT / command.RULES_FILE, tmp_path / "panels.yaml"):
        done = subprocess.run([PROMTOOL or "", "check", "rules", file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


SLOW_BURN = {  # a tenth is late: ten times the budget, enough for six hours and too little for the page
    'argosy_time_to_first_token_seconds_bucket{model_name="m",le="2.0"}': "0+9x90",
    'argosy_time_to_first_token_seconds_count{model_name="m"}': "0+10x90",
    'argosy_inter_token_seconds_bucket{model_name="m",le="0.15"}': "0+8x90",
    'argosy_inter_token_seconds_count{model_name="m"}': "0+10x90",
    'argosy_responses_total{route="/v1/chat/completions",status="200"}': "0+8x90",
    'argosy_responses_total{route="/v1/chat/completions",status="503"}': "0+2x90",
}
ALERT_CASES: list[tuple[dict[str, bool], dict[str, str], str]] = [
    (
        {
            "ArgosyFirstTokenBudgetSlow": True,
            "ArgosyFirstTokenBudgetFast": False,
            "ArgosyInterTokenBudgetSlow": True,
            "ArgosyInterTokenBudgetFast": True,
            "ArgosyErrorsBudgetSlow": True,
        },
        SLOW_BURN,
        "70m",
    ),
    (
        {"ArgosyFirstTokenBudgetFast": True},
        {
            'argosy_time_to_first_token_seconds_bucket{model_name="m",le="2.0"}': "0+8x90",
            'argosy_time_to_first_token_seconds_count{model_name="m"}': "0+10x90",
        },
        "70m",
    ),
    (
        {"ArgosyFirstTokenBudgetFast": False},
        {
            'argosy_time_to_first_token_seconds_bucket{model_name="m",le="2.0"}': "0+99x90",
            'argosy_time_to_first_token_seconds_count{model_name="m"}': "0+100x90",
        },
        "70m",
    ),
    (
        {"ArgosyErrorsBudgetFast": True},
        {
            'argosy_responses_total{route="/v1/completions",status="200"}': "0+10x90",
            'argosy_broken_replies_total{model_name="m",code="engine_error"}': "0+5x90",
        },
        "70m",
    ),
    (  # refusals that are the client's doing cost nothing
        {"ArgosyErrorsBudgetFast": False},
        {
            'argosy_responses_total{route="/v1/completions",status="200"}': "0+10x90",
            'argosy_responses_total{route="/v1/completions",status="400"}': "0+90x90",
        },
        "70m",
    ),
    ({"ArgosyNoReplica": True}, {'argosy_replicas{state="ready"}': "1 0x20"}, "10m"),
    ({"ArgosyReplicaStalled": True}, {'argosy_faults_total{kind="replica_stalled"}': "0x5 1x20"}, "8m"),
    ({"ArgosyReplicaStalled": False}, {'argosy_faults_total{kind="replica_lost"}': "0x5 1x20"}, "8m"),
    (
        {"ArgosyReplicaRestarts": True},
        {'argosy_faults_total{kind="replica_lost",instance="a"}': "0+1x40"},
        "30m",
    ),
    ({"ArgosyRankSilent": True}, {'argosy_rank_age_seconds{replica="r",rank="1"}': "9x20"}, "10m"),
    (
        {"ArgosyKvPressure": True},
        {
            'argosy_replica_kv_blocks_used{replica="r"}': "39x30",
            'argosy_replica_kv_blocks{replica="r"}': "40x30",
            'argosy_replica_preemptions_total{replica="r"}': "0+60x30",
        },
        "20m",
    ),
    (  # full and content
        {"ArgosyKvPressure": False},
        {
            'argosy_replica_kv_blocks_used{replica="r"}': "39x30",
            'argosy_replica_kv_blocks{replica="r"}': "40x30",
            'argosy_replica_preemptions_total{replica="r"}': "7x30",
        },
        "20m",
    ),
    ({"ArgosyQueueGrows": True}, {'argosy_queue_choices{model_name="m"}': "0+30x30"}, "20m"),
    ({"ArgosyQueueGrows": False}, {'argosy_queue_choices{model_name="m"}': "50x30"}, "20m"),
    ({"ArgosySheds": True}, {'argosy_sheds_total{reason="saturated"}': "0+60x30"}, "20m"),
    (
        {"ArgosyGatewayLags": True},
        {
            'argosy_loop_lag_seconds_bucket{instance="a",le="0.25"}': "0+90x30",
            'argosy_loop_lag_seconds_bucket{instance="a",le="0.5"}': "0+100x30",
            'argosy_loop_lag_seconds_bucket{instance="a",le="+Inf"}': "0+100x30",
        },
        "20m",
    ),
]


@needs_promtool
def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path: Path) -> None:
    """Each case in a Prometheus of its own inside promtool: which alerts fire at a moment of made-up series."""
    known = {alert.name for alert in rules.alerts(Objective())}
    assert {name for expected, _, _ in ALERT_CASES for name, fires in expected.items() if fires} == known
    document = yaml.safe_load((ROOT / command.RULES_FILE).read_text())
    document["groups"][0]["interval"] = "1m"  # as the series
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(document))
    cases = []
    for expected, series, moment in ALERT_CASES:
        asked = []
        for name, fires in expected.items():
            # The text of an alert holds its value: what fires is asked of Prometheus' own series of alerts.
            text = f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) > bool 0'
            asked.append({"expr": text, "eval_time": moment, "exp_samples": [{"labels": "{}", "value": 1}] * fires})
        given = [{"series": key, "values": values} for key, values in series.items()]
        cases.append({"interval": "1m", "name": str(expected), "input_series": given, "promql_expr_test": asked})
    document = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": cases,
    }
    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump(document))
    done = subprocess.run([PROMTOOL or "", "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
