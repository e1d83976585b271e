"""Drawings of dashed contours: two that a pair of discs may join, and short ones that distract.

Written anew from the rules of the program that made the published images (Linsley et al. 2018,
arXiv 1805.08315), so that images come from the same distribution but for one thing: that program
lets the two contours cross now and then (it does not look at the other one's newest segment, and
its masks are soft: about one image in ten of size 32 has a crossing); here they never do.

A contour is a chain of segments with gaps. The next segment's end lies on a circle around the point
one margin beyond the last one; directions are sampled with weight cos(continuity * turn)^2, and 0
where something is near. Two contours that start at some distance grow in turns; short ones fill
the rest; discs mark a start and an end: of one contour (label 1) or of both (label 0).
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

_TRIALS = 3  # for a segment
_CONTOUR_TRIALS = 5  # for a distracting contour
_SCALE = 2  # lines and discs are drawn at twice the size and reduced
Point = tuple[int, int]  # (y, x)
_OCCUPIED, _OVERLAP = 0.3, 1.8  # on antialiased masks, as published


@dataclasses.dataclass(frozen=True)
class Settings:
    """Lengths in pixels; the fields are the published program's.

    Attributes:
      size: of the square image.
      segments: of the two contours; a third as many in those that distract.
      padding: border that stays empty.
      length, thickness: of a segment.
      margins: free space around segments, one of these for each image; the gaps are twice as wide.
      radius: of the discs.
      distance: between the starts of the two contours.
      continuity: 1 turns by less than 90 degrees; more is straighter.
      distractor_segments: in all, before whole contours are counted.
      contrast: of the two contours and of those that distract.
    """

    size: int
    segments: int
    padding: int
    length: int
    thickness: float
    margins: tuple[int, ...]
    radius: float
    distance: int
    continuity: float
    distractor_segments: int
    contrast: tuple[float, float]


@dataclasses.dataclass
class Contour:
    """A growing contour.

    Attributes:
      points: (y, x) of the start, then of each segment's far end.
      pivot, angle: where the last segment points and how.
      lines: float32 [S, S], what is drawn.
      newest: float32 [S, S], the space of the last segment, which its successor may touch.
    """

    points: list[Point]
    pivot: Point
    angle: float
    lines: np.ndarray
    newest: np.ndarray


@dataclasses.dataclass(frozen=True)
class Drawing:
    """An image and what is in it.

    Attributes:
      image: uint8 [S, S].
      label: 1 where the discs mark one contour.
      contours: the two.
      discs: (y, x) of both centers.
    """

    image: np.ndarray
    label: int
    contours: tuple[Contour, Contour]
    discs: tuple[Point, Point]


def _moved(point: Point, angle: float, by: float) -> Point:
    """Returns the point so far away, rounded up as published."""
    return int(np.ceil(point[0] + by * np.sin(angle))), int(np.ceil(point[1] + by * np.cos(angle)))


def _ball(radius: int) -> np.ndarray:
    """Returns [n, 2] offsets within a radius."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.stack(np.nonzero(y**2 + x**2 <= radius**2), axis=1) - radius


