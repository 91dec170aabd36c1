"""The console in a real browser, against a real service on a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.browser import CHROMIUM, Browser, Page, a_browser
from tests.e2e.playground import fill, open_playground, send, shown_tokens
from tests.e2e.service import Service, serving
from tests.tiny import tiny_model_folder

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the console was not looked at")

MODEL = "tiny"
TOKEN = "an-operators-token-of-some-length"
STRANGER = "console.test"  # a name for this machine that is not a local one: who uses it has to show the token
VIEWS = ("fleet", "live", "requests", "playground")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("console")
    (folder / "token").write_text(TOKEN)
    (folder / "serve.yaml").write_text(f"operator_token_file: {folder / 'token'}\n")
    # Slow enough that a request can be seen while it runs.
    model = tiny_model_folder(folder / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    flags = ("--runtime", "local", "--replicas", "2", "--model", str(model), "--served-model-name", MODEL)
    with serving(folder, *flags, "--kv-cache-bytes", "64MiB", "--config", str(folder / "serve.yaml")) as service:
        yield service


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("chromium")
    with a_browser(folder, f"--host-resolver-rules=MAP {STRANGER} 127.0.0.1") as browser:
        yield browser


@pytest.fixture
def page(service: Service, browser: Browser) -> Iterator[Page]:
    """The console, live. Whatever a test did with it: nothing went wrong in it, and it asked nobody but its server."""
    page = browser.open(f"{service.url}/console")
    page.until("document.body.dataset.link === 'live'")
    yield page
    page.value("0")  # hears what is still on its way
    assert page.problems == []
    assert page.urls and all(re.match(rf"{re.escape(service.url)}/|blob:", url) for url in page.urls), page.urls
    page.close()


def test_every_view_is_reached_by_keys_and_renders_in_both_themes(page: Page) -> None:
    for number, view in enumerate(VIEWS, 1):
        page.press(str(number))
        page.until(f"location.hash === '#{view}' && !document.getElementById('view-{view}').hidden")
        assert page.value("[...document.querySelectorAll('main > section')].filter((s) => !s.hidden).length") == 1
        backgrounds = set()
        for scheme in ("light", "dark"):
            page.prefer(scheme)
            backgrounds.add(page.value("getComputedStyle(document.body).backgroundColor"))
        assert backgrounds == {"rgb(255, 255, 255)", "rgb(20, 23, 28)"}
        for width in (1280, 400):
            page.resize(width, 800)
            assert page.value("document.documentElement.scrollWidth") <= width, (view, width)
    page.press("t", "t")  # dark, whatever the system has
    page.prefer("light")
    assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
    page.press("Escape", "?")
    page.until("document.getElementById('help').open")
    page.press("Escape")
    page.until("!document.getElementById('help').open")
    page.press("Tab")
    assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_the_fleet_is_that_of_progressz(page: Page, service: Service) -> None:
    service.wait_for_blocks()
    page.until("document.querySelectorAll('.card').length === 2")
    for replica in service.replicas():
        card = page.text(f".card[data-replica={replica['id']}]")
        assert str(replica["ranks"][0]["pid"]) in card and replica["ranks"][0]["host"] in card
        assert f"of {replica['blocks_total']:,}" in card and MODEL in card
        assert page.text(f".card[data-replica={replica['id']}] .badge") == "ready"
    assert "2 / 2" in page.text("#fleet-tiles")


def test_a_completion_of_the_playground_is_the_apis(page: Page, service: Service) -> None:
    body = {
        "model": MODEL,
        "prompt": "the ship and",
        "max_tokens": 40,
        "temperature": 0.9,
        "logprobs": 3,
        "stop": ["q"],
    }
    seed = 2**62 + 1  # a number of JavaScript would not hold it
    (wanted,) = service.http.post("/v1/completions", json=body | {"seed": seed}).json()["choices"]
    fields = {"max_tokens": 40, "temperature": 0.9, "logprobs": 3, "stop": "q"}
    open_playground(page, "completion", "the ship and", seed=seed, **fields)
    assert str(seed) in page.text("#curl")
    send(page)
    assert page.text("#run-note") == "complete"
    assert page.text(".turn .text") == wanted["text"]
    logprobs = wanted["logprobs"]
    assert shown_tokens(page) == [
        list(pair) for pair in zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    ]
    assert page.text(".choice .end") == f"finished: {wanted['finish_reason']}"
    page.value("document.querySelector('.turn .text').focus()")
    page.press("ArrowRight", "ArrowRight")
    others = logprobs["top_logprobs"][1]
    assert page.value("document.querySelectorAll('#popup tbody tr').length") == len(others)
    best = max(others.values())
    assert f"{100 * 2.718281828459045**best:.1f}"[:2] in page.text("#popup td")


def test_a_chat_goes_on_and_shows_the_apis_tokens(page: Page, service: Service) -> None:
    messages = [{"role": "system", "content": "short"}, {"role": "user", "content": "naïf?"}]
    body: dict[str, Any] = {"model": MODEL, "seed": 7, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    open_playground(page, "chat", "naïf?", system="short", seed=7, max_tokens=12, logprobs=2)
    for turn in ("and then", ""):
        (wanted,) = service.http.post("/v1/chat/completions", json=body | {"messages": messages}).json()["choices"]
        send(page)
        assert page.text(".turn:last-child .text") == wanted["message"]["content"]
        assert shown_tokens(page) == [[token["token"], token["logprob"]] for token in wanted["logprobs"]["content"]]
        messages += [{"role": "assistant", "content": wanted["message"]["content"]}, {"role": "user", "content": turn}]
        fill(page, "prompt", turn)


def test_errors_are_the_servers_and_name_the_field(page: Page) -> None:
    open_playground(page, "completion", "x", temperature="much")
    send(page)
    page.problems[:] = [problem for problem in page.problems if "400" not in problem]  # chromium logs every one
    error = page.text("#run-error")
    assert "temperature" in error and "HTTP 400" in error
    assert page.value("document.activeElement.name") == "temperature"
    open_playground(page, "completion", "x", max_tokens=400, temperature="")
    page.value("document.querySelector('#ask [name=ignore_eos]').checked = true")
    page.value("document.getElementById('send').click()")
    page.until("document.querySelectorAll('.turn .text span').length > 3")
    page.press("Escape")
    page.until("!document.getElementById('send').disabled")
    assert page.text("#run-note") == "stopped by you"
    assert 3 < page.value("document.querySelectorAll('.turn .text span').length") < 400


def test_a_timeline_opens_from_the_keyboard_alone(page: Page, service: Service) -> None:
    body = {"model": MODEL, "prompt": "the sea " * 40, "max_tokens": 30, "ignore_eos": True, "n": 2}
    found = service.http.post("/v1/completions", json=body, headers={"x-request-id": "a-request-to-find"}).json()
    service.http.post("/v1/completions", json=body | {"max_tokens": 2})
    account = service.http.get(f"/v1/requests/{found['id']}").json()
    page.press("/")
    page.until("document.activeElement.id === 'filter'")
    page.write("to-find")
    page.until("document.querySelectorAll('#requests tbody tr').length === 1")
    page.press("ArrowDown")
    page.until(f"document.activeElement.textContent === '{found['id']}'")
    page.press("Enter")
    page.until(f"document.querySelectorAll('.lane').length === 3 && location.hash === '#requests/{found['id']}'")
    kinds = page.value(
        "[...document.querySelectorAll('.lane')].map((lane) => [...lane.children].map((c) => c.dataset.kind))"
    )
    told = [account["events"], *(choice["events"] for choice in account["choices"])]
    assert kinds == [[event["kind"] for event in events] for events in told]
    assert {"sent", "chunk", "decode", "finished"} <= set(kinds[1])
    page.until("document.activeElement.tagName === 'H2'")
    while page.value("document.activeElement.closest('.lane') === null"):
        page.press("Tab")
    page.press("ArrowDown", "ArrowRight")
    assert page.value("document.activeElement.dataset.kind") in kinds[1]
    assert "choice 0" in page.value("document.activeElement.parentElement.ariaLabel")
    assert len(page.text(".detail")) > 20
    before = page.value("document.querySelector('.inner').offsetWidth")
    page.press("+")
    assert page.value("document.querySelector('.inner').offsetWidth") == pytest.approx(2 * before, rel=0.02)
    page.press("Escape")
    page.until(f"document.activeElement.textContent === '{found['id']}'")  # back where one was


def test_the_chrome_trace_is_saved(page: Page, service: Service, tmp_path: Path) -> None:
    found = service.http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 3}).json()
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.value(f"location.hash = '#requests/{found['id']}'")
    page.until("document.querySelector('.head button') && document.querySelector('.lane')")
    page.value("document.querySelector('.head button').click()")
    deadline = time.monotonic() + 10
    while not (saved := list(tmp_path.glob("*.json"))) and time.monotonic() < deadline:
        page.value("0")
        time.sleep(0.05)
    assert [path.name for path in saved] == [f"{found['id']}.trace.json"]
    trace = service.http.get(f"/v1/requests/{found['id']}", params={"format": "chrome"}).json()
    assert json.loads(saved[0].read_text()).keys() == trace.keys()


@contextlib.contextmanager
def load(service: Service, num_streams: int) -> Iterator[None]:
    """Requests one after the other on every stream, until the block is left."""
    is_over = threading.Event()
    body = {"model": MODEL, "prompt": "the sea", "max_tokens": 300, "ignore_eos": True}

    def ask() -> None:
        while not is_over.is_set():
            assert service.http.post("/v1/completions", json=body).status_code == 200

    threads = [threading.Thread(target=ask) for _ in range(num_streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(60)


def test_load_shows_in_figures_and_lines(page: Page, service: Service) -> None:
    page.press("2")
    tiles = "[...document.querySelectorAll('#live-tiles div')]"
    tile = tiles + ".find((tile) => tile.firstChild.textContent === '{}').children[1].textContent.replace(',', '')"
    page.until(f"{tiles}.length")
    with load(service, 4):
        page.until(f"Number({tile.format('Running')}) > 0 && parseFloat({tile.format('Output')}) > 10")
        page.until(f"/ms|µs/.test({tile.format('Inter-token')}) && /ms|µs/.test({tile.format('First token')})")
        page.until("document.querySelector('#charts .line.output').getAttribute('d').includes('L')")
    page.until(f"{tile.format('Running')} === '0'")
    counted = service.http.get("/console/state").json()["models"][MODEL]["generation_tokens"]
    page.until(f"document.getElementById('counts').textContent.includes('output tokens{counted:,}')")


def test_a_stranger_is_asked_for_the_token(service: Service, browser: Browser) -> None:
    page = browser.open(f"http://{STRANGER}:{service.port}/console#requests")
    page.until("document.getElementById('login').open && document.body.dataset.link === 'locked'")
    assert "operator" in page.text("#login-why")
    assert page.text("#replicas") == ""
    for token in ("wrong", TOKEN):
        page.until("document.activeElement.id === 'token'")
        page.write(token)
        page.press("Enter")
        page.until("!document.getElementById('login').open")
        if token == "wrong":
            page.until("document.getElementById('login').open")
    page.until("document.body.dataset.link === 'live' && document.querySelectorAll('.card').length === 2")
    page.until("document.querySelectorAll('#requests tbody tr').length > 0")
    stored = page.value("[JSON.stringify({...localStorage}), JSON.stringify({...sessionStorage}), document.cookie]")
    assert TOKEN not in stored[0] and TOKEN in stored[1] and not stored[2]
    assert TOKEN not in page.value("document.documentElement.outerHTML")
    page.go(f"http://{STRANGER}:{service.port}/console")  # the tab keeps it
    page.until("document.body.dataset.link === 'live'")
    assert all("401" in problem for problem in page.problems), page.problems
    page.close()


def test_a_killed_replica_and_a_lost_server_are_unmistakable(page: Page, service: Service) -> None:
    page.until("document.querySelectorAll('.card').length === 2")
    name, pid = next(iter(service.pids().items()))
    card = f".card[data-replica={name}]"
    os.kill(pid, signal.SIGSTOP)  # hangs before it dies: it is down for longer than a poll
    page.until(f"['down', 'stalled'].includes(document.querySelector('{card}').dataset.state)")
    assert page.text(f"{card} .cause")
    red = page.value(f"getComputedStyle(document.querySelector('{card} .badge')).backgroundColor")
    assert red != page.value(
        "getComputedStyle(document.querySelector('.card[data-state=ready] .badge')).backgroundColor"
    )
    assert "not ready" in page.value("document.title")
    os.kill(pid, signal.SIGKILL)
    page.until(f"document.querySelector('{card}').dataset.state === 'ready'", 30)
    assert name in page.text("#news") and "ready" in page.text("#news li")
    assert str(pid) not in page.text(card)
    service.wait_until_ready(30)
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    page.until("document.body.dataset.link === 'gone' && !document.getElementById('banner').hidden")
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.until("document.body.dataset.link === 'live' && document.getElementById('banner').hidden")
    page.problems[:] = [problem for problem in page.problems if "DISCONNECTED" not in problem]
