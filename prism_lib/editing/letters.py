"""Letters, words and side markers burnt into a film, which an edit leaves as they are."""

from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor


def burnt_in_text(images: Tensor, anywhere: bool = False, *, contrast: float = 0.3, extent: float = 0.16) -> Tensor:
    """Letters burnt into the corners of a film, or `anywhere`, bool (N, 1, H, W).

    A letter is at most `extent` of the width in size and at least `contrast` brighter than the dark ground around it.
    It lies in a corner (outer seventh in x, outer quarter in y) and touches no border; a wire that leaves the film
    does. Letters `anywhere` are bright, of one gray and crisp, and nothing as bright leads away from them: an L, R, AP
    or PA that is not in the middle of the film, tilted or mirrored too, and level rows of at least four strokes, each
    with the plate, ring or initials within 0.8 of its height. Dark letters, arrows and cut letters are not found.
    """
    gray = images.mean(1).cpu().numpy()
    width = gray.shape[-1]
    found = np.zeros(gray.shape, dtype=bool)
    size = max(3, round(0.05 * width))
    for image, text in zip(gray, found, strict=True):
        ground = ndimage.minimum_filter(image, size)
        labels, count = ndimage.label(image - ndimage.maximum_filter(ground, size) > contrast, np.ones((3, 3)))
        for label, box in enumerate(ndimage.find_objects(labels, count), 1):
            rows, columns = box
            x, y = (columns.start + columns.stop) / 2 / width, (rows.start + rows.stop) / 2 / len(image)
            inside = min(rows.start, columns.start) > 0 and rows.stop < len(image) and columns.stop < width
            small = max(rows.stop - rows.start, columns.stop - columns.start) <= extent * width
            if inside and small and abs(x - 0.5) > 0.36 and abs(y - 0.5) > 0.25:
                text[box] |= labels[box] == label
        # with the soft rims of the letters
        text[:] = ndimage.binary_dilation(text, iterations=max(1, round(0.008 * width)))
        for rows, columns in _letter_boxes(image.astype(float)) if anywhere else ():
            rim = round(0.8 * (rows.stop - rows.start))
            text[max(rows.start - rim, 0) : rows.stop + rim, max(columns.start - rim, 0) : columns.stop + rim] = True
    return torch.from_numpy(found)[:, None].to(images.device)


def _letter_boxes(film: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Boxes of letters and words on a gray film (H, W); the limits were set on films of NIH and Hannover."""
    width, near = film.shape[1], 2 * max(1, round(0.004 * film.shape[1])) + 1
    relief = film - ndimage.grey_opening(film, max(3, round(0.026 * width) | 1))
    content = ndimage.find_objects((film > 0.05).astype(int))  # without padding
    # Over small gaps letters are joined to words.
    for level, gap in product((0.08, 0.11, 0.15, 0.2, 0.27, 0.36, 0.5), (1, round(0.012 * width) | 1)):
        labels, _ = ndimage.label(ndimage.binary_closing(relief > level, np.ones((1, gap))), np.ones((3, 3)))
        for label, box in enumerate(ndimage.find_objects(labels), 1):
            high, long = ((side.stop - side.start) / width for side in box)
            if not (0.011 <= high <= 0.065 and 0.3 * high <= long <= min(12 * high, 0.18)):
                continue
            around = tuple(slice(max(side.start - near, 0), side.stop + near) for side in box)
            part = labels[around] == label
            ink = part & (relief[around] > level)
            gray = relief[around] / np.median(relief[around][ink])
            rim = ndimage.maximum_filter(part, near)
            leads_away = np.percentile(gray[ndimage.maximum_filter(rim, near) & ~rim], 90)
            crisp = (rim & (gray > 0.75)).sum() / (rim & (gray > 0.3)).sum()
            if leads_away > 0.65 or crisp < 0.38 or not 0.15 < ink.sum() / (high * long * width**2) < 0.75:
                continue
            shape = (gray * ink).clip(max=1)[np.ix_(part.any(1), part.any(0))]
            strokes = np.median((np.diff(shape > 0.5, axis=1, prepend=False) & (shape > 0.5)).sum(1)[len(shape) // 5 :])
            word = high <= 0.037 and strokes >= max(4, 1.3 * long / high) and leads_away < min(0.49, 0.06 * strokes)
            y, x = (abs((side.start + side.stop) / size - 1) for side, size in zip(box, film.shape, strict=True))
            cut = any(s.start <= whole.start or whole.stop <= s.stop for s, whole in zip(box, content[0], strict=True))
            if not word and high >= 0.017 and crisp > 0.55 and (y > 0.74 or x > 0.52) and not cut:
                patterns, aspects = _glyphs()
                word = ((_pattern(shape) @ patterns) * (abs(np.log(long / high / aspects)) < 0.6)).max() > 0.82
            if word:
                yield box


@cache
def _glyphs() -> tuple[np.ndarray, np.ndarray]:
    """Patterns (256, G) of letters, upright, tilted by up to 28 degrees, slanted or mirrored, and width over height."""
    patterns, aspects, fonts = [], [], f"{get_data_path()}/fonts/ttf/DejaVuSans"
    tilts = [(tilt, tilt) for tilt in (-0.54, -0.36, -0.18, 0.18, 0.36, 0.54)] + [(0.2, 0)]
    shears = [(text, tilt) for text in "LR" for tilt in tilts] + [(text, (0, 0)) for text in ("L", "R", "AP", "PA")]
    for weight, (text, (x, y)) in product(("", "-Bold"), shears):
        image = Image.new("L", (240, 240))
        ImageDraw.Draw(image).text((120, 120), text, 255, ImageFont.truetype(f"{fonts}{weight}.ttf", 60), "mm")
        image = image.transform(image.size, Image.Transform.AFFINE, (1, x, -120 * x, -y, 1, 120 * y))
        shape = np.asarray(image.crop(image.getbbox()), float)
        patterns += [_pattern(shape[::a, ::b]) for a in (1, -1) for b in (1, -1)]
        aspects += [shape.shape[1] / shape.shape[0]] * 4
    return np.stack(patterns, 1), np.array(aspects)


def _pattern(shape: np.ndarray) -> np.ndarray:
    """A picture (H, W) as 16 x 16 blurred values of mean 0 and length 1."""
    cells = F.adaptive_avg_pool2d(torch.from_numpy(shape.copy())[None], 16)[0].numpy()
    cells = ndimage.gaussian_filter(cells, 1, mode="constant").ravel()
    return (cells - cells.mean()) / max(np.linalg.norm(cells - cells.mean()), 1e-9)
