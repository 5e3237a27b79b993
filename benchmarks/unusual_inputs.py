"""Are bad inputs flagged before an edit is offered? `python -m benchmarks.unusual_inputs DATA MODEL`.

DATA is a prepared folder of frontal films, or "phantom". Films of its training patients say what is usual, its
validation films set the limits at a stated share of false alarms, and bad inputs are made of its test films: turned,
mirrored, inverted, photographed, enlarged from 128 pixels, cut in half. Phantoms, drawn CT slices, photographs,
textures, noise and blank images join them. Writes figures/<data set>/unusual_inputs.json, with the rates of both parts.

`--save` writes the reference beside MODEL's weights, or into a folder: to be run whenever the training data change.
`--others FOLDER` adds files that ought to be flagged (lateral films, children), `--elsewhere FOLDER` good films of
another hospital, whose flags are false alarms. MODEL need not exist yet: DATA gives the size.

Layout and sharpness read pixels alone: half of the films that are upside down or cut in half have errors of noise
prediction (Graham et al., CVPR Workshops, 2023) like good ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from skimage import color, filters, transform
from skimage import data as pictures
from torch import Tensor
from torch.nn.functional import interpolate, pad

from prism_lib import paths, records
from prism_lib.data.folder import load_info, load_table, read_images
from prism_lib.data.uploads import read_file
from prism_lib.evaluation import novelty
from prism_lib.files import write_text
from prism_lib.phantom import patients

FITTED, TESTED = 1000, 100  # films at most: for what is usual, and of each kind
PHANTOM_SEEDS = 9001, 9003, 9002  # populations of what is usual, limits and test, that no training draws from
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins", "moon", "page", "text", "retina")
TEXTURES = ("brick", "grass", "gravel")
COMPONENTS = 16
FEWEST = 20  # images that can say what is usual, or set the limits
SMALL = 128


def upside_down(film: Tensor, dice: np.random.Generator) -> Tensor:
    """A film (H, W) turned by half a circle."""
    return film.flip(0, 1)


def mirrored(film: Tensor, dice: np.random.Generator) -> Tensor:
    """Left and right exchanged: the heart is on the wrong side."""
    return film.flip(1)


def inverted(film: Tensor, dice: np.random.Generator) -> Tensor:
    """MONOCHROME1 read as MONOCHROME2: bone is dark, air is bright."""
    return 1 - film


def turned(film: Tensor, dice: np.random.Generator) -> Tensor:
    """A film on its side, to the left or to the right."""
    return film.rot90(int(dice.choice([1, 3])), (0, 1))


def half(film: Tensor, dice: np.random.Generator) -> Tensor:
    """One side of the chest only, padded to a square as an upload is."""
    width = film.shape[1]
    part = film[:, : width // 2] if dice.random() < 0.5 else film[:, width // 2 :]
    return pad(part, ((width - part.shape[1]) // 2, (width - part.shape[1] + 1) // 2))


def enlarged(film: Tensor, dice: np.random.Generator) -> Tensor:
    """A thumbnail of 128 pixels that was enlarged again."""
    small = interpolate(film[None, None], size=SMALL, mode="bilinear", antialias=True)
    small = (small * 255).round() / 255
    return interpolate(small, size=film.shape[0], mode="bicubic").clamp(0, 1)[0, 0]


def photographed(film: Tensor, dice: np.random.Generator) -> Tensor:
    """A film on a light box or a screen, taken by telephone: askew, in a frame, in uneven light, often with moire."""
    size = film.shape[0]
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
    inset = 0.08 + dice.uniform(0, 0.06) + dice.uniform(-0.04, 0.04, (4, 2))
    placed = np.where(corners == 0, inset, 1 - inset) * size
    askew = transform.ProjectiveTransform.from_estimate(placed, corners * size)
    surround = dice.uniform(0.05, 0.9)  # a dark room or a lit box
    photo = transform.warp(film.double().numpy(), askew, cval=-1, order=1)
    photo = np.where(photo < 0, surround, 0.08 + 0.8 * photo)  # a screen's black is not black
    y, x = np.mgrid[:size, :size] / size
    angle = dice.uniform(0, 2 * np.pi)
    photo *= 1 + dice.uniform(0.1, 0.35) * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
    glare = dice.uniform(0.2, 0.8, 2)
    photo += dice.uniform(0, 0.25) * np.exp(-((x - glare[0]) ** 2 + (y - glare[1]) ** 2) / 0.02)
    if dice.random() < 0.7:  # a screen: two grids that beat
        for _ in range(2):
            period, tilt = dice.uniform(2.5, 9) / size, dice.uniform(-0.15, 0.15)
            photo *= 1 + dice.uniform(0.01, 0.05) * np.sin(2 * np.pi * (x + tilt * y) / period)
    photo = filters.gaussian(photo, dice.uniform(0.5, 1.2)) + dice.normal(0, 0.01, photo.shape)
    return torch.from_numpy(np.clip(photo, 0, 1)).float()


MADE: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "upside_down": upside_down, "mirrored": mirrored, "inverted": inverted, "turned_by_90_degrees": turned,
    "half_of_the_chest": half, "enlarged_from_128_pixels": enlarged, "photograph_of_a_film": photographed,
}  # fmt: skip


def ct_slice(size: int, dice: np.random.Generator) -> Tensor:
    """An axial slice of a chest in ellipses (size, size): skin, wall, lungs, heart, spine, ribs, aorta, vessels."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    image = np.zeros((size, size))

    def ellipse(cx: float, cy: float, rx: float, ry: float, gray: float) -> None:
        image[((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1] = gray

    wide, deep = dice.uniform(0.38, 0.47), dice.uniform(0.26, 0.34)
    ellipse(0, 0, wide, deep, 0.35)  # fat
    ellipse(0, 0, 0.93 * wide, 0.9 * deep, 0.55)  # muscle
    for side in (-1, 1):
        ellipse(side * 0.47 * wide, 0, 0.38 * wide, 0.68 * deep, 0.06)
    ellipse(0.12 * wide, -0.2 * deep, 0.36 * wide, 0.4 * deep, 0.6)  # heart
    ellipse(0, 0.62 * deep, 0.12 * wide, 0.16 * deep, 0.9)  # vertebra
    ellipse(0.14 * wide, 0.4 * deep, 0.07 * wide, 0.07 * wide, 0.65)  # aorta
    for angle in np.linspace(0, 2 * np.pi, 13):
        ellipse(0.86 * wide * np.cos(angle), 0.82 * deep * np.sin(angle), 0.035, 0.018, 0.92)
    for _ in range(60):
        side, radius = dice.choice([-1, 1]), dice.uniform(0.002, 0.008)
        ellipse(side * dice.uniform(0.2, 0.75) * wide, dice.uniform(-0.5, 0.5) * deep, radius, radius, 0.4)
    image = filters.gaussian(image, size / 400) + dice.normal(0, 0.02, image.shape)
    return torch.from_numpy(np.clip(image, 0, 1)).float()


def drawn(size: int, count: int, dice: np.random.Generator) -> dict[str, Tensor]:
    """Kinds (N, 1, size, size) that are made of no film."""
    noise = torch.from_numpy(dice.random((count, 1, size, size))).float()
    gray = torch.from_numpy(dice.random((count, 1, 1, 1))).float().expand(-1, 1, size, size)
    return {
        "phantom": patients.render(patients.sample_patients(count, 9002), size),
        "ct_slice": torch.stack([ct_slice(size, dice) for _ in range(count)])[:, None],
        "photograph_in_gray": torch.cat([_sample(name, size) for name in PHOTOGRAPHS]),
        "texture": torch.cat([_sample(name, size) for name in TEXTURES]),
        "noise": noise,
        "blank": gray,
    }


def _sample(name: str, size: int) -> Tensor:
    picture = getattr(pictures, name)()
    gray = color.rgb2gray(picture[..., :3]) if picture.ndim == 3 else picture / 255
    side = min(gray.shape)
    top, left = ((length - side) // 2 for length in gray.shape)
    square = transform.resize(gray[top : top + side, left : left + side], (size, size), anti_aliasing=True)
    return torch.from_numpy(np.clip(square, 0, 1)).float()[None, None]


def files(folder: Path, size: int) -> Tensor:
    """The images of a folder (N, 1, size, size); ValueError if it holds none that can be read."""
    found = []
    for path in sorted(path for path in folder.rglob("*.*") if path.is_file()):
        try:
            found.append(read_file(path, size))
        except ValueError:
            continue
    if not found:
        raise ValueError(f"{folder} holds no image that can be read at {size} pixels")
    return torch.cat(found)


def bad_inputs(films: Tensor, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every kind by name, (N, 1, H, W), made of films (N, 1, H, W) or drawn."""
    for kind, make in MADE.items():
        dice = np.random.default_rng(seed)
        yield kind, torch.stack([make(film, dice) for film in films[:, 0]])[:, None]
    yield from drawn(films.shape[-1], min(len(films), 40), np.random.default_rng(seed)).items()


def prepared(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Films of the training patients, validation films, test films as they are (one a patient), and with devices.

    Where devices were rendered, training and validation films are with and without them.
    """
    table = load_table(folder)
    rendered = table["rendered"].astype(bool) if "rendered" in table else pd.Series(False, table.index)
    order = np.random.default_rng(0).permutation(len(table))
    table, rendered = table.iloc[order], rendered.iloc[order]
    test = table[table["split"] == "test"]
    plain = test[~rendered[test.index]].drop_duplicates("patient_id")
    with_devices = test[rendered[test.index]].drop_duplicates("patient_id")
    parts = table[table["split"] == "train"][:FITTED], table[table["split"] == "val"], plain[:TESTED]
    read = [read_images(folder, part) for part in (*parts, with_devices[:TESTED]) if len(part)]
    return read[0], read[1], read[2], read[3] if len(read) > 3 else read[2][:0]


def phantoms(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `prepared`, of three populations of phantoms; half of them have devices."""
    drawn = [patients.sample_patients(count, seed) for count, seed in zip((512, 256, 64), PHANTOM_SEEDS, strict=True)]
    known, held_out, tested = (patients.render(population, size) for population in drawn)
    return known, held_out, tested, tested[:0]


def reference_of(known: Tensor, held_out: Tensor, share: float) -> novelty.Reference:
    """The reference of images (N, C, H, W) like the training images; `share` of those held out are below its limits."""
    if (fewest := min(len(known), len(held_out))) < FEWEST:
        raise ValueError(f"{fewest} images are too few to measure what is usual; at least {FEWEST} are needed")
    if not 0.5 <= share < 1:
        raise ValueError(f"share is {share}; expected a value in [0.5, 1)")
    rows, sharp = novelty.layout(known), novelty.sharpness(known)
    if not (torch.isfinite(rows).all() and torch.isfinite(sharp).all()):
        raise ValueError("blank images cannot be among those that say what is usual")
    mean = rows.mean(0)
    _, spread, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    variances = spread.square() / (len(rows) - 1)
    rest = variances[COMPONENTS:].sum().item() / (rows.shape[1] - COMPONENTS)
    channels, height, width = known.shape[1:]
    reference = novelty.Reference(
        shape=(channels, height, width),
        mean=tuple(mean.tolist()),
        axes=tuple(map(tuple, axes[:COMPONENTS].tolist())),
        variances=tuple(variances[:COMPONENTS].tolist()),
        rest=rest,
        sharpness=(sharp.mean().item(), sharp.std().item()),
        share=share,
        images=len(known) + len(held_out),
    )
    by_layout, by_blur = reference.parts(held_out).quantile((1 + share) / 2, dim=0).tolist()
    return replace(reference, limits=(by_layout, by_blur))


def save(reference: novelty.Reference, folder: Path) -> Path:
    """Write `novelty.json` beside a model's weights, to six digits."""
    content = json.loads(json.dumps(asdict(reference)), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    return write_text(folder / novelty.FILE, json.dumps(content) + "\n")


def rates(reference: novelty.Reference, images: Tensor) -> dict[str, float]:
    """Shares flagged: in all, by the layout and by blur; and the median score of images that have one."""
    parts = reference.parts(images)
    layout, blur = (~(parts <= torch.tensor(reference.limits, dtype=torch.float64))).double().mean(0).tolist()
    scores = reference.scores(images)
    flagged = sum(reference.is_new(score) for score in scores.tolist()) / len(scores)
    found = {"flagged": flagged, "by_layout": layout, "by_blur": blur, "images": len(images)}
    known = scores[torch.isfinite(scores)]
    return found | ({"median_score": known.median().item()} if len(known) else {})


def measured(
    reference: novelty.Reference, films: Tensor, good: dict[str, Tensor], others: Tensor | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Rates of good films by name, of which all are false alarms, and of bad inputs made of `films` and of `others`."""
    bad = {kind: rates(reference, images) for kind, images in bad_inputs(films)}
    if others is not None:
        bad["others"] = rates(reference, others)
    return {
        "false_alarms": {name: rates(reference, images) for name, images in good.items() if len(images)},
        "bad": bad,
    }


def main() -> None:
    """Measure, write the reference where it is asked for, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help='a prepared folder, or "phantom"')
    parser.add_argument("model", help="its name is recorded")
    parser.add_argument("--save", nargs="?", const="", help="write novelty.json beside the weights, or into a folder")
    parser.add_argument("--others", type=Path, help="a folder of files that ought to be flagged")
    parser.add_argument("--elsewhere", type=Path, help="a folder of good films of another hospital")
    parser.add_argument("--false-alarms", type=float, default=0.05, help="share of the validation films (default .05)")
    parser.add_argument("--figures", default="", help="a folder for the record in place of figures/<data set>")
    given = parser.parse_args()
    phantom = given.data == "phantom"
    info: dict[str, Any] = {} if phantom else load_info(Path(given.data))
    size = 256 if phantom else int(info["config"]["size"])
    place = None if given.save is None else Path(given.save or paths.weights() / given.model)
    if place is not None and not place.is_dir():
        parser.error(f"--save: there is no folder {place}")
    more = {name: files(folder, size) for name in ("others", "elsewhere") if (folder := getattr(given, name))}
    with records.Timer() as timer:
        known, held_out, films, with_devices = phantoms(size) if phantom else prepared(Path(given.data))
        reference = reference_of(known, held_out, 1 - given.false_alarms)
        good = {"held_out": films, "held_out_with_rendered_devices": with_devices}
        good |= {"elsewhere": more["elsewhere"]} if "elsewhere" in more else {}
        metrics = measured(reference, films, good, more.get("others"))
    if place is not None:
        save(reference, place)
    path = records.record(
        "unusual_inputs",
        dataset="phantom" if phantom else info["source"],
        notebook="benchmarks/unusual_inputs.py",
        parameters={"size": size, "known": len(known), "held_out": len(held_out), "false_alarms": given.false_alarms},
        seed=0,
        metrics=metrics,
        figures_dir=given.figures,
        model=given.model,
        seconds=timer.seconds,
    )
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
