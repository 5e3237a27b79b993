"""Pictures for the screen: 8-bit arrays and the PNG bytes of them, in the colours of `plots`.

A view is (H, W, 3) uint8. Everything here is a pure function of images (C, H, W) in [0, 1], so that a slider can
redraw in milliseconds without a front end of its own.
"""

from __future__ import annotations

import io

import numpy as np
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from prism_lib.reporting.plots import DIFFERENCE_COLORS, DIFFERENCE_LIMIT

MODES = ("curtain", "fade")
LINE = (255, 176, 0)  # orange of the colour-blind safe palette: seen on black and on white
TINT = np.array([86, 180, 233], np.float32)  # sky blue of the same palette


def view(image: Tensor) -> np.ndarray:
    """An image (C, H, W) in [0, 1] as it is."""
    pixels = np.atleast_3d(gray_or_colour(image))
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def gray_or_colour(image: Tensor) -> np.ndarray:
    """The 8-bit levels of an image (C, H, W): (H, W) if it is gray, else (H, W, 3); 8-bit input comes back exactly."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def before_after(before: np.ndarray, after: np.ndarray, share: float, mode: str = "curtain") -> np.ndarray:
    """From `before` (share 0) to `after` (share 1): a curtain drawn from the left, or a cross-fade."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; expected a value in [0, 1]")
    if mode == "fade":
        return (before + share * (after.astype(np.float32) - before)).round().astype(np.uint8)
    edge = round(share * before.shape[1])
    drawn = before.copy()
    drawn[:, :edge] = after[:, :edge]
    if 0 < edge < before.shape[1]:
        drawn[:, edge - 1 : edge + 1] = LINE
    return drawn


def difference(after: Tensor, before: Tensor) -> np.ndarray:
    """The signed difference in the colours of every figure: red brighter, blue darker, white unchanged."""
    change = (after.float() - before.float()).mean(0).detach().cpu().numpy()
    unit = (change / (2 * DIFFERENCE_LIMIT) + 0.5).clip(0, 1)
    return (colormaps[DIFFERENCE_COLORS](unit)[..., :3] * 255).round().astype(np.uint8)


def overlay(image: Tensor, mask: Tensor) -> np.ndarray:
    """The image with its mask (1, H, W) in [0, 1] tinted."""
    weight = mask.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy() * 0.45
    return (view(image) * (1 - weight) + TINT * weight).round().astype(np.uint8)


def framed(picture: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """A view with the outline of a rectangle (top, left, bottom, right), the last two excluded."""
    top, left, bottom, right = box
    drawn = picture.copy()
    drawn[top:bottom, [left, right - 1]] = LINE
    drawn[[top, bottom - 1], left:right] = LINE
    return drawn


def png(picture: np.ndarray) -> bytes:
    """8-bit levels (H, W) or (H, W, 3) as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
