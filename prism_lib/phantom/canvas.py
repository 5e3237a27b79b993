"""Where devices lie in a film and how they are drawn: the chest's box, dice, curves, a map of attenuation.

Lengths are in mm, places (u, v): u = -1, 1 at the picture's left and right lung border, v = 0, 1 at apices, diaphragm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicHermiteSpline
from torch import Tensor

from prism_lib.phantom.anatomy import stamp

Points = NDArray[np.float64]  # (P, 2), x first
Pair = tuple[float, float]
STEP = 0.45  # pixels between the points of a curve
CHEST = 285.0  # millimetres between the lungs' lateral borders


class Dice:
    """Uniform draws of one film's seed for one kind."""

    def __init__(self, seed: int, stream: int) -> None:
        self.generator = torch.Generator().manual_seed((int(seed) * 1_000_003 + stream * 7919) % 2**63)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def near(self, point: Pair, spread: float) -> Pair:
        """A point in (u, v) beside another."""
        return point[0] + self.uniform(-spread, spread), point[1] + self.uniform(-spread, spread)

    def chance(self, probability: float) -> bool:
        return self.uniform(0, 1) < probability

    def between(self, low: int, high: int) -> int:
        return int(self.uniform(low, high + 1 - 1e-6))


@dataclass(frozen=True)
class Anchors:
    """The chest's box in a film of ``size`` pixels: midline, lateral borders of the lungs, apices, diaphragm."""

    size: int
    middle: float
    left: float  # in the picture: the patient's right
    right: float
    apex: float
    base: float

    @classmethod
    def of(cls, film: Tensor) -> "Anchors":
        """From the smoothed film (H, H): lungs are the two dark areas beside a bright band above the heart."""
        small = F.avg_pool2d(F.interpolate(film[None, None], (64, 64), mode="area"), 3, 1, 1, count_include_pad=False)
        gray = small[0, 0].numpy().astype(np.float64)
        across = gray[14:34].mean(0)

        def bright(x: int) -> float:
            """A column's brightness over that of the lungs beside it; mildly prefers the picture's middle."""
            lungs = (across[x - 15 : x - 6].mean() + across[x + 7 : x + 16].mean()) / 2
            return float(across[x - 2 : x + 3].mean() - lungs - 0.0008 * (x - 31.5) ** 2)

        middle = max(range(23, 42), key=bright)
        across = gray[18:38].mean(0)

        def edge(ahead: Points, start: int, step: int, usual: int, low: int, high: int) -> int:
            """Where 70 % of the contrast on the way from a dark start is reached."""
            if len(ahead) < 3 or ahead.max() - ahead[0] < 0.06:
                return usual
            k = int(np.argmax(ahead > 0.3 * ahead[0] + 0.7 * ahead.max()))
            return min(max(start + step * k, low), high)

        half, top, bottom = [], [], []
        for sign in (-1, 1):
            lung = min(range(7, 19), key=lambda d: across[min(max(middle + sign * d, 0), 63)])
            column = middle + sign * lung
            end = max(column - 14, 0) if sign < 0 else min(column + 15, 63)
            half.append(edge(across[column:end:sign], lung, 1, 21, 17, 28))
            down = gray[:, max(column - 3, 0) : column + 4].mean(1)
            row = 14 + int(np.argmin(down[14:38]))
            top.append(edge(down[row : max(row - 24, 0) : -1], row, -1, 8, 3, 15))
            bottom.append(edge(down[row:63], row, 1, 47, 38, 58))
        left, right = (min(max(h, 0.85 * sum(half) / 2), 1.15 * sum(half) / 2) for h in half)
        centre, apex = middle + 0.5, sum(top) / 2
        box = centre, centre - left, centre + right, apex, max(sum(bottom) / 2, apex + 28)
        return cls(film.shape[-1], *(value * film.shape[-1] / 64 for value in box))

    @property
    def mm(self) -> float:
        """Pixels a millimetre."""
        return (self.right - self.left) / CHEST

    def at(self, *places: Pair) -> Points:
        """Places (u, v) in the chest as pixels (P, 2)."""
        u, v = np.asarray(places, dtype=np.float64).T
        x = self.middle + np.where(u < 0, u * (self.middle - self.left), u * (self.right - self.middle))
        return np.stack([x, self.apex + v * (self.base - self.apex)], axis=1)


