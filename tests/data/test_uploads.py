"""Uploads: what a person may hand in, good and bad; each bad file is one sentence, in bounded memory."""

import io
import re
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from prism_lib.data import dicom as dicom_files
from prism_lib.data.uploads import MAX_BYTES, read_file, read_upload

SIZE = 32
LEVELS = np.random.default_rng(0).integers(1, 255, (SIZE, SIZE), dtype=np.uint8)
MEMORY = 64 * 2**20  # bytes that a refusal may take


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_claiming(width, height, comment=b""):
    """A valid header of a gray PNG with next to no pixels behind it, and a compressed comment."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(comment))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + text + pixels + chunk(b"IEND", b"")


def dicom(levels, photometric="MONOCHROME2", syntax=ExplicitVRLittleEndian, **more):
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.Rows, data.Columns = levels.shape[:2]
    data.SamplesPerPixel = 1 if levels.ndim == 2 else 3
    data.PhotometricInterpretation = photometric
    data.BitsAllocated = data.BitsStored = 8 * levels.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, 0
    if levels.ndim == 3:
        data.PlanarConfiguration = 0
    data.PixelData = levels.tobytes()
    for name, value in more.items():
        setattr(data, name, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, data, enforce_file_format=True)
    return buffer.getvalue()


def tiff(values):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values)
    return buffer.getvalue()


def zipped(size):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("film.png", bytes(size))
    return buffer.getvalue()


GRAY = Image.fromarray(LEVELS)
RED = Image.fromarray(np.stack([LEVELS, LEVELS // 2, LEVELS // 3], axis=-1))
NAN = np.where(np.arange(SIZE)[:, None] == 3, np.nan, LEVELS).astype(np.float32)
FRAMES = [Image.fromarray(np.roll(LEVELS, shift, 0)) for shift in (1, 2)]

BAD = {
    "text": (b"PNG? No, a letter to the radiologist.\n" * 40, "not an image"),
    "empty": (b"", "empty (0 bytes)"),
    "one pixel": (saved(GRAY.crop((0, 0, 1, 1)), "PNG"), "1x1 pixels is smaller than 32x32"),
    "huge header": (png_claiming(20_000, 20_000), "far more pixels"),
    "large header": (png_claiming(9_000, 9_000), "9000x9000 pixels; at most 40,000,000"),
    "comment bomb": (png_claiming(SIZE, SIZE, bytes(2 * MEMORY)), "cannot be used"),
    "animated": (saved(GRAY, "GIF", save_all=True, append_images=FRAMES), "3 frames: only single images"),
    "cut png": (saved(GRAY, "PNG")[:600], "cannot be used"),
    "large dicom": (dicom(LEVELS, Rows=9_000, Columns=9_000), "9000x9000 pixels; at most 40,000,000"),
    "cut dicom": (dicom(LEVELS)[:-500], "cannot be used"),
    "dicom header only": (dicom(LEVELS)[:300], "DICOM"),
    "colour dicom": (dicom(np.stack([LEVELS] * 3, axis=-1), "RGB"), "RGB"),
    "dicom of frames": (dicom(LEVELS, NumberOfFrames=40_000), "40000 frames"),
    "deflated dicom": (dicom(LEVELS, syntax=DeflatedExplicitVRLittleEndian), "deflated"),
    "nan": (tiff(NAN), "floating-point"),
    "floats": (tiff(LEVELS.astype(np.float32)), "floating-point"),
    "zip bomb": (zipped(200 * 2**20), "not an image"),
    "blank": (saved(Image.new("L", (SIZE, SIZE), 7), "PNG"), "blank"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_upload_is_one_sentence_in_bounded_memory(what):
    content, reason = BAD[what]
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^film\.png ") as refusal:
        read_upload("film.png", content, SIZE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = str(refusal.value)
    assert reason in said
    assert re.fullmatch(r"film\.png [^\n]+\.", said)
    assert peak < MEMORY


@pytest.mark.parametrize(
    "what",
    ["huge header", "large header", "large dicom", "animated", "dicom of frames", "deflated dicom", "nan", "zip bomb"],
)
def test_what_the_header_forbids_is_never_decoded(what, monkeypatch):
    monkeypatch.setattr(dicom_files, "_levels", lambda *arguments: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    content, reason = BAD[what]
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_upload("film.png", content, SIZE)


def test_a_file_too_large_to_send_is_refused_unread():
    with pytest.raises(ValueError, match=r"65 MB; at most 64 MB"):
        read_upload("film.png", bytes(MAX_BYTES + 2**20), SIZE)


def test_a_huge_file_is_refused_by_its_length(tmp_path, monkeypatch):
    with (tmp_path / "film.png").open("wb") as file:
        file.truncate(2**40)  # sparse: a terabyte that takes no disk
    with pytest.raises(ValueError, match=r"film\.png has 1048576 MB"):
        read_file(tmp_path / "film.png", SIZE)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (saved(GRAY, "PNG"), LEVELS),
        (saved(GRAY, "TIFF"), LEVELS),
        (saved(Image.fromarray(LEVELS.astype(np.uint16) * 257), "PNG"), LEVELS),
        (tiff(LEVELS.astype(np.uint16) * 257), LEVELS),
        (dicom(LEVELS, WindowCenter=128, WindowWidth=256), LEVELS),
        (dicom(LEVELS, "MONOCHROME1", WindowCenter=128, WindowWidth=256), 255 - LEVELS),
    ],
    ids=["png", "tiff", "png16", "tiff16", "dicom", "dicom1"],
)
def test_a_good_upload_is_read_at_full_depth(content, expected):
    image = read_upload("film", content, SIZE)
    assert image.shape == (1, 1, SIZE, SIZE)
    np.testing.assert_array_equal((image[0, 0] * 255).round().byte().numpy(), expected)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_jpeg_is_read(mode):
    image = read_upload("film.jpg", saved(GRAY.convert(mode), "JPEG", quality=100, subsampling=0), SIZE)
    assert abs((image[0, 0] * 255).numpy() - LEVELS).max() < 4


def test_a_wide_film_is_padded_and_colour_is_kept_where_the_model_has_it():
    wide = saved(Image.fromarray(np.tile(LEVELS, (1, 2))), "PNG")
    image = read_upload("film", wide, SIZE)[0, 0]
    assert (image[: SIZE // 4] == 0).all() and (image[-SIZE // 4 :] == 0).all()
    assert image[SIZE // 2].min() > 0
    colour = read_upload("mole", saved(RED, "PNG"), SIZE, "RGB")
    np.testing.assert_array_equal((colour[0].permute(1, 2, 0) * 255).round().byte().numpy(), np.asarray(RED))
