"""Wakes: order, turns, and one failure that stays one."""

from __future__ import annotations

import asyncio
import logging

import pytest

from serving.gateway.wakes import Wakes


async def turn() -> None:
    await asyncio.sleep(0)


def test_calls_are_made_in_order_in_one_turn_and_never_at_once() -> None:
    async def test() -> None:
        wakes = Wakes()
        seen: list[int] = []
        for number in range(5):
            wakes.add(lambda number=number: seen.append(number))  # type: ignore[misc]
        assert seen == []
        await turn()
        assert seen == [0, 1, 2, 3, 4]
        await turn()
        assert seen == [0, 1, 2, 3, 4]

    asyncio.run(test())


def test_a_call_that_adds_itself_lets_others_run_between() -> None:
    async def test() -> None:
        wakes = Wakes()
        seen: list[str] = []

        def again() -> None:
            seen.append("again")
            if len(seen) < 6:
                wakes.add(again)

        wakes.add(again)
        asyncio.get_running_loop().call_soon(seen.append, "other")
        await turn()
        assert seen == ["again", "other"]
        await turn()
        assert seen == ["again", "other", "again"]

    asyncio.run(test())


def test_a_call_that_fails_is_logged_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        wakes = Wakes()
        seen: list[int] = []
        wakes.add(lambda: seen.append(1 // 0))
        wakes.add(lambda: seen.append(2))
        await turn()
        assert seen == [2]
        wakes.add(lambda: seen.append(3))
        await turn()
        assert seen == [2, 3]

    with caplog.at_level(logging.ERROR, "argosy.gateway"):
        asyncio.run(test())
    assert "ZeroDivisionError" in caplog.text
