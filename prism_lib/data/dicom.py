"""Radiographs from DICOM files: gray levels as a viewer shows them, pixel spacing, and header fields by name.

The order of the standard (PS3.4, N.2): stored values, modality LUT or rescale, VOI LUT or window, MONOCHROME1 inverted.
A header holds names and birth dates of patients; only the fields that the caller names leave this module, but for a
derived DICOM, which belongs to the patient's record as its source does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import generate_uid

from prism_lib.files import atomic


@dataclass(frozen=True)
class Film:
    """Levels (H, W) float32 in [0, 255], the side of a pixel in millimetres (NaN where unknown), asked-for fields."""

    levels: np.ndarray
    spacing_mm: float
    fields: dict[str, str]


def read(path: Path, keywords: Sequence[str] = (), check_size: Callable[[tuple[int, int]], None] | None = None) -> Film:
    """Decode one single-frame gray image; ValueError with the reason where that is not possible.

    `check_size` gets width and height before anything is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's remarks on values that break the standard but can be read
            data = pydicom.dcmread(path)
            _check(data)
            if check_size:
                check_size((int(data.Columns), int(data.Rows)))
            fields = {keyword: _text(data.get(keyword)) for keyword in keywords}
            return Film(_levels(data, _stored(data)), _spacing(data), fields)
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


def derive(path: Path, target: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write a derived copy of a film with changed levels (H, W) in [0, 255], in stored values as the film has them.

    Window, bits and interpretation stay, and so does every stored value whose level does not change. A film without a
    window gets its own range as the window, so that it looks the same.
    """
    read(path)  # refuses what cannot be used
    data = pydicom.dcmread(path)
    stored = _stored(data)
    lowest = int(stored.min())
    ramp = np.arange(lowest, int(stored.max()) + 1).astype(stored.dtype)
    shown = _levels(data, ramp)
    old = shown[stored.astype(int) - lowest]
    sign = 1 if shown[-1] > shown[0] else -1
    if (np.diff(table := sign * shown) < 0).any():
        raise ValueError("the VOI LUT does not rise or fall throughout: changed levels have no stored value")
    ends = np.searchsorted(table, table[0], "right") - 1, np.searchsorted(table, table[-1])  # of the window

    def value(levels: np.ndarray) -> np.ndarray:
        left, right = (np.searchsorted(table, sign * levels, side) for side in ("left", "right"))
        return lowest + ((left + right - 1) / 2).clip(*ends)

    new = change(old)
    beyond = (stored - value(old)) * (1 - np.abs(new - old) / 2).clip(0)
    fresh = np.rint(value(new) + beyond).clip(lowest, stored.max())
    pixels = np.where(new == old, stored, fresh).astype(stored.dtype)
    if not data.get("VOILUTSequence") and (data.get("WindowWidth") is None or data.get("WindowCenter") is None):
        span = np.asarray(apply_modality_lut(ramp, data), dtype=float)[[0, -1]]
        data.WindowCenter, data.WindowWidth = f"{span.mean():.10g}", f"{np.ptp(span):.10g}"
        data.VOILUTFunction = "LINEAR_EXACT"
    data.SourceImageSequence = [pydicom.Dataset()]
    for name in ("SOPClassUID", "SOPInstanceUID"):
        setattr(data.SourceImageSequence[0], f"Referenced{name}", data.file_meta[f"MediaStorage{name}"].value)
    data.ImageType = ["DERIVED", "SECONDARY", *list(data.get("ImageType") or [])[2:]]
    data.DerivationDescription = "PRISM counterfactual: generated pixels, not for diagnosis"
    data.SeriesDescription, data.SeriesInstanceUID = "PRISM counterfactual", generate_uid()
    for stale in ("SmallestImagePixelValue", "LargestImagePixelValue", "IconImageSequence"):
        data.pop(stale, None)
    data.set_pixel_data(pixels, data.PhotometricInterpretation, data.BitsStored)  # with a new SOPInstanceUID
    with atomic(target) as partial:
        data.save_as(partial, enforce_file_format=True)


def _stored(data: Dataset) -> np.ndarray:
    try:
        return np.asarray(data.pixel_array)
    except RuntimeError as error:  # its message lists the plugins that would decode the pixels
        syntax = data.file_meta.TransferSyntaxUID
        raise ValueError(f"transfer syntax {syntax.name} needs a plugin: {' '.join(str(error).split())}") from None


def _levels(data: Dataset, stored: np.ndarray) -> np.ndarray:
    """Gray levels in [0, 255] of stored values by the VOI LUT, else the window, else the range of the values."""
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
