"""Where an edit may show: a soft pixel mask, and the composite of edit and input.

Coarse *evidence* (attention to the edit's words, difference of the noise predictions) gives the region, the *change* of
the decoded image gives the pixels: strong pixels inside the evidence are seeds and grow through weaker pixels that
touch them. All steps are continuous, so rounding cannot flip a pixel; where the mask is 0 the input stays bit for bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from pydantic import NonNegativeInt, PositiveFloat
from scipy import ndimage
from skimage.morphology import reconstruction
from torch import Tensor

from prism_lib.configs import Share, checked


@checked()
class MaskConfig:
    """Settings of the automatic mask; lengths in pixels, changes in units of the [0, 1] gray range.

    A pixel is weak from max(`min_change`, `weak` x noise) and strong from max(2 `min_change`, `strong` x noise), where
    noise is the image's median change. Seeds need at least `seed_evidence`, and pixels that they grow into at least
    `grow_evidence`, as shares of the image's greatest evidence. Evidence is attention at `attention_weight` 1 and noise
    difference at 0. The mask is closed over `close` pixels, widened by `dilate` and faded over `feather`. From a change
    of `replaced` on, no detail of the input is kept.
    """

    min_change: PositiveFloat = 0.015
    weak: PositiveFloat = 3.0
    strong: PositiveFloat = 4.0
    attention_weight: Share = 0.25
    seed_evidence: Share = 0.2
    grow_evidence: Share = 0.1
    smooth: NonNegativeInt = 1
    close: NonNegativeInt = 2
    dilate: NonNegativeInt = 1
    feather: NonNegativeInt = 1
    softness: PositiveFloat = 0.2
    replaced: PositiveFloat = 0.12


def evidence(word_maps: Tensor, noise_change: Tensor, attention_weight: float) -> Tensor:
    """Where the edit acts, (N, 1, h, w), with maximum 1 per image; 0 everywhere if nothing changed.

    `word_maps` (N, 2, h, w) is the attention to the edit's words in source and target, `noise_change` (N, 1, h, w) the
    mean absolute difference of their noise predictions.
    """
    change = _unit(noise_change)
    attention = _unit(word_maps.amax(1, keepdim=True))
    # Without words all weight goes to the noise; without a change of noise there is no edit to locate.
    weight = attention_weight * (attention.amax((1, 2, 3), keepdim=True) > 0)
    changed = change.amax((1, 2, 3), keepdim=True) > 0
    return _unit(weight * attention + (1 - weight) * change) * changed


def pixel_change(edited: Tensor, reference: Tensor, smooth: int = 1) -> Tensor:
    """Mean absolute change over channels, averaged over (2 smooth + 1)^2 pixels: (N, 1, H, W)."""
    return _box((edited - reference).abs().mean(1, keepdim=True), smooth)


def automatic_mask(change: Tensor, coarse: Tensor, config: MaskConfig) -> Tensor:
    """The soft mask (N, 1, H, W) of a pixel change (N, 1, H, W), given coarse evidence (N, 1, h, w)."""
    where = F.interpolate(coarse, size=change.shape[2:], mode="bilinear", align_corners=False)
    noise = change.flatten(1).median(1).values[:, None, None, None]
    weak = (config.weak * noise).clamp(min=config.min_change)
    strong = (config.strong * noise).clamp(min=2 * config.min_change)
    body = _ramp(change, weak, config.softness) * _ramp(where, config.grow_evidence, config.softness)
    seeds = _ramp(change, strong, config.softness) * _ramp(where, config.seed_evidence, config.softness)
    closed = -_maximum(-_maximum(grow(seeds, body), config.close), config.close)  # gaps up to 2 `close` are filled
    return soften(closed, config.dilate, config.feather)


def grow(seeds: Tensor, body: Tensor) -> Tensor:
    """Gray-scale hysteresis: the parts of `body` that are connected to a seed (Vincent, 1993); (N, 1, H, W)."""
    start = torch.minimum(seeds, body).cpu().double().numpy()  # not every device has float64
    limit = body.cpu().double().numpy()
    grown = [reconstruction(s[0], b[0], footprint=np.ones((3, 3))) for s, b in zip(start, limit, strict=True)]
    return torch.from_numpy(np.stack(grown))[:, None].to(body.dtype).to(body.device)


def soften(mask: Tensor, dilate: int, feather: int) -> Tensor:
    """Widen a mask by `dilate` pixels and let it fade over `feather` more; exactly 0 beyond both."""
    return _box(_maximum(mask, dilate + feather // 2), feather // 2 + feather % 2)


@dataclass(frozen=True)
class Areas:
    """Where a user allows an edit of N images.

    `mask` is "auto" (found from the edit itself), "off" (everywhere, no composite) or (N, 1, H, W) in [0, 1]. `keep`,
    of the same shape, marks pixels that stay the input's inside any mask.
    """

    mask: Tensor | str = "auto"
    keep: Tensor | None = None

    @classmethod
    def checked(cls, mask: Tensor | str, keep: Tensor | None, images: Tensor) -> "Areas":
        """Areas for images (N, C, H, W); ValueError for a wrong shape or range, or if no pixel is left to edit."""
        if isinstance(mask, str) and mask not in ("auto", "off"):
            raise ValueError(f"mask is {mask!r}; expected 'auto', 'off' or a tensor")
        areas = cls(
            mask if isinstance(mask, str) else _checked_mask("mask", mask, images),
            None if keep is None else _checked_mask("keep", keep, images),
        )
        open_pixels = areas.cells(*images.shape[2:])
        if open_pixels is not None and not bool((has_any := open_pixels.flatten(1).any(1)).all()):
            raise ValueError(f"the masks of image {int(has_any.int().argmin())} leave no pixel to edit")
        return areas

    def __getitem__(self, rows: slice | list[int]) -> "Areas":
        """The areas of some of the images, by slice or places."""
        mask = self.mask if isinstance(self.mask, str) else self.mask[rows]
        return Areas(mask, None if self.keep is None else self.keep[rows])

    def cells(self, height: int, width: int) -> Tensor | None:
        """The latent cells (N, 1, height, width) with any pixel that may be edited, or None for all."""
        if isinstance(self.mask, Tensor):
            allowed = self.mask if self.keep is None else self.mask * (self.keep == 0)
        elif self.keep is not None:
            allowed = self.keep == 0
        else:
            return None
        return F.adaptive_max_pool2d((allowed > 0).float(), (height, width))


def _checked_mask(name: str, mask: Tensor, images: Tensor) -> Tensor:
    expected = (len(images), 1, *images.shape[2:])
    if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
        raise ValueError(f"{name} must be a tensor of shape {expected}, got {tuple(getattr(mask, 'shape', ()))}")
    mask = mask.to(images)
    if not bool(mask.isfinite().all()) or float(mask.min()) < 0 or float(mask.max()) > 1:
        raise ValueError(f"{name} must be boolean or hold finite values in [0, 1]")
    return mask


def without(mask: Tensor, keep: Tensor, feather: int) -> Tensor:
    """A mask that is 0 at the pixels to keep and fades towards them over `feather` pixels."""
    return torch.minimum(mask, 1 - _box(_maximum((keep > 0).to(mask), feather), feather)) * (keep == 0)


def evidence_region(coarse: Tensor, threshold: float, softness: float = 0.3) -> Tensor:
    """Cells whose evidence, averaged over 3x3 cells, exceeds `threshold`, and their neighbours; soft, (N, 1, h, w)."""
    return _maximum(_ramp(_box(coarse, 1), threshold, softness), 1)


def side_cells(like: Tensor, side: str) -> Tensor:
    """1, and 0 in the outer third of the image opposite to a side of the patient ("left", "right"); as `like`."""
    cells, third = torch.ones_like(like), round(0.36 * like.shape[-1])
    if side:
        cells[..., slice(third) if side == "left" else slice(-third, None)] = 0
    return cells


def attention_region(word_maps: Tensor, threshold: float, softness: float = 0.2) -> Tensor:
    """LocalBlend (Hertz et al., 2023): cells whose attention, 3x3 max-pooled, exceeds a share of the image's maximum.

    `word_maps` (N, 2, h, w); a cell counts if source or target exceed it. Returns (N, 1, h, w), soft.
    """
    pooled = _maximum(word_maps, 1)
    relative = pooled / pooled.amax((2, 3), keepdim=True).clamp(min=torch.finfo(pooled.dtype).tiny)
    return _ramp(relative, threshold, softness).amax(1, keepdim=True)


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
    patterns, aspects, fonts = [], [], f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans"
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


def composite(images: Tensor, edited: Tensor, reconstruction: Tensor, mask: Tensor, replaced: float) -> Tensor:
    """Put an edit into the input image; where the mask is 0 the result is the input, bit for bit.

    The detail that the autoencoder loses (images - reconstruction) is kept where the edit changes less than `replaced`.
    """
    change = edited - reconstruction
    # Where an edit removes a lead, the lost detail is the lead's own and would leave a ghost of it.
    kept = (1 - _maximum(change.abs(), 2) / replaced).clamp(min=0)
    new = edited + kept * (images - reconstruction)
    return torch.where(mask > 0, (images + mask * (new - images)).clamp(0, 1), images)


def _unit(values: Tensor) -> Tensor:
    """Divide each image by its maximum; an image of zeros stays zero."""
    return values / values.amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)


def _ramp(values: Tensor, threshold: Tensor | float, softness: float) -> Tensor:
    """A threshold without a jump: 0 below threshold x (1 - softness), 1 above threshold x (1 + softness)."""
    low = threshold * (1 - softness)
    width = 2 * softness * threshold
    if not isinstance(width, Tensor) and width == 0:
        return torch.ones_like(values)
    return ((values - low) / width).clamp(0, 1)


def _maximum(values: Tensor, radius: int) -> Tensor:
    return F.max_pool2d(values, 2 * radius + 1, stride=1, padding=radius) if radius else values


def _box(values: Tensor, radius: int) -> Tensor:
    if not radius:
        return values
    return F.avg_pool2d(values, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
