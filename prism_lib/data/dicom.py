"""Radiographs from DICOM files: gray levels as a viewer shows them, pixel spacing, and header fields by name.

The order of the standard (PS3.4, N.2): stored values, modality LUT or rescale, VOI LUT or window, MONOCHROME1 inverted.
A header holds names and birth dates of patients; only the fields that the caller names leave this module.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset


@dataclass(frozen=True)
class Film:
    """Levels (H, W) float32 in [0, 255], the side of a pixel in millimetres (NaN where unknown), asked-for fields."""

    levels: np.ndarray
    spacing_mm: float
    fields: dict[str, str]


def check_keywords(keywords: Sequence[str]) -> None:
    """Raise ValueError at the first that is no keyword of the DICOM dictionary, such as "PatientAge"."""
    from pydicom.datadict import tag_for_keyword

    for keyword in keywords:
        if tag_for_keyword(keyword) is None:
            raise ValueError(f"header field {keyword!r} is no keyword of DICOM's dictionary (one is 'PatientAge')")


def read(path: Path, keywords: Sequence[str] = (), check_size: Callable[[tuple[int, int]], None] | None = None) -> Film:
    """Decode one single-frame gray image; ValueError with the reason where that is not possible.

    `check_size` gets width and height before anything is decoded.
    """
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's remarks on values that break the standard but can be read
            data = pydicom.dcmread(path)
            _check(data)
            if check_size:
                check_size((int(data.Columns), int(data.Rows)))
            fields = {keyword: _text(data.get(keyword)) for keyword in keywords}
            return Film(_levels(data), _spacing(data), fields)
    except InvalidDicomError:
        raise ValueError("not a DICOM file") from None
    except ValueError:
        raise
    except Exception as error:  # pydicom's parsers raise whatever a damaged header leads them to
        raise ValueError(f"unreadable DICOM: {' '.join(str(error).split()) or type(error).__name__}") from None


def _check(data: Dataset) -> None:
    """What would otherwise be decoded into something else than the film."""
    if "PixelData" not in data:
        raise ValueError("DICOM without pixels")
    if (frames := int(data.get("NumberOfFrames") or 1)) > 1:
        raise ValueError(f"DICOM of {frames} frames: only single images can be used")
    interpretation = str(data.get("PhotometricInterpretation", ""))
    if data.get("SamplesPerPixel", 1) != 1 or interpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"DICOM pixels are {interpretation or 'not described'}, not MONOCHROME1 or MONOCHROME2")
    allocated, stored, high = (int(data[name].value) for name in ("BitsAllocated", "BitsStored", "HighBit"))
    if allocated not in (8, 16) or not 8 <= stored <= allocated or high != stored - 1:
        raise ValueError(f"inconsistent bits: {allocated} allocated, {stored} stored, high bit {high}")


def _levels(data: Dataset) -> np.ndarray:
    """Gray levels in [0, 255] by the VOI LUT, else the window, else the film's own range."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    try:
        stored = data.pixel_array
    except RuntimeError as error:  # its message lists the plugins that would decode the pixels
        syntax = data.file_meta.TransferSyntaxUID
        raise ValueError(f"transfer syntax {syntax.name} needs a plugin: {' '.join(str(error).split())}") from None
    values = np.asarray(apply_modality_lut(stored, data), dtype=np.float64)
    if data.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1
        shown = apply_voi_lut(values.round().astype(np.int64), data)
    elif data.get("WindowWidth") is not None and data.get("WindowCenter") is not None:
        # The ends that the window maps to: what lies far outside it is black or white.
        low, high = apply_voi_lut(np.array([-1e12, 1e12]), data)
        shown = apply_voi_lut(values, data)
    else:
        low, high, shown = values.min(), values.max(), values
    if low == high:
        raise ValueError(f"blank image: every pixel is {low:g}")
    levels = ((shown - low) * (255 / (high - low))).clip(0, 255)
    if data.PhotometricInterpretation == "MONOCHROME1":
        levels = 255 - levels
    return levels.astype(np.float32)


def _spacing(data: Dataset) -> float:
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        if value := data.get(name):
            row, column = map(float, value)
            if not math.isclose(row, column, rel_tol=0.01):
                raise ValueError(f"pixels are not square: {name} is {row:g} x {column:g} mm")
            return row
    return math.nan


def _text(value: Any) -> str:
    if value is None:
        return ""
    return "|".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
