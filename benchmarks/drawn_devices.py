"""Real devices that readers drew on films: where they run, what they absorb, and how much of them an edit leaves.

DRAWN has a row a device: `file_name` (without suffix), `kind`, `width`, and `points`, "x y x y ...", all in pixels of a
film of SIDE x SIDE. A device with a width is a curve; its points need to be near the bright ridge only, which `route`
follows. A device of width 0 is an area, and its points are the outline.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.sparse import coo_array, diags_array
from scipy.sparse.linalg import spsolve
from scipy.spatial import KDTree
from skimage.draw import polygon
from skimage.feature import hessian_matrix, hessian_matrix_eigvals
from skimage.graph import route_through_array

from prism_lib.phantom.films import KINDS

DRAWN = Path(__file__).parents[1] / "figures/films/drawn_devices.csv"
SIDE = 512
NEAR = 6  # pixels within which a drawn point is put on the ridge
ALONG = 25  # pixels along a curve over which its cross-section is taken as constant
SHOWS = 0.01  # mean attenuation below which a drawn device does not show
DRAWN_KINDS = (*KINDS, "ecg clips", "surgical clips", "valve", "other")


class Device(NamedTuple):
    """A curve (L, 2) of (y, x) in steps of about a pixel with its width, or an area (width 0) with its outline."""

    kind: str
    width: float
    points: np.ndarray

    def where(self, shape: tuple[int, ...], margin: float = 0.0) -> np.ndarray:
        """The pixels of the device and ``margin`` around it, boolean of a film's shape."""
        marked = np.ones(shape, bool)
        y, x = self.points.round().astype(int).T if self.width else polygon(*self.points.T)
        marked[y.clip(0, shape[0] - 1), x.clip(0, shape[1] - 1)] = False
        away: np.ndarray = ndimage.distance_transform_edt(marked)
        return away <= self.width / 2 + margin


def load_devices(films: Mapping[str, np.ndarray], path: Path | None = None) -> dict[str, list[Device]]:
    """The devices of films (H, H) in [0, 1] by file name; a wrong row of these films is an error that names it."""
    path, found = path or DRAWN, {name: list[Device]() for name in films}
    table = pd.read_csv(path, dtype={"file_name": str, "kind": str, "points": str})
    columns = ["file_name", "kind", "width", "points"]
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{path} lacks the column {missing[0]!r}")
    for row, (name, kind, width, points) in enumerate(table[columns].itertuples(index=False), 2):
        if name not in films:
            continue
        try:
            drawn, width = np.array(str(points).split(), float).reshape(-1, 2)[:, ::-1], float(width)
        except ValueError as error:
            raise ValueError(f"{path}, row {row}: width {width!r} and points {points!r} are no numbers") from error
        if kind not in DRAWN_KINDS or not 0 <= width < SIDE:
            raise ValueError(f"{path}, row {row}: kind {kind!r} or width {width} is unknown: {', '.join(DRAWN_KINDS)}")
        drawn, width = drawn * len(films[name]) / SIDE, width * len(films[name]) / SIDE
        inside = len(drawn) >= 2 and bool(((drawn >= 0) & (drawn < len(films[name]))).all())
        device = Device(kind, width, route(films[name], drawn, width) if width and inside else drawn)
        if not inside or len(device.points) < (2 if width else 3):
            raise ValueError(f"{path}, row {row}: a curve has two points below {SIDE} or more, an area three")
        found[name].append(device)
    return found


def route(film: np.ndarray, drawn: np.ndarray, width: float) -> np.ndarray:
    """The bright ridge of a film (H, H) near a drawn line (L, 2) of (y, x), smoothed, in steps of a pixel."""
    hessian = hessian_matrix(film, max(1.0, width / 2.5), mode="nearest", use_gaussian_derivatives=False)
    ridge = np.clip(-hessian_matrix_eigvals(hessian)[1], 0, None)
    line, last = np.ones(film.shape, bool), len(film) - 1
    for start, end in pairwise(drawn):
        steps = np.linspace(0, 1, int(np.abs(end - start).max()) + 2)[:, None]
        line[tuple((start + steps * (end - start)).round().astype(int).clip(0, last).T)] = False
    away = ndimage.distance_transform_edt(line)
    cost = 1 / (0.05 + ridge / max(np.quantile(ridge[away <= NEAR], 0.95), 1e-6)) + (away / NEAR) ** 2
    cost[away > 2 * NEAR] = 1e6
    path: list[tuple[int, int]] = []
    for start, end in pairwise(_best(ridge, point) for point in drawn):
        path += route_through_array(cost, start, end)[0][bool(path) :]
    return ndimage.gaussian_filter1d(np.array(path, float), 2, axis=0, mode="nearest")


