"""Street-like scenes, drawn from numbers: what the data set of generated scenes shows."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["CLASSES", "MIN_SIDE", "PALETTE", "SPLITS", "draw_scene"]

_COLOURS = {
    "road": [128, 64, 128],
    "pavement": [244, 35, 232],
    "building": [70, 70, 70],
    "sky": [70, 130, 180],
    "tree": [107, 142, 35],
    "car": [0, 0, 142],
    "person": [220, 20, 60],
    "pole": [153, 153, 153],
    "sign": [220, 220, 0],
    "light": [250, 170, 30],
}
CLASSES, PALETTE = tuple(_COLOURS), list(_COLOURS.values())
SPLITS = ("train", "val", "test")

ROAD, PAVEMENT, BUILDING, SKY, TREE, CAR, PERSON, POLE, SIGN, LIGHT = range(10)
IGNORE = 255
MIN_SIDE = 48

UInt8 = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

# Half-width of the per-pixel noise, by class: foliage and facades are rougher than sky.
_NOISE = np.full(256, 10, np.int16)
_NOISE[[SKY, TREE, BUILDING]] = 6, 22, 14


class _Canvas:
    """An image and its label map that are painted together.

    Only integers are drawn and only integer arithmetic follows, so that the same seed gives the
    same bytes on every platform.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.height, self.width, self.rng = height, width, rng
        self.image = np.zeros((height, width, 3), np.uint8)
        self.label = np.full((height, width), IGNORE, np.uint8)

    def between(self, low: float, high: float) -> int:
        """Uniform integer in [low, high], both ends included."""
        return int(self.rng.integers(int(low), max(int(low), int(high)) + 1))

    def chance(self, percent: int) -> bool:
        return self.between(0, 99) < percent

    def near(self, colour: Colour, spread: int) -> Colour:
        shift = self.rng.integers(-spread, spread + 1, 3).tolist()
        b, g, r = (min(255, max(0, c + s)) for c, s in zip(colour, shift, strict=True))
        return b, g, r

    def grey(self, low: int, high: int) -> Colour:
        v = self.between(low, high)
        return self.near((v, v, v), 8)

    def polygon(self, points: list[tuple[int, int]], cls: int, colour: Colour) -> None:
        pts = np.array(points, np.int32)
        cv2.fillPoly(self.image, [pts], colour)
        cv2.fillPoly(self.label, [pts], (cls,))

    def rect(self, x0: int, y0: int, x1: int, y1: int, cls: int, colour: Colour) -> None:
        """Filled rectangle; both corners are inside it."""
        cv2.rectangle(self.image, (x0, y0), (x1, y1), colour, cv2.FILLED)
        cv2.rectangle(self.label, (x0, y0), (x1, y1), (cls,), cv2.FILLED)

    def ellipse(self, x: int, y: int, rx: int, ry: int, cls: int, colour: Colour) -> None:
        cv2.ellipse(self.image, (x, y), (rx, ry), 0, 0, 360, colour, cv2.FILLED)
        cv2.ellipse(self.label, (x, y), (rx, ry), 0, 0, 360, (cls,), cv2.FILLED)


