"""Figures as a PNG, for chats and pages that show no HTML: the marks of the report, drawn by Pillow.

Drawn at twice the size wanted and reduced, which smooths the lines; the letters are Pillow's own font, so that the
picture is the same on a machine without fonts.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

from loadtest.report import words
from loadtest.report.figure import HEIGHT, TEXT_SIZE, WIDTH, Area, Dot, Figure, Line, Mark, Point, Text
from loadtest.report.tones import LIGHT

SCALE = 3  # drawn
SMALLER = 2  # and reduced by this: 1.5 pixels of the picture for each of the figure's
TITLE_HEIGHT = 30
COLUMNS = 2


def drawn(title: str, figures: Sequence[Figure]) -> bytes:
    """The figures in two columns under a title, as PNG bytes; the same figures give the same bytes."""
    num_rows = -(-len(figures) // COLUMNS)
    tile_height = HEIGHT + TITLE_HEIGHT
    width, height = min(COLUMNS, max(len(figures), 1)) * WIDTH, TITLE_HEIGHT + num_rows * tile_height
    image = Image.new("RGB", (width * SCALE, height * SCALE), LIGHT["page"])
    pen = _Pen(ImageDraw.Draw(image, "RGBA"), 0, 0)
    pen.write(Text(16, 22, title, tone="ink"), TEXT_SIZE + 4)
    for index, figure in enumerate(figures):
        x, y = index % COLUMNS * WIDTH, TITLE_HEIGHT + index // COLUMNS * tile_height
        _Pen(pen.draw, x, y).write(Text(16, 20, figure.title, tone="ink"), TEXT_SIZE + 2)
        tile = _Pen(pen.draw, x, y + TITLE_HEIGHT)
        for mark in figure.marks():
            tile.put(mark)
    image = image.resize((width * SCALE // SMALLER, height * SCALE // SMALLER), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


class _Pen:
    """Draws marks at an offset, in units of the figure."""

    def __init__(self, draw: ImageDraw.ImageDraw, left: float, top: float) -> None:
        self.draw, self.left, self.top = draw, left, top

    def put(self, mark: Mark) -> None:
        match mark:
            case Line():
                for piece in _dashes(mark.points) if mark.is_dashed else [mark.points]:
                    width = max(1, round(mark.width * SCALE))
                    self.draw.line([self._at(point) for point in piece], LIGHT[mark.tone], width, joint="curve")
            case Area():
                self.draw.polygon([self._at(point) for point in mark.points], (*_rgb(LIGHT[mark.tone]), 70))
            case Dot():
                (x, y), size = self._at((mark.x, mark.y)), 3.5 * SCALE
                box = (x - size, y - size, x + size, y + size)
                fill = LIGHT["page"] if mark.is_hollow else LIGHT[mark.tone]
                self.draw.ellipse(box, fill, LIGHT[mark.tone], round(1.5 * SCALE))
            case Text():
                self.write(mark, TEXT_SIZE)

    def write(self, mark: Text, size: int) -> None:
        text = words.plain(mark.text)
        font = ImageFont.load_default(size * SCALE)
        anchor = {"start": "l", "middle": "m", "end": "r"}[mark.anchor]
        x, y = self._at((mark.x, mark.y))
        halo = 2 * SCALE if mark.has_halo else 0
        if not mark.is_vertical:
            self.draw.text(
                (x, y), text, LIGHT[mark.tone], font, anchor + "s", stroke_width=halo, stroke_fill=LIGHT["page"]
            )
            return
        left, top, right, bottom = (math.ceil(edge) for edge in font.getbbox(text))
        mask = Image.new("L", (right - min(left, 0), bottom - min(top, 0)))
        ImageDraw.Draw(mask).text((0, 0), text, 255, font)
        turned = mask.transpose(Image.Transpose.ROTATE_90)
        self.draw.bitmap((round(x) - turned.width, round(y) - turned.height // 2), turned, LIGHT[mark.tone])

    def _at(self, point: Point) -> Point:
        return (self.left + point[0]) * SCALE, (self.top + point[1]) * SCALE


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _dashes(points: Sequence[Point], on: float = 5, off: float = 4) -> Iterator[list[Point]]:
    """A polyline cut into dashes, in units of the figure."""
    left, is_on, piece = on, True, [points[0]]
    for start, end in itertools.pairwise(points):
        length, done = math.dist(start, end), 0.0
        while length - done > left:
            done += left
            at = (start[0] + (end[0] - start[0]) * done / length, start[1] + (end[1] - start[1]) * done / length)
            if is_on:
                yield [*piece, at]
            is_on = not is_on
            left, piece = (on if is_on else off), [at]
        left -= length - done
        piece.append(end)
    if is_on and len(piece) > 1:
        yield piece
