"""Text with exact token counts, learnt from the server itself: no tokenizer file is needed.

`usage.prompt_tokens` counts a prompt by the server's own tokenizer and chat template. A list of words is sent once and
twice: when the second costs exactly as many tokens more as there are words, each of them is one token. Otherwise the
list is halved. What a template adds is what a prompt of one word costs in all. A final prompt of random units must
cost what was foretold, or lengths are called approximate.
"""

from __future__ import annotations

import random
from typing import Any

import httpx

from loadtest.http import Target
from loadtest.plan import Words
from loadtest.spec import SpecError
from loadtest.tenants import Tenant

WORDS = (
    *("time", "way", "year", "work", "day", "man", "world", "life", "part", "number", "house", "water"),
    *("place", "week", "case", "point", "company", "right", "group", "problem", "fact", "hand", "eye", "city"),
    *("name", "room", "line", "book", "side", "air", "state", "food", "level", "door", "field", "land"),
    *("war", "road", "tree"),
)
CANDIDATES = ([f" {word}" for word in WORDS], list("0123456789"))
"""Words with the space before them, as most vocabularies hold them; digits where numbers are split into them."""
MIN_UNITS = 8
MAX_PROBES = 64
CHECK_UNITS = 40


class Prober:
    """Asks what prompts cost."""

    def __init__(self, target: str, tenant: Tenant, timeout_s: float = 120.0) -> None:
        self.target = Target(target)
        self._http = httpx.Client(base_url=self.target.url, headers=tenant.headers, timeout=timeout_s)
        self.num_probes = 0

    def close(self) -> None:
        self._http.close()

    def model(self, wanted: str | None) -> tuple[str, dict[str, Any]]:
        """(name, entry of /v1/models) of the model asked for, or of the first. Raises SpecError."""
        try:
            response = self._http.get("/v1/models")
            entries = response.raise_for_status().json()["data"]
            found: Any = next((entry for entry in entries if wanted in (None, entry["id"])), None)
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            if wanted is not None:
                return wanted, {}
            raise SpecError(f"{self.target.url}/v1/models: {error}; name the model with --model") from None
        if found is None and wanted is None:
            raise SpecError(f"{self.target.url} serves no model")
        return (wanted, {}) if found is None and wanted is not None else (found["id"], found)

    def cost(self, endpoint: str, model: str, texts: list[str]) -> int:
        """Prompt tokens of a text, or of a chat whose turns alternate between user and assistant. Raises SpecError."""
        self.num_probes += 1
        if self.num_probes > MAX_PROBES:
            raise SpecError(f"no text of known length after {MAX_PROBES} probes")
        body: dict[str, Any] = {"model": model, "max_tokens": 1}
        if endpoint == "chat":
            roles = ("user", "assistant")
            body["messages"] = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
        else:
            body["prompt"] = texts[0]
        path = "/v1/chat/completions" if endpoint == "chat" else "/v1/completions"
        try:
            response = self._http.post(path, json=body)
            response.raise_for_status()
            return int(response.json()["usage"]["prompt_tokens"])
        except httpx.HTTPStatusError as error:
            raise SpecError(f"{path}: {error.response.status_code}: {error.response.text[:200]}") from None
        except httpx.HTTPError as error:
            raise SpecError(f"{self.target.url}{path}: {error}") from None
        except (ValueError, KeyError, TypeError):
            raise SpecError(f"{path}: the response has no usage.prompt_tokens") from None


def fit(prober: Prober, model: str, endpoints: tuple[str, ...], has_turns: bool) -> Words:
    """Words that are exact on every endpoint named, or `is_exact` False. Raises SpecError when nothing is answered."""
    draw = random.Random("argosy:fitting")
    for opener, candidates in (("Go", CANDIDATES[0]), ("Go", CANDIDATES[1])):
        overhead = {endpoint: prober.cost(endpoint, model, [opener]) for endpoint in endpoints}
        try:
            units = _units(prober, model, endpoints[0], opener, overhead[endpoints[0]], candidates)
            if len(units) < MIN_UNITS:
                continue
            turn = 0
            if has_turns:
                turn = prober.cost("chat", model, [opener] * 3) - overhead["chat"]
            text = opener + "".join(draw.choices(units, k=CHECK_UNITS))
            is_exact = all(
                prober.cost(endpoint, model, [text]) == overhead[endpoint] + CHECK_UNITS for endpoint in endpoints
            )
            if is_exact and has_turns:
                wanted = overhead["chat"] + turn + 3 * CHECK_UNITS
                is_exact = prober.cost("chat", model, [text] * 3) == wanted
        except SpecError:
            continue
        if is_exact:
            return Words(opener=opener, units=tuple(units), overhead=overhead, turn_overhead=turn, is_exact=True)
    return Words(overhead=overhead, is_exact=False)


def _units(
    prober: Prober, model: str, endpoint: str, opener: str, overhead: int, candidates: list[str]
) -> list[str]:  # fmt: skip
    """Those of the candidates that cost one token each."""
    if not candidates:
        return []
    once = prober.cost(endpoint, model, [opener + "".join(candidates)])
    if once - overhead == len(candidates):
        return candidates
    if len(candidates) <= MIN_UNITS // 2:
        return []
    half = len(candidates) // 2
    return [
        unit
        for part in (candidates[:half], candidates[half:])
        for unit in _units(prober, model, endpoint, opener, overhead, part)
    ]
