"""Who may import whom, and what may stand where: section 2 of the design, read from the syntax trees.

Each rule is a function from one source file to complaints; `test_every_rule_bites` shows for each of them a
line that it refuses, so that a rule which never fires cannot pass for a kept one.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("serving", "models", "k8s", "loadtest")
MAX_LINES = 400

LEAVES = tuple(
    f"serving.{name}"
    for name in (
        *("types", "errors", "metrics", "wire", "block_hash"),
        *("config", "control", "demand", "logs", "parsing", "secret_file"),
    )
)

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LEAVES, LEAVES),
    "models": ("models",),
    "serving": ("serving", "models"),  # cli, supervisor, the runtimes: wiring
    "serving.gateway": ("serving.gateway", *LEAVES),
    "serving.engine": ("serving.engine", "serving.planning.roofline", "models", *LEAVES),
    "serving.deployments": ("serving.deployments", "serving.engine", *LEAVES),
    "serving.planning": ("serving.planning", "models", *LEAVES),
    "serving.sim": ("serving.sim", "serving.engine", "serving.gateway", "serving.deployments.autoscaling", *LEAVES),
    "k8s": ("k8s",),
    "loadtest": ("loadtest",),
    "loadtest.bench": ("loadtest", "serving", "models"),
}
"""Package -> which of our own packages it may import. The longest name that fits a module decides."""

ONLY_IN: dict[str, tuple[str, ...]] = {
    "ray": ("serving.deployments",),
    "torch": ("models", "serving.engine", "loadtest.bench"),
    "fastapi": ("serving.gateway",),
    "starlette": ("serving.gateway", "serving.deployments"),
    "uvicorn": ("serving.gateway",),
    "kubernetes": ("k8s",),
    "opentelemetry": ("serving.gateway.tracing",),
}
"""Distribution -> the only packages that import it."""

WITHOUT_TORCH = (
    "serving.gateway",
    *LEAVES,
    *(f"serving.engine.{name}" for name in ("request", "blocks", "scheduler", "plan")),
)
"""Modules that neither import torch nor anything of ours that does."""

WITHOUT_RAY = tuple(f"serving.deployments.{name}" for name in ("autoscaling", "rates", "serve_policy"))
"""The policy: it runs in simulated time as well."""

TORCH_CUDA = ("models.platform", "serving.engine.graphs", "models.ops.triton")
PICKLES = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
FORBIDDEN_WORDS = ("Manager", "Helper", "Util", "Base", "Impl")


@dataclasses.dataclass(frozen=True)
class Source:
    """One Python file of ours."""

    module: str
    text: str
    is_package: bool = False

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @functools.cached_property
    def imports(self) -> list[tuple[int, str]]:
        """(line, dotted name) of everything imported anywhere; `from a import b` is a.b."""
        found: list[tuple[int, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        return found


def is_within(name: str, packages: str | tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the packages or lies inside one."""
    packages = (packages,) if isinstance(packages, str) else packages
    return any(name == package or name.startswith(package + ".") for package in packages)


@functools.cache
def our_sources() -> dict[str, Source]:
    """Module name -> source, of the four packages."""
    sources = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            sources[module] = Source(module, path.read_text(encoding="utf-8"), is_package)
    return sources


# --- rules: one file -> complaints -----------------------------------------------------------

Rule = Callable[[Source], Iterator[str]]


def imports_only_what_it_may(source: Source) -> Iterator[str]:
    package = max((name for name in MAY_IMPORT if is_within(source.module, name)), key=len)
    for line, name in source.imports:
        if is_within(name, PACKAGES) and not is_within(name, MAY_IMPORT[package]):
            yield f"line {line}: {package} must not import {name}"


def keeps_distributions_where_they_belong(source: Source) -> Iterator[str]:
    for line, name in source.imports:
        distribution = name.partition(".")[0]
        if distribution in ONLY_IN and not is_within(source.module, ONLY_IN[distribution]):
            yield f"line {line}: {distribution} is for {', '.join(ONLY_IN[distribution])}"
        if distribution == "ray" and is_within(source.module, WITHOUT_RAY):
            yield f"line {line}: {source.module} imports no ray"


