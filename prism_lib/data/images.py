"""From an image file of any kind to the pixels of a prepared image: square, eight bits, gray or colour.

Pixels become what a viewer shows: EXIF orientation is applied, palettes and CMYK are looked up, and transparent pixels
become black. They are read at full depth, reduced with antialiasing, and rounded once; no image is stretched. This
module and `data.dicom` do not import torch, because every process that prepares images loads them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

from prism_lib.data import dicom

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
Fit = Literal["letterbox", "crop"]
Mode = Literal["L", "RGB"]  # PIL's names: gray, colour
# What PIL's decoders raise, whatever the damage.
_DECODING_ERRORS = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Rejection:
    """A file that could not be used, and why: one such file among 100,000 does not end the work."""

    file: str
    reason: str


@dataclass(frozen=True)
class Picture:
    """An image ready to be stored, (H, W) or (H, W, 3) uint8, and the table columns that its file gives."""

    pixels: np.ndarray
    columns: Mapping[str, Any] = field(default_factory=dict)


# The picture of each row, in order, the same however the rows are batched; picklable, for other processes call it.
Reader = Callable[[pd.DataFrame], Iterator[Picture | Rejection]]


@dataclass(frozen=True)
class ImageFiles:
    """A `Reader` of the files in "path"; a rejected one is named by its "source_file"."""

    size: int
    fit: Fit = "letterbox"  # keeps the whole image and pads with black; "crop" keeps its centre
    mode: Mode = "L"  # colour is reduced to gray, and gray is repeated to colour
    max_upscale: float = 1.0  # how many times an image may be enlarged to reach `size`
    header: tuple[str, ...] | None = None  # of DICOM files the header fields to copy, by keyword; None for image files

    def __call__(self, rows: pd.DataFrame) -> Iterator[Picture | Rejection]:
        """The pictures in the rows' order."""
        for name, path in zip(rows["source_file"], rows["path"], strict=True):
            try:
                yield self.read(Path(path))
            except ValueError as error:
                yield Rejection(name, str(error))

    def read(self, path: Path) -> Picture:
        """One picture; ValueError with the reason if the file cannot be used."""
        if self.header is None:
            return Picture(read_image(path, self.size, self.fit, self.mode, self.max_upscale))
        film = dicom.read(path, self.header)
        levels = Image.fromarray(film.levels)
        pixels = _square([levels], self.size, self.fit, self.max_upscale)
        spacing = film.spacing_mm / _scale(levels.size, self.size, self.fit)
        return Picture(pixels, {"pixel_spacing_mm": spacing, **film.fields})


def read_image(
    path: Path, size: int, fit: Fit = "letterbox", mode: str = "L", max_upscale: float = 1.0
) -> np.ndarray:
    """A file as (size, size) or (size, size, 3) uint8 (see `ImageFiles`); ValueError with the reason if unusable."""
    if dicom.is_dicom(path):
        bands = [Image.fromarray(dicom.read(path).levels)]
    else:
        bands = _read_bands(path, size, fit, mode, max_upscale)
    pixels = _square(bands, size, fit, max_upscale)
    return np.stack([pixels] * 3, axis=-1) if mode == "RGB" and pixels.ndim == 2 else pixels


def _read_bands(path: Path, size: int, fit: Fit, mode: str, max_upscale: float) -> list[Image.Image]:
    """One band, or three, of levels in [0, 255] as floats; the header is checked before anything is decoded."""
    try:
        if path.stat().st_size == 0:
            raise ValueError("empty file")
        with Image.open(path) as file:
            _check_size(file.size, size, fit, max_upscale)
            if (frames := getattr(file, "n_frames", 1)) > 1:
                raise ValueError(f"{frames} frames: only single images can be used")
            return _full_depth(file, mode)
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except _DECODING_ERRORS as error:
        raise ValueError(f"unreadable image: {error}") from None


def _full_depth(file: Image.Image, mode: str) -> list[Image.Image]:
    """Bands in [0, 255] as floats: 16-bit files keep their depth until they are resized."""
    if file.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    upright = ImageOps.exif_transpose(file)
    if upright.mode.startswith("I"):
        return [Image.fromarray(np.asarray(upright, dtype=np.float32) * np.float32(255 / 65535))]
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", seen.size, (0, 0, 0, 255)), seen).convert("RGB")
    return [band.convert("F") for band in upright.convert(mode).split()]


def _check_size(shape: tuple[int, int], size: int, fit: Fit, max_upscale: float) -> None:
    if _scale(shape, size, fit) > max_upscale:
        larger = "" if max_upscale == 1 else f" by more than {max_upscale:g} times"
        raise ValueError(f"image of {shape[0]}x{shape[1]} pixels is smaller than {size}x{size}{larger}")


def _scale(shape: tuple[int, int], size: int, fit: Fit) -> float:
    return size / (max(shape) if fit == "letterbox" else min(shape))


def _square(bands: list[Image.Image], size: int, fit: Fit, max_upscale: float) -> np.ndarray:
    """Bands of levels in [0, 255] as (size, size) or (size, size, 3) uint8."""
    _check_size(bands[0].size, size, fit, max_upscale)
    extrema = [band.getextrema() for band in bands]
    if all(low == high for low, high in extrema):
        raise ValueError(f"blank image: every pixel is {', '.join(f'{low:g}' for low, _ in extrema)}")
    fitted = [_fit(band, size, fit) for band in bands]
    return fitted[0] if len(fitted) == 1 else np.stack(fitted, axis=-1)


def _fit(band: Image.Image, size: int, fit: Fit) -> np.ndarray:
    scale = _scale(band.size, size, fit)
    width, height = (max(1, round(side * scale)) for side in band.size)
    resized = np.asarray(band.resize((width, height), Image.Resampling.LANCZOS))
    levels = resized.round().clip(0, 255).astype(np.uint8)
    if fit == "crop":
        top, left = (height - size) // 2, (width - size) // 2
        return levels[top : top + size, left : left + size]
    top, left = (size - height) // 2, (size - width) // 2
    return np.pad(levels, ((top, size - height - top), (left, size - width - left)))
