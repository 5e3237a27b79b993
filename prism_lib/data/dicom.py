"""Radiographs from DICOM files: gray levels as a viewer shows them, pixel spacing, and header fields by name.

The order of the standard (PS3.4, N.2): stored values, modality LUT or rescale, VOI LUT or window, MONOCHROME1 inverted.
A header holds names and birth dates of patients; only the fields that the caller names leave this module, but for a
derived DICOM, which belongs to the patient's record as its source does. A Secondary Capture belongs to no record.
"""

import hashlib
import io
import math
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import Dataset, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.pixels.utils import _get_jpg_parameters
from pydicom.uid import generate_uid

from prism_lib.files import atomic

# Only pylibjpeg-libjpeg decodes these; its licence keeps it out of the dependencies.
LIBJPEG = (uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
INSTALL = "pip install pylibjpeg-libjpeg (the extra [dicom]; its licence is GPL-3)"
# Attributes that the standard requires in a Secondary Capture, if only empty (PS3.3, A.8.1).
_EMPTY = """PatientName PatientID PatientBirthDate PatientSex PatientOrientation
    StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName"""
_GENERATED = "PRISM counterfactual: generated pixels, not for diagnosis"


class DicomError(ValueError):
    """Why a file cannot be used, in one sentence."""


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
    with _refusals():
        data = _open(path)
        size = _whole(data, "Columns"), _whole(data, "Rows")
    if check_size:
        check_size(size)
    with _refusals():
        fields = {keyword: _text(data.get(keyword)) for keyword in keywords}
        return Film(_levels(data, _stored(data)), _spacing(data), fields)


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do: with preamble and prefix, or at once with group 2 or 8."""
    with path.open("rb") as file:
        start = file.read(132)
    first = [struct.unpack(f"{order}HH", start[:4]) for order in "<>" if len(start) == 132]
    return start[128:] == b"DICM" or any(group in (2, 8) and element < 0x20 for group, element in first)


@contextmanager
def _refusals() -> Iterator[None]:
    """Whatever pydicom raises becomes a DicomError; its remarks on values that can be read are dropped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except DicomError:
            raise
        except Exception as error:  # pydicom's parsers raise whatever a damaged header leads them to
            reason = getattr(error, "strerror", None) or "a value of its header is damaged"
            raise DicomError(f"unreadable DICOM: {reason}") from error


def _open(path: Path) -> Dataset:
    """A single-frame gray image, not yet decoded; DicomError for what would be decoded into something else."""
    if not is_dicom(path):
        raise DicomError("not a DICOM file")
    data = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in data.file_meta:  # as in files without preamble
        implicit, little = data.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    if "PixelData" not in data:
        raise DicomError("DICOM without pixels")
    if (frames := _whole(data, "NumberOfFrames", 1)) > 1:
        raise DicomError(f"DICOM of {frames} frames: only single images can be used")
    interpretation = str(data.get("PhotometricInterpretation", ""))
    if data.get("SamplesPerPixel", 1) != 1 or interpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise DicomError(f"DICOM pixels are {interpretation or 'not described'}, not MONOCHROME1 or MONOCHROME2")
    allocated, stored, high = (_whole(data, name) for name in ("BitsAllocated", "BitsStored", "HighBit"))
    if allocated not in (8, 16):
        raise DicomError(f"DICOM of {allocated} bits a pixel: only 8 and 16 can be used")
    if not 1 <= stored <= allocated or high != stored - 1:
        raise DicomError(f"inconsistent bits: {allocated} allocated, {stored} stored, high bit {high}")
    return data


def _whole(data: Dataset, name: str, default: int | None = None) -> int:
    value: Any = data.get(name)
    try:
        return int(value) if value not in (None, "") or default is None else default
    except (TypeError, ValueError):
        raise DicomError(f"damaged DICOM: {name} is {'missing' if value is None else repr(str(value))}") from None


def derive(path: Path, target: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write a derived copy of a film with changed levels (H, W) in [0, 255], in stored values as the film has them.

    Window, bits and values whose level does not change stay; a film without a window gets its own range as one.
    """
    with _refusals():
        data = _open(path)
        stored, _ = _stored(data), _spacing(data)
        lowest = int(stored.min())
        ramp = np.arange(lowest, int(stored.max()) + 1).astype(stored.dtype)
        shown = _levels(data, ramp)
    if data.file_meta.TransferSyntaxUID == uid.ExplicitVRBigEndian:  # retired, and pydicom sets no pixels of it
        raise DicomError("a big-endian DICOM cannot hold changed pixels")
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
    pixels = np.where(new == old, stored, np.rint(value(new) + beyond).clip(lowest, stored.max())).astype(stored.dtype)
    if not data.get("VOILUTSequence") and (data.get("WindowWidth") is None or data.get("WindowCenter") is None):
        span = np.asarray(apply_modality_lut(ramp, data), dtype=float)[[0, -1]]
        data.WindowCenter, data.WindowWidth = f"{span.mean():.10g}", f"{np.ptp(span):.10g}"
        data.VOILUTFunction = "LINEAR_EXACT"
    data.SourceImageSequence = [pydicom.Dataset()]
    for name in ("SOPClassUID", "SOPInstanceUID"):
        value = data.file_meta.get(f"MediaStorage{name}", data.get(name))
        setattr(data.SourceImageSequence[0], f"Referenced{name}", value)
    data.ImageType = ["DERIVED", "SECONDARY", *list(data.get("ImageType") or [])[2:]]
    data.DerivationDescription = _GENERATED
    data.SeriesDescription, data.SeriesInstanceUID = "PRISM counterfactual", generate_uid()
    for stale in ("SmallestImagePixelValue", "LargestImagePixelValue", "IconImageSequence"):
        data.pop(stale, None)
    data.set_pixel_data(pixels, data.PhotometricInterpretation, data.BitsStored)  # with a new SOPInstanceUID
    with atomic(target) as partial:
        data.save_as(partial, enforce_file_format=True)


def secondary_capture(pixels: np.ndarray, recipe: str, source: Path | None = None, header: Sequence[str] = ()) -> bytes:
    """A DICOM Secondary Capture of pixels, (H, W) uint8 or uint16 or (H, W, 3) uint8: the bytes of its file.

    The content decides its UIDs. Of a DICOM `source` come only the fields that `header` names by keyword, and whether
    text is burnt into the image; DicomError where fields are named and there is no such source.
    """
    data, bits = Dataset(), 8 * pixels.itemsize
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data.SpecificCharacterSet, data.SOPClassUID = "ISO_IR 192", uid.SecondaryCaptureImageStorage
    for name in _EMPTY.split():
        setattr(data, name, None)
    data.Modality, data.ConversionType, data.SeriesNumber, data.InstanceNumber = "OT", "SYN", 1, 1
    data.ImageType, data.SeriesDescription = ["DERIVED", "SECONDARY"], "PRISM counterfactual"
    whole = f"{_GENERATED}. {recipe}"
    fits = len(whole.encode()) <= 1024  # of the attribute; comments hold ten times as much
    data.DerivationDescription = whole if fits else f"{_GENERATED}. The recipe is in ImageComments."
    if not fits:
        data.ImageComments = recipe
    if pixels.ndim == 2:
        data.WindowCenter, data.WindowWidth, data.VOILUTFunction = (2**bits - 1) / 2, 2**bits - 1, "LINEAR_EXACT"
    content = [recipe, repr(pixels.shape), hashlib.sha256(pixels.tobytes()).hexdigest()]
    data.StudyInstanceUID, data.SeriesInstanceUID, own = (generate_uid(entropy_srcs=[*content, k]) for k in "abc")
    if source is not None and is_dicom(source):
        with _refusals():
            given = pydicom.dcmread(source, stop_before_pixels=True, force=True)
            for name in ("BurnedInAnnotation", *header):
                if name in given:
                    setattr(data, name, given[name].value)
    elif header:
        raise DicomError(f"there is no DICOM header to copy {header[0]} from")
    data.set_pixel_data(pixels, "MONOCHROME2" if pixels.ndim == 2 else "RGB", bits)
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = own
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _stored(data: Dataset) -> np.ndarray:
    syntax = data.file_meta.TransferSyntaxUID
    try:
        if syntax.is_encapsulated and syntax != uid.RLELossless:
            _check_frame(next(generate_frames(data.PixelData, number_of_frames=1)), data.Rows, data.Columns)
        if (pixels := np.asarray(data.pixel_array)).shape != (data.Rows, data.Columns):
            raise DicomError(f"damaged pixels: {pixels.shape} of them, and {data.Columns}x{data.Rows} in the header")
        return pixels
    except (MemoryError, DicomError):
        raise
    except Exception as error:  # decoders raise any exception
        if syntax in LIBJPEG and find_spec("libjpeg") is None:
            raise DicomError(f"{syntax.name} takes another decoder: {INSTALL}") from None
        reason = "no decoder reads the frame" if syntax.is_compressed else str(error).partition(" - ")[0]
        raise DicomError(f"damaged pixels ({syntax.name}): {' '.join(reason.split())}") from error


def _check_frame(frame: bytes, rows: int, columns: int) -> None:
    """A frame has a header of its own, by which decoders take memory and time."""
    if (start := frame.find(b"\xff\x4f\xff\x51")) >= 0 and frame[:2] != b"\xff\xd8":  # JPEG 2000, else JPEG or JPEG-LS
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        own: Any = bottom - top, right - left
    else:
        found = _get_jpg_parameters(frame)
        own = found.get("height"), found.get("width")
    if own != (rows, columns):
        said = f"a frame of {own[1]}x{own[0]} pixels" if own[0] else "a frame without a size"
        raise DicomError(f"damaged pixels: {said}, and {columns}x{rows} in the header")


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
    if low == high or not np.isfinite(high - low):
        raise DicomError(f"blank image: every pixel is {low:g}" if low == high else "values or window are not finite")
    levels = ((shown - low) * (255 / (high - low))).clip(0, 255)
    if data.PhotometricInterpretation == "MONOCHROME1":
        levels = 255 - levels
    return levels.astype(np.float32)


def _spacing(data: Dataset) -> float:
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        if value := data.get(name):
            row, column = map(float, value)
            if not math.isclose(row, column, rel_tol=0.01):
                raise DicomError(f"pixels are not square: {name} is {row:g} x {column:g} mm")
            return row
    return math.nan


def _text(value: Any) -> str:
    if value is None:
        return ""
    return "|".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
