"""YAML that is the same bytes every time and reads well in a review."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Final

import yaml

HEADING: Final = "# Rendered from a spec by `python -m k8s.render`; do not edit.\n"
_FIRST: Final = ("apiVersion", "kind", "metadata", "name", "namespace")


class _Dumper(yaml.SafeDumper):
    """No anchors, lists indented, long texts as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        del indentless
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _ordered(value: Any) -> Any:
    """Keys sorted, those that name an object first."""
    if isinstance(value, dict):
        first = [key for key in _FIRST if key in value]
        return {key: _ordered(value[key]) for key in (*first, *sorted(set(value) - set(first)))}
    return [_ordered(item) for item in value] if isinstance(value, list | tuple) else value


def dump(document: Any) -> str:
    """One document, without heading."""
    return yaml.dump(_ordered(document), Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True)


def documents(objects: Iterable[Any]) -> str:
    """A file of several objects, with its heading."""
    return HEADING + "---\n".join(dump(document) for document in objects)


def content_hash(value: Any) -> str:
    """Eight hex digits of a value's content, for names that change with it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
