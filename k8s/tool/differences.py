"""What differs between an object as it is and as it should be, field by field, for people and for decisions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Final

import yaml

from k8s.objects import Object
from k8s.tool.quantities import number

SERVE_CONFIG: Final = "serveConfigV2"

_SERVERS_OWN: Final = (
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
)
_NAMES: Final = ("name", "key", "groupName", "type", "containerPort", "port", "ip", "mountPath", "topologyKey")
"""Fields that tell items of a list apart, the first that all of them have."""

ABSENT: Final = "-"
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """One field. before, after: values; ABSENT where there is none."""

    path: Path
    before: Any
    after: Any

    @property
    def field(self) -> str:
        return ".".join(self.path)


def differences(before: Object | None, after: Object, *, is_partial: bool) -> list[Difference]:
    """Fields of `after` that are otherwise, or absent, in `before`.

    is_partial: `after` holds only what we set, so that a field of `before` alone is somebody else's and stays;
    otherwise it is a removal. What the server writes itself (status, versions) does not count.
    """
    if before is None:
        return [Difference((), ABSENT, ABSENT)]
    return list(_compare(_compared(before), _compared(after), (), is_partial))


def removals(previous: Object, after: Object, live: Object) -> list[Difference]:
    """Fields that we set once, set no more, and that are still there: an apply takes them away."""
    lost = [found for found in differences(previous, after, is_partial=False) if found.after == ABSENT]
    kept = {found.path for found in differences(live, previous, is_partial=True)}
    return [found for found in lost if found.path not in kept]


def shown(value: Any) -> str:
    """One line, cut where it is long."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    text = text.removesuffix("...").strip().replace("\n", " ")
    return text if len(text) <= 100 else text[:97] + "..."


def _compared(thing: Object) -> Object:
    kept = {key: value for key, value in thing.items() if key not in ("status", "apiVersion", "kind")}
    metadata = {key: value for key, value in (thing.get("metadata") or {}).items() if key not in _SERVERS_OWN}
    kept["metadata"] = metadata
    spec = kept.get("spec")
    if isinstance(spec, dict) and isinstance(spec.get(SERVE_CONFIG), str):
        # A text to Kubernetes, a document to people and to Ray.
        with contextlib.suppress(yaml.YAMLError):
            kept["spec"] = {**spec, SERVE_CONFIG: yaml.safe_load(spec[SERVE_CONFIG])}
    return kept


def _compare(before: Any, after: Any, path: Path, is_partial: bool) -> Iterator[Difference]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*after, *(() if is_partial else before)}, key=str):
            step = (*path, str(key))
            if key not in before:
                if not _is_empty(after[key]):
                    yield Difference(step, ABSENT, after[key])
            elif key not in after:
                if not _is_empty(before[key]):
                    yield Difference(step, before[key], ABSENT)
            else:
                # Serve's config is one text to Kubernetes: whoever sets it sets all of it.
                yield from _compare(before[key], after[key], step, is_partial and key != SERVE_CONFIG)
    elif isinstance(before, list) and isinstance(after, list):
        yield from _compare_lists(before, after, path, is_partial)
    elif not _is_same(before, after):
        yield Difference(path, before, after)


def _compare_lists(before: list[Any], after: list[Any], path: Path, is_partial: bool) -> Iterator[Difference]:
    name = _naming_field([*before, *after])
    if name is None:
        if len(before) != len(after):
            yield Difference(path, before, after)
            return
        for i, pair in enumerate(zip(before, after, strict=True)):
            yield from _compare(*pair, (*path, str(i)), is_partial)
        return
    olds = {item[name]: item for item in before}
    news = {item[name]: item for item in after}
    order = [key for key in news if key in olds]
    if order != [key for key in olds if key in news]:  # means nothing to most readers, and all to a hash
        yield Difference((*path, "order"), [key for key in olds if key in news], order)
    for key in [*news, *(key for key in olds if key not in news)]:
        step = (*path, str(key))
        if key not in news:
            if not is_partial:
                yield Difference(step, olds[key], ABSENT)
        elif key not in olds:
            yield Difference(step, ABSENT, news[key])
        else:
            yield from _compare(olds[key], news[key], step, is_partial)


def _naming_field(items: list[Any]) -> str | None:
    if not items or not all(isinstance(item, dict) for item in items):
        return None
    return next((name for name in _NAMES if all(isinstance(item.get(name), str | int) for item in items)), None)


def _is_same(before: Any, after: Any) -> bool:
    """ "1000m" is 1, and "2048Mi" is "2Gi": a server may write a quantity otherwise. It never turns powers of two into
    powers of ten, and a hash of the text tells them apart (apimachinery, resource.Quantity: Format is kept)."""
    if before == after:
        return isinstance(before, bool) == isinstance(after, bool)
    if isinstance(before, bool) or isinstance(after, bool):
        return False
    if isinstance(before, str | int | float) and isinstance(after, str | int | float):
        left, right = number(before), number(after)
        return left is not None and left == right and _is_binary(before) == _is_binary(after)
    return False


def _is_binary(value: str | int | float) -> bool:
    return isinstance(value, str) and value.endswith("i")


def _is_empty(value: Any) -> bool:
    """What a server may leave out, or fill in, without a meaning."""
    return value is None or value in ({}, [], "")
