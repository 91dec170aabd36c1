"""The table of checks: a name, how bad a finding is, what the check reads, and what mends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from k8s.tool import exits
from k8s.tool.doctor.facts import Facts

ERROR: Final = "error"
WARNING: Final = "warning"
OK: Final = "ok"
UNKNOWN: Final = "not known"

Look = Callable[[Facts], Iterable[str]]


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """reads: names of facts without which nothing can be said."""

    name: str
    severity: str
    fix: str
    reads: tuple[str, ...]
    look: Look


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """outcome: ok, warning, error or not known. texts: the findings, or what is needed to know."""

    check: Check
    outcome: str
    texts: tuple[str, ...] = ()


class NotKnown(Exception):
    """What a check raises when what it read cannot tell. Its text says why."""


class Table:
    """Checks in the order in which they were written down."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def check(self, name: str, severity: str, fix: str, *reads: str) -> Callable[[Look], Look]:
        """Decorates a function from facts to findings, one line each."""

        def add(look: Look) -> Look:
            if any(check.name == name for check in self.checks):
                raise ValueError(f"two checks are {name}")
            self.checks.append(Check(name, severity, fix, reads, look))
            return look

        return add


def examine(checks: Iterable[Check], facts: Facts) -> Iterator[Result]:
    """Every check once; one that stumbles over an object it did not expect says so, and the others go on."""
    for check in checks:
        missing = [facts.unknown[name] for name in check.reads if name in facts.unknown]
        if missing:
            yield Result(check, UNKNOWN, tuple(dict.fromkeys(missing)))
            continue
        try:
            texts = tuple(check.look(facts))
        except NotKnown as why:
            yield Result(check, UNKNOWN, (str(why),))
            continue
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            yield Result(check, UNKNOWN, (f"an object of another shape: {error!r}",))
            continue
        yield Result(check, check.severity if texts else OK, texts)


def exit_code(results: Iterable[Result]) -> int:
    """0: nothing found, 2: warnings, 3: errors. What is not known counts for nothing."""
    outcomes = {result.outcome for result in results}
    return exits.REFUSED if ERROR in outcomes else exits.CHANGES if WARNING in outcomes else exits.DONE


def as_json(results: Iterable[Result]) -> dict[str, Any]:
    found = list(results)
    return {
        "exit_code": exit_code(found),
        "checks": [
            {
                "name": result.check.name,
                "outcome": result.outcome,
                "texts": list(result.texts),
                "fix": result.check.fix if result.outcome in (ERROR, WARNING) else "",
            }
            for result in found
        ],
    }
