"""Names, ports, paths, flags and variables in the manifests against the code that serves them."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer.main
import yaml

from k8s import autoscale, engine, gateway, monitoring, objects, weights_pvc
from k8s.objects import GATEWAY, GPU_HEALTH, HEAD, LOADTEST, WORKER
from k8s.sizing import MAX_DRAIN_S
from serving import cli, config
from serving.deployments.document import ReplicaArguments, autoscaling_config, serve_config
from serving.errors import SettingsError
from tests.k8s.invariants_of_time import env
from tests.k8s.manifests import OVERLAYS, ROOT, manifests

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


# --- the gateway --------------------------------------------------------------------------------


@every_overlay
def test_gateways_are_started_with_flags_that_exist(overlay: str) -> None:
    command, *flags = manifests(overlay).container(GATEWAY)["args"]
    known = {flag for param in typer.main.get_command(cli.app).commands[command].params for flag in param.opts}
    assert {flag.partition("=")[0] for flag in flags} <= known
    required = {p.opts[0] for p in typer.main.get_command(cli.app).commands[command].params if p.required}
    assert required <= {flag.partition("=")[0] for flag in flags}


@every_overlay
def test_the_settings_file_is_one_that_gateways_take(overlay: str, tmp_path: Path) -> None:
    m = manifests(overlay)
    file = tmp_path / "settings.yaml"
    file.write_text(m.settings_map["data"]["settings.yaml"])
    settings = config.load(config=file, environ={})
    assert settings.port == m.container(GATEWAY)["ports"][0]["containerPort"]
    assert settings.host == "0.0.0.0"
    assert settings.gateway.served_model_name == m.spec.served_model_name
    assert settings.gateway.max_queue_len == m.sizing.max_queue_len
    assert settings.gateway.request_timeout_s == m.sizing.request_timeout_s
    assert settings.drain_timeout_s == m.sizing.gateway_drain_s


def test_a_gateway_takes_the_longest_drain_that_a_spec_may_ask_for() -> None:
    assert config.load({"drain_timeout_s": str(MAX_DRAIN_S)}, environ={}).drain_timeout_s == MAX_DRAIN_S
    with pytest.raises(SettingsError):
        config.load({"drain_timeout_s": str(MAX_DRAIN_S + 1)}, environ={})


@every_overlay
def test_mounted_files_lie_where_the_flags_say(overlay: str) -> None:
    container = manifests(overlay).container(GATEWAY)
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    for flag in container["args"][1:]:
        name, _, value = flag.partition("=")
        if name in ("--config", "--secret-file"):
            assert str(Path(value).parent) in mounts, flag


def test_probes_ask_paths_that_the_app_has() -> None:
    from serving.config import GatewaySettings
    from serving.gateway.app import build_app
    from serving.gateway.dispatch import Dispatch

    settings = GatewaySettings(fd=-1, secret="00" * 16)
    paths = set(build_app(settings, Dispatch(settings)).openapi()["paths"])
    m = manifests("prod-h100-tp8")
    container = m.container(GATEWAY)
    asked = {container[kind]["httpGet"]["path"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
    asked |= {endpoint["path"] for endpoint in m.one("ServiceMonitor", "gateway")["spec"]["endpoints"]}
    assert asked == {"/livez", "/readyz", "/metrics"}
    assert asked <= paths


def test_the_autoscaler_asks_for_a_metric_that_exists() -> None:
    from serving.metrics.catalogue import BY_NAME

    assert BY_NAME[gateway.IN_FLIGHT_METRIC].kind == "gauge"


@every_overlay
def test_variables_of_ours_are_settings(overlay: str) -> None:
    m = manifests(overlay)
    names = [name for pod in m.pods() for container in pod.containers() for name in env(container)]
    names += [name for thing in m.of_kind("ConfigMap") for name in thing["data"]]
    ours = {name.removeprefix("ARGOSY_").lower() for name in names if name.startswith("ARGOSY_")}
    assert ours <= config.OPTIONS.keys()


# --- Ray ----------------------------------------------------------------------------------------


@every_overlay
def test_serve_takes_its_document_and_it_is_that_of_the_product(overlay: str) -> None:
    """`k8s` may not import `serving.deployments.document`: the two must say the same."""
    with warnings.catch_warnings(action="ignore"):  # Ray's own deprecations, at import
        from ray.serve.schema import ServeDeploySchema

        document = manifests(overlay).serve
        ServeDeploySchema.model_validate(document)
    directory, model = document["applications"]
    arguments = msgspec.convert(model["args"], ReplicaArguments)
    assert msgspec.to_builtins(arguments).keys() >= model["args"].keys()
    assert msgspec.to_builtins(arguments.engine).keys() >= model["args"]["engine"].keys()
    [ours] = model["deployments"]
    product = serve_config(
        arguments,
        num_replicas=ours.get("num_replicas", 1),
        num_cpus=ours["ray_actor_options"]["num_cpus"],
        max_surge_percent=ours["max_surge_percent"],
        secret_file=arguments.secret_file,
    )
    theirs = product["applications"][1]["deployments"][0]
    assert ours["max_ongoing_requests"] > 0
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differing <= {"max_ongoing_requests", "autoscaling_config", "num_replicas"}
    assert ("num_replicas" in differing) == ("autoscaling_config" in ours)
    for key in ("name", "route_prefix", "import_path"):
        assert model[key] == product["applications"][1][key]
    directory["deployments"][0]["ray_actor_options"].pop("resources", None)
    assert directory == product["applications"][0]


@every_overlay
def test_what_serve_imports_exists(overlay: str) -> None:
    for application in manifests(overlay).serve["applications"]:
        module, _, name = application["import_path"].partition(":")
        with warnings.catch_warnings(action="ignore"):
            assert callable(getattr(importlib.import_module(module), name))


def test_the_autoscaling_policy_exists() -> None:
    module, _, name = autoscale.POLICY.partition(":")
    scaled = manifests("prod-h100-tp8").replica["autoscaling_config"]
    assert scaled == autoscaling_config(2, 4, scaled["policy"]["policy_kwargs"])
    policy = getattr(importlib.import_module(module), name)
    kwargs = manifests("prod-h100-tp8").replica["autoscaling_config"]["policy"]["policy_kwargs"]
    assert {"rows_per_replica", "start_s"} <= kwargs.keys()
    policy(**kwargs)


@every_overlay
def test_ports_are_those_of_the_code(overlay: str) -> None:
    from ray._private import ray_constants

    m = manifests(overlay)
    default = ReplicaArguments.__dataclass_fields__["listen"].default
    listen = m.serve["applications"][1]["args"]["listen"]
    assert listen == default.replace("127.0.0.1", "node")
    first, last = map(int, listen.rpartition(":")[2].split("-"))
    [rule] = m.one("NetworkPolicy", "gateway")["spec"]["egress"]
    assert {"endPort": last, "port": first, "protocol": "TCP"} in rule["ports"]
    assert ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT == objects.AGENT_PORT
    assert ray_constants.DEFAULT_DASHBOARD_PORT == objects.DASHBOARD_PORT
    [url] = [flag for flag in m.container(GATEWAY)["args"] if flag.startswith("--directory-url=")]
    route = m.serve["applications"][0]["route_prefix"]
    name = m.one("RayService")["metadata"]["name"]
    assert url == f"--directory-url=http://{name}-serve-svc:{m.serve['http_options']['port']}{route}"
    for component in (HEAD, WORKER):
        ports = {port["name"]: port["containerPort"] for port in m.container(component)["ports"]}
        assert ports["serve"] == m.serve["http_options"]["port"]


def test_ray_nodes_answer_the_paths_that_probes_ask_without_a_token() -> None:
    from ray.dashboard import http_server_agent

    container = manifests("dev-cpu").container(WORKER)
    asked = {container[kind]["httpGet"]["path"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked <= set(http_server_agent.PUBLIC_EXACT_PATHS)


@every_overlay
def test_whoever_may_run_a_replica_or_the_directory_has_the_secret(overlay: str) -> None:
    m = manifests(overlay)
    files = {application["args"]["secret_file"] for application in m.serve["applications"]}
    assert files == {objects.SECRET_FILE}
    for pod in m.pods():
        mounts = {mount["mountPath"] for mount in pod.spec["containers"][0].get("volumeMounts", [])}
        assert (objects.SECRET_PATH in mounts) == (pod.component in (*objects.ENGINE, GATEWAY)), pod.owner


def test_variables_of_ray_are_ones_that_it_reads() -> None:
    import ray

    folder = Path(ray.__file__).parent
    constants = [*(folder / "_private").glob("*.py"), *(folder / "serve" / "_private").glob("*.py")]
    constants += [folder / "_common" / "usage" / "usage_constants.py"]
    text = "".join(path.read_text() for path in constants)
    binary = (folder / "_raylet.so").read_bytes()
    names = {name for pod in manifests("prod-h100-tp8").pods() for c in pod.containers() for name in env(c)}
    ours = {name for name in names if name.startswith("RAY_")}
    assert "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" in ours and len(ours) == 7
    for name in ours:
        assert name in text or name.removeprefix("RAY_").encode() in binary, name


def test_versions_of_ray_agree() -> None:
    assert importlib.metadata.version("ray") == engine.RAY_VERSION
    assert f"ray[serve]=={engine.RAY_VERSION}" in (ROOT / "pyproject.toml").read_text()
    assert manifests("dev-cpu").ray["rayVersion"] == engine.RAY_VERSION


def test_ray_takes_the_arguments_of_its_nodes() -> None:
    from ray.scripts.scripts import start

    known = {option.removeprefix("--") for param in start.params for option in param.opts}
    for overlay in OVERLAYS:
        m = manifests(overlay)
        for group in (m.ray["headGroupSpec"], *m.ray["workerGroupSpecs"]):
            assert group["rayStartParams"].keys() <= known
            resources = group["rayStartParams"].get("resources")
            assert resources is None or json.loads(resources.strip("'"))


# --- weights, GPUs, load tests ------------------------------------------------------------------


@every_overlay
def test_the_engine_looks_where_a_pull_writes(overlay: str) -> None:
    from models.store.manifest import MANIFEST
    from models.store.pull import resolve

    m = manifests(overlay)
    [data] = [thing["data"] for thing in m.of_kind("ConfigMap") if "MODEL" in thing["data"]]
    folder = resolve(data["MODEL"], Path(data["ARGOSY_STORE"]))
    arguments = m.serve["applications"][1]["args"]
    assert str(folder) == data["MODEL_DIR"] == arguments["engine"]["model_dir"]
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in m.container(WORKER)["volumeMounts"]}
    assert mounts[data["ARGOSY_STORE"]] is True
    assert mounts[str(Path(arguments["secret_file"]).parent)] is True
    assert weights_pvc.MANIFEST == MANIFEST


@every_overlay
def test_commands_are_ones_that_exist(overlay: str) -> None:
    commands = typer.main.get_command(cli.app).commands
    for text in scripts(overlay):
        for line in text.splitlines():
            words = line.removeprefix("exec ").split()
            if words[:1] == ["argosy"]:
                assert words[1] in commands, line
        subprocess.run(["/bin/sh", "-n", "-c", text], check=True, timeout=10)  # its grammar


def scripts(overlay: str) -> Iterator[str]:
    for pod in manifests(overlay).pods():
        for container in pod.containers():
            if container.get("command", [])[:2] == ["/bin/sh", "-c"]:
                yield container["command"][2]
            for kind in ("startupProbe", "livenessProbe"):
                yield from container.get(kind, {}).get("exec", {}).get("command", [])[2:]


def test_modules_that_containers_run_exist() -> None:
    command = manifests("prod-h100-tp8").container(GPU_HEALTH)["command"]
    assert command[:2] == ["python", "-m"]
    assert importlib.util.find_spec(command[2]) is not None
    usage = subprocess.run([sys.executable, "-m", command[2]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert usage.returncode == 2 and "usage:" in usage.stderr


@pytest.mark.parametrize("component", [LOADTEST, "loadtest-worker"])
def test_load_tests_are_started_with_flags_that_exist(component: str) -> None:
    arguments = manifests("prod-h100-tp8").container(component)["args"]
    shown = subprocess.run(
        [sys.executable, "-m", "serving.cli", "loadtest", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert arguments[0] == "loadtest"
    for flag in arguments[1:]:
        assert flag.partition("=")[0] + " " in shown or flag.partition("=")[0] + "]" in shown, flag


# --- monitoring ---------------------------------------------------------------------------------


def test_rules_and_dashboard_are_those_of_the_metrics() -> None:
    from serving.metrics import rules
    from serving.metrics.rules import Objective

    m = manifests("prod-h100-tp8")
    assert m.one("PrometheusRule", "rules")["spec"] == rules.render(Objective())
    [dashboard] = [t for t in m.of_kind("ConfigMap") if "grafana_dashboard" in t["metadata"]["labels"]]
    assert json.loads(dashboard["data"]["argosy.json"]) == json.loads(monitoring.DASHBOARD_FILE.read_text())


def test_promtool_takes_the_rules(tmp_path: Path) -> None:
    import shutil

    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian's package prometheus)")
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(manifests("prod-h100-tp8").one("PrometheusRule", "rules")["spec"]))
    ran = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_series_names_that_are_relabelled_are_not_needed() -> None:
    """What a ServiceMonitor drops must not be what a rule asks for."""
    import re

    endpoint: Any = manifests("prod-h100-tp8").one("ServiceMonitor", "gateway")["spec"]["endpoints"][0]
    from serving.metrics.catalogue import BY_NAME

    for step in endpoint["metricRelabelings"]:
        if step["action"] == "drop":
            assert not [name for name in BY_NAME if re.fullmatch(step["regex"], name)]
        if step["action"] == "labeldrop":
            labels = {label.name for metric in BY_NAME.values() for label in metric.labels}
            assert not [label for label in labels if re.fullmatch(step["regex"], label)]