def _background(c: _Canvas, horizon: int) -> None:
    h, w = c.height, c.width
    top, bottom = c.near((215, 195, 175), 35), c.near((225, 220, 215), 30)
    rows = np.arange(horizon + 1, dtype=np.int32)[:, None]
    sky = (np.array(top) * (horizon - rows) + np.array(bottom) * rows) // max(1, horizon)
    c.image[: horizon + 1] = sky[:, None]
    c.label[: horizon + 1] = SKY
    c.rect(0, horizon, w, h, PAVEMENT, c.grey(105, 165))

    x = -c.between(0, w // 12)
    while x < w:
        width = c.between(w // 12, w // 4)
        if c.chance(80):
            _building(c, x, x + width, c.between(0, horizon * 3 // 4), horizon + h // 40)
        x += width

    vanish = w // 2 + c.between(-w // 6, w // 6)
    left, right = c.between(-w // 4, w // 8), w + c.between(-w // 8, w // 4)
    far = max(1, w // 40)
    road = [(vanish - far, horizon), (vanish + far, horizon), (right, h), (left, h)]
    c.polygon(road, ROAD, c.grey(75, 135))
    # Lane marks are as bright and as thin as poles, yet they are road.
    depth, aside = h - horizon, (left + right) // 2 - vanish
    for k in range(c.between(3, 6)):
        downs = (depth * (2 * k + end) // 12 for end in (1, 2))
        a, b = ((vanish + aside * down // max(1, depth), horizon + down) for down in downs)
        cv2.line(c.image, a, b, c.grey(170, 230), 1 + k // 3)


def _building(c: _Canvas, x0: int, x1: int, top: int, ground: int) -> None:
    wall = c.grey(150, 215) if c.chance(30) else c.near((95, 115, 140), 45)
    c.rect(x0, top, x1, ground, BUILDING, wall)
    step = c.between(5, 10)
    glass = c.grey(40, 110) if c.chance(70) else c.grey(170, 225)
    for y in range(top + 3, ground - step, step):
        for x in range(x0 + 2, x1 - step // 2, step):
            if c.chance(85):
                cv2.rectangle(c.image, (x, y), (x + step // 2, y + step // 2), glass, cv2.FILLED)
    # Drainpipes and adverts look like poles and signs, yet they are building.
    if c.chance(40):
        x = c.between(x0, x1)
        cv2.line(c.image, (x, top), (x, ground), c.grey(50, 130), 1)
    if c.chance(30):
        x, y = c.between(x0, x1), c.between(top, ground)
        cv2.rectangle(c.image, (x, y), (min(x + step, x1), y + step // 2), _vivid(c), cv2.FILLED)


def _vivid(c: _Canvas) -> Colour:
    colours: list[Colour] = [(50, 50, 200), (190, 90, 40), (40, 190, 210), (225, 225, 225)]
    return c.near(colours[c.between(0, len(colours) - 1)], 30)


def _tree(c: _Canvas, x: int, ground: int, size: int) -> None:
    trunk = max(1, size // 14)
    c.rect(x - trunk // 2, ground - size // 2, x + trunk // 2, ground, TREE, c.grey(40, 90))
    green = c.near((55, 100, 75), 30)
    for _ in range(c.between(4, 7)):
        dx, dy = c.between(-size // 4, size // 4), c.between(-size // 6, size // 4)
        r = max(1, c.between(size // 8, size // 4))
        c.ellipse(x + dx, ground - size * 2 // 3 + dy, r, r, TREE, c.near(green, 12))


def _car(c: _Canvas, x: int, ground: int, size: int) -> None:
    length, height = max(5, size * 5 // 8), max(3, size * 3 // 10)
    paint = c.grey(30, 210) if c.chance(60) else _vivid(c)
    x0, x1, top = x - length // 2, x + length // 2, ground - height
    c.rect(x0, top + height * 2 // 5, x1, ground - height // 8, CAR, paint)
    inset, low, r = length // 5, top + height // 2, max(1, height // 5)
    left, right = x0 + inset, x1 - inset
    roof = [(x0 + inset // 2, low), (left, top), (right, top), (x1 - inset // 2, low)]
    c.polygon(roof, CAR, c.near(paint, 25))
    c.rect(left, top + height // 8, right, top + height * 3 // 8, CAR, c.grey(35, 90))
    for wheel in (left, right):
        c.ellipse(wheel, ground - r, r, r, CAR, c.grey(20, 50))


def _person(c: _Canvas, x: int, ground: int, size: int) -> None:
    height = max(5, size * 2 // 5)
    half = max(1, height // 9)
    coat, legs = (c.grey(35, 140) if c.chance(50) else c.near((110, 90, 120), 70) for _ in "ab")
    hip, neck, apart = ground - height * 9 // 20, ground - height * 4 // 5, max(0, half - 1)
    c.rect(x - half, hip, x - apart, ground, PERSON, legs)
    c.rect(x + apart, hip, x + half, ground, PERSON, legs)
    c.rect(x - half, neck, x + half, hip, PERSON, coat)
    r = max(1, height // 12)
    c.ellipse(x, neck - r, r, r, PERSON, c.near((120, 140, 180), 40))


def _pole(c: _Canvas, x: int, ground: int, size: int) -> None:
    height, extra = max(6, size * 4 // 5), max(0, size // 25 - 1)  # 1 to 3 pixels wide
    top = ground - height
    c.rect(x - extra // 2, top, x + (extra + 1) // 2, ground, POLE, c.grey(50, 120))
    kind = c.between(0, 9)
    r = max(2, size // 15)
    if kind < 4:
        colour = _vivid(c)
        if c.chance(50):
            c.ellipse(x, top + r, r, r, SIGN, colour)
        else:
            c.rect(x - r, top, x + r, top + 2 * r, SIGN, colour)
        if r > 2:
            cv2.line(c.image, (x - r // 2, top + r), (x + r // 2, top + r), c.grey(200, 240), 1)
    elif kind < 7:
        half = max(1, r * 2 // 3)
        c.rect(x - half, top, x + half, top + 3 * r, LIGHT, c.grey(25, 60))
        lamps: list[Colour] = [(40, 40, 220), (40, 190, 230), (90, 210, 60)]
        on, dot = c.between(0, 2), max(0, half - 1)
        cv2.circle(c.image, (x, top + r // 2 + on * r), dot, lamps[on], cv2.FILLED)
    else:
        arm = x + (1 if c.chance(50) else -1) * max(2, size // 6)
        c.rect(min(x, arm), top, max(x, arm), top + extra, POLE, c.grey(50, 120))


def _light_and_noise(c: _Canvas) -> UInt8:
    h, w = c.height, c.width
    gain = np.full((h, w, 1), c.between(75, 120), np.int32)  # per cent
    # A shadow with a slanted edge falls on one side of the street.
    edge = c.between(0, w) + np.arange(h)[:, None] * c.between(-100, 100) // 100
    shaded = np.arange(w)[None, :] < edge
    if c.chance(50):
        shaded = ~shaded
    gain[shaded & (c.label != SKY)] -= c.between(0, 35)
    noise = c.rng.integers(-64, 65, (2, h, w, 3), dtype=np.int16).sum(0, dtype=np.int32)
    grain = noise * _NOISE[c.label].astype(np.int32)[..., None] // 128
    image = c.image.astype(np.int32) * gain // 100 + c.between(-12, 12) + grain
    lit: UInt8 = np.clip(image, 0, 255).astype(np.uint8)
    return lit


# How many there are of each kind of thing, at least and at most, and how near in per cent.
_OBJECTS = (
    *((_tree, 0, 4, 15, 85), (_car, 0, 4, 15, 85)),
    *((_person, 0, 4, 15, 85), (_pole, 1, 5, 30, 100)),
)


@lru_cache(maxsize=4)  # the label of a scene is read right after its image
def draw_scene(
    index: int,
    *,
    split: str = "train",
    size: tuple[int, int] = (128, 256),
    seed: int = 0,
    rare: int = 100,
) -> tuple[UInt8, UInt8]:
    """Draw one scene; the arguments are those of :class:`ohem_mm.datasets.StreetScenesDataset`.

    Returns:
        The BGR image, uint8 (H, W, 3), and the label map, uint8 (H, W), with class indices into
        :data:`CLASSES` and 255 where nothing is labelled. Both are read-only.
    """
    h, w = size
    c = _Canvas(h, w, np.random.default_rng([seed, SPLITS.index(split), index]))
    horizon = c.between(h * 2 // 5, h // 2)
    _background(c, horizon)

    counts = [c.between(least, most) for _, least, most, *_ in _OBJECTS]
    objects = [
        (c.between(*depths), c.between(0, w - 1), painter)
        for (painter, _, _, *depths), count in zip(_OBJECTS, counts, strict=True)
        for _ in range(count)
    ]
    if rare < 100:  # numbers of its own, so that the rest of the street stays where it is
        drawn = np.random.default_rng([seed, SPLITS.index(split), index, 1])
        chances = drawn.integers(0, 100, len(objects)).tolist()
        objects = [
            thing
            for thing, chance in zip(objects, chances, strict=True)
            if chance < rare or thing[2] not in (_person, _pole)
        ]
    # Far things first: near ones hide them.
    for depth, x, painter in sorted(objects, key=lambda o: o[:2]):
        ground = horizon + (h - horizon) * depth // 110
        if painter is _car:
            x = w // 2 + (x - w // 2) * depth // 110
        painter(c, x, ground, h * depth // 100)

    # What nobody labelled: a bonnet at the bottom, something under a sheet.
    if c.chance(40):
        c.ellipse(w // 2, h, w * 2 // 5, h // 12, IGNORE, c.grey(20, 120))
    if c.chance(30):
        x, y = c.between(0, w), c.between(horizon, h)
        c.rect(x, y, x + w // 16, y + h // 12, IGNORE, c.near((100, 120, 140), 60))

    image = _light_and_noise(c)
    image.flags.writeable = c.label.flags.writeable = False
    return image, c.label
