"""Models from the hub: a small hub of our own answers on loopback, the real client asks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.store.manifest import MANIFEST
from tests.models.store.world import write_folder, write_vocabulary

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PULL = """
import sys
from pathlib import Path
from models.store import StoreError, pull
steps = []
try:
    print(pull(sys.argv[1], store=Path(sys.argv[2]), progress=lambda *step: steps.append(step)))
except StoreError as error:
    sys.exit(f"refused: {error}")
finally:
    print(max((done for phase, done, total in steps if phase == "download"), default=0))
"""


class Hub:
    """One repository `owner/name` at one commit, over the few paths of the hub's API that a download needs."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, with_body: bool) -> None:
                path = self.path.partition("?")[0]
                hub.asked.append(path)
                names = sorted(entry.name for entry in folder.iterdir())
                status, body, headers = 404, b"", {"X-Error-Code": "RepoNotFound"}
                if path.startswith("/api/models/owner/name/tree/"):
                    entries = [
                        {"type": "file", "path": name, "oid": "0" * 40, "size": (folder / name).stat().st_size}
                        for name in names
                    ]
                    status, body, headers = 200, json.dumps(entries).encode(), {}
                elif path.startswith("/api/models/owner/name"):
                    info = {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                    status, body, headers = 200, json.dumps(info).encode(), {}
                elif path.startswith("/owner/name/resolve/") and path.rpartition("/")[2] in names:
                    body = (folder / path.rpartition("/")[2]).read_bytes()
                    status, headers = 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = write_folder(tmp_path / "published")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "modeling.py").write_text("boom")
    server = Hub(folder)
    yield server
    server.close()


def start(tmp_path: Path, reference: str, endpoint: str, *, offline: bool = False) -> tuple[int, str]:
    """(exit code, output) of a pull by a fresh process with a hub cache of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
        "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PULL, reference, tmp_path / "store"],
        capture_output=True, text=True, timeout=120, env=environment, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_hub_id_is_fetched_without_pickles_and_code_and_then_found_offline(tmp_path: Path, hub: Hub) -> None:
    code, output = start(tmp_path, "owner/name", hub.url)
    assert code == 0, output
    folder = tmp_path / "store" / "owner--name"
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors", MANIFEST}
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert int(output.split()[-1]) >= (folder / "model.safetensors").stat().st_size  # bytes were reported
    assert not any(path.endswith((".bin", ".py")) for path in hub.asked)

    num_asked = len(hub.asked)
    assert start(tmp_path, "owner/name", hub.url)[0] == 0
    assert len(hub.asked) == num_asked  # the store has it: nobody is asked

    (folder / "config.json").write_text("{}")
    code, output = start(tmp_path, "owner/name", "http://127.0.0.1:9", offline=True)
    assert code == 0, output  # damaged, and made again from the hub's cache
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_the_commit_is_pinned_in_the_manifest(tmp_path: Path, hub: Hub) -> None:
    assert start(tmp_path, "owner/name@main", hub.url)[0] == 0
    manifest = json.loads((tmp_path / "store" / "owner--name--main" / MANIFEST).read_text())
    assert manifest["source"] == f"hub:owner/name@{COMMIT}"


def test_a_sharded_model_without_a_tokenizer_json_is_fetched_and_converted(tmp_path: Path, hub: Hub) -> None:
    published = shard(tmp_path / "published")
    (published / "tokenizer.json").unlink()
    write_vocabulary(published)
    code, output = start(tmp_path, "owner/name", hub.url)
    assert code == 0, output
    folder = tmp_path / "store" / "owner--name"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", MANIFEST, "model.safetensors.index.json",
        "weights-1.safetensors", "weights-2.safetensors",
    }  # fmt: skip
    assert any(path.endswith("vocab.json") for path in hub.asked)


def test_a_model_that_brings_code_is_refused_before_its_weights_are_fetched(tmp_path: Path, hub: Hub) -> None:
    config = {"model_type": "llama", "auto_map": {"AutoModel": "modeling.Evil"}}
    (tmp_path / "published" / "config.json").write_text(json.dumps(config))
    code, output = start(tmp_path, "owner/name", hub.url)
    assert code == 1
    assert "asks for code of its own ('auto_map')" in output
    assert not any(path.endswith(".safetensors") for path in hub.asked)
    assert not (tmp_path / "store" / "owner--name").exists()


def test_a_model_of_pickles_alone_is_refused(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "published" / "model.safetensors").unlink()
    code, output = start(tmp_path, "owner/name", hub.url)
    assert code == 1
    assert "there is neither model.safetensors nor model.safetensors.index.json" in output


def test_an_index_cannot_ask_for_files_elsewhere(tmp_path: Path, hub: Hub) -> None:
    index = json.dumps({"weight_map": {"a": "../../../etc/x.safetensors"}})
    (tmp_path / "published" / "model.safetensors.index.json").write_text(index)
    code, output = start(tmp_path, "owner/name", hub.url)
    assert code == 1
    assert "not a safetensors file beside it" in output


def test_a_vocabulary_that_nobody_needs_is_not_fetched(tmp_path: Path, hub: Hub) -> None:
    write_vocabulary(tmp_path / "published")
    assert start(tmp_path, "owner/name", hub.url)[0] == 0
    assert not any(path.endswith(("vocab.json", "merges.txt")) for path in hub.asked)


def shard(folder: Path) -> Path:
    """Cut the folder's two tensors into two files."""
    (folder / "model.safetensors").unlink()
    names = {"a": "weights-1.safetensors", "b": "weights-2.safetensors"}
    for tensor, name in names.items():
        save_file({tensor: torch.zeros(2)}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_a_damaged_copy_in_the_hubs_cache_is_found(tmp_path: Path, hub: Hub) -> None:
    assert start(tmp_path, "owner/name", hub.url)[0] == 0
    weights = tmp_path / "store" / "owner--name" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)  # the store and the cache share this file
    (weights.parent / MANIFEST).unlink()
    weights.parent.rename(tmp_path / "store" / "aside")

    code, output = start(tmp_path, "owner/name", hub.url)
    assert code == 1
    assert "refused: model.safetensors: the copy in the hub's cache is damaged" in output


def test_what_the_hub_does_not_have_is_said(tmp_path: Path, hub: Hub) -> None:
    code, output = start(tmp_path, "owner/other", hub.url)
    assert code == 1
    assert "refused: owner/other: the hub has no such model" in output


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_hub_the_message_names_the_cache(tmp_path: Path, offline: bool) -> None:
    code, output = start(tmp_path, "owner/name", "http://127.0.0.1:9", offline=offline)
    assert code == 1
    assert "refused: owner/name: the hub cannot be reached and its cache" in output
    assert str(tmp_path / "hf" / "hub") in output
    assert not (tmp_path / "store" / "owner--name").exists()
