"""The client: deadlines, repetitions, pages, watches that end or expire, and what a server refuses."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from k8s import render
from k8s.tool import exits, main
from k8s.tool.cluster import connect
from k8s.tool.exits import ApiError, DeadlineError
from k8s.tool.inside import page, run_in
from k8s.tool.kinds import CONFIG_MAP, POD, RAY_SERVICE, SERVICE
from k8s.tool.mirror import Mirror
from k8s.tool.specs import find_spec
from tests.k8s.cluster_fixture import World, running, world

__all__ = ["running", "world"]


def config_map(name: str, **data: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "argosy"}, "data": data}


def test_a_busy_server_is_asked_again_when_it_says(world: World) -> None:
    world.running.fault("GET */services", status=429, times=1, headers={"Retry-After": "1"})
    begun = time.monotonic()
    assert world.cluster.select(SERVICE, "argosy").items == []
    assert 1.0 <= time.monotonic() - begun < 3.0


@pytest.mark.parametrize("status", [429, 503])
def test_reading_and_applying_outlive_a_short_outage(world: World, status: int) -> None:
    world.running.fault("* */configmaps*", status=status, times=2)
    assert world.cluster.select(CONFIG_MAP, "argosy").items == []
    world.running.fault("PATCH */configmaps/*", status=status, times=1)
    world.cluster.apply(config_map("a", x="1"))
    assert world.cluster.get(CONFIG_MAP, "a", "argosy") is not None


def test_a_change_that_may_have_happened_is_not_repeated(world: World) -> None:
    fault = world.running.fault("POST */configmaps", status=503, times=1)
    with pytest.raises(ApiError) as raised:
        world.cluster.create(config_map("a"))
    assert raised.value.status == 503
    assert fault.times == 0


def test_a_slow_server_ends_in_an_error_that_names_the_deadline(world: World) -> None:
    world.running.fault("GET */services", delay_s=30)
    world.cluster.timeout_s = 0.3
    with pytest.raises(DeadlineError, match=r"list services in argosy: no answer from http://.* within 0\.3 s"):
        world.cluster.select(SERVICE, "argosy")


def test_a_server_that_stays_busy_ends_in_the_same_error(world: World) -> None:
    world.running.fault("GET */services", status=429, headers={"Retry-After": "60"})
    world.cluster.timeout_s = 0.5
    begun = time.monotonic()
    with pytest.raises(DeadlineError, match="429"):
        world.cluster.select(SERVICE, "argosy")
    assert time.monotonic() - begun < 2.0


def test_a_server_that_is_not_there_is_named(world: World) -> None:
    text = world.running.kubeconfig.read_text().replace(world.running.url, "http://127.0.0.1:9")
    path = world.folder / "nowhere"
    path.write_text(text)
    cluster = connect(path, None, 0.5)
    with pytest.raises(DeadlineError, match=r"127\.0\.0\.1:9"):
        cluster.select(SERVICE, "argosy")
    cluster.close()


def test_no_kubeconfig_is_an_error_of_its_own(world: World) -> None:
    code, text = world.run("plan", "dev-cpu", "--kubeconfig", str(world.folder / "absent"))
    assert code == exits.ERROR
    assert f"there is no file {world.folder / 'absent'}" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [b\n", "is no kubeconfig: while parsing a flow sequence"),
        ("hello", "is no kubeconfig"),
        ("", "is empty"),
        ("apiVersion: v1\nkind: Config\n", "Expected key current-context"),
    ],
)
def test_a_kubeconfig_that_is_none_is_told_in_a_line(world: World, text: str, said: str) -> None:
    path = world.folder / "bad"
    path.write_text(text)
    code, printed = world.run("status", "--kubeconfig", str(path))
    assert (code, printed.count("\n")) == (exits.ERROR, 1)
    assert printed.startswith("error: ")
    assert said in printed


def test_a_wrong_context_never_ends_in_the_pod_s_own_cluster(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes import config

    asked: list[object] = []
    monkeypatch.setattr(config, "load_incluster_config", lambda **values: asked.append(values))
    code, text = world.run("status", "--context", "nope")
    assert code == exits.ERROR
    assert "Expected object with name nope" in text
    assert asked == []
    monkeypatch.setenv("KUBECONFIG", "")
    monkeypatch.setenv("HOME", str(world.folder))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(world.folder / "absent"))
    connect(None, None, 1.0).close()
    assert len(asked) == 1


@pytest.mark.parametrize("text", ["nowhere/spec.yaml", "broken.yaml", "nope", "elsewhere/prod-h100-tp8"])
def test_a_spec_that_is_none_is_told_in_a_line(world: World, text: str) -> None:
    (world.folder / "broken.yaml").write_text("a: [b\n")
    said = {
        "nowhere/spec.yaml": "No such file",
        "broken.yaml": "not YAML",
        "nope": f"there are {', '.join(render.overlay_names())}. One of your own: copy {render.ROOT}/overlays/NAME",
        "elsewhere/prod-h100-tp8": "prod-h100-tp8 is one by its name alone",
    }[text]
    code, printed = world.run("render", str(world.folder / text) if "." in text else text)
    assert (code, printed.count("\n")) == (exits.ERROR, 1)
    assert said in printed


def test_an_installation_without_overlays_says_what_to_do(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "ROOT", world.folder)
    code, printed = world.run("render", "dev-cpu")
    assert code == exits.ERROR
    assert "brings no overlays: name a spec's YAML file, or run in a checkout" in printed


def test_overlays_are_found_by_path_by_name_and_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    folder = render.ROOT / "overlays" / "dev-cpu"
    assert find_spec("dev-cpu") == find_spec(str(folder)) == find_spec(str(folder / "spec.yaml"))


def test_wrong_usage_names_the_help_that_there_is(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["bogus"], "`argosy k8s --help`"), (["plan"], "`argosy k8s plan --help`")):
        assert main.main(arguments) == exits.ERROR
        assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(world: World) -> None:
    (world.folder / "file").write_text("")
    code, text = world.run("render", "dev-cpu", "--out", str(world.folder / "file" / "x"))
    assert code == exits.ERROR
    assert "error: --out: " in text


def test_long_lists_come_in_pages_and_begin_anew_when_a_page_expires(world: World) -> None:
    for i in range(7):
        world.running.put(config_map(f"c{i}"))
    world.running.state.page_size = 3
    assert len(world.cluster.select(CONFIG_MAP, "argosy").items) == 7
    gone = world.running.fault("GET */configmaps", status=410, times=0)
    gone_at = iter([False, True, False, False, False, False])
    original = world.cluster._send

    def send(*arguments: object) -> object:
        gone.times = int(next(gone_at))
        return original(*arguments)  # type: ignore[arg-type]

    world.cluster._send = send  # type: ignore[method-assign]
    assert [item["metadata"]["name"] for item in world.cluster.select(CONFIG_MAP, "argosy").items] == [
        f"c{i}" for i in range(7)
    ]


def wait_until(what: object, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def names(mirror: Mirror) -> set[str]:
    return {thing["metadata"]["name"] for thing in mirror.items(CONFIG_MAP)}


def test_a_mirror_follows_objects_through_ended_and_expired_watches(world: World) -> None:
    world.running.put(config_map("a"))
    with Mirror(world.cluster, "argosy", (CONFIG_MAP,)) as mirror:
        wait_until(lambda: names(mirror) == {"a"})
        wait_until(lambda: world.running.state.num_watches == 1)
        world.running.put(config_map("b"))
        wait_until(lambda: names(mirror) == {"a", "b"})
        # While no watch is open something disappears: nobody will ever send that event.
        world.running.state.num_expiries = 2
        lists = mirror.num_lists(CONFIG_MAP)
        world.running.do(world.running.server.end_watches)
        world.running.drop(config_map("a"))
        wait_until(lambda: names(mirror) == {"b"})
        wait_until(lambda: mirror.num_lists(CONFIG_MAP) >= lists + 3)
        world.running.drop(config_map("b"))
        wait_until(lambda: names(mirror) == set())
        assert mirror.error(CONFIG_MAP) == ""


def test_a_mirror_says_why_it_does_not_know(world: World) -> None:
    world.running.fault("GET */configmaps", status=403, message="configmaps is forbidden")
    with Mirror(world.cluster, "argosy", (CONFIG_MAP,)) as mirror:
        wait_until(lambda: "forbidden" in mirror.error(CONFIG_MAP))


def test_a_watch_ends_at_once_when_nobody_wants_it(world: World) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=lambda: list(world.cluster.watch(CONFIG_MAP, "argosy", "", stop)))
    thread.start()
    wait_until(lambda: world.running.state.num_watches == 1)
    stop.set()
    thread.join(2.0)
    assert not thread.is_alive()


def test_what_is_not_there_is_none_and_what_is_forbidden_says_so(world: World) -> None:
    assert world.cluster.get(RAY_SERVICE, "absent", "argosy") is None
    assert world.cluster.delete(CONFIG_MAP, "absent", "argosy") is False
    world.running.fault("GET */pods", status=403, message="pods is forbidden")
    with pytest.raises(ApiError, match="ask for a Role") as raised:
        world.cluster.select(POD, "argosy")
    assert raised.value.is_forbidden


def test_a_delete_takes_only_the_object_that_was_meant(world: World) -> None:
    world.running.put(config_map("a"))
    assert world.cluster.delete(CONFIG_MAP, "a", "argosy", uid="another") is False
    assert world.running.find("ConfigMap", "a") is not None


def test_rights_are_asked_for(world: World) -> None:
    world.running.state.denied = ["patch nodes", "create pods/exec"]
    assert world.cluster.may("list", POD, "argosy") is True
    assert world.cluster.may("create", POD, "argosy", subresource="exec") is False


def test_a_command_in_a_pod(world: World) -> None:
    world.running.state.on_exec = lambda pod, container, command: (0, f"{pod} {container} {' '.join(command)}")
    assert run_in(world.cluster, "p", "argosy", "c", ["a", "b"], 5.0) == "p c a b"
    world.running.state.on_exec = lambda *_: (7, "it broke")
    with pytest.raises(ApiError, match="exit code 7: it broke"):
        run_in(world.cluster, "p", "argosy", "c", ["a"], 5.0)
    world.running.state.on_exec = None
    with pytest.raises(ApiError, match="needs create on pods/exec") as raised:
        run_in(world.cluster, "p", "argosy", "c", ["a"], 5.0)
    assert raised.value.is_forbidden


def test_a_page_of_a_pod_comes_through_the_proxy_or_from_within(world: World) -> None:
    world.running.state.pages["*/pods/p:8000/proxy/progressz"] = {"replicas": [1]}
    assert page(world.cluster, "p", "argosy", "gateway", 8000, "/progressz") == {"replicas": [1]}
    world.running.state.pages.clear()  # as a NetworkPolicy does
    world.running.state.on_exec = lambda *_: (0, '{"replicas": [2]}')
    assert page(world.cluster, "p", "argosy", "gateway", 8000, "/progressz") == {"replicas": [2]}


def test_without_the_client_the_tool_says_what_to_install(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    code, text = world.run("status")
    assert code == exits.ERROR
    assert "pip install 'argosy[k8s]'" in text
    assert world.run("render", "dev-cpu")[0] == exits.DONE
