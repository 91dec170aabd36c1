"""The console's routes: a fixed table of files that hold no data, and data for operators only."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.gateway.api.console import FOLDER, MEDIA_TYPES
from serving.metrics.histogram import Histogram
from serving.metrics.labels import MAX_MODELS, MAX_RANKS, MAX_REPLICAS
from serving.metrics.snapshot import PlaneView, ReplicaView
from serving.types import RankState, ReplicaStats
from serving.wire import Beat
from tests.gateway.world import MODEL, Script, World, a_world

TOKEN = "an-operators-token-of-some-length"
NAMES = sorted(path.name for path in FOLDER.iterdir())


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def test_every_file_is_served_as_what_it_is_under_a_strict_policy() -> None:
    with a_world() as world:
        for name in NAMES:
            reply = world.get("/console" if name == "index.html" else f"/console/{name}")
            assert reply.status_code == 200, name
            assert reply.content == (FOLDER / name).read_bytes()
            assert reply.headers["content-type"] == MEDIA_TYPES[Path(name).suffix]
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["referrer-policy"] == "no-referrer"
            policy = dict(rule.split(" ", 1) for rule in reply.headers["content-security-policy"].split("; "))
            assert policy.pop("default-src") == policy.pop("base-uri") == policy.pop("form-action") == "'none'"
            assert policy.pop("frame-ancestors") == policy.pop("trusted-types") == "'none'"
            assert policy.pop("require-trusted-types-for") == "'script'"
            assert policy == dict.fromkeys(("script-src", "style-src", "connect-src", "img-src"), "'self'")


def test_an_unchanged_file_is_not_sent_again() -> None:
    with a_world() as world:
        first = world.get("/console/main.js")
        assert first.headers["cache-control"] == "no-cache"  # asked for again: a new gateway's page is never mixed
        again = httpx.get(f"{world.url}/console/main.js", headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"] != world.get("/console").headers["etag"]
        other = httpx.get(f"{world.url}/console/main.js", headers={"if-none-match": '"0"'})
        assert other.status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "index.html",
        "nothing.js",
        "__init__.py",
        "main.js/",
        "%2e%2e%2fapp.py",
        "..%2f..%2fapi%2fconsole.py",
        "%2fetc%2fpasswd",
        "main.js%00",
        "MAIN.JS",
        "x" * 4000,
    ],
)
def test_no_other_name_reaches_a_file(name: str) -> None:
    with a_world() as world:
        reply = world.get(f"/console/{name}")
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "not_found"
        assert len(reply.content) < 1000


def test_a_slash_too_many_leads_to_the_page() -> None:
    with a_world() as world:
        reply = httpx.get(f"{world.url}/console/", follow_redirects=True)
        assert (reply.status_code, reply.url.path) == (200, "/console")


def test_the_files_know_each_other_and_nobody_else() -> None:
    """Everything that is linked or imported is a file of the folder, everything in the folder is used."""
    used = {"index.html", *re.findall(r'(?:href|src)="console/([^"]+)"', read("index.html"))}
    for name in NAMES:
        text = read(name).replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|[\"'(]//", text), name
        if name.endswith(".js"):
            used.update(re.findall(r' from "\./([^"]+)"', text))
            assert text.count(" from ") >= len(re.findall(r"^import", text, re.M))
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bFunction\(", text)
    assert used == set(NAMES)
    page = read("index.html")
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script>", page)  # nothing inline: the policy would refuse it


def test_the_files_are_short_and_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["serving.gateway"]
    for name in NAMES:
        assert any(fnmatch(f"console/{name}", pattern) for pattern in patterns), name
        assert read(name).count("\n") < 400, name


def ask(world: World, path: str, **headers: str) -> httpx.Response:
    return httpx.get(world.url + path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def state(world: World, **headers: str) -> httpx.Response:
    return ask(world, "/console/state", **headers)


def test_the_page_is_for_anyone_and_its_data_for_operators(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    strangers: tuple[dict[str, str], ...] = ({"x_forwarded_for": "192.0.2.1"}, {"host": "evil.example"})
    with a_world(operator_token_file=str(tmp_path / "token")) as world:
        assert state(world).status_code == 200
        for stranger in strangers:
            refused = state(world, **stranger)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "operator_only")
            assert state(world, authorization="Bearer wrong", **stranger).status_code == 401
            assert state(world, authorization=f"Bearer {TOKEN}", **stranger).status_code == 200
            page = httpx.get(
                f"{world.url}/console", headers={name.replace("_", "-"): v for name, v in stranger.items()}
            )
            assert page.status_code == 200
    with a_world() as world:
        refused = state(world, authorization=f"Bearer {TOKEN}", host="evil.example")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_only")


def test_the_state_counts_what_happened() -> None:
    with a_world(Script(frames=(3,), cached_tokens=1)) as world:
        before = state(world)
        assert before.headers["cache-control"] == "no-store"
        world.complete(n=2)
        world.complete(n=0)
        after = state(world).json()
    first = before.json()
    assert after["now"] > first["now"] and after["gateway"]["uptime_s"] > first["gateway"]["uptime_s"] > 0
    assert first["models"][MODEL]["generation_tokens"] == 0
    model = after["models"][MODEL]
    assert (model["generation_tokens"], model["finished"], model["num_running"]) == (18, {"stop": 2}, 0)
    assert model["card"]["max_num_seqs"] == 8 and model["card"]["determinism"] == "exact"
    assert after["errors"] == {"invalid_value": 1}
    assert after["responses"]["200"] == 2 and after["responses"]["400"] == 1
    for name in ("time_to_first_token", "inter_token_latency", "request_latency", "queue_time"):
        assert len(model[name]["counts"]) == len(after["bounds"]["seconds"]) + 1
    assert sum(model["time_to_first_token"]["counts"]) == 1 and model["time_to_first_token"]["sum"] > 0
    assert after["gateway"]["is_ready"] and after["replicas"][0]["id"] == "replica-0"


def a_replica(number: int, is_up: bool, num_ranks: int = 1) -> dict[str, Any]:
    ranks = [{"rank": rank, "host": "host", "pid": 1, "step": 0, "age_s": 0.0} for rank in range(num_ranks)]
    entry = {"id": f"replica-{number}", "state": "ready" if is_up else "down", "epoch": 1, "ranks": ranks}
    return entry if is_up else entry | {"error": "connection lost"}


def a_view(number: int, stats: ReplicaStats | None) -> ReplicaView:
    ranks = [RankState(rank=0, host="host", pid=1, step=0, age_s=0.0)]
    beat = Beat(
        seq=1,
        step=7,
        step_age_s=0.0,
        announced_s=0.25,
        state="ready",
        num_running=1,
        num_waiting=0,
        blocks_used=3,
        blocks_total=10,
        granted=1,
        ranks=ranks,
    )
    return ReplicaView(f"replica-{number}", MODEL, beat, 0.01, stats)


def test_a_replica_is_what_its_beats_say_and_one_that_is_down_says_nothing() -> None:
    stats = ReplicaStats(steps=5, decode_tokens=9, hardware_fraction=0.5, phases=[("weights", 1.5)])
    with a_world() as world:
        world.plane.progress = lambda: [a_replica(0, True), a_replica(1, False), a_replica(2, True)]  # type: ignore[method-assign]
        views = (a_view(0, stats), a_view(1, stats), a_view(2, None))
        world.gateway.metrics.plane = lambda: PlaneView(replicas=views, faults={"replica_lost": 1})
        shown = state(world).json()
    up, down, old = shown["replicas"]
    assert (up["announced_s"], up["model"], up["num_ranks"]) == (0.25, MODEL, 1)
    assert up["stats"]["decode_tokens"] == 9 and up["stats"]["hardware_fraction"] == 0.5
    assert down["error"] == "connection lost" and "stats" not in down
    assert old["stats"] is None
    assert shown["faults"] == {"replica_lost": 1}


def test_the_state_is_bounded_and_shows_trouble_first() -> None:
    with a_world() as world:
        fleet = [a_replica(number, number % 100 != 7, MAX_RANKS + 5) for number in range(500)]
        world.plane.progress = lambda: fleet  # type: ignore[method-assign]
        stats = ReplicaStats(step_counts=[1] * 14, ratio_counts=[1] * 13)
        views = tuple(a_view(number, stats) for number in range(500))
        world.gateway.metrics.plane = lambda: PlaneView(replicas=views, loop_lag=Histogram((1.0,)))
        for number in range(3 * MAX_MODELS):
            world.gateway.metrics.model(f"model-{number}").generation_tokens += 1
        reply = state(world)
        shown = reply.json()
    assert (shown["num_replicas"], len(shown["replicas"])) == (500, MAX_REPLICAS)
    assert [replica["state"] for replica in shown["replicas"][:6]] == ["down"] * 5 + ["ready"]
    assert all(len(replica["ranks"]) == MAX_RANKS for replica in shown["replicas"])
    assert shown["replicas"][0]["num_ranks"] == MAX_RANKS + 5
    assert len(shown["models"]) == MAX_MODELS + 1
    assert len(reply.content) < 1 << 20
