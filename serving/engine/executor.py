"""Where steps are computed (C5): the loop may submit step n + 1 before it has read step n."""

from __future__ import annotations

from typing import Protocol

from serving.engine.plan import Plan
from serving.engine.runner import StepResult
from serving.engine.worker import Worker


class StepHandle(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what the step raised."""
        ...


class Executor(Protocol):
    """Runs plans in the order of submission."""

    def submit(self, plan: Plan) -> StepHandle: ...


class Computed:
    """A step that is over."""

    def __init__(self, value: StepResult) -> None:
        self._value = value

    def result(self) -> StepResult:
        return self._value


class LocalExecutor:
    """One rank in the caller's thread: on CPU there is nothing to overlap with."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def submit(self, plan: Plan) -> Computed:
        return Computed(self._worker.run(plan.encode()))