def _best(ridge: np.ndarray, point: np.ndarray) -> tuple[int, int]:
    """The strongest place of a ridge near a point, nearer ones first."""
    y, x = point.round().astype(int).clip(0, len(ridge) - 1)
    top, left = max(y - NEAR, 0), max(x - NEAR, 0)
    near = ridge[top : y + NEAR + 1, left : x + NEAR + 1]
    rows, columns = np.indices(near.shape)
    likely = near * np.exp(-2 * ((rows + top - y) ** 2 + (columns + left - x) ** 2) / NEAR**2)
    row, column = np.unravel_index(likely.argmax(), near.shape)
    return int(row) + top, int(column) + left


def behind(film: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The film with the solution of Laplace's equation in the pixels of a mask."""
    number = np.full(np.add(film.shape, 2), -1)  # of an unknown; with a border
    number[1:-1, 1:-1][where] = np.arange(where.sum())
    padded = np.pad(film, 1)
    inside = np.pad(np.ones(film.shape, bool), 1)
    y, x = np.nonzero(np.pad(where, 1))
    neighbours, known, links = np.zeros(len(y)), np.zeros(len(y)), []
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        other = (y + dy, x + dx)
        neighbours += inside[other]
        known += np.where(number[other] < 0, padded[other], 0)
        linked = np.flatnonzero(number[other] >= 0)
        links.append(np.stack([linked, number[other][linked]]))
    rows, columns = np.concatenate(links, 1)
    matrix = diags_array(neighbours) - coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(y),) * 2)
    filled = film.copy()
    if len(y):
        filled[where] = spsolve(matrix.tocsc(), known)
    return filled


def attenuations(film: np.ndarray, devices: Sequence[Device]) -> tuple[list[np.ndarray], np.ndarray]:
    """What each device absorbs beyond the film around it, (H, H) each, below 0 where it is darker; and all together.

    The film behind them is interpolated from the pixels beside them, blurred against grain. The cross-section of a
    curve is the running median along it, so that neither ribs nor crossing devices are taken for a part of it. All
    together absorb at least 0, the sum of all where they cross, but no more than is seen there.
    """
    places = [device.where(film.shape, 1.5) for device in devices]
    union = np.any([*places, np.zeros_like(film, bool)], axis=0)
    clear = ndimage.gaussian_filter((~union).astype(float), 1)
    smooth = ndimage.gaussian_filter(np.where(union, 0, film), 1) / clear.clip(1e-6)
    through = (1 - film).clip(1 / 255, 1) / (1 - behind(np.where(union, 0, smooth), union)).clip(1 / 255, 1)
    seen = np.where(union, -np.log(through.clip(0.05, 2)), 0)
    maps = [_along(seen, device) if device.width else seen for device in devices]
    maps = [found * place for found, place in zip(maps, places, strict=True)]
    positive = np.clip([*maps, np.zeros_like(film)], 0, None)
    return maps, np.minimum(positive.sum(0), np.maximum(positive.max(0), seen))


def _along(found: np.ndarray, device: Device) -> np.ndarray:
    """A map whose cross-sections to a curve are running medians along it; 0 beyond its ends."""
    path = device.points
    step = np.gradient(path, axis=0)
    normals = np.stack([-step[:, 1], step[:, 0]], 1) / np.linalg.norm(step, axis=1, keepdims=True).clip(1e-6)
    reach = int(np.ceil(device.width / 2 + 2))
    offsets = np.arange(-2 * reach, 2 * reach + 1) / 2
    at = path[:, None] + offsets[:, None] * normals[:, None]
    sections = ndimage.map_coordinates(found, at.reshape(-1, 2).T, order=1).reshape(len(path), -1)
    sections = ndimage.median_filter(sections, (min(ALONG, len(path)), 1), mode="nearest")
    pixels = np.stack(np.nonzero(device.where(found.shape, reach)), 1)
    _, nearest = KDTree(path).query(pixels)
    aside = ((pixels - path[nearest]) * normals[nearest]).sum(1)
    ahead = ((pixels - path[nearest]) * step[nearest]).sum(1)
    beyond = (nearest == 0) & (ahead < -0.5) | (nearest == len(path) - 1) & (ahead > 0.5)
    smooth = np.zeros_like(found)
    along = ndimage.map_coordinates(sections, [nearest, 2 * (aside + reach)], order=1, mode="nearest")
    smooth[tuple(pixels.T)] = np.where(beyond, 0, along)
    return smooth


def residuals(film: np.ndarray, edited: np.ndarray, devices: Sequence[Device]) -> list[float]:
    """How much of each device is left after an edit: 1 is all, 0 nothing, below 0 a dark trace; NaN if it never showed.

    It is the projection of what the edited film shows at the device's place to what the film showed there.
    """
    found = []
    for before, after in zip(attenuations(film, devices)[0], attenuations(edited, devices)[0], strict=True):
        shows = before > 0
        seen = shows.any() and before[before != 0].mean() >= SHOWS
        found.append(float((after * before)[shows].sum() / (before[shows] ** 2).sum()) if seen else float("nan"))
    return found
