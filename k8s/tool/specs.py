"""What a command is about: a spec from a file or an overlay, or the deployment of a name and a namespace."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from k8s import deployment, render
from k8s.objects import Object
from k8s.spec import ServingSpec, SpecError, read_spec
from k8s.tool.exits import ToolError


def find_spec(text: str) -> ServingSpec:
    """Of a YAML file, or of an overlay by its name. Raises ToolError with the names that there are."""
    path = Path(text)
    try:
        if path.suffix in (".yaml", ".yml") or path.is_file():
            return read_spec(path)
        if path.is_dir():
            return read_spec(path / render.SPEC_FILE)
        names = render.overlay_names()
        if text not in names:
            raise ToolError(f"SPEC: {text!r} is neither a YAML file nor an overlay; {_known(text, names)}")
        return render.overlay_spec(text)
    except SpecError as error:
        raise ToolError(str(error)) from None


def _known(text: str, names: list[str]) -> str:
    """What there is instead of an overlay that there is not. names: of overlays."""
    if not names:
        return "this installation brings no overlays: name a spec's YAML file, or run in a checkout"
    if Path(text).name in names:  # as a path in a checkout, from elsewhere
        return f"{Path(text).name} is one by its name alone"
    folder = render.ROOT / "overlays"
    return f"there are {', '.join(names)}. One of your own: copy {folder}/NAME/{render.SPEC_FILE}, and name the file"


def objects_of(spec: ServingSpec) -> list[Object]:
    """Everything that stands on the cluster. Raises ToolError when the spec's numbers do not fit each other."""
    try:
        return list(deployment.objects(spec).values())
    except SpecError as error:
        raise ToolError(str(error)) from None


def place_holders(spec: ServingSpec) -> str:
    """Why nothing can be started with a spec whose images nobody has named; "" = they are named."""
    keys = {image: key for key, image in dataclasses.asdict(spec.images).items()}
    named = [f"images.{keys[image]} ({image.partition('@')[0]})" for image in spec.placeholder_images]
    if not named:
        return ""
    verb = "is a place holder" if len(named) == 1 else "are place holders"
    return f"{', '.join(named)} {verb}: build and push the images, and name their digests in the spec"


def as_mapping(spec: ServingSpec) -> dict[str, Any]:
    """What `spec_from` reads back as the same spec."""
    return _plain(dataclasses.asdict(spec))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
