"""deploy, plan and render against an API server over HTTP: waves, waits, reasons, conflicts, atomic returns."""

from __future__ import annotations

import json
import urllib.request

import pytest
import yaml

from k8s.tool import exits, main
from tests.k8s.cluster_fixture import World, running, world

__all__ = ["running", "world"]


def test_a_deployment_of_the_smallest_overlay_is_whole_and_then_nothing_is_left_to_change(world: World) -> None:
    code, text = world.run("plan", "dev-cpu")
    assert code == exits.CHANGES, text
    assert "create RayService argosy" in text

    code, text = world.deploy()
    assert code == exits.DONE, text
    assert world.running.find("RayService", "argosy") is not None
    assert world.running.find("Secret", "argosy-engine") is not None
    order = [call for call in world.running.state.calls if call.startswith("PATCH") and "dryRun" not in call]
    places = [next(i for i, call in enumerate(order) if part in call) for part in
              ("/namespaces/argosy?", "resourcequotas", "configmaps", "rayservices", "deployments")]  # fmt: skip
    assert places == sorted(places)

    code, text = world.run("plan", "dev-cpu")
    assert code == exits.DONE, text
    assert "Nothing to change" in text


def test_the_way_in_is_deployed_and_taken_away_with_its_component(world: World) -> None:
    cluster = {"gateway_class": "envoy", "gateway_certificate": "argosy-tls"}
    spec = world.spec_file(components=["gateway-api"], cluster=cluster)
    code, text = world.run("plan", spec)
    assert code == exits.CHANGES, text
    assert "Secret argosy-tls is not there; make it, with tls.crt, tls.key" in text
    assert world.deploy(spec)[0] == exits.DONE
    for kind, name in (("Gateway", "argosy-edge"), ("HTTPRoute", "argosy-gateway")):
        assert world.running.find(kind, name) is not None
    code, text = world.deploy()
    assert code == exits.DONE, text
    for kind, name in (("Gateway", "argosy-edge"), ("HTTPRoute", "argosy-gateway")):
        assert world.running.find(kind, name) is None


def test_one_autoscaler_goes_before_the_other_comes(world: World) -> None:
    """KEDA's admission refuses a ScaledObject for a Deployment that another HPA scales."""
    assert world.deploy(world.spec_file(gateway={"max_replicas": 3}))[0] == exits.DONE
    assert world.running.find("HorizontalPodAutoscaler", "argosy-gateway") is not None
    spec = world.spec_file(gateway={"max_replicas": 3}, components=["autoscale-keda"])
    code, text = world.deploy(spec)
    assert code == exits.DONE, text
    calls = [call for call in world.running.state.calls if "dryRun" not in call]
    gone = next(i for i, call in enumerate(calls) if call.startswith("DELETE") and "horizontalpod" in call)
    came = next(i for i, call in enumerate(calls) if call.startswith("PATCH") and "scaledobjects" in call)
    assert gone < came
    assert text.count("HorizontalPodAutoscaler argosy-gateway: the spec no longer has it") == 1
    assert world.running.find("HorizontalPodAutoscaler", "argosy-gateway") is None


def test_render_prints_the_same_bytes_and_valid_yaml(world: World) -> None:
    (code, first), (_, second) = world.run("render", "dev-cpu"), world.run("render", "dev-cpu")
    assert code == exits.DONE
    assert first == second
    assert "RayService" in {thing["kind"] for thing in yaml.load_all(first, yaml.CSafeLoader)}


def test_events_are_json_lines(world: World) -> None:
    code, text = world.deploy("dev-cpu", "-o", "json")
    assert code == exits.DONE
    events = [json.loads(line) for line in text.splitlines()]
    assert [event["wave"] for event in events if event["event"] == "applied"] == [
        "policy",
        "config",
        "engine",
        "gateway",
    ]
    assert events[-1]["event"] == "done"


@pytest.mark.parametrize("arguments", [["nope"], ["plan"], ["plan", "--nope"], ["plan", "no-such-overlay"]])
def test_wrong_usage_is_an_error_and_never_the_code_of_changes(arguments: list[str]) -> None:
    assert main.main(arguments) == exits.ERROR