def exposed(film: Tensor) -> Tensor:
    """Share (H, H) in [0, 1] of a device that shows: none in black padding or beyond the collimator."""
    width = film.shape[-1] // 64 | 1
    mean = F.avg_pool2d(film[None, None], width, 1, width // 2, count_include_pad=False)[0, 0]
    return ((mean - 0.01) / 0.02).clamp(0, 1)


def film_contrast(film: Tensor, body: Anchors) -> float:
    """How steep the film's gray is, 0.45 to 1.2: the span of gray in the chest over that of an average film."""
    rows, columns = slice(int(max(body.apex, 0)), int(body.base)), slice(int(max(body.left, 0)), int(body.right))
    chest = film[rows, columns][::4, ::4].flatten().sort().values
    return min(max(float(chest[int(0.95 * len(chest))] - chest[int(0.05 * len(chest))]) / 0.55, 0.45), 1.2)


def spline(knots: ArrayLike, smooth: bool = True) -> Points:
    """Evenly spaced points along a smooth curve, or along straight lines, through knots (K, 2) in pixels."""
    line = np.asarray(knots, dtype=np.float64)
    if smooth:
        gaps = np.maximum(np.linalg.norm(np.diff(line, axis=0), axis=1), 1e-3) ** 0.5  # centripetal: no overshoot
        t = np.concatenate([[0.0], gaps.cumsum()])
        smoothed = CubicHermiteSpline(t, line, np.gradient(line, t, axis=0))
        line = smoothed(np.linspace(0, t[-1], 24 * len(gaps) + 1))
    length = np.concatenate([[0.0], np.linalg.norm(np.diff(line, axis=0), axis=1).cumsum()])
    even = np.linspace(0, length[-1], max(2, int(length[-1] / STEP) + 1))
    return np.stack([np.interp(even, length, line[:, axis]) for axis in (0, 1)], axis=1)


def beside(points: Points, distance: float) -> Points:
    """The curve shifted along its normal, in pixels."""
    tangent = np.gradient(points, axis=0)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-9)
    return points + distance * np.stack([-tangent[:, 1], tangent[:, 0]], axis=1)


class Canvas:
    """One kind's attenuation map (H, W); strengths are multiplied by the film's contrast."""

    def __init__(self, body: Anchors, contrast: float) -> None:
        self.mm, self.size, self.contrast = body.mm, body.size, contrast
        self.map = torch.zeros(body.size, body.size)

    def line(self, points: Points, width: float, strength: float, hollow: float = 0.0) -> None:
        """A round wire or, with ``hollow`` the share of its radius that is free, a tube; strength is its maximum."""
        radius = width / 2 * self.mm
        reach = math.ceil(max(radius, 0.9)) + 1
        points = points[((points > -reach) & (points < self.size - 1 + reach)).all(1)]
        if not len(points):
            return
        low = np.maximum(np.floor(points.min(0)).astype(int) - reach, 0)
        wide, tall = np.minimum(np.ceil(points.max(0)).astype(int) + reach + 1, self.size) - low
        pixels = torch.from_numpy(points - low).float()[None]
        radii = torch.full(pixels.shape[:2], radius), torch.full(pixels.shape[:2], radius * hollow)
        outer, inner = (stamp(pixels, each, int(max(wide, tall)))[0, :tall, :wide] for each in radii)
        full = 2 * radius * math.sqrt(1 - hollow**2)
        box = self.map[low[1] : low[1] + tall, low[0] : low[0] + wide]
        box += self.contrast * strength * (outer - inner).clamp(min=0) / full

    def shape(
        self, at: Points, half: Pair, strength: float, angle: float = 0, power: float = 2, rim: float = 0
    ) -> None:
        """A plate bounded by a superellipse with half axes in mm; with ``rim`` only the border of that width."""
        reach = math.ceil(1.5 * max(half) * self.mm) + 2
        (x0, y0), (x1, y1) = (np.clip(np.round(at) + far, 0, self.size).astype(int) for far in (-reach, reach))
        dx, dy = torch.arange(x0, x1)[None, :] - float(at[0]), torch.arange(y0, y1)[:, None] - float(at[1])
        cos, sin = math.cos(angle), math.sin(angle)
        along, beyond = (cos * dx + sin * dy) / half[0], (cos * dy - sin * dx) / half[1]
        radial = (along.abs().pow(power) + beyond.abs().pow(power)).pow(1 / power) / self.mm
        depth = (1 - radial) * min(half) * self.mm  # pixels below the edge
        cover = (depth + 0.5).clamp(0, 1)
        if rim:
            cover -= (depth - max(rim * self.mm, 1.0) + 0.5).clamp(0, 1)
        self.map[y0:y1, x0:x1] += self.contrast * strength * cover

    def stroke(self, origin: Points, angle: float, lines: Sequence[ArrayLike], width: float, strength: float) -> None:
        """Straight lines given in mm around an origin, as one piece of wire."""
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.array([[cos, sin], [-sin, cos]])
        pieces = [spline(origin + np.asarray(line, dtype=np.float64) @ turn * self.mm, smooth=False) for line in lines]
        self.line(np.concatenate(pieces), width, strength)

    def near_end(self, points: Points, start: float, stop: float) -> Points:
        """The piece between two distances from the end of a curve, in mm."""
        n = len(points)
        return points[max(0, n - int(stop * self.mm / STEP)) : max(1, n - int(start * self.mm / STEP))]
