"""`python -m k8s.lint CHECKOV`: checkov on every overlay; each finding that we allow has a reason here.

Exit code 1 for a finding without a reason, and for a reason without a finding. Pods inside a RayService are shown to
checkov as pods, which it would not see otherwise. CHECKOV: the program, in an environment of its own (it pins much).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from k8s import deployment, render
from k8s.objects import Object
from k8s.yaml_text import documents

ALLOWED: Final = {
    ("CKV_K8S_11", r".*"): "no limit of CPU: throttling is latency, and requests keep shares fair",
    (
        "CKV_K8S_8",
        r"Deployment\.argosy\.argosy-(balloon|loadtest-worker)",
    ): "a balloon does nothing, a sender ends itself",
    (
        "CKV_K8S_9",
        r"(Deployment|DaemonSet)\.argosy\.argosy-(balloon|loadtest-worker|gpu-health)",
    ): "nothing is sent to it",
    ("CKV_K8S_38", r"DaemonSet\.argosy\.argosy-gpu-health"): "it reads and patches its node",
    ("CKV_K8S_38", r"Pod\.argosy\.head"): "Ray's autoscaler beside it asks the API server for pods",
    ("CKV_K8S_43", r".*"): "development names tags; that production names digests is an invariant of ours",
    ("CKV_K8S_15", r".*"): "a digest is pulled once; what has a tag was loaded by hand",
}
"""(check, resource) -> why it is as it is."""


def pods_as_objects(overlay: str) -> list[Object]:
    """An overlay's objects, with the pods of its RayService as pods of their own."""
    found = list(deployment.objects(render.overlay_spec(overlay)).values())
    for thing in [thing for thing in found if thing["kind"] == "RayService"]:
        cluster = thing["spec"]["rayClusterConfig"]
        groups = [("head", cluster["headGroupSpec"]), *((g["groupName"], g) for g in cluster["workerGroupSpecs"])]
        for name, group in groups:
            metadata = {"name": name, "namespace": thing["metadata"]["namespace"], **group["template"]["metadata"]}
            found.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group["template"]["spec"]})
    return found


def findings(checkov: str, overlay: str) -> list[tuple[str, str, str]]:
    """(check, resource, what it says). Raises OSError when checkov does not run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{overlay}.yaml"
        file.write_text(documents(pods_as_objects(overlay)), encoding="utf-8")
        command = [checkov, "--framework", "kubernetes", "--output", "json", "--quiet", "--file", str(file)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
        try:
            told: Any = json.loads(ran.stdout)
        except ValueError:
            raise OSError(f"{checkov}: {ran.stderr[-2000:] or ran.stdout[-2000:]}") from None
    failed = told["results"]["failed_checks"]
    return [(entry["check_id"], entry["resource"], entry["check_name"]) for entry in failed]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m k8s.lint CHECKOV", file=sys.stderr)
        return 2
    used, num_bad = set(), 0
    for overlay in render.overlay_names():
        for check, resource, says in findings(arguments[0], overlay):
            reasons = [key for key in ALLOWED if key[0] == check and re.fullmatch(key[1], resource)]
            used |= set(reasons)
            if not reasons:
                num_bad += 1
                print(f"{overlay}: {check} {resource}: {says}")
    for key in ALLOWED.keys() - used:
        num_bad += 1
        print(f"{key[0]} {key[1]}: allowed, and nothing needs it")
    print(f"{num_bad} findings without a reason, {len(used)} kinds of findings with one")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
