"""Real films with rendered devices: a film and the same film with devices are a pair whose truth is known to the pixel.

The backgrounds are films of any source. The first copy of a film comes twice, as it is and with devices; further copies
of the train split are moved and windowed a little and come once. See `phantom.films` for the devices.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from prism_lib.data import tables
from prism_lib.data.chest import NOT_THERE
from prism_lib.data.images import ImageFiles, Picture, Rejection
from prism_lib.data.tables import Source, split_patients

DEVICES = "Support Devices"
RENDERED_SHARE = 0.6  # of the further copies
POLICY = (
    f"{DEVICES} is 1 where devices were rendered, 0 where the film was screened and shows none, and unknown elsewhere; "
    "other labels: "
)


@dataclass(frozen=True)
class RenderedFilms:
    """A `Reader` of films; "copy" above 0 is moved and windowed, and "rendered" gets devices by "film_seed"."""

    films: ImageFiles

    def __call__(self, rows: pd.DataFrame) -> Iterator[Picture | Rejection]:
        """The pictures in the rows' order, with the kinds of their devices in the column "kinds"."""
        import torch  # only in a process that renders

        from prism_lib.phantom.films import with_devices

        columns = ("source_file", "path", "film_seed", "copy", "rendered")
        for name, path, seed, copy, devices in zip(*(rows[column] for column in columns), strict=True):
            try:
                pixels = moved(self.films, Path(path), seed) if copy else self.films.read(Path(path)).pixels
            except ValueError as error:
                yield Rejection(name, str(error))
                continue
            kinds: Sequence[str] = ()
            if devices:
                rendered = with_devices(torch.from_numpy(pixels)[None, None] / 255, [seed])
                pixels, (kinds,) = (rendered.images[0, 0] * 255).round().byte().numpy(), rendered.kinds
            yield Picture(pixels, {"kinds": "|".join(kinds) or NOT_THERE})


def moved(films: ImageFiles, path: Path, seed: int) -> np.ndarray:
    """A film turned by up to 4 degrees, zoomed by 0.96 to 1.15, shifted by up to 3 % and with gamma 0.8 to 1.25.

    Chests are never mirrored.
    """
    random = np.random.default_rng(seed)
    # Moved at twice the size, so that the reduction hides the interpolation.
    large = replace(films, size=2 * films.size, max_upscale=2 * films.max_upscale).read(path).pixels
    side, angle, zoom = len(large), np.deg2rad(random.uniform(-4, 4)), random.uniform(0.96, 1.15)
    shift = side * random.uniform(-0.03, 0.03, 2)
    cos, sin, centre = np.cos(angle) / zoom, np.sin(angle) / zoom, side / 2
    x0, y0 = (centre - cos * centre - sin * centre + shift[0], centre + sin * centre - cos * centre + shift[1])
    turned = Image.fromarray(large).transform(
        (side, side), Image.Transform.AFFINE, (cos, sin, x0, -sin, cos, y0), Image.Resampling.BICUBIC
    )
    small = np.asarray(turned.resize((films.size, films.size), Image.Resampling.LANCZOS), dtype=float) / 255
    gamma = 0.8 * (1.25 / 0.8) ** random.uniform()
    return (255 * small**gamma).round().astype(np.uint8)


def film_source(
    films: Source, reader: ImageFiles, shares: Sequence[float], seed: int, copies: int, screened: Path | None
) -> Source:
    """Pairs of films with and without rendered devices, from the gray films of another source.

    `screened` is a table with the columns "file_name" and "Support Devices": films with 1 are left out, films with 0
    count as clean, and only these have a pair outside the train split. The column "twin" of a film with devices is the
    file name of the one without.
    """
    table = films.table.assign(**{DEVICES: float("nan")})
    if screened is not None:
        verdict = tables.read_table(screened, {"file_name": "file_name", DEVICES: DEVICES})
        known = tables.label_values(verdict[DEVICES], screened, DEVICES)
        table[DEVICES] = table["source_file"].map(dict(zip(verdict["file_name"], known, strict=True)))
        table = table[table[DEVICES] != 1]
    if "split" not in table:
        table["split"] = table["patient_id"].map(split_patients(table["patient_id"], shares, seed))
    names = table["name"]
    parts = []
    for copy in range(copies):
        some = table if copy == 0 else table[table["split"] == "train"]
        key = names[some.index] + f"_{copy}"
        draws = key.map(lambda name: zlib.crc32(f"{seed}:{name}".encode()))
        some = some.assign(name=key, copy=copy, film_seed=draws, rendered=False, twin=NOT_THERE)
        twin = some["split"] + "/" + key + ".png"
        devices = some.assign(name=key + "_devices", rendered=True, twin=twin, **{DEVICES: 1.0})
        if screened is not None:  # the truth of a film with devices of its own would not be one
            devices = devices[(some["split"] == "train") | (some[DEVICES] == 0)]
        if copy:
            chosen = draws % 1000 < 1000 * RENDERED_SHARE
            some, devices = some[~chosen], devices[chosen].assign(twin=NOT_THERE)
        parts += [some, devices]
    pairs = pd.concat(parts).sort_values("name", kind="stable").reset_index(drop=True)
    labels = tuple(dict.fromkeys((*films.labels, DEVICES)))
    return Source(pairs, labels, POLICY + films.label_policy, RenderedFilms(reader), films.rejected)
