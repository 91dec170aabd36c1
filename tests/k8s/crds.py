"""Custom resources against the schemas that their operators publish: strictly, and with their CEL rules."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
from cel_expr_python import cel

from tests.k8s.manifests import CRDS, Object


@functools.cache
def schema_of(api_version: str, kind: str) -> dict[str, Any] | None:
    """The OpenAPI schema of a kind; None when the folder does not have it."""
    group, _, version = api_version.rpartition("/")
    path = CRDS / f"{kind}.{group}.{version}.json"
    return json.loads(path.read_text(encoding="utf-8"))["schema"] if path.is_file() else None


def complaints(thing: Object) -> Iterator[str]:
    """What is wrong with a custom resource: fields that do not exist, values that do not fit, rules that fail."""
    schema = schema_of(thing["apiVersion"], thing["kind"])
    assert schema is not None, f"no schema of {thing['kind']}"
    for error in _validator(thing["apiVersion"], thing["kind"]).iter_errors(thing):
        yield f"{error.json_path}: {error.message[:300]}"
    yield from _rule_failures(schema, thing, "")


@functools.cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    schema = schema_of(api_version, kind)
    assert schema is not None
    strict = _strict(schema)
    strict["properties"] |= {"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": METADATA}
    return jsonschema.Draft202012Validator(strict)


METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def _strict(schema: Any) -> Any:
    """A Kubernetes schema in JSON Schema's words: unknown fields are errors unless the schema keeps them."""
    if not isinstance(schema, dict):
        return schema
    made = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if "properties" in schema:
        made["properties"] = {key: _strict(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            made["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if key in made:
            made[key] = _strict(made[key])
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
        made.pop("anyOf", None)
        if "pattern" in made:  # which is of the string alone
            made["anyOf"] = [{"type": "integer"}, {"type": "string", "pattern": made.pop("pattern")}]
    made.pop("format", None)
    return made


# --- CEL ----------------------------------------------------------------------------------------


@functools.cache
def _program(rule: str) -> Any:
    return _environment().compile(rule)


@functools.cache
def _environment() -> Any:
    return cel.NewEnv(variables={"self": cel.Type.DYN})


def _rule_failures(schema: dict[str, Any], value: Any, path: str) -> Iterator[str]:
    """Rules over one state. Those over two (`oldSelf`) speak of changes, and here nothing changes."""
    for entry in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in entry["rule"] and not holds(entry["rule"], value):
            yield f"{path or '$'}: {entry.get('message', entry['rule'])}"
    if isinstance(value, dict):
        for key, part in value.items():
            inner = schema.get("properties", {}).get(key) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                yield from _rule_failures(inner, part, f"{path}.{key}")
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for i, part in enumerate(value):
            yield from _rule_failures(schema["items"], part, f"{path}[{i}]")


def holds(rule: str, value: Any) -> bool:
    """Whether a CEL rule is true of `self`."""
    return bool(_program(rule).eval(data={"self": value}).value())


# --- devices ------------------------------------------------------------------------------------


@functools.cache
def _devices() -> Any:
    """CEL with Kubernetes' quantities, here whole numbers."""
    whole, text = cel.Type.INT, cel.Type.STRING
    quantity = cel.Overload("quantity_of_text", whole, [text], False, int)
    compare = cel.Overload("compare_quantities", whole, [whole, whole], True, lambda a, b: (a > b) - (a < b))
    functions = [cel.FunctionDecl("quantity", [quantity]), cel.FunctionDecl("compareTo", [compare])]
    return cel.NewEnv(variables={"device": cel.Type.DYN}, functions=functions)


def selects_device(expression: str, device: Object) -> bool:
    """Whether a device selector is true of a device. Raises ValueError for what would end an allocation."""
    found = _devices().compile(expression).eval(data={"device": device}).value()
    if not isinstance(found, bool):
        raise ValueError(f"{expression}: {found}")
    return found
