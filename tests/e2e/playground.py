"""The console's playground, used as a person uses it."""

from __future__ import annotations

import json
from typing import Any

from tests.e2e.browser import Page


def open_playground(page: Page, kind: str, prompt: str, **fields: Any) -> None:
    page.value("location.hash = '#playground'")
    page.until("document.getElementById('p-model').value")
    page.value(f"document.querySelector('[name=kind][value={kind}]').click()")
    for name, value in {"prompt": prompt, **fields}.items():
        fill(page, name, str(value))


def fill(page: Page, name: str, value: str) -> None:
    field = f"document.querySelector('#ask [name={name}]')"
    page.value(f"{field}.value = {json.dumps(value)}, {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def send(page: Page) -> None:
    """From the keyboard; waits for the end of the answer."""
    page.value("document.querySelector('#ask [name=prompt]').focus()")
    page.press("Enter", ctrl=True)
    page.until("!document.getElementById('send').disabled")


def shown_tokens(page: Page) -> list[list[Any]]:
    """[token, log-probability] of every token of the last answer."""
    spans = "[...document.querySelectorAll('.turn:last-child .text span')]"
    shown: list[list[Any]] = page.value(f"{spans}.flatMap((span) => JSON.parse(span.dataset.logprobs))")
    return shown
