"""From an image file of any kind to a prepared image, square, eight bits, gray or colour, written batch by batch.

Pixels become what a viewer shows: EXIF orientation is applied, palettes and CMYK are looked up, and transparent pixels
become black. They are read at full depth, reduced with antialiasing, and rounded once; no image is stretched.

This module and `data.dicom` do not import torch: every process that prepares images loads them. The result does not
depend on the number of processes.
"""

import hashlib
import io
import json
import math
import struct
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

from prism_lib.data import dicom
from prism_lib.files import file_hash, write_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
Fit = Literal["letterbox", "crop"]
Mode = Literal["L", "RGB"]  # PIL's names: gray, colour
# What PIL's decoders raise, whatever the damage.
_DECODING_ERRORS = (OSError, SyntaxError, EOFError, struct.error, zlib.error)


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
    formats: tuple[str, ...] | None = None  # of image files, by PIL's names; None is all that PIL reads
    max_pixels: float = math.inf  # of an image as it is in its file

    def __call__(self, rows: pd.DataFrame) -> Iterator[Picture | Rejection]:
        for name, path in zip(rows["source_file"], rows["path"], strict=True):
            try:
                yield self.read(Path(path))
            except (OSError, ValueError) as error:
                yield Rejection(name, str(error))

    def read(self, path: Path) -> Picture:
        """One picture, (size, size) or (size, size, 3); ValueError with the reason if the file cannot be used."""
        if self.header is None and not dicom.is_dicom(path):
            return Picture(self._square(self._bands(path)))
        film = dicom.read(path, self.header or (), self._check_size)
        levels = Image.fromarray(film.levels)
        pixels, spacing = self._square([levels]), film.spacing_mm / self._scale(levels.size)
        return Picture(pixels, {} if self.header is None else {"pixel_spacing_mm": spacing, **film.fields})

    def _bands(self, path: Path) -> list[Image.Image]:
        """One band, or three, of levels in [0, 255] as floats; the header is checked before anything is decoded."""
        try:
            if path.stat().st_size == 0:
                raise ValueError("empty file")
            with Image.open(path, formats=self.formats) as file:
                self._check_size(file.size)
                if (frames := getattr(file, "n_frames", 1)) > 1:
                    raise ValueError(f"{frames} frames: only single images can be used")
                if file.mode == "F":
                    raise ValueError("floating-point pixels, whose range is not known")
                upright = ImageOps.exif_transpose(file)
                if upright.mode.startswith("I"):  # 16 bits keep their depth until they are resized
                    return [Image.fromarray(np.asarray(upright, dtype=np.float32) * np.float32(255 / 65535))]
                if upright.has_transparency_data:
                    upright = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright.convert("RGBA"))
                return [band.convert("F") for band in upright.convert(self.mode).split()]
        except UnidentifiedImageError:
            raise ValueError("not an image" + (f" ({', '.join(self.formats)})" if self.formats else "")) from None
        except Image.DecompressionBombError:
            raise ValueError("far more pixels than any film has") from None
        except _DECODING_ERRORS as error:
            raise ValueError(f"unreadable image: {error}") from None

    def _scale(self, shape: tuple[int, int]) -> float:
        return self.size / (max(shape) if self.fit == "letterbox" else min(shape))

    def _check_size(self, shape: tuple[int, int]) -> None:
        if shape[0] * shape[1] > self.max_pixels:
            raise ValueError(f"image of {shape[0]}x{shape[1]} pixels; at most {self.max_pixels:,} are decoded")
        if self._scale(shape) > self.max_upscale:
            larger = "" if self.max_upscale == 1 else f" by more than {self.max_upscale:g} times"
            raise ValueError(f"image of {shape[0]}x{shape[1]} pixels is smaller than {self.size}x{self.size}{larger}")

    def _square(self, bands: list[Image.Image]) -> np.ndarray:
        """Bands of levels in [0, 255] as (size, size) or (size, size, 3) uint8."""
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


BATCH = 32  # rows that a reader gets at once


@dataclass(frozen=True)
class Written:
    """An image that was written: hashes of the file and of its pixels, and the columns that its source file gave."""

    file_name: str
    file_hash: str
    pixel_hash: str
    columns: Mapping[str, Any]


Outcome = Written | Rejection


def write_images(images: Reader, plan: pd.DataFrame, folder: Path, key: str, processes: int) -> Generator[Outcome]:
    """Write the images of `plan` to its "file_name"s below `folder`; yields their outcomes, in order.

    Batches that work of the same `key` has finished are not read again. RuntimeError if one of the processes dies.
    """
    from prism_lib.devices import side_by_side  # late: it loads torch, which the reading processes do not need

    batches = (plan.iloc[start : start + BATCH] for start in range(0, len(plan), BATCH))
    try:
        for outcomes in side_by_side(partial(_write_batch, images, folder, key), batches, processes):
            yield from outcomes
    except BrokenProcessPool as error:
        reason = "a process that reads images died, perhaps for want of memory"
        raise RuntimeError(f"{reason}; finished images are kept, and processes=1 needs less") from error


def _write_batch(images: Reader, folder: Path, key: str, rows: pd.DataFrame) -> list[Outcome]:
    """One batch. A batch with a rejected file leaves no record, because the file may be repaired until the next run."""
    record = folder / f"{key}-{rows.index[0]}.json"
    if record.is_file():
        finished = [Written(**item) for item in json.loads(record.read_text(encoding="utf-8"))]
        files = [(folder / item.file_name, item.file_hash) for item in finished]
        if all(file.is_file() and file_hash(file) == digest for file, digest in files):
            return [*finished]
    outcomes: list[Outcome] = []
    for file_name, image in zip(rows["file_name"], images(rows), strict=True):
        if isinstance(image, Rejection):
            outcomes.append(image)
            continue
        file = io.BytesIO()
        Image.fromarray(image.pixels).save(file, format="PNG")
        try:
            (folder / file_name).write_bytes(file.getbuffer())
        except OSError as error:
            raise OSError(error.errno, f"cannot write {file_name}: {error.strerror}", str(folder)) from error
        pixels = hashlib.sha256(repr(image.pixels.shape).encode() + image.pixels.tobytes()).hexdigest()
        outcomes.append(Written(file_name, hashlib.sha256(file.getbuffer()).hexdigest(), pixels, dict(image.columns)))
    if all(isinstance(item, Written) for item in outcomes):
        write_text(record, json.dumps([asdict(item) for item in outcomes]))
    return outcomes