def test_a_plan_names_fields_and_the_upgrade_they_cause_and_changes_nothing(world: World) -> None:
    assert world.deploy()[0] == exits.DONE
    before = {thing["metadata"]["resourceVersion"] for thing in world.running.all("RayService")}
    spec = world.spec_file(engine={"cpus_per_rank": 2}, images={"engine": "argosy-engine:0.2.0"})
    code, found = world.run_json("plan", spec)
    assert code == exits.CHANGES == found["exit_code"]
    assert found["upgrade"]["kind"] == "new cluster"
    assert found["compared"] == "by the server, in a dry run"
    [service] = [thing for thing in found["objects"] if thing["kind"] == "RayService"]
    fields = {entry["path"]: entry["after"] for entry in service["fields"]}
    assert "argosy-engine:0.2.0" in fields.values()
    assert any(".serveConfigV2.applications.model" in path for path in fields)
    assert found["gpus"]["more_replicas"] == found["gpus"]["fitting_replicas"] == 1
    assert {thing["metadata"]["resourceVersion"] for thing in world.running.all("RayService")} == before
    code, text = world.run("plan", spec)
    assert "Engine: new cluster" in text
    assert "every engine pod" in text


def test_without_a_dry_run_objects_are_compared_locally(world: World) -> None:
    assert world.deploy()[0] == exits.DONE
    world.running.fault("PATCH *", status=404)
    code, found = world.run_json("plan", "dev-cpu")
    assert (code, found["has_changes"]) == (exits.DONE, False)
    assert found["compared"].startswith("locally: the server has no dry run")


def test_fields_that_we_no_longer_set_are_removals(world: World) -> None:
    spec = world.spec_file(images={"pull_secret": "registry"})
    world.running.put({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "registry", "namespace": "argosy"}})
    assert world.deploy(spec)[0] == exits.DONE
    world.running.fault("PATCH *dry-run*", status=404)
    code, found = world.run_json("plan", "dev-cpu")
    assert code == exits.CHANGES
    removed = [entry["path"] for thing in found["objects"] for entry in thing["fields"] if entry["after"] == "-"]
    assert any("imagePullSecrets" in path for path in removed)
    assert found["upgrade"]["kind"] == "new cluster"  # what goes is in KubeRay's hash as what comes


def test_place_holders_are_refused_by_key_and_rendered_all_the_same(world: World) -> None:
    for command, changed in (("deploy", "refused"), ("plan", "+ create RayService argosy"), ("preflight", "")):
        code, text = world.run(command, "prod-h100-tp8")
        assert code == exits.REFUSED, text
        assert changed.replace("refused", "") in text
        for key, image in (("gateway", "gateway"), ("engine", "engine-cuda"), ("loadtest", "loadtest")):
            assert f"images.{key} (registry.invalid/argosy/{image})" in text
        assert "name their digests in the spec" in text
    assert not [
        call for call in world.running.state.calls if call.startswith(("POST", "PATCH")) and "dryRun" not in call
    ]
    assert world.run("deploy", "prod-h100-tp8", "--ignore-capacity", "--recreate")[0] == exits.REFUSED
    code, text = world.run("plan", world.spec_file("prod-h100-tp8", images={"engine": "a/b@sha256:" + "1" * 64}))
    assert "images.engine" not in text
    assert world.run("render", "prod-h100-tp8")[0] == exits.DONE


def test_ended_jobs_of_earlier_models_go_with_their_pods(world: World) -> None:
    """One that runs stays: a cluster that is being replaced may wait for it."""

    def with_weights(**images: str) -> str:
        return world.spec_file(components=["weights-pvc"], images=images)

    def jobs() -> set[str]:
        return {job["metadata"]["name"] for job in world.running.all("Job")}

    assert world.deploy(with_weights())[0] == exits.DONE
    [first] = world.running.all("Job")
    owner = {"uid": first["metadata"]["uid"], "kind": "Job", "name": first["metadata"]["name"]}
    other = {
        **first,
        "metadata": {**first["metadata"], "name": "x", "labels": {"app.kubernetes.io/instance": "argosy"}},
    }
    active = {
        **first,
        "metadata": {**first["metadata"], "name": "argosy-weights-old", "uid": "u"},
        "status": {"active": 1},
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "fetched", "namespace": "argosy", "labels": {},
           "ownerReferences": [owner]}, "spec": {"containers": []}, "status": {"phase": "Succeeded"}}  # fmt: skip
    world.running.put(other, pod)
    things = world.running.snapshot()
    world.running.restore([*things, active])  # without a controller that would end it

    second = with_weights(engine="argosy-engine:0.2.0")
    code, found = world.run_json("plan", second)
    doomed = [thing["name"] for thing in found["objects"] if (thing["kind"], thing["action"]) == ("Job", "delete")]
    assert (code, doomed) == (exits.CHANGES, [owner["name"]])
    code, text = world.deploy(second)
    assert code == exits.DONE, text
    assert jobs() > {"x", "argosy-weights-old"}
    assert owner["name"] not in jobs()
    assert len(jobs()) == 3
    assert world.running.find("Pod", "fetched") is None
    assert "Job argosy-weights-old still runs and stays" in text

    failed = {"conditions": [{"type": "Failed", "status": "True"}]}
    world.running.restore([{**thing, "status": failed} if thing["metadata"]["name"] == "argosy-weights-old" else thing
                           for thing in world.running.snapshot()])  # fmt: skip
    assert world.run("plan", second)[0] == exits.CHANGES
    assert world.deploy(second)[0] == exits.DONE
    assert "argosy-weights-old" not in jobs()
    assert world.run("plan", second)[0] == exits.DONE


