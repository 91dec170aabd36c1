"""The directory by itself: a listing that waits for news, and forgets who stays silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest

from serving.deployments import directory as directory_module
from serving.deployments.directory import Directory


def entry(name: str, **changes: object) -> dict[str, Any]:
    return {"id": name, "epoch": 1, "host": "127.0.0.1", "port": 7600, "card": {}, "state": "ready"} | changes


def ids(listing: dict[str, Any]) -> list[str]:
    return [member.id for member in listing["replicas"]]


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def test_an_unknown_version_is_answered_at_once_and_the_current_one_when_something_changes() -> None:
    async def scenario() -> None:
        directory = Directory()
        first = await directory.listing(-1)
        assert first["replicas"] == []
        waiting = asyncio.create_task(directory.listing(first["version"]))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await directory.renew(entry("a"))
        second = await asyncio.wait_for(waiting, 1.0)
        assert ids(second) == ["a"] and second["version"] > first["version"]

    run(scenario())


def test_renewals_that_say_nothing_new_wake_nobody() -> None:
    async def scenario() -> None:
        directory = Directory()
        await directory.renew(entry("a"))
        version = (await directory.listing(-1))["version"]
        waiting = asyncio.create_task(directory.listing(version))
        for _ in range(5):
            await directory.renew(entry("a"))
            await asyncio.sleep(0)
        assert not waiting.done()
        await directory.renew(entry("a", state="draining"))
        assert (await asyncio.wait_for(waiting, 1.0))["replicas"][0].state == "draining"

    run(scenario())


def test_a_long_poll_ends_unchanged_after_its_hold() -> None:
    async def scenario() -> None:
        directory = Directory()
        version = (await directory.listing(-1))["version"]
        begun = time.monotonic()
        assert (await directory.listing(version, hold_s=0.1))["version"] == version
        assert 0.09 < time.monotonic() - begun < 1.0

    run(scenario())


def test_silence_expires_an_entry_and_its_neighbour_stays() -> None:
    async def scenario() -> None:
        directory = Directory(expire_s=0.4)
        await directory.renew(entry("silent"))
        await directory.renew(entry("alive"))
        begun = time.monotonic()
        listing = await directory.listing(-1)
        while "silent" in ids(listing):
            await directory.renew(entry("alive"))
            listing = await directory.listing(listing["version"], hold_s=0.05)
        assert ids(listing) == ["alive"]
        assert 0.35 < time.monotonic() - begun < 1.0

    run(scenario())


def test_leaving_takes_effect_at_once() -> None:
    async def scenario() -> None:
        directory = Directory()
        await directory.renew(entry("a"))
        version = (await directory.listing(-1))["version"]
        await directory.leave("a")
        after = await directory.listing(version, hold_s=1.0)
        assert ids(after) == [] and after["version"] > version
        await directory.leave("a")
        assert (await directory.listing(-1))["version"] == after["version"]

    run(scenario())


def test_a_restarted_directory_repeats_no_version() -> None:
    async def scenario() -> None:
        old = Directory()
        await old.renew(entry("a"))
        version = (await old.listing(-1))["version"]
        await asyncio.sleep(0.005)
        assert (await Directory().listing(version, hold_s=5.0))["version"] > version

    run(scenario())


def test_only_the_latest_news_of_a_load_is_kept() -> None:
    """It comes twice a second, for minutes perhaps, and must not drive out the phases."""

    async def scenario() -> None:
        directory = Directory()
        await directory.report("a", "ranks", 1.0)
        for done in range(1000):
            await directory.report_load("a", done, 999, done / 10)
            await directory.report_load("b", done, 999, done / 10)
        await directory.report("a", "weights", 100.0)
        kept = [(report.replica, report.phase, report.done_bytes) for report in directory._reports]
        assert kept == [("a", "ranks", 0), ("a", "weights", 999), ("b", "weights", 999), ("a", "weights", 0)]
        assert [report.number for report in directory._reports] == [1, 2000, 2001, 2002]

    run(scenario())


def test_entries_and_reports_are_bounded_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "MAX_ENTRIES", 2)

    async def scenario() -> None:
        directory = Directory()
        await directory.renew(entry("a"))
        await directory.renew(entry("b"))
        with pytest.raises(ValueError, match="limit of 2"):
            await directory.renew(entry("c"))
        await directory.renew(entry("a", epoch=2))
        with pytest.raises(msgspec.ValidationError, match="port"):
            await directory.renew(entry("a", port="7600"))
        for number in range(directory_module.MAX_REPORTS + 10):
            await directory.report("a", "load", float(number))
        assert len(directory._reports) == directory_module.MAX_REPORTS
        assert directory._reports[-1].number == directory_module.MAX_REPORTS + 10

    run(scenario())
