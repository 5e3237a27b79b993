"""Where an edit may show: a soft pixel mask, and the composite of edit and input.

Coarse *evidence* (attention to the edit's words, difference of the noise predictions) gives the region, the *change* of
the decoded image gives the pixels: strong pixels inside the evidence are seeds and grow through weaker pixels that
touch them. All steps are continuous, so rounding cannot flip a pixel; where the mask is 0 the input stays bit for bit.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveFloat
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
