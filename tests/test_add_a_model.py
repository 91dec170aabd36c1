"""docs/add-a-model.md is followed to the letter: its blocks are put where it says and run."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from models import registry
from models.ops.kernels import Kernels
from models.ops.reference import ReferenceKernels
from tests.models.paged import inference_on_one_thread

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "add-a-model.md").read_text()


def blocks() -> dict[str, str]:
    """Code by the path in its first line; blocks of one path follow on one another."""
    files: dict[str, str] = {}
    for path, code in re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL):
        files[path] = f"{files[path]}\n{code}" if path in files else code
    return files


def written(folder: Path, path: str, code: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The block as a module that others can import, as if it lay in the tree."""
    file = folder / Path(path).name
    file.write_text(code)
    name = path.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tests_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Steps 1 to 3 done; the module of step 4."""
    (architecture, source), (place, lines), (test, checks) = blocks().items()
    module = written(tmp_path, architecture, source, monkeypatch)
    assert place == "models/registry.py"
    importing, entry = lines.strip().split("\n\n")
    model_type, decoder = entry.strip().removesuffix(",").replace('"', "").split(": ")
    assert architecture == f"models/architectures/{model_type}.py"
    assert importing == f"from models.architectures.{model_type} import {decoder}"
    monkeypatch.setitem(registry.ARCHITECTURES, model_type, getattr(module, decoder))
    with inference_on_one_thread():
        yield written(tmp_path, test, checks, monkeypatch)


@pytest.mark.parametrize("kind", [ReferenceKernels.name, "auto"])
def test_the_four_steps(kind: str, tests_of_the_page: ModuleType, tmp_path: Path) -> None:
    page = tests_of_the_page
    kernels: Kernels = registry.select_kernels(page.torch.device("cpu"), page.torch.float32, kind)
    for variant in page.VARIANTS:
        page.test_parity(variant, kernels, tmp_path / variant)
    if kind == "auto":
        for backend, dtype in page.BACKENDS:
            _unless_skipped(page.test_bits_do_not_depend_on_the_batch, backend, dtype, tmp_path / "bits")
        page.test_ranks_and_stages(tmp_path / "ranks")
        page.test_wrong_fields()


def test_every_test_of_the_page_is_run(tests_of_the_page: ModuleType) -> None:
    run = {"test_parity", "test_bits_do_not_depend_on_the_batch", "test_ranks_and_stages", "test_wrong_fields"}
    assert {name for name in vars(tests_of_the_page) if name.startswith("test_")} == run


def test_what_the_page_names_exists() -> None:
    made = set(blocks())
    paths = set(re.findall(r"(?:models|tests)/[\w/]+\.py", PAGE)) | {
        f"models/architectures/{name}" for name in re.findall(r"`(\w+\.py)`", PAGE)
    }
    assert {path for path in paths - made if not (ROOT / path).exists()} == set()
    assert not any((ROOT / path).exists() for path in made - {"models/registry.py"})  # or there is nothing to add


def test_every_architecture_has_its_file_and_its_tests() -> None:
    for model_type, decoder in registry.ARCHITECTURES.items():
        assert decoder.__module__ == f"models.architectures.{model_type}"
        folder = ROOT / "tests" / "models" / ("" if model_type == "llama" else "architectures")
        assert (folder / f"test_{model_type}.py").exists()


def _unless_skipped(test: Callable[..., None], *arguments: object) -> None:
    """A backend that this machine lacks must not hide the others."""
    try:
        test(*arguments)
    except pytest.skip.Exception:
        return