@functools.lru_cache(maxsize=16)
def _circle(radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (offsets [n, 2] of the pixels on a circle, their angles [n])."""
    turns = np.arange(0, 2 * np.pi, 1 / radius)
    points = np.floor(radius * np.stack([np.sin(turns), np.cos(turns)], axis=1)).astype(int)
    points = np.unique(points, axis=0)
    return points, np.arctan2(points[:, 0], points[:, 1])


def _reduced(drawn: np.ndarray, size: int) -> np.ndarray:
    """Reduces a drawing to float32 [size, size] in 0..1."""
    picture = Image.fromarray(drawn.astype(np.uint8))
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS), np.float32) / 255


@functools.lru_cache(maxsize=4096)
def _segment(
    length: int, thickness: float, margin: int, angle: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draws (line, space) float32 [2R+1, 2R+1] of a segment from the center at an angle."""
    reach = length + int(np.ceil(thickness)) + margin
    size, center = 2 * reach * _SCALE + 1, reach * _SCALE
    picture = Image.new("L", (size, size), 0)
    y, x = _moved((center, center), angle, length * _SCALE)
    width = round(thickness * _SCALE)
    ImageDraw.Draw(picture).line([(center, center), (x, y)], fill=255, width=width)
    line = np.asarray(picture)
    padded = np.pad(line, margin * _SCALE)
    space = np.zeros_like(line)
    for dy, dx in _ball(margin * _SCALE) + margin * _SCALE:
        np.maximum(space, padded[dy : dy + size, dx : dx + size], out=space)
    return _reduced(line, 2 * reach + 1), _reduced(space, 2 * reach + 1)


class _Canvas:
    """What is occupied, and how segments are put there."""

    def __init__(self, s: Settings, margin: int, rng: np.random.Generator):
        self.s, self.margin, self.rng = s, margin, rng
        self.mask = np.ones((s.size, s.size), np.float32)
        inner = slice(s.padding, s.size - s.padding)
        self.mask[inner, inner] = 0
        self.near = _ball(margin)
        self.steps, self.step_angles = _circle(s.length + margin)

    def inside(self, point: Point) -> bool:
        """Returns whether a point lies in the image."""
        return 0 <= point[0] < self.s.size and 0 <= point[1] < self.s.size

    def patch(
        self, point: Point, angle: float
    ) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
        """Returns (window of the image, line, space) of a segment, clipped at the borders."""
        line, space = _segment(self.s.length, self.s.thickness, self.margin, angle)
        reach = len(line) // 2
        window, part = [], []
        for center in point:
            low, high = max(center - reach, 0), min(center + reach + 1, self.s.size)
            window.append(slice(low, high))
            part.append(slice(low - center + reach, high - center + reach))
        return tuple(window), line[tuple(part)], space[tuple(part)]

    def placed(self, point: Point, angle: float, contrast: float, lines: np.ndarray) -> np.ndarray:
        """Draws a segment into `lines`; returns its space [S, S]."""
        window, line, space = self.patch(point, angle)
        lines[window] = np.maximum(lines[window], contrast * line)
        newest = np.zeros_like(self.mask)
        newest[window] = space
        return newest

    def start(self, tail: Point, angle: float, contrast: float) -> Contour | None:
        """Returns a contour of one segment from `tail`, None where that leaves the image."""
        head = _moved(tail, angle, self.s.length)
        back = angle + np.pi if angle < 0 else angle - np.pi
        pivot = _moved(head, back, self.s.length + self.margin)
        if not (self.inside(head) and self.inside(pivot)):
            return None
        lines = np.zeros_like(self.mask)
        newest = self.placed(tail, angle, contrast, lines)
        return Contour([tail, head], pivot, angle, lines, newest)

    def extend(self, contour: Contour, contrast: float, others: Sequence[Contour] = ()) -> bool:
        """Adds a segment; returns False where there is no room for one."""
        # Where the next segment may end: on a circle around the new pivot, within the image.
        s, rng = self.s, self.rng
        pivot = _moved(contour.pivot, contour.angle, s.length + 2 * self.margin)
        heads = self.steps + pivot
        fits = ((heads >= 0) & (heads < s.size)).all(axis=1)
        if not fits.any():
            return False
        heads, angles = heads[fits], self.step_angles[fits]

        # How likely each end is: straight on is likelier, occupied places are out.
        turn = np.abs(angles - contour.angle)
        turn = np.minimum(np.minimum(turn, 2 * np.pi - turn) * s.continuity, np.pi / 2)
        weight = np.cos(turn) ** 2
        some = weight > 1e-9
        around = heads[some, None] + self.near
        np.clip(around, 0, s.size - 1, out=around)
        weight[some] *= 1 - self.mask[around[..., 0], around[..., 1]].max(axis=1)
        total = weight.sum()
        if total < 1e-4:
            return False

        # A few trials; the first segment with enough free space is placed.
        cumulative = np.cumsum(weight) / total
        for _ in range(_TRIALS):
            chosen = min(np.searchsorted(cumulative, rng.random(), "right"), len(heads) - 1)
            head, angle = tuple(heads[chosen].tolist()), float(angles[chosen])
            back = angle + np.pi if angle < 0 else angle - np.pi
            window, _, space = self.patch(head, back)
            taken = self.mask[window]
            for other in others:
                taken = np.maximum(taken, other.newest[window])
            if (taken + space).max() < _OVERLAP:
                self.mask = np.maximum(self.mask, contour.newest)
                contour.newest = self.placed(head, back, contrast, contour.lines)
                contour.points.append(head)
                contour.pivot, contour.angle = pivot, angle
                return True
        return False

    def angle(self) -> float:
        """Samples a direction, in radians."""
        return float(self.rng.integers(-180, 180) * np.pi / 180)


def _two_contours(canvas: _Canvas) -> tuple[Contour, Contour] | None:
    """Places the two long contours; returns None where they do not fit."""
    s, rng = canvas.s, canvas.rng
    low, high = 2 * s.distance, s.size - 2 * s.distance
    if low >= high:
        raise ValueError(f"distance={s.distance} leaves no room for starts in size={s.size}")

    # Their starts: the first anywhere in the middle, the second at the distance from it.
    contours: list[Contour] = []
    for _ in range(2):
        for _ in range(_TRIALS):
            angle = canvas.angle()
            if not contours:
                tail = tuple(rng.integers(low, high, 2).tolist())
            else:
                around = rng.integers(0, 360) * np.pi / 180
                first = contours[0].points[0]
                tail = tuple(
                    int(np.round(c + s.distance * f(around)))
                    for c, f in zip(first, (np.sin, np.cos), strict=True)
                )
            contour = canvas.start(tail, angle, s.contrast[0])
            if contour is not None:
                contours.append(contour)
                break
        else:
            return None

    # They grow in turns, each past the other's newest segment.
    for _ in range(s.segments - 1):
        for contour, other in (contours, contours[::-1]):
            if not canvas.extend(contour, s.contrast[0], [other]):
                return None
    for contour in contours:
        canvas.mask = np.maximum(canvas.mask, contour.newest)
    return contours[0], contours[1]


def _distractor(canvas: _Canvas, segments: int) -> np.ndarray | None:
    """Places a short contour at a free place; returns its lines, None where there is no room."""
    s, rng = canvas.s, canvas.rng
    free = np.argwhere(canvas.mask[1:-1, 1:-1] <= _OCCUPIED) + 1
    if len(free) < 0.01 * s.size**2:
        return None

    # A start whose segment has room.
    before = canvas.mask
    angle = canvas.angle()
    for index in rng.permutation(len(free))[:256]:
        tail = tuple(free[index].tolist())
        window, _, space = canvas.patch(tail, angle)
        if not (canvas.mask[window][space > 0.99] > _OCCUPIED).any():
            break
    else:
        return None

    # The whole contour, or nothing of it.
    contour = canvas.start(tail, angle, s.contrast[1])
    for _ in range(segments - 1):
        if contour is None or not canvas.extend(contour, s.contrast[1]):
            canvas.mask = before
            return None
    if contour is None:
        return None
    canvas.mask = np.maximum(canvas.mask, contour.newest)
    return contour.lines


def draw(s: Settings, rng: np.random.Generator) -> Drawing:
    """Draws one image. The label is 0 or 1 with equal chance."""
    # The two long contours.
    label, margin = int(rng.integers(2)), int(rng.choice(s.margins))
    found = None
    while found is None or cross(found[0].points, found[1].points):
        canvas = _Canvas(s, margin, rng)
        found = _two_contours(canvas)
    image = np.maximum(found[0].lines, found[1].lines)

    # Short ones that distract.
    short = s.segments // 3
    for _ in range(s.distractor_segments // short):
        for _ in range(_CONTOUR_TRIALS):
            lines = _distractor(canvas, short)
            if lines is not None:
                image = np.maximum(image, lines)
                break

    # Discs at the ends of one contour, or at an end of each.
    start = int(rng.integers(2))
    discs = found[start].points[0], found[start if label else 1 - start].points[-1]
    for center in discs:
        image = np.maximum(image, _disc(s.size, center, s.radius))
    # The published images are stretched so that the brightest point is white.
    image = np.round(image / image.max() * 255).astype(np.uint8)
    return Drawing(image, label, found, discs)


def cross(one: Sequence[Point], two: Sequence[Point]) -> bool:
    """Returns whether two lines through points (y, x) cross or touch."""
    a, b = (np.asarray(part, float)[:, None] for part in (one[:-1], one[1:]))
    c, d = (np.asarray(part, float)[None] for part in (two[:-1], two[1:]))

    def side(p, q, r):
        u, v = q - p, r - p
        return np.sign(u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0])

    parted = (side(a, b, c) * side(a, b, d) > 0) | (side(c, d, a) * side(c, d, b) > 0)
    # Pieces of one straight line are parted where their boxes are.
    low, high = (
        np.maximum(np.minimum(a, b), np.minimum(c, d)),
        np.minimum(np.maximum(a, b), np.maximum(c, d)),
    )
    return bool((~parted & (low <= high).all(axis=-1)).any())


def _disc(size: int, center: Point, radius: float) -> np.ndarray:
    """Draws a disc, float32 [size, size]."""
    y, x = np.ogrid[: size * _SCALE, : size * _SCALE]
    inside = (y - center[0] * _SCALE) ** 2 + (x - center[1] * _SCALE) ** 2
    return _reduced(255 * (inside <= (radius * _SCALE) ** 2), size)
