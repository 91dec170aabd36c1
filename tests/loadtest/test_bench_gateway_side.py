"""The benchmarks of the gateway's side measure what they say, on runs of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from loadtest.bench import coldstart, gateway, queue
from tests.gateway.world import ASSETS
from tests.tiny import tiny_model_folder


def printed_lines(output: str) -> list[dict[str, Any]]:
    """The JSON lines that a benchmark printed under its table."""
    return [json.loads(row) for row in output.splitlines() if row.startswith("{")]


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    for name, data in ASSETS.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_gateway_reports_the_cost_of_tokens_that_arrived(assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--streams", "8", "24", "--seconds", "0.5", "--settle", "0.1", "--repeat", "1", "--rate", "50"]
    assert gateway.main([*run, "--replicas", "2", "--assets", str(assets)]) == 0
    few, many = printed_lines(capsys.readouterr().out)
    assert (few["bench"], many["bench"]) == ("gateway 8", "gateway 24")
    for line in few, many:
        assert line["unit"] == "us/token"
        assert 1.0 < line["limit"] < line["value"] < 5000  # a bare protocol costs something, the gateway more
        assert line["fraction"] == pytest.approx(line["limit"] / line["value"], abs=0.01)
        assert 0.3 < line["delivered"] < 1.5  # the pace of the replicas, as seen by the clients
        assert 0.0 < line["delay_p50_ms"] <= line["delay_p99_ms"] < 500


def test_gateway_says_what_is_wrong_instead_of_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = ASSETS | {"chat_template.jinja": b"{{ raise_exception('no chat') }}"}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    assert gateway.main(["--streams", "2", "--repeat", "1", "--assets", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "refused" in captured.err
    assert not printed_lines(captured.out)


def test_queue_reports_every_operation_and_the_step_at_every_depth(capsys: pytest.CaptureFixture[str]) -> None:
    assert queue.main(["--depths", "70", "2000", "--blocks", "20", "--steps", "30", "--repeat", "2"]) == 0
    lines = {line["bench"]: line for line in printed_lines(capsys.readouterr().out)}
    names = ["operation push", "operation pop", "operation discard", "operation expiry", "step median", "step mean"]
    assert list(lines) == [f"queue {name} at {depth}" for name in names for depth in (70, 2000)]
    for name in names:
        shallow, deep = lines[f"queue {name} at 70"], lines[f"queue {name} at 2000"]
        assert shallow["ratio"] == 1.0
        assert 0.0 < shallow["value"] < 10_000
        assert deep["ratio"] == pytest.approx(deep["value"] / shallow["value"], abs=0.01)
    # 256 tokens, eight ends and ten arrivals cannot cost less than one push
    assert lines["queue step median at 70"]["value"] > lines["queue operation push at 70"]["value"]


def test_queue_refuses_a_depth_below_its_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        queue.main(["--depths", "10"])
    assert "--depths 10" in capsys.readouterr().err


def test_coldstart_reports_phases_in_the_order_of_a_real_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model_folder(tmp_path / "tiny"))
    capsys.readouterr()
    assert coldstart.main(["--runtime", "local", "--model", model, "--repeat", "1", "--cold"]) == 0
    captured = capsys.readouterr()
    (line,) = printed_lines(captured.out)
    assert (line["bench"], line["shape"], line["fmt"]) == ("coldstart local", "tiny", "cold disk cache")
    phases = list(line["phases"])
    assert phases.index("local: import") < phases.index("replica 0: weights") < phases.index("gateway: first contact")
    assert sum(line["phases"].values()) + line["unreported_s"] >= 0.9 * line["value"]
    assert 0.0 < line["value"] < line["first_token_s"] < 60.0
    assert line["end_s"] < 10.0


def test_a_start_that_fails_is_told_and_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_model_folder(tmp_path / "tiny"))
    assert coldstart.main(["--runtime", "local", "--model", model, "--repeat", "1", "--timeout", "0.2"]) == 1
    assert "not ready in time" in capsys.readouterr().err
    # Other tests' shared Ray cluster may be among the children.
    left = [child for child in psutil.Process().children(recursive=True) if "serving." in " ".join(child.cmdline())]
    assert not left
    assert coldstart.main(["--runtime", "local", "--model", str(tmp_path / "none"), "--repeat", "1"]) == 1
    assert "none" in capsys.readouterr().err