def imports_absolutely(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"line {node.lineno}: relative import"


def leaves_the_environment_to_config(source: Source) -> Iterator[str]:
    if source.module == "serving.config":
        return
    names = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "os":
            yield f"line {node.lineno}: os.{node.attr} is for serving/config.py"
    for line, name in source.imports:
        if name in {f"os.{attribute}" for attribute in names}:
            yield f"line {line}: {name} is for serving/config.py"


def has_no_global_statement(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: global {', '.join(node.names)}"


def unpickles_nothing(source: Source) -> Iterator[str]:
    for line, name in source.imports:
        if is_within(name, PICKLES):
            yield f"line {line}: {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            yield f"line {node.lineno}: {ast.unparse(node)} pickles"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield f"line {node.value.lineno}: allow_pickle"


def leaves_cuda_to_the_platform(source: Source) -> Iterator[str]:
    if source.module.startswith(TORCH_CUDA):  # triton_attention.py as well as triton/
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr == "cuda" and ast.unparse(node.value) == "torch":
            yield f"line {node.lineno}: torch.cuda is for {', '.join(TORCH_CUDA)}"
    for line, name in source.imports:
        if is_within(name, "torch.cuda"):
            yield f"line {line}: {name} is for {', '.join(TORCH_CUDA)}"


def says_what_things_are(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ClassDef):
            yield from (f"line {node.lineno}: class {node.name}" for word in FORBIDDEN_WORDS if word in node.name)
    last = source.module.rpartition(".")[2]
    if any(word.lower() in last.split("_") for word in (*FORBIDDEN_WORDS, "utils", "helpers")):
        yield f"a file named {last}"


RULES: dict[Rule, tuple[str, ...]] = {
    imports_only_what_it_may: (
        "serving.gateway.app: from serving.engine.core import Engine",
        "serving.gateway.app: from serving import supervisor",
        "serving.gateway.text.stop: import models.config",
        "serving.engine.core: from serving.gateway import streams",
        "serving.engine.core: import serving.deployments.replica",
        "serving.deployments.replica: import models.registry",
        "serving.planning.plan: from loadtest.bench import decode",
        "serving.types: from serving.engine import request",
        "serving.config: from serving import supervisor",
        "models.batch: from serving.types import SamplingParams",
        "loadtest.users: import serving.wire",
        "k8s.render: def f():\n    from serving import config",
    ),
    keeps_distributions_where_they_belong: (
        "serving.engine.core: import ray",
        "serving.gateway.app: def f():\n    from ray import serve",
        "serving.deployments.autoscaling: import ray",
        "serving.engine.core: from fastapi import FastAPI",
        "models.config: import starlette.requests",
        "serving.types: import torch",
        "serving.gateway.queue: if True:\n    import torch.nn",
        "k8s.render: import torch",
        "loadtest.users: import ray",
        "serving.gateway.server: def f():\n    import opentelemetry.sdk.trace",
    ),
    imports_absolutely: ("models.batch: from . import config", "models.ops.cpu: from ..batch import Batch"),
    leaves_the_environment_to_config: (
        "serving.cli: import os\nos.environ['A']",
        "models.config: import os\nos.getenv('A')",
        "serving.engine.core: from os import environ",
    ),
    has_no_global_statement: ("models.config: def f():\n    global x\n    x = 1",),
    unpickles_nothing: (
        "serving.deployments.replica: import pickle",
        "models.checkpoint: from cloudpickle import loads",
        "models.checkpoint: import torch\ntorch.load('x')",
        "models.checkpoint: import numpy as np\nnp.load('x', allow_pickle=True)",
    ),
    leaves_cuda_to_the_platform: (
        "models.layers.linear: import torch\ntorch.cuda.synchronize()",
        "serving.engine.core: from torch import cuda",
        "serving.engine.core: import torch.cuda",
    ),
    says_what_things_are: (
        "serving.engine.core: class RequestManager: pass",
        "serving.engine.core: class ExecutorBase: pass",
        "serving.engine.utils: ",
        "models.load_helper: ",
    ),
}
"""Rule -> lines that it must refuse, as `module: source`."""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_is_kept(rule: Rule) -> None:
    complaints = [f"{source.module}: {text}" for source in our_sources().values() for text in rule(source)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_bites(rule: Rule) -> None:
    for example in RULES[rule]:
        module, _, text = example.partition(": ")
        assert list(rule(Source(module, text))), example


def test_what_the_rules_allow() -> None:
    for example in (
        "serving.gateway.app: from fastapi import FastAPI\nfrom serving import wire\nimport serving.types",
        "serving.engine.runner: import torch\nfrom models.batch import Batch",
        "serving.deployments.replica: from ray import serve\nfrom serving.engine.server import ReplicaServer",
        "models.ops.triton_attention: import torch\ntorch.cuda.synchronize()",
        "loadtest.bench.decode: import torch\nfrom serving.engine.core import StepLoop\nfrom models import registry",
        "serving.config: import os\nos.environ['A']",
        "models.cpu_reuse: def f():\n    x = 1\n    def g():\n        nonlocal x\n",
    ):
        module, _, text = example.partition(": ")
        assert [complaint for rule in RULES for complaint in rule(Source(module, text))] == []


# --- the graph -------------------------------------------------------------------------------


def our_imports(source: Source) -> set[str]:
    """Modules of ours that `source` imports, and the packages whose __init__ runs with them."""
    sources = our_sources()
    found = set()
    for _, name in source.imports:
        while name and name not in sources:
            name = name.rpartition(".")[0]
        while name:
            found.add(name)
            name = name.rpartition(".")[0]
    return found - {source.module}


def test_scheduling_and_the_gateway_reach_no_torch_by_any_path() -> None:
    sources = our_sources()
    for start in sources:
        if not is_within(start, WITHOUT_TORCH):
            continue
        reached, frontier = {start}, [start]
        while frontier:
            source = sources[frontier.pop()]
            assert not any(is_within(name, ("torch", "ray")) for _, name in source.imports), (start, source.module)
            new = our_imports(source) - reached
            reached |= new
            frontier += new


def test_no_module_imports_itself_through_others() -> None:
    """Imports go one way: repeatedly removing modules that import none of those left removes all of them."""
    left = {
        name: {other for other in our_imports(source) if not is_within(name, other)}
        for name, source in our_sources().items()
    }
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    on_cycles = {name: sorted(imported & left.keys()) for name, imported in left.items()}
    assert not on_cycles


# --- files -----------------------------------------------------------------------------------


def test_files_are_short() -> None:
    paths = [path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*")]
    lengths = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n")
        for path in paths
        if path.suffix in (".py", ".h", ".cpp", ".cu")
    }
    assert len(lengths) > 50
    assert not {name: length for name, length in lengths.items() if length >= MAX_LINES}


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py")}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()]


# --- a fresh interpreter ---------------------------------------------------------------------


def modules_loaded_by(package: str) -> set[str]:
    """Top-level modules in a fresh interpreter after importing every module of `package`."""
    names = [name for name in our_sources() if is_within(name, package)]
    assert names
    program = "\n".join(f"import {name}" for name in names) + "\nimport sys; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return {name.partition(".")[0] for name in ran.stdout.split()}


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("serving.gateway", {"torch", "ray", "models"}),
        ("serving.engine", {"ray", "fastapi", "starlette", "uvicorn"}),
        ("serving.engine.scheduler", {"torch", "ray"}),
        ("models", {"serving", "ray", "fastapi"}),
    ],
)
def test_importing_a_package_loads_nothing_that_it_may_not(package: str, absent: set[str]) -> None:
    loaded = modules_loaded_by(package)
    assert package.partition(".")[0] in loaded
    assert not loaded & absent
