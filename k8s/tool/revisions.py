"""What was deployed, kept on the cluster itself: a labelled Secret for each of the last ten deployments.

A rollback needs neither git nor the machine that deployed. The Secret's name holds the number, so that of two
deployments at once only one gets it: the other is refused.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import gzip
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

from k8s.objects import APP, Object
from k8s.spec import ServingSpec, SpecError, spec_from
from k8s.tool.cluster import Cluster
from k8s.tool.exits import ApiError, Refused, ToolError
from k8s.tool.kinds import SECRET
from k8s.tool.specs import as_mapping

KEPT: Final = 10
MAX_BYTES: Final = 900 << 10  # of a Secret's 1 MiB
SECRET_TYPE: Final = "argosy/revision"
LABEL: Final = "argosy/revision"
STATUS: Final = "argosy/status"
HASH: Final = "argosy/manifest-hash"
NOTE: Final = "argosy/note"
TIME: Final = "argosy/time"

RUNNING: Final = "deploying"
GOOD: Final = "good"
FAILED: Final = "failed"


@dataclasses.dataclass(frozen=True, slots=True)
class Revision:
    """One deployment. time: RFC 3339, of its begin."""

    number: int
    status: str
    hash: str
    note: str
    time: str
    name: str
    data: dict[str, str] = dataclasses.field(repr=False)

    @property
    def manifest(self) -> list[Object]:
        """The objects as they were applied. Raises ToolError."""
        return self._unpacked("manifest")  # type: ignore[no-any-return]

    @property
    def spec(self) -> ServingSpec:
        """Raises ToolError, also for a spec that this version of the tool no longer reads."""
        try:
            return spec_from(self._unpacked("spec"), f"the spec of revision {self.number}")
        except SpecError as error:
            raise ToolError(str(error)) from None

    def _unpacked(self, key: str) -> Any:
        try:
            return json.loads(gzip.decompress(base64.b64decode(self.data[key])))
        except (KeyError, OSError, EOFError, ValueError) as error:
            raise ToolError(f"revision {self.number}: Secret {self.name} cannot be read: {error!r}") from None


def manifest_hash(things: Sequence[Object]) -> str:
    """Sixteen hex digits of what the objects say, whatever their order."""
    texts = sorted(json.dumps(thing, sort_keys=True) for thing in things)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def read_revisions(cluster: Cluster, name: str, namespace: str) -> list[Revision]:
    """Of one deployment, the newest first. Raises ApiError."""
    listing = cluster.select(SECRET, namespace, labels=f"app.kubernetes.io/instance={name},{LABEL}")
    return sorted((_revision(thing) for thing in listing.items), key=lambda revision: -revision.number)


def last_good(revisions: Sequence[Revision]) -> Revision | None:
    return next((revision for revision in revisions if revision.status == GOOD), None)


def begin(
    cluster: Cluster, spec: ServingSpec, things: Sequence[Object], revisions: Sequence[Revision], note: str
) -> Revision:
    """Write down what is about to be applied. Raises Refused when somebody else has begun the same number."""
    number = revisions[0].number + 1 if revisions else 1
    data = {"manifest": _packed(list(things)), "spec": _packed(as_mapping(spec))}
    size = sum(len(value) for value in data.values())
    if size > MAX_BYTES:
        raise ToolError(f"the manifest has {size:,} bytes even packed, more than a Secret may hold ({MAX_BYTES:,})")
    thing = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": SECRET_TYPE,
        "metadata": {
            "name": f"{spec.name}-revision-{number:06d}",
            "namespace": spec.namespace,
            "labels": {
                "app.kubernetes.io/name": APP,
                "app.kubernetes.io/instance": spec.name,
                "app.kubernetes.io/component": "revision",
                LABEL: str(number),
                STATUS: RUNNING,
            },
            "annotations": {HASH: manifest_hash(things), NOTE: note[:200], TIME: _now()},
        },
        "data": data,
    }
    try:
        return _revision(cluster.create(thing))
    except ApiError as error:
        if error.status == 409:
            raise Refused(f"somebody else deploys {spec.name} right now: revision {number} has been taken") from None
        raise


def finish(cluster: Cluster, revision: Revision, namespace: str, status: str, note: str = "") -> None:
    """Say how a revision ended."""
    metadata: dict[str, Any] = {"labels": {STATUS: status}}
    if note:
        metadata["annotations"] = {NOTE: note[:200]}
    cluster.patch(SECRET, revision.name, namespace, {"metadata": metadata})


def forget_old(cluster: Cluster, name: str, namespace: str) -> None:
    """Keep the newest KEPT revisions, and the newest good one whatever its age."""
    revisions = read_revisions(cluster, name, namespace)
    good = last_good(revisions)
    for revision in revisions[KEPT:]:
        if revision != good:
            cluster.delete(SECRET, revision.name, namespace)


def _revision(thing: Object) -> Revision:
    metadata = thing["metadata"]
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    try:
        number = int(labels[LABEL])
    except (KeyError, ValueError):
        raise ToolError(f"Secret {metadata['name']}: its label {LABEL} is no number") from None
    return Revision(
        number=number,
        status=labels.get(STATUS, ""),
        hash=annotations.get(HASH, ""),
        note=annotations.get(NOTE, ""),
        time=annotations.get(TIME, ""),
        name=metadata["name"],
        data=thing.get("data") or {},
    )


def _packed(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
