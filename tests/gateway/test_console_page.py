"""The console in a real browser, on a gateway without engines: its arithmetic, its parser, text that is hostile."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from serving.errors import NoCapacity
from tests.e2e.browser import CHROMIUM, Browser, Page, a_browser
from tests.e2e.playground import open_playground, send
from tests.gateway.world import MODEL, Script, World, a_world

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the console was not looked at")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with a_browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def world() -> Iterator[World]:
    with a_world() as world:
        yield world


@pytest.fixture
def page(world: World, browser: Browser) -> Iterator[Page]:
    page = browser.open(f"{world.url}/console")
    page.until("document.body.dataset.link === 'live'")
    yield page
    assert page.problems == []
    page.close()


MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script> & ok"


def test_markup_stays_text_wherever_it_comes_from(browser: Browser) -> None:
    """A model that says nothing else, prompts of the same kind, log-probabilities and their alternatives."""
    with a_world(Script(text=MARKUP)) as world:
        page = browser.open(f"{world.url}/console")
        for kind, logprobs in (("completion", 3), ("completion", ""), ("chat", 2), ("chat", "")):
            open_playground(page, kind, MARKUP, max_tokens=200, logprobs=logprobs)
            send(page)
            assert page.text(".turn:last-child .text") == MARKUP
            assert MARKUP in page.text(".turn:last-child .asked")
            page.value("document.querySelector('.turn:last-child .text').focus()")
            page.press("ArrowRight")
            assert page.value("document.getElementById('popup').hidden") == (not logprobs)
            assert page.value("document.querySelectorAll('main img, script:not([src]), #popup img').length") == 0
        assert page.problems == []
        write = "(() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } })()"
        assert page.value(write) == "TypeError"  # and if a line of the page tried, the browser would not let it
        page.close()


def test_a_stream_that_breaks_shows_what_came_and_the_servers_words(browser: Browser) -> None:
    failure = NoCapacity("Every replica is gone.", retry_after_s=1.0, reason="draining")
    with a_world(Script(text="hello world and more", gap_s=0.02, fail_after=6, failure=failure)) as world:
        page = browser.open(f"{world.url}/console")
        open_playground(page, "completion", "x", max_tokens=50)
        send(page)
        assert page.text("#run-note") == "failed"
        assert "Every replica is gone." in page.text("#run-error") and "no_capacity" in page.text("#run-error")
        assert "hello world and more".startswith(page.text(".turn .text")) and page.text(".turn .text")
        world.plane.script.fail_after = None
        send(page)
        assert page.text("#run-note") == "complete" and page.value("document.getElementById('run-error').hidden")
        assert page.text(".turn .text") == "hello world and more"
        page.close()


READ = """(async () => {
  let text = "";
  try {
    const body = JSON.stringify({prompt: "x", max_tokens: 50, stream: true});
    const reply = await fetch("/v1/completions", {method: "POST", body});
    const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const {done, value} = await reader.read();
      if (done) return "a clean end: " + text;
      text += value;
    }
  } catch (error) { return error.name + ": " + text }
})()"""


def test_a_page_reads_the_error_before_the_stream_breaks(browser: Browser) -> None:
    """A body that breaks takes along what its reader has not read: the error used to be lost in two of three."""
    failure = NoCapacity("Every replica is gone.", retry_after_s=1.0, reason="draining")
    with a_world(Script(text="hello world and more", gap_s=0.005, fail_after=6, failure=failure)) as world:
        page = browser.open(f"{world.url}/console")
        for _ in range(8):
            told = page.value(READ)
            assert told.startswith("TypeError: ") and "Every replica is gone." in told.splitlines()[-2], told
        page.close()


def test_a_hidden_page_asks_nothing(page: Page) -> None:
    def hide(is_hidden: bool) -> None:
        hidden = json.dumps(is_hidden)
        page.value(f"Object.defineProperty(document, 'hidden', {{value: {hidden}, configurable: true}})")
        page.value("document.dispatchEvent(new Event('visibilitychange'))")

    hide(True)
    page.until("document.body.dataset.link === 'paused'")
    time.sleep(0.2)  # what was on its way
    num_asked = len(page.urls)
    time.sleep(1.3)
    assert page.value("1") and len(page.urls) == num_asked
    hide(False)
    page.until("document.body.dataset.link === 'live'")
    assert len(page.urls) > num_asked


def test_an_hour_of_polls_is_kept_in_bounds_and_counted_right(world: World, page: Page) -> None:
    """Made-up states: 100 tokens/s, then a restart of the gateway; first tokens after 30 ms, some after 10 minutes."""
    state = world.get("/console/state").json()
    found = page.value(
        f"""import('./console/history.js').then(({{History, quantile}}) => {{
          const state = {json.dumps(state)};
          const history = new History();
          const model = state.models[{json.dumps(MODEL)}];
          const first = model.time_to_first_token.counts;
          const zero = first.map(() => 0);
          const rates = [];
          for (let at = 0; at < 3600; at += 1) {{
            const uptime_s = at < 3000 ? 100 + at : at - 2990;
            const counts = zero.with(3, 9 * uptime_s).with(-1, uptime_s);
            history.add({{
              ...state, now: state.now + at, gateway: {{...state.gateway, uptime_s}},
              models: {{[{json.dumps(MODEL)}]: {{...model, generation_tokens: 100 * uptime_s,
                time_to_first_token: {{counts, sum: 1}}}}}},
            }});
            const {{output}} = history.samples.at(-1);
            rates.push(output && Math.round(output));
          }}
          return {{
            samples: history.samples.length, documents: history.documents.length, rates: [...new Set(rates)],
            ttft: history.samples.at(-1).ttft, none: quantile([1, 2], [0, 0, 0], 0.5),
            within: quantile([1, 2], [0, 4, 0], 0.5),
          }};
        }})"""
    )
    assert found["samples"] == 600 and found["documents"] <= 12
    assert found["rates"] == [None, 100]
    assert 0.02 <= found["ttft"][0] <= 0.04 and found["ttft"][2] == 600.0
    assert found["none"] is None and found["within"] == 1.5


def test_events_are_cut_right_wherever_the_stream_is_torn(page: Page) -> None:
    text = 'data: {"a": "é→🚢"}\r\n\r\n: queue position=3\n\ndata: x\ndata: y\n\nevent: z\ndata:no space\n\n'
    text += "data: [DONE]\n\n"
    wanted = [{"data": '{"a": "é→🚢"}'}, {"comment": "queue position=3"}, {"data": "x\ny"}, {"data": "no space"}]
    found = page.value(
        f"""import('./console/stream.js').then(({{EventCutter}}) => {{
          const bytes = new TextEncoder().encode({json.dumps(text)});
          const all = [];
          for (let at = 0; at <= bytes.length; at += 1) {{
            const decoder = new TextDecoder();
            const cutter = new EventCutter();
            const events = [];
            for (const part of [bytes.slice(0, at), bytes.slice(at)])
              events.push(...cutter.feed(decoder.decode(part, {{stream: true}})));
            all.push(JSON.stringify(events));
          }}
          return [...new Set(all)];
        }})"""
    )
    assert [json.loads(events) for events in found] == [[*wanted, {"data": "[DONE]"}]]
