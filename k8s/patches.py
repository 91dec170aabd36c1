"""How one set of objects becomes another, in the two words that kustomize knows: JSON patches and deletions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

from k8s.objects import Object

Key = tuple[str, str, str]
"""(apiVersion, kind, name): within one deployment nothing else tells objects apart."""
Operation = dict[str, Any]
"""{op: add | replace | remove, path, value}: RFC 6902."""


def key_of(thing: Object) -> Key:
    return thing["apiVersion"], thing["kind"], thing["metadata"]["name"]


def keyed(objects: Iterable[Object]) -> dict[Key, Object]:
    """Raises ValueError when two objects have one name."""
    found: dict[Key, Object] = {}
    for thing in objects:
        if key_of(thing) in found:
            raise ValueError(f"two objects are {' '.join(key_of(thing))}")
        found[key_of(thing)] = thing
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Change:
    """What turns one set of objects into another."""

    added: dict[Key, Object]
    removed: tuple[Key, ...]
    patched: dict[Key, list[Operation]]

    def apply(self, objects: dict[Key, Object]) -> dict[Key, Object]:
        """The changed set; `objects` stay as they are."""
        found = {key: copy.deepcopy(thing) for key, thing in objects.items() if key not in self.removed}
        for key, operations in self.patched.items():
            for operation in operations:
                _apply(found[key], operation)
        return found | copy.deepcopy(self.added)


def change(before: dict[Key, Object], after: dict[Key, Object]) -> Change:
    patched = {key: difference(before[key], after[key]) for key in before if key in after}
    return Change(
        added={key: after[key] for key in after if key not in before},
        removed=tuple(key for key in before if key not in after),
        patched={key: operations for key, operations in patched.items() if operations},
    )


def fitting(thing: Object, operations: Iterable[Operation]) -> list[Operation]:
    """Those of the operations that can be made on an object, one after another."""
    copied, found = copy.deepcopy(thing), []
    for operation in operations:
        try:
            _apply(copied, operation)
        except (KeyError, IndexError):
            continue
        found.append(operation)
    return found


def difference(before: Any, after: Any, path: str = "") -> list[Operation]:
    """Operations that turn `before` into `after`. Lists are compared item by item where they tell the same things."""
    if before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        found: list[Operation] = []
        for name in sorted(before.keys() | after.keys()):
            where = f"{path}/{name.replace('~', '~0').replace('/', '~1')}"
            if name not in after:
                found.append({"op": "remove", "path": where})
            elif name not in before:
                found.append({"op": "add", "path": where, "value": after[name]})
            else:
                found += difference(before[name], after[name], where)
        return found
    if isinstance(before, list) and isinstance(after, list) and _are_aligned(before, after):
        pairs = enumerate(zip(before, after, strict=False))
        found = [step for i, pair in pairs for step in difference(*pair, f"{path}/{i}")]
        found += [{"op": "remove", "path": f"{path}/{i}"} for i in reversed(range(len(after), len(before)))]
        more = range(len(before), len(after))
        return found + [{"op": "add", "path": f"{path}/{i}", "value": after[i]} for i in more]
    return [{"op": "replace", "path": path, "value": after}]


def _are_aligned(before: list[Any], after: list[Any]) -> bool:
    """Whether items at one place belong together: lists of one length, or named items of which one list has more."""
    if len(before) == len(after):
        return True
    return all(_name(a) is not None and _name(a) == _name(b) for a, b in zip(before, after, strict=False))


def _name(item: Any) -> Any:
    """What tells an item of a list from the others of its kind."""
    return item.get("name", item.get("groupName")) if isinstance(item, dict) else None


def _apply(thing: Any, operation: Operation) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    for part in parents:
        thing = thing[int(part)] if isinstance(thing, list) else thing[part]
    where = int(last) if isinstance(thing, list) else last
    if operation["op"] == "replace":
        thing[where]  # must be there: KeyError, IndexError
    if operation["op"] == "remove":
        del thing[where]
    elif operation["op"] == "add" and isinstance(thing, list):
        thing.insert(int(where), copy.deepcopy(operation["value"]))
    else:
        thing[where] = copy.deepcopy(operation["value"])
