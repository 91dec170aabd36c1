"""What `argosy serve` shows of a start."""

from __future__ import annotations

import pytest

from serving.terminal import Terminal


def shown_by(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> str:
    terminal.close()
    return capsys.readouterr().err


def test_the_weights_line_says_bytes_and_rate(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal("m")
    terminal.loading("replica 0", 3_100_000_000, 8_000_000_000, 1.3)
    terminal.loading("replica 0", 8_000_000_000, 8_000_000_000, 3.2)
    terminal.loading("replica 1", 269_000_000, 269_000_000, 0.2)
    terminal.phase("replica 0", "weights", 3.3)
    terminal.phase("replica 1", "weights", 0.21)
    terminal.phase("replica 0", "kv cache", 0.1)
    assert shown_by(terminal, capsys).splitlines() == [
        "replica 0: weights 3.30 s (8.0 GB, 2.5 GB/s)",
        "replica 1: weights 0.21 s (269.0 MB, 1.3 GB/s)",
        "replica 0: kv cache 0.10 s",
    ]


def test_a_terminal_shows_how_far_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal("m")
    terminal.loading("replica 0", 3_100_000_000, 8_000_000_000, 1.3)
    assert terminal._progress is not None
    terminal._progress.refresh()
    terminal.phase("replica 0", "weights", 3.3)
    shown = shown_by(terminal, capsys)
    assert "3.1 of 8.0 GB, 2.4 GB/s" in shown
