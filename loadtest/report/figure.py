"""Plots as plain marks in pixels, which `svg` and `png` both draw: one picture, two formats, no plotting library."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from loadtest.report import words

Floats = npt.NDArray[np.float64]
Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]

WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 78, 18, 34, 42
TEXT_SIZE = 12
CHARACTER_WIDTH = 6.3  # at TEXT_SIZE, on average: enough to set a legend


# --- marks: what a picture consists of -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Line:
    points: tuple[Point, ...]
    tone: str
    width: float = 1.0
    is_dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Area:
    """A filled polygon, half transparent."""

    points: tuple[Point, ...]
    tone: str


@dataclasses.dataclass(frozen=True)
class Dot:
    x: float
    y: float
    tone: str
    is_hollow: bool = False


@dataclasses.dataclass(frozen=True)
class Text:
    x: float
    y: float  # of the baseline
    text: str
    anchor: Anchor = "start"
    tone: str = "muted"
    is_vertical: bool = False  # reads upwards
    has_halo: bool = False  # stands out from lines that it crosses


@dataclasses.dataclass(frozen=True)
class Hover:
    """A region that shows `text` while pointed at, where the format can."""

    x: float
    y: float
    width: float
    height: float
    text: str


Mark = Line | Area | Dot | Text | Hover


# --- plots: what the marks say ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, which must differ; `is_log` needs both above zero."""

    label: str
    low: float
    high: float
    is_log: bool = False
    say: Callable[[float], str] = words.plain_number

    def place(self, value: Floats) -> Floats:
        """Where values lie between the ends, 0 to 1; what lies outside is drawn at the end."""
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = np.log(np.maximum(value, self.low)), math.log(low), math.log(high)
        return np.clip((value - low) / (high - low), 0.0, 1.0)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.is_log else _linear_ticks(self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Series:
    """One line, area or set of dots over `x`, `y` float64 [n]; NaN in `y` leaves a gap."""

    name: str
    x: Floats
    y: Floats
    tone: str
    kind: Literal["line", "area", "dots", "linked"] = "line"  # linked: dots joined by a line
    is_dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """A straight line across the plot, at a value of one axis."""

    at: float
    label: str
    is_vertical: bool
    tone: str = "red"


@dataclasses.dataclass(frozen=True)
class Figure:
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    rules: tuple[Rule, ...] = ()
    hovers: tuple[tuple[float, float, str], ...] = ()  # from x, to x, text
    note: str = ""  # how to read it

    def marks(self) -> Iterator[Mark]:
        """The picture, back to front, `WIDTH` by `HEIGHT` pixels with y downwards."""
        yield from self._axes()
        for series in self.series:
            yield from self._drawn(series)
        for rule in self.rules:
            yield from self._ruled(rule)
        yield from self._legend()
        for low, high, text in self.hovers:
            x0, x1 = self._x(np.array([low, high]))
            yield Hover(x0, TOP, max(x1 - x0, 1.0), HEIGHT - TOP - BOTTOM, text)

    def _x(self, values: Floats) -> list[float]:
        return [float(x) for x in LEFT + self.x.place(values) * (WIDTH - LEFT - RIGHT)]

    def _y(self, values: Floats) -> list[float]:
        return [float(y) for y in HEIGHT - BOTTOM - self.y.place(values) * (HEIGHT - TOP - BOTTOM)]

    def _axes(self) -> Iterator[Mark]:
        bottom = HEIGHT - BOTTOM
        ticks = self.y.ticks()
        for value, y in zip(ticks, self._y(np.array(ticks)), strict=True):
            yield Line(((LEFT, y), (WIDTH - RIGHT, y)), "grid")
            yield Text(LEFT - 8, y + 4, self.y.say(value), "end")
        ticks = self.x.ticks()
        for value, x in zip(ticks, self._x(np.array(ticks)), strict=True):
            yield Line(((x, bottom), (x, bottom + 4)), "muted")
            yield Text(x, bottom + 18, self.x.say(value), "middle")
        yield Line(((LEFT, bottom), (WIDTH - RIGHT, bottom)), "muted")
        yield Text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, self.x.label, "middle")
        yield Text(14, (TOP + bottom) / 2, self.y.label, "middle", is_vertical=True)

    def _drawn(self, series: Series) -> Iterator[Mark]:
        floor = float(HEIGHT - BOTTOM)
        for piece in _unbroken(series.y):
            points = tuple(zip(self._x(series.x[piece]), self._y(series.y[piece]), strict=True))
            if series.kind == "area":
                yield Area(((points[0][0], floor), *points, (points[-1][0], floor)), series.tone)
                continue
            if series.kind != "dots" and len(points) > 1:
                yield Line(points, series.tone, 1.8, series.is_dashed)
            if series.kind in ("dots", "linked") or len(points) == 1:
                yield from (Dot(x, y, series.tone, series.is_dashed) for x, y in points)

    def _ruled(self, rule: Rule) -> Iterator[Mark]:
        axis = self.x if rule.is_vertical else self.y
        if not axis.low <= rule.at <= axis.high:
            return
        if rule.is_vertical:
            x = self._x(np.array([rule.at]))[0]
            yield Line(((x, TOP), (x, HEIGHT - BOTTOM)), rule.tone, 1.4, True)
            is_right = x > WIDTH * 0.7
            middle = TOP + 0.45 * (HEIGHT - TOP - BOTTOM)
            yield Text(
                x - 5 if is_right else x + 5,
                middle,
                rule.label,
                "end" if is_right else "start",
                rule.tone,
                has_halo=True,
            )
        else:
            y = self._y(np.array([rule.at]))[0]
            yield Line(((LEFT, y), (WIDTH - RIGHT, y)), rule.tone, 1.4, True)
            yield Text(
                WIDTH - RIGHT - 4, y + 14 if y < TOP + 16 else y - 5, rule.label, "end", rule.tone, has_halo=True
            )

    def _legend(self) -> Iterator[Mark]:
        x, y = float(LEFT), 16.0
        for series in self.series:
            if not series.name:
                continue
            if series.kind == "area":
                yield Area(((x, y - 9), (x + 18, y - 9), (x + 18, y + 1), (x, y + 1)), series.tone)
            elif series.kind == "dots":
                yield Dot(x + 9, y - 4, series.tone, series.is_dashed)
            else:
                yield Line(((x, y - 4), (x + 18, y - 4)), series.tone, 2.4, series.is_dashed)
            yield Text(x + 24, y, series.name, tone="ink")
            x += 24 + len(series.name) * CHARACTER_WIDTH + 16


