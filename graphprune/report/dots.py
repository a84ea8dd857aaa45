"""Names beside the dots of a chart, placed where they cover neither each other nor a dot.

A dot that another one hides is drawn as a ring around it. A name that found no place next to its
dot has a line to it. All lengths are in the drawing's pixels, x to the right and y down, from the
plot's upper left corner.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import final

RADIUS = 5.0
LINE = 15.0  # height of a name
_RING = 4.0  # how much larger each ring is
_NEAR = 4.0  # between two dots of which one hides the other
_CHARACTER = 6.8  # width in a 12 pixel sans-serif, on the wide side
_GAP = 4.0  # between a dot and its name
_LONGEST = 34  # characters

_CIRCLE = re.compile(r'<circle cx="([-\d.e]+)" cy="([-\d.e]+)" r="[\d.]+" class="dot ')
_RADIUS = re.compile(r'\br="[\d.]+"')
_PLOT = re.compile(r'class="plot"><rect x="0" y="0" width="([\d.]+)" height="([\d.]+)"')
_OVERLAY = re.compile(r'<g transform="[^"]*" class="plot text-overlay">')
# The page's color around the letters: lines do not cross them.
_STYLE = (
    "font-size: 12px; text-anchor: start; fill: var(--ink); "
    "paint-order: stroke; stroke: var(--page); stroke-width: 3px"
)


@final
@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def hits(self, other: Box) -> bool:
        """Whether the two have an area in common."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def holds(self, other: Box) -> bool:
        """Whether another one lies in it."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.top <= other.top
            and other.bottom <= self.bottom
        )


@final
@dataclass(frozen=True, slots=True)
class Dot:
    """A dot, or a ring around those that were drawn there before.

    Attributes:
        x, y: its center.
        rings: how many dots are there already.
        reach: from the center to the edge of the last ring around it.
    """

    x: float
    y: float
    rings: int = 0
    reach: float = RADIUS


@final
@dataclass(frozen=True, slots=True)
class Name:
    """A name, the dot that it belongs to, and where it stands."""

    text: str
    dot: Dot
    box: Box

    @property
    def end(self) -> tuple[float, float]:
        """The point of the box that is nearest to the dot."""
        x = min(max(self.dot.x, self.box.left), self.box.right)
        return x, min(max(self.dot.y, self.box.top), self.box.bottom)

    @property
    def is_apart(self) -> bool:
        """Whether it stands too far from its dot to be read as its name without a line."""
        x, y = self.end
        return math.hypot(x - self.dot.x, y - self.dot.y) > self.dot.reach + _GAP + LINE / 2


def ringed(centers: Sequence[tuple[float, float]]) -> list[Dot]:
    """Dots at these places, those that others would hide with rings."""
    dots = []
    for i, center in enumerate(centers):
        near = [j for j, other in enumerate(centers) if math.dist(center, other) <= _NEAR]
        dots.append(Dot(*center, near.index(i), RADIUS + _RING * (len(near) - 1)))
    return dots


def placed(dots: Sequence[Dot], texts: Sequence[str], width: float, height: float) -> list[Name]:
    """A place for each dot's text, the nearest that is free; first come, first served.

    Where the plot is full, a text covers others rather than leave the plot.

    Args:
        dots: what the texts belong to.
        texts: what to write.
        width, height: of the plot.
    """
    plot = Box(0, 0, width, height)
    taken = [Box(d.x - d.reach, d.y - d.reach, d.x + d.reach, d.y + d.reach) for d in dots]
    names = []
    for dot, text in zip(dots, texts, strict=True):
        places = list(_places(dot, text, height))
        inside = [box for box in places if plot.holds(box)] or places
        free = (box for box in inside if not any(box.hits(other) for other in taken))
        names.append(Name(text, dot, next(free, inside[0])))
        taken.append(names[-1].box)
    return names


def _places(dot: Dot, text: str, height: float) -> Iterator[Box]:
    """Places for a text: right of the dot and left of it, then ever further up and down."""
    width = _CHARACTER * len(text)
    beside = dot.reach + _GAP
    for step in range(int(height / LINE) + 1):
        lefts = [dot.x + beside, dot.x - beside - width]
        if step:
            lefts.append(dot.x - width / 2)
        for down in dict.fromkeys((-step * LINE, step * LINE)):
            top = dot.y + down - LINE / 2
            for left in lefts:
                yield Box(left, top, left + width, top + LINE)


def named(svg: str, texts: Sequence[str]) -> str:
    """A drawing of dots with their names, in the order in which they were drawn.

    One with other dots than these, as where a value could not be drawn, stays as it is.
    """
    centers = [(float(x), float(y)) for x, y in _CIRCLE.findall(svg)]
    plot = _PLOT.search(svg)
    if plot is None or len(centers) != len(texts):
        return svg
    dots = ringed(centers)
    names = placed(dots, [_short(text) for text in texts], float(plot[1]), float(plot[2]))
    rings = iter(dots)
    svg = _CIRCLE.sub(lambda found: _circle(found[0], next(rings)), svg)
    drawn = "".join(_drawn(name) for name in names)
    return _OVERLAY.sub(lambda found: found[0] + drawn, svg, count=1)


def _short(text: str) -> str:
    """The end of a name that is too long: folders differ there."""
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


def _circle(drawn: str, dot: Dot) -> str:
    """A circle as it was drawn, or a ring."""
    if not dot.rings:
        return drawn
    ring = f'r="{RADIUS + _RING * dot.rings - 1:g}" style="fill: none; stroke-width: 2"'
    return _RADIUS.sub(ring, drawn)


def _drawn(name: Name) -> str:
    """The text, and a line where it stands apart from its dot."""
    text = (
        f'<text x="{name.box.left:.1f}" y="{name.box.bottom - 4:.1f}" '
        f'style="{_STYLE}">{escape(name.text)}</text>'
    )
    if not name.is_apart:
        return text
    x, y = name.end
    return (
        f'<line x1="{name.dot.x:.1f}" y1="{name.dot.y:.1f}" x2="{x:.1f}" y2="{y:.1f}" '
        f'style="stroke: var(--dim)"/>{text}'
    )
