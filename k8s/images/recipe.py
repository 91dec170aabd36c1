"""A Dockerfile's recipe followed without a container engine: the same steps, the same file tree.

Knows the instructions that our Dockerfiles use and refuses others. A stage's root is an overlay over this machine's own
file system, which stands in for the base image: that base is the one thing not tested. Needs root and overlayfs.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final

DEVICES: Final = ("/dev", "/proc")
BUILD_S: Final = 900


class RecipeError(Exception):
    """A step that failed, or an instruction that this does not know."""


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """One instruction, its continued lines joined."""

    line: int
    name: str
    text: str


def parse(text: str) -> list[Step]:
    """The instructions of a Dockerfile."""
    steps: list[Step] = []
    joined, first = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not joined and (not line.strip() or line.lstrip().startswith("#")):
            continue
        first = first if joined else number
        joined += line.removesuffix("\\")
        if not line.endswith("\\"):
            name, _, rest = joined.strip().partition(" ")
            steps.append(Step(first, name.upper(), rest.strip()))
            joined = ""
    return steps


@dataclasses.dataclass(slots=True)
class Stage:
    """A root, and what the image says of its processes."""

    root: Path
    args: dict[str, str]
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = dataclasses.field(default_factory=list)
    command: list[str] = dataclasses.field(default_factory=list)

    def expanded(self, text: str) -> str:
        """With ${NAME} and $NAME replaced."""
        known = self.args | self.env
        return re.sub(r"\$\{?(\w+)\}?", lambda match: known.get(match.group(1), ""), text)

    def run(self, script: str, *, timeout_s: float = BUILD_S) -> None:
        """A shell's line in the root, as its user. Raises RecipeError with the end of its output."""
        command = [
            "chroot",
            f"--userspec={self.user}",
            str(self.root),
            "/bin/sh",
            "-c",
            f"cd {self.workdir} && {script}",
        ]
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **self.args, **self.env}
        environment = {name: value for name, value in environment.items() if value}
        ran = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s
        )
        if ran.returncode:
            raise RecipeError(f"RUN {script}: exit code {ran.returncode}\n{ran.stdout[-3000:]}")


class Recipe:
    """One Dockerfile. Call within a mount namespace of its own: mounts are left to its end."""

    def __init__(self, dockerfile: Path, context: Path, scratch: Path, args: dict[str, str]) -> None:
        """scratch: an empty folder on a file system that can hold an overlay's upper layer."""
        self._steps = parse(dockerfile.read_text(encoding="utf-8"))
        self._context = context
        self._scratch = scratch
        self._given = args
        self._ignored = [
            line for line in _text_of(context / ".dockerignore").splitlines() if line and not line.startswith("#")
        ]

    def build(self) -> Stage:
        """The last stage. Raises RecipeError."""
        stages: dict[str, Stage] = {}
        stage: Stage | None = None
        for step in self._steps:
            if step.name == "FROM":
                name = step.text.partition(" AS ")[2] or str(len(stages))
                root = self._empty(name) if step.text.split()[0] == "scratch" else self._base_image(name)
                stages[name] = stage = Stage(root, args={})
            elif stage is None:
                if step.name != "ARG":
                    raise RecipeError(f"line {step.line}: {step.name} before FROM")
            else:
                self._follow(step, stage, stages)
        if stage is None:
            raise RecipeError("no FROM")
        return stage

    def _empty(self, name: str) -> Path:
        root = self._scratch / f"{name}-root"
        root.mkdir(parents=True)
        return root

    def _base_image(self, name: str) -> Path:
        """This machine's root under an overlay, without the folders in which projects and secrets lie."""
        root, upper, work = (self._scratch / f"{name}-{part}" for part in ("root", "upper", "work"))
        for folder in (root, upper, work):
            folder.mkdir(parents=True)
        mount("-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={upper},workdir={work}", str(root))
        for device in DEVICES:
            mount("--rbind", device, str(root / device.strip("/")))
        hidden = {Path("/root"), Path("/home"), Path("/" + self._context.resolve().parts[1])}
        for folder in hidden - {Path("/opt"), Path("/usr"), Path("/etc")}:
            if (root / str(folder).strip("/")).is_dir():
                mount("-t", "tmpfs", "tmpfs", str(root / str(folder).strip("/")))
        return root

    def _follow(self, step: Step, stage: Stage, stages: dict[str, Stage]) -> None:
        match step.name:
            case "ARG":
                name, _, default = step.text.partition("=")
                stage.args[name] = self._given.get(name, default)
            case "ENV":
                for word in shlex.split(stage.expanded(step.text)):
                    name, _, value = word.partition("=")
                    stage.env[name] = value
            case "WORKDIR":
                stage.workdir = step.text
                _inside(stage, step.text).mkdir(parents=True, exist_ok=True)
            case "USER":
                stage.user = step.text
            case "COPY":
                self._copy(step, stage, stages)
            case "RUN":
                stage.run(step.text)
            case "ENTRYPOINT":
                stage.entrypoint = json.loads(step.text)
            case "CMD":
                stage.command = json.loads(step.text)
            case "EXPOSE":
                pass
            case _:
                raise RecipeError(f"line {step.line}: {step.name} is not known here")

    def _copy(self, step: Step, stage: Stage, stages: dict[str, Stage]) -> None:
        words = stage.expanded(step.text).split()
        source_root = self._context
        if words[0].startswith("--from="):
            source_root = stages[words.pop(0).removeprefix("--from=")].root
        *sources, target = words
        for source in sources:
            found = source_root / source.strip("/")
            if not found.exists():
                raise RecipeError(f"line {step.line}: COPY {source}: there is no such file")
            into = _inside(stage, target)
            if target.endswith("/") or len(sources) > 1:
                into /= found.name
            is_ours = source_root == self._context
            if found.is_dir():
                ignore = self._leave_out if is_ours else None
                shutil.copytree(found, into, symlinks=True, dirs_exist_ok=True, ignore=ignore)
            elif is_ours and self.is_ignored(Path(source)):
                raise RecipeError(f"line {step.line}: COPY {source}: .dockerignore leaves it out")
            else:
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, into)

    def _leave_out(self, folder: str, names: list[str]) -> set[str]:
        inside = Path(folder).relative_to(self._context)
        return {n for n in names if not (Path(folder) / n).is_dir() and self.is_ignored(inside / n)} | (
            {"__pycache__"} & set(names)
        )

    def is_ignored(self, path: Path) -> bool:
        """By .dockerignore: the last pattern that matches a file or one of its folders decides."""
        ignored = False
        for line in self._ignored:
            pattern = line.removeprefix("!")
            if any(_matches(pattern, str(part)) for part in (path, *path.parents) if str(part) != "."):
                ignored = not line.startswith("!")
        return ignored


def _text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _matches(pattern: str, path: str) -> bool:
    """Docker's patterns: ** is any number of folders, * stays within one."""
    expression = ""
    for part in re.split(r"(\*\*/?|\*|\?)", pattern):
        expression += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
    return re.fullmatch(expression, path) is not None


def _inside(stage: Stage, path: str) -> Path:
    absolute = path if path.startswith("/") else f"{stage.workdir}/{path}"
    return stage.root / absolute.strip("/")


def mount(*arguments: str) -> None:
    """Raises RecipeError."""
    ran = subprocess.run(["mount", *arguments], capture_output=True, text=True, timeout=30)
    if ran.returncode:
        raise RecipeError(f"mount {' '.join(arguments)}: {ran.stderr.strip()}")