def test_a_deployment_without_the_right_to_list_jobs_leaves_them(world: World) -> None:
    assert world.deploy()[0] == exits.DONE
    world.running.fault("GET */jobs", status=403, message="jobs is forbidden")
    code, found = world.run_json("plan", "dev-cpu")
    assert code == exits.DONE
    assert any("needs list on jobs" in text for text in found["warnings"])


def test_a_field_that_another_manager_holds_is_a_conflict_by_name(world: World) -> None:
    assert world.deploy()[0] == exits.DONE
    patch = {"spec": {"revisionHistoryLimit": 3}}
    url = f"{world.running.url}/apis/apps/v1/namespaces/argosy/deployments/argosy-gateway?fieldManager=kubectl-edit"
    headers = {"Content-Type": "application/merge-patch+json"}
    request = urllib.request.Request(url, json.dumps(patch).encode(), headers, method="PATCH")
    with urllib.request.urlopen(request, timeout=5) as answer:
        assert answer.status == 200
    code, text = world.deploy()
    assert code == exits.REFUSED, text
    assert 'conflict with "kubectl-edit": .spec.revisionHistoryLimit' in text
    assert "--force-conflicts" in text
    code, text = world.deploy("dev-cpu", "--force-conflicts")
    assert code == exits.DONE, text
    assert (world.running.find("Deployment", "argosy-gateway") or {})["spec"]["revisionHistoryLimit"] == 10


def test_the_real_reason_of_a_failure_is_told_and_the_last_good_revision_comes_back(world: World) -> None:
    assert world.deploy()[0] == exits.DONE
    world.operators.bad_image = "nowhere"
    world.operators.application = "RUNNING"
    spec = world.spec_file(images={"gateway": "nowhere/gateway:1", "engine": "argosy-engine:0.1.0"})
    hold = world.operators

    def gateway(server: object, event: str, thing: dict[str, object]) -> None:
        if thing["kind"] == "Deployment":
            hold.holds_gateway = "nowhere" in str(thing["spec"])

    world.running.state.controllers.insert(0, gateway)  # type: ignore[arg-type]
    code, text = world.deploy(spec, "--atomic")
    assert code == exits.ROLLED_BACK, text
    assert 'ImagePullBackOff Back-off pulling image "nowhere/gateway:1"' in text
    deployment = world.running.find("Deployment", "argosy-gateway")
    assert deployment is not None
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == "argosy-gateway:0.1.0"
    code, found = world.run_json("rollback", "--list")
    assert [(entry["number"], entry["status"]) for entry in found["revisions"]] == [(2, "failed"), (1, "good")]


@pytest.mark.parametrize(
    ("application", "message", "said"),
    [
        ("DEPLOY_FAILED", "Traceback (most recent call last):\n  File x\nValueError: no model", "ValueError: no model"),
        ("DEPLOYING", "", "not ready in time"),
    ],
)
def test_a_first_deployment_that_fails_stays_and_says_why(
    world: World, application: str, message: str, said: str
) -> None:
    world.operators.application, world.operators.message = application, message
    code, text = world.run("deploy", "dev-cpu", "--settle", "0", "--patience", "0.2", "--timeout", "1")
    assert code == exits.UNFINISHED
    assert said in text
    assert "nothing to return to" in text


