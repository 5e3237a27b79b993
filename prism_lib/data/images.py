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
from numpy.typing import ArrayLike
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import fft, ndimage

from prism_lib.data import dicom
from prism_lib.files import atomic

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
    mode: str = "L"  # or "RGB": colour is reduced to gray, and gray is repeated to colour
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
        """One picture, (size, size) or (size, size, 3); ValueError with the reason if the file cannot be used."""
        if self.header is None and not dicom.is_dicom(path):
            return Picture(self._square(self._bands(path)))
        film = dicom.read(path, self.header or ())
        levels = Image.fromarray(film.levels)
        pixels, spacing = self._square([levels]), film.spacing_mm / self._scale(levels.size)
        return Picture(pixels, {} if self.header is None else {"pixel_spacing_mm": spacing, **film.fields})

    def _bands(self, path: Path) -> list[Image.Image]:
        """One band, or three, of levels in [0, 255] as floats; the header is checked before anything is decoded."""
        try:
            if path.stat().st_size == 0:
                raise ValueError("empty file")
            with Image.open(path) as file:
                self._check_size(file.size)
                if (frames := getattr(file, "n_frames", 1)) > 1:
                    raise ValueError(f"{frames} frames: only single images can be used")
                if file.mode == "F":
                    raise ValueError("floating-point pixels, whose range is not known")
                upright = ImageOps.exif_transpose(file)
                if upright.mode.startswith("I"):  # 16 bits keep their depth until they are resized
                    return [Image.fromarray(np.asarray(upright, dtype=np.float32) * np.float32(255 / 65535))]
                if upright.has_transparency_data:
                    seen = upright.convert("RGBA")
                    black = Image.new("RGBA", seen.size, (0, 0, 0, 255))
                    upright = Image.alpha_composite(black, seen).convert("RGB")
                return [band.convert("F") for band in upright.convert(self.mode).split()]
        except UnidentifiedImageError:
            raise ValueError("not an image") from None
        except _DECODING_ERRORS as error:
            raise ValueError(f"unreadable image: {error}") from None

    def _scale(self, shape: tuple[int, int]) -> float:
        return self.size / (max(shape) if self.fit == "letterbox" else min(shape))

    def _check_size(self, shape: tuple[int, int]) -> None:
        if self._scale(shape) > self.max_upscale:
            larger = "" if self.max_upscale == 1 else f" by more than {self.max_upscale:g} times"
            raise ValueError(f"image of {shape[0]}x{shape[1]} pixels is smaller than {self.size}x{self.size}{larger}")

    def _square(self, bands: list[Image.Image]) -> np.ndarray:
        """Bands of levels in [0, 255] as (size, size) or (size, size, 3) uint8."""
        self._check_size(bands[0].size)
        extrema = [band.getextrema() for band in bands]
        if all(low == high for low, high in extrema):
            raise ValueError(f"blank image: every pixel is {', '.join(f'{low:g}' for low, _ in extrema)}")
        fitted = [self._fit(band) for band in bands]
        return fitted[0] if self.mode == "L" else np.stack(fitted * (3 // len(fitted)), axis=-1)

    def _fit(self, band: Image.Image) -> np.ndarray:
        size, scale = self.size, self._scale(band.size)
        width, height = (max(1, round(side * scale)) for side in band.size)
        resized = np.asarray(band.resize((width, height), Image.Resampling.LANCZOS))
        levels = resized.round().clip(0, 255).astype(np.uint8)
        if self.fit == "crop":
            top, left = (height - size) // 2, (width - size) // 2
            return levels[top : top + size, left : left + size]
        top, left = (size - height) // 2, (size - width) // 2
        return np.pad(levels, ((top, size - height - top), (left, size - width - left)))


def put_back_file(source: Path, target: Path, factual: ArrayLike, edited: ArrayLike, mask: ArrayLike) -> None:
    """Write the film in `source` with the edit of its letterboxed image: `put_back` of a `Counterfactual`'s tensors.

    All are (1, S, S) in [0, 1]. A target that ends in ".dcm" is a derived DICOM; any other a PNG of the file's bits (of
    a DICOM's levels in 16), upright and without alpha. A colour file changes alike in every channel.
    """
    images = [np.asarray(image, dtype=np.float32) for image in (factual, edited, mask)]
    if len({image.shape for image in images}) > 1 or images[0].shape != (1, *images[0].shape[-1:] * 2):
        raise ValueError(f"expected three images (1, S, S); got {', '.join(str(image.shape) for image in images)}")

    def change(levels: np.ndarray) -> np.ndarray:
        return put_back(levels, images[0][0] * 255, images[1][0] * 255, images[2][0])

    if target.suffix == ".dcm":
        return dicom.derive(source, target, change)
    if dicom.is_dicom(source):
        new, top = change(dicom.read(source).levels) * 257, 65535
    else:
        with Image.open(source) as file:
            film = ImageOps.exif_transpose(file)
        top = 65535 if film.mode.startswith("I") else 255
        old = np.asarray(film if film.mode == "L" or top > 255 else film.convert("RGB"))
        levels = np.float32(255 / top) * np.asarray(film if top > 255 else film.convert("L"), dtype=np.float32)
        delta = (change(levels) - levels) * (top // 255)
        new = old + (delta if old.ndim == 2 else delta[..., None])
    with atomic(target) as partial:
        Image.fromarray(np.rint(new).clip(0, top).astype(np.uint16 if top > 255 else np.uint8)).save(partial, "PNG")


def put_back(levels: np.ndarray, factual: np.ndarray, edited: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An edit of a film's letterboxed image, at the film's own size; where the mask is 0 the film stays to the bit.

    The film is (H, W), the image and its edit (S, S), all levels in [0, 255]; the mask (S, S) is in [0, 1]. The change
    is enlarged and added. Where its steps exceed the film's grain, the film's finer detail holds the sharp edge of what
    changed, and would leave a ghost of it: there grain of the film's spectrum and level takes its place.
    """
    change, scale = edited - factual, len(factual) / max(levels.shape)
    rows, columns = (max(1, round(side * scale)) for side in levels.shape)
    top, left = (len(factual) - rows) // 2, (len(factual) - columns) // 2

    def enlarged(image: np.ndarray, resample: Image.Resampling) -> np.ndarray:
        inner = Image.fromarray(image[top : top + rows, left : left + columns].astype(np.float32))
        return np.asarray(inner.resize(levels.shape[::-1], resample))

    smooth, target = (enlarged(image, Image.Resampling.BICUBIC) for image in (factual, edited))
    inside = enlarged(mask, Image.Resampling.NEAREST) > 0
    if inside.all() or not inside.any() or scale >= 1:  # no film to learn the grain from, or nothing finer
        return np.where(inside, (levels + target - smooth).clip(0, 255), levels)
    detail = levels - smooth
    level, grain = _grain(detail, smooth, target, ~inside, len(factual))
    steps = ndimage.maximum_filter(change, 3) - ndimage.minimum_filter(change, 3)
    steps, share = (enlarged(image, Image.Resampling.BILINEAR) for image in (steps, mask))
    fresh = share * (steps / level - 1).clip(0, 1)
    new = target + (1 - fresh) * detail + np.sqrt(1 - (1 - fresh) ** 2) * grain
    return np.where(inside, new.clip(0, 255), levels)


def _grain(detail: np.ndarray, gray: np.ndarray, wanted: np.ndarray, known: np.ndarray, cells: int) -> list[np.ndarray]:
    """Standard deviation of the film's grain at gray levels `wanted`, and such grain, (H, W), learnt where `known`."""
    # Medians of the fine detail by gray level: edges of anatomy hardly count.
    sizes = pd.Series(np.abs(detail[known])).groupby((gray[known] // 8).astype(int)).median() / 0.6745
    level = np.interp(wanted, 8 * sizes.index + 4.0, sizes).clip(0.2).astype(np.float32)
    most = 3 * np.median(np.abs(detail[known]))
    padded = [fft.next_fast_len(side, real=True) for side in detail.shape]
    power = np.abs(fft.rfft2(known * detail.clip(-most, most), padded)) ** 2
    power = ndimage.uniform_filter(power, max(1, cells // 8), mode=("wrap", "mirror"))
    white = np.random.default_rng(0).standard_normal(padded, dtype=np.float32)
    noise = fft.irfft2(fft.rfft2(white) * np.sqrt(power), padded)[: detail.shape[0], : detail.shape[1]]
    return [level, level * noise / max(noise.std(), 1e-12)]
