"""The command line: refusals are fast and say what to do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.stand_in import eventually


def argosy(*arguments: str, timeout_s: float = 30.0, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ARGOSY_")}
    return subprocess.run(
        [sys.executable, "-m", "serving.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=clean | {"NO_COLOR": "1", "COLUMNS": "200", **environ},
    )


@pytest.mark.parametrize("command", [[], ["serve"], ["pull"], ["chat"]])
def test_help_is_there(command: list[str]) -> None:
    done = argosy(*command, "--help")
    assert done.returncode == 0 and "Usage" in done.stdout


def test_every_flag_that_scripts_rely_on_is_there() -> None:
    text = argosy("serve", "--help").stdout
    fixed = """model served-model-name host port runtime replicas gateways tensor-parallel-size pipeline-parallel-size
        dtype quantization collectives weight-cache device max-model-len max-num-seqs max-num-batched-tokens
        kv-cache-bytes seed config print-config"""
    for flag in fixed.split():
        assert f"--{flag} " in text, flag


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "eighty"], "--port: expected a whole number"),
        (["serve", "--gateways", "2"], "--gateways: several gateway processes (2) comes with a later release"),
        (["serve", "--prot", "80"], "No such option: --prot"),
        (["serve", "--device", "cuda"], "--device cuda: no NVIDIA device"),
        (["serve", "--config", "/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["serve", "--host", "203.0.113.7", "--port", "0"], "--host 203.0.113.7"),
        (["bench", "no-such-bench"], "no benchmark 'no-such-bench'"),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_slow(arguments: list[str], message: str) -> None:
    begun = time.monotonic()
    done = argosy(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begun < 5.0


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = argosy("serve", "--port", str(port))
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1 is taken" in done.stderr and "--port" in done.stderr


def test_a_model_that_is_nowhere_is_refused_with_its_name(tmp_path: Path) -> None:
    done = argosy("serve", "--port", "0", "--runtime", "local", "--model", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert "nothing" in done.stderr and "Traceback" not in done.stderr


def test_an_unsupported_architecture_is_refused_before_a_replica_tries(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["Mamba"]}')
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    done = argosy("serve", "--port", "0", "--runtime", "local", "--model", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "mamba" in done.stderr and "Traceback" not in done.stderr


def test_print_config_shows_what_was_asked_and_what_was_found() -> None:
    done = argosy("serve", "--print-config", "--port", "1234", ARGOSY_MAX_NUM_SEQS="5")
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["asked"]["port"] == 1234 and shown["asked"]["max_num_seqs"] == 5
    assert shown["found"]["cores"] >= 1 and shown["found"]["memory_available_bytes"] > 0


def test_chat_without_a_server_says_how_to_start_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    done = argosy("chat", "--url", f"http://127.0.0.1:{port}")
    assert done.returncode == 1
    assert "argosy serve" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_while_starting_stops_cleanly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.cli", "serve", "--port", "0", "--runtime", "local"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"ARGOSY_STORE": str(tmp_path)},
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    eventually(lambda: len(children.read_text().split()) >= 2)
    pids = [int(pid) for pid in children.read_text().split()]
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - begun < 5.0
    assert process.returncode == 0, errors
    eventually(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()], 3.0)


def test_a_load_generator_without_its_extra_says_what_to_install() -> None:
    """After `make serve` alone there is no locust: this was a traceback."""
    code = "import sys; sys.modules['gevent'] = None; sys.argv = ['argosy', 'loadtest', '--rate', '5']"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; from serving.cli import main; main()"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: gevent is not installed") and "argosy[loadtest]" in done.stderr
    assert "Traceback" not in done.stderr