def test_unscheduled_pods_are_explained(world: World) -> None:
    world.operators.application = "DEPLOYING"
    message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu, 1 node(s) had untolerated taint {team: x}."

    def unscheduled(server: object, event: str, thing: dict[str, object]) -> None:
        if thing["kind"] == "Pod" and "worker" in str(thing["metadata"]) and event == "ADDED":
            thing["status"] = {
                "phase": "Pending",
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
                ],
            }
            world.running.server.store(thing)  # type: ignore[arg-type]

    world.running.state.controllers.append(unscheduled)  # type: ignore[arg-type]
    code, text = world.run("deploy", "dev-cpu", "--settle", "0", "--timeout", "1")
    assert code == exits.UNFINISHED
    assert "FailedScheduling: 0/1 nodes are available" in text
    assert "no node has enough nvidia.com/gpu left" in text
    assert "nodes with the taint team are closed to this pod" in text


def test_a_namespace_role_is_enough(world: World) -> None:
    """What belongs to the cluster, or to its administrator, is told and left alone."""
    for path in ("/api/v1/namespaces/argosy", "*priorityclasses*", "*resourcequotas*", "*limitranges*"):
        world.running.fault(f"PATCH {path}", status=403)
        world.running.fault(f"GET {path}", status=403)
    code, text = world.deploy()
    assert code == exits.DONE, text
    assert "Namespace argosy was not applied" in text
    assert "PriorityClass argosy-head was not applied" in text
    code, text = world.run("plan", "dev-cpu")
    assert code == exits.DONE, text


def test_a_missing_crd_is_named(world: World) -> None:
    world.running.state.absent.add("ray.io/v1/rayservices")
    code, text = world.deploy()
    assert code in (exits.REFUSED, exits.UNFINISHED)
    assert "rayservices.ray.io" in text
    assert "install its CRD" in text


def test_two_deployments_at_once(world: World) -> None:
    assert world.deploy()[0] == exits.DONE
    revision = world.running.find("Secret", "argosy-revision-000001")
    assert revision is not None
    revision["metadata"]["labels"]["argosy/status"] = "deploying"
    world.running.put(revision)
    spec = world.spec_file(gateway={"min_replicas": 2, "max_replicas": 2})
    code, text = world.deploy(spec)
    assert code == exits.REFUSED
    assert "revision 1" in text
    assert world.deploy(spec, "--take-over")[0] == exits.DONE


def test_what_the_spec_no_longer_has_is_deleted_and_only_ten_revisions_are_kept(world: World) -> None:
    for i in range(3):
        spec = world.spec_file(gateway={"queue_timeout_s": 10 + i})
        assert world.deploy(spec)[0] == exits.DONE
    revision = world.running.find("Secret", "argosy-revision-000003")
    assert revision is not None
    for number in range(4, 13):  # as nine more deployments leave them
        labels = {**revision["metadata"]["labels"], "argosy/revision": str(number)}
        metadata = {**revision["metadata"], "name": f"argosy-revision-{number:06d}", "labels": labels}
        world.running.put({**revision, "metadata": metadata})
    assert world.deploy(world.spec_file(gateway={"queue_timeout_s": 99}))[0] == exits.DONE
    maps = [thing["metadata"]["name"] for thing in world.running.all("ConfigMap")]
    assert len([name for name in maps if name.startswith("argosy-gateway-")]) == 1
    revisions = [s for s in world.running.all("Secret") if "argosy/revision" in s["metadata"].get("labels", {})]
    assert sorted(int(s["metadata"]["labels"]["argosy/revision"]) for s in revisions) == list(range(4, 14))


def test_a_deployment_waits_through_expired_watches(world: World) -> None:
    world.running.state.num_expiries = 20
    code, text = world.deploy()
    assert code == exits.DONE, text


def test_an_object_that_disappears_while_it_is_waited_for(world: World) -> None:
    world.operators.application = "DEPLOYING"

    def vanish(server: object, event: str, thing: dict[str, object]) -> None:
        if thing["kind"] == "RayService" and event == "MODIFIED" and thing.get("status"):
            world.running.server.drop(thing)  # type: ignore[arg-type]

    world.running.state.controllers.append(vanish)  # type: ignore[arg-type]
    code, text = world.run("deploy", "dev-cpu", "--settle", "0", "--timeout", "1")
    assert code == exits.UNFINISHED
    assert "RayService argosy: is not there (any more)" in text