def fitted(
    label: str,
    values: Sequence[Floats],
    say: Callable[[float], str] = words.plain_number,
    *,
    is_log: bool | None = None,
) -> Axis:
    """The axis that shows all `values`: from zero, or logarithmic where they span more than two decades.

    Values that are NaN do not count, on a logarithmic axis those at or below zero do not either.
    """
    flat = np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in values] or [np.zeros(0)])
    flat = flat[np.isfinite(flat)]
    above = flat[flat > 0]
    if is_log is None:
        is_log = len(above) > 0 and bool(above.max() > 100 * np.median(above))
    if is_log:
        low, high = (float(above.min()), float(above.max())) if len(above) else (1.0, 10.0)
        return Axis(label, low / 1.15, high * 1.15, True, say)
    high = float(flat.max()) if len(flat) else 0.0
    return Axis(label, 0.0, high * 1.08 if high > 0 else 1.0, False, say)


def _linear_ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 3.5 else (1,)
    every = 1 if decades < 9 else 2
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, every)
    found = [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]
    found = [value for value in found if low <= value <= high]
    return found if len(found) > 2 else _linear_ticks(low, high)


def _unbroken(values: Floats) -> Iterator[slice]:
    """Runs of values without a NaN between them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], ~np.isnan(values), [False]]).astype(np.int8)))
    for start, stop in edges.reshape(-1, 2):
        yield slice(int(start), int(stop))
