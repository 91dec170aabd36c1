"""What kustomize prints for an overlay, as the tests look at it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from k8s import render
from k8s.objects import Object
from k8s.patches import Key, keyed
from k8s.sizing import Sizing
from k8s.spec import ServingSpec
from tests.k8s.optional import OPTIONAL

ROOT = Path(__file__).parent.parent.parent
CRDS = ROOT.parent / "shared" / "crds"
OVERLAYS = render.overlay_names()
KUBECTL = Path(sys.executable).parent / "kubectl"


def kustomize(folder: Path) -> str:
    """What `kubectl kustomize` prints; needs no cluster."""
    ran = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def printed(spec: ServingSpec) -> dict[Key, Object]:
    """What kustomize prints for the overlay of a spec, rendered beside a copy of the committed base and components."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("base", "components"):
            shutil.copytree(render.ROOT / part, root / part)
        for path, text in render.render_overlay(spec, "overlays/x").items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text, encoding="utf-8")
        return keyed(yaml.load_all(kustomize(root / "overlays" / "x"), yaml.CSafeLoader))


def spec_named(name: str) -> ServingSpec:
    """Of an overlay, or of an optional spec."""
    return OPTIONAL[name]() if name in OPTIONAL else render.overlay_spec(name)


@dataclasses.dataclass
class Pod:
    """A template of pods."""

    owner: str  # "Deployment/argosy-gateway", "RayService/argosy/workers"
    template: Object
    count: int = 1  # most pods of it, ever

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def labels(self) -> dict[str, str]:
        return self.template["metadata"]["labels"]

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    def containers(self, *, init: bool = True) -> Iterator[Object]:
        yield from self.spec["containers"]
        yield from self.spec.get("initContainers", []) if init else []


@dataclasses.dataclass
class Manifests:
    """The objects of an overlay, or of an optional spec; tests break copies of it."""

    spec: ServingSpec
    objects: dict[Key, Object]

    @functools.cached_property
    def sizing(self) -> Sizing:
        return Sizing(self.spec)

    def of_kind(self, kind: str) -> list[Object]:
        return [thing for key, thing in self.objects.items() if key[1] == kind]

    def one(self, kind: str, suffix: str = "") -> Object:
        """The object of that kind whose name is the deployment's, and `-suffix`."""
        name = f"{self.spec.name}-{suffix}" if suffix else self.spec.name
        [found] = [thing for thing in self.of_kind(kind) if thing["metadata"]["name"] == name]
        return found

    @property
    def service(self) -> Object:
        """spec of the RayService."""
        return self.one("RayService")["spec"]

    @property
    def ray(self) -> Object:
        return self.service["rayClusterConfig"]

    @property
    def workers(self) -> Object:
        [group] = [group for group in self.ray["workerGroupSpecs"] if group["groupName"] == "workers"]
        return group

    @property
    def serve(self) -> Object:
        """Serve's document, parsed anew each time; `alter_serve` changes it."""
        return yaml.safe_load(self.service["serveConfigV2"])

    @property
    def replica(self) -> Object:
        """The model's deployment in Serve's document."""
        return self.serve["applications"][1]["deployments"][0]

    def alter_serve(self, alter: Callable[[Object], None]) -> None:
        document = self.serve
        alter(document)
        self.service["serveConfigV2"] = yaml.safe_dump(document)

    @property
    def settings(self) -> Object:
        """The gateways' settings file."""
        return yaml.safe_load(self.settings_map["data"]["settings.yaml"])

    @property
    def settings_map(self) -> Object:
        [found] = [thing for thing in self.of_kind("ConfigMap") if "settings.yaml" in thing["data"]]
        return found

    def alter_settings(self, **values: Any) -> None:
        self.settings_map["data"]["settings.yaml"] = yaml.safe_dump(self.settings | values)

    def pods(self) -> list[Pod]:
        found = []
        for kind in ("Deployment", "DaemonSet", "Job"):
            for thing in self.of_kind(kind):
                count = thing["spec"].get("replicas", 1)
                found.append(Pod(f"{kind}/{thing['metadata']['name']}", thing["spec"]["template"], count))
        head, name = self.ray["headGroupSpec"], self.one("RayService")["metadata"]["name"]
        found.append(Pod(f"RayService/{name}/head", head["template"]))
        for group in self.ray["workerGroupSpecs"]:
            count = group["maxReplicas"] * group["numOfHosts"]
            found.append(Pod(f"RayService/{name}/{group['groupName']}", group["template"], count))
        return found

    def pod(self, component: str) -> Pod:
        [found] = [pod for pod in self.pods() if pod.component == component]
        return found

    def container(self, component: str) -> Object:
        return self.pod(component).spec["containers"][0]


@functools.cache
def _loaded(overlay: str) -> Manifests:
    spec = spec_named(overlay)
    if overlay in OPTIONAL:
        return Manifests(spec, printed(spec))
    return Manifests(spec, keyed(yaml.load_all(kustomize(render.ROOT / "overlays" / overlay), yaml.CSafeLoader)))


def manifests(overlay: str) -> Manifests:
    """A copy that the caller may break."""
    loaded = _loaded(overlay)
    return Manifests(loaded.spec, copy.deepcopy(loaded.objects))


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector, with matchLabels and matchExpressions, finds the labels."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        value, values = labels.get(expression["key"]), expression.get("values", [])
        kept = {
            "In": value in values,
            "NotIn": value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not kept[expression["operator"]]:
            return False
    return True
