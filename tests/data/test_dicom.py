"""DICOM films as a viewer shows them; nothing of a header but what was asked for."""

import contextlib
import io
import re
import struct
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.data.data_manager import DATA_ROOT
from pydicom.datadict import DicomDictionary
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import JPEGLossless, JPEGLosslessSV1, JPEGLSLossless

from prism_lib import paths
from prism_lib.data import dicom
from prism_lib.data.images import ImageFiles
from tests.formats import dicom as write
from tests.formats import noise

RAMP = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)


def twelve_bits(path, **fields):
    return write(path, RAMP, **({"BitsStored": 12, "HighBit": 11} | fields))


def test_without_a_window_the_film_fills_the_range(tmp_path):
    levels = dicom.read(twelve_bits(tmp_path / "a.dcm")).levels
    assert levels.dtype == np.float32
    np.testing.assert_allclose(levels, RAMP / 4095 * 255, rtol=1e-6)


def test_window_after_rescale(tmp_path):
    # PS3.3 C.11.2.1.2: a window of 1001 around 1000.5 maps 500 to black, 1500 to white; values are 2 x + 100.
    path = twelve_bits(tmp_path / "a.dcm", RescaleSlope=2, RescaleIntercept=100, WindowCenter=1000.5, WindowWidth=1001)
    levels, values = dicom.read(path).levels, RAMP * 2.0 + 100
    np.testing.assert_allclose(levels, ((values - 500) / 1000).clip(0, 1) * 255, atol=1e-3)


def test_monochrome1_is_the_negative(tmp_path):
    film = dicom.read(twelve_bits(tmp_path / "a.dcm")).levels
    negative = dicom.read(twelve_bits(tmp_path / "b.dcm", PhotometricInterpretation="MONOCHROME1")).levels
    np.testing.assert_allclose(film + negative, 255, rtol=1e-6)


def test_voi_lut_is_looked_up(tmp_path):
    from pydicom.dataset import Dataset

    entry = Dataset()
    entry.LUTDescriptor = [4096, 0, 12]
    entry.add_new("LUTData", "OW", struct.pack("<4096H", *range(4095, -1, -1)))
    path = twelve_bits(tmp_path / "a.dcm", VOILUTSequence=[entry], WindowCenter=1, WindowWidth=2)
    np.testing.assert_allclose(dicom.read(path).levels, (4095 - RAMP) / 4095 * 255, rtol=1e-6)


def test_signed_and_eight_bit_pixels(tmp_path):
    signed = write(tmp_path / "a.dcm", (RAMP - 2000.0).astype(np.int16), PixelRepresentation=1)
    np.testing.assert_allclose(dicom.read(signed).levels, RAMP / 4095 * 255, rtol=1e-6)
    eight = np.array(noise(0))
    levels = dicom.read(write(tmp_path / "b.dcm", eight, WindowCenter=128, WindowWidth=256)).levels
    np.testing.assert_allclose(levels, eight, atol=1)


def test_only_asked_fields_are_copied(tmp_path):
    path = twelve_bits(tmp_path / "a.dcm", ImagerPixelSpacing=[0.15, 0.15])
    film = dicom.read(path, ["PatientAge", "StationName"])
    assert film.fields == {"PatientAge": "067Y", "StationName": ""}
    assert film.spacing_mm == pytest.approx(0.15)
    assert dicom.read(path).fields == {}
    assert np.isnan(dicom.read(twelve_bits(tmp_path / "b.dcm")).spacing_mm)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"PixelData": None}, "DICOM without pixels"),
        ({"NumberOfFrames": 2, "PixelData": RAMP.tobytes() * 2}, "DICOM of 2 frames"),
        ({"BitsStored": 20, "HighBit": 19}, "inconsistent bits: 16 allocated, 20 stored, high bit 19"),
        ({"BitsStored": 12, "HighBit": 15}, "inconsistent bits: 16 allocated, 12 stored, high bit 15"),
        ({"BitsAllocated": 12}, "DICOM of 12 bits a pixel: only 8 and 16"),
        ({"BitsAllocated": None}, "damaged DICOM: BitsAllocated is missing"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR, not MONOCHROME1"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "pixels are RGB"),
        ({"WindowCenter": "nan", "WindowWidth": 200}, "values or window are not finite"),
        ({"Rows": 32}, r"damaged pixels: \(2, 32, 64\) of them, and 64x32 in the header"),
        ({"PixelSpacing": [0.1, 0.3]}, "pixels are not square: PixelSpacing is 0.1 x 0.3 mm"),
        ({"Rows": 100}, "of pixel data|length of the pixel data|pixel data"),
        ({"PixelData": RAMP[:1].tobytes() * 64}, "nothing"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR DS")
def test_what_cannot_be_used_is_named(tmp_path, fields, message):
    path = twelve_bits(tmp_path / "a.dcm", **fields)
    if message == "nothing":  # a film like any other: the rows above fail for what they say, not for their making
        assert dicom.read(path).levels.shape == (64, 64)
        return
    with pytest.raises(ValueError, match=message):
        dicom.read(path)


def test_blank_film(tmp_path):
    with pytest.raises(ValueError, match="blank image: every pixel is 7"):
        dicom.read(write(tmp_path / "a.dcm", np.full((32, 32), 7, np.uint16)))


# --- as hospitals have them -----------------------------------------------------------------------

FOLDER = Path(DATA_ROOT) / "test_files"
PYDICOM = sorted(path for path in FOLDER.rglob("*") if path.is_file())
KINDS = {  # what a refusal may say, one sentence each, and its name in the table
    "not a DICOM file": None,
    "DICOM without pixels": None,
    r"DICOM of \d+ frames: only single images can be used": "several frames",
    r"DICOM of \d+ bits a pixel: only 8 and 16 can be used": "1 or 32 bits a pixel",
    r"DICOM pixels are [A-Z_0-9 ]+, not MONOCHROME1 or MONOCHROME2": "colour",
    "DICOM pixels are not described, not MONOCHROME1 or MONOCHROME2": None,
    r"pixels are not square: PixelSpacing is [\d.]+ x [\d.]+ mm": "pixels not square",
    r"damaged DICOM: NumberOfFrames is '1A'": "damaged",
    r"damaged pixels: a frame of \d+x\d+ pixels, and \d+x\d+ in the header": "damaged",
    r"damaged pixels \([\w ()]+\): (no decoder reads the frame|The number of bytes .* \(\d+ vs \d+ bytes\))": "damaged",
}


def outcome(path):
    """The transfer syntax of one of pydicom's files, and "read" or the kind of refusal; None of what is no image."""
    try:
        dicom.read(path)
        said = "read"
    except ValueError as error:
        said = str(error)
        if dicom.INSTALL in said and find_spec("libjpeg") is None:  # what the extra finds
            said = "read" if path.name != "JPEG-lossy.dcm" else "damaged"
    if said not in ("read", "damaged"):
        (said,) = {name for pattern, name in KINDS.items() if re.fullmatch(pattern, said)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meta = pydicom.dcmread(path, force=True, stop_before_pixels=True).file_meta
    return (meta.TransferSyntaxUID.name if "TransferSyntaxUID" in meta else "not stated"), said


def test_each_of_pydicoms_own_files_is_read_or_refused_in_one_plain_sentence():
    found = pd.DataFrame([outcome(path) for path in PYDICOM], columns=["syntax", "what"])
    assert len(found) > 150
    lines = ["| transfer syntax | read | refused |", "|---|--:|---|"]
    for syntax, whats in found.dropna().groupby("syntax")["what"]:
        counts = whats.value_counts()
        refused = ", ".join(f"{kind} ({counts[kind]})" for kind in sorted(set(counts.index) - {"read"}))
        lines.append(f"| {syntax} | {counts.get('read', 0)} | {refused} |")
    table = "\n".join(lines)
    assert table in (paths.root() / "docs" / "your-data.md").read_text(), f"the table in docs/your-data.md is\n{table}"


def lossless_jpeg(pixels, bits, predictor):
    """A frame of process 14 (ISO 10918-1, annex H): differences to the left (predictor 1) or to above (2)."""
    below = np.zeros((pixels.shape[0] + 1, pixels.shape[1] + 1), int)
    below[1:, 1:] = pixels
    expected = below[1:, :-1].copy() if predictor == 1 else below[:-1, 1:].copy()
    expected[0], expected[1:, 0] = (
        below[1, :-1],
        below[1:-1, 1],
    )  # the first row from the left, the first column from above
    expected[0, 0] = 2 ** (bits - 1)
    stream = ""
    for difference in ((pixels - expected + 2**15 - 1) % 2**16 - 2**15 + 1).ravel().tolist():
        size = abs(difference).bit_length()  # its code is 5 bits long
        stream += f"{size:05b}"
        if 0 < size < 16:
            stream += f"{difference if difference > 0 else difference + 2**size - 1:0{size}b}"
    stream += "1" * (-len(stream) % 8)
    scan = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\0")
    header = b"\xff\xc3" + struct.pack(">HBHHB3B", 11, bits, *pixels.shape, 1, 1, 0x11, 0)
    codes = b"\xff\xc4" + struct.pack(">HB16B17B", 36, 0, *(17 * (n == 5) for n in range(1, 17)), *range(17))
    return (
        b"\xff\xd8"
        + header
        + codes
        + b"\xff\xda"
        + struct.pack(">HB2B3B", 8, 1, 1, 0, predictor, 0, 0)
        + scan
        + b"\xff\xd9"
    )


@pytest.mark.parametrize(("syntax", "predictor"), [(JPEGLosslessSV1, 1), (JPEGLossless, 2)])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossless_jpeg_of_process_14_is_read_to_the_bit(tmp_path, syntax, predictor, bits):
    pytest.importorskip("libjpeg", reason="the extra [dicom] is not installed")
    pixels = np.random.default_rng(bits).integers(0, 2**bits, (24, 20)).astype("uint8" if bits == 8 else "uint16")
    frame = encapsulate([lossless_jpeg(pixels.astype(int), bits, predictor)])
    about = {"BitsStored": bits, "HighBit": bits - 1, "WindowCenter": (2**bits - 1) / 2, "WindowWidth": 2**bits - 1}
    about |= {"VOILUTFunction": "LINEAR_EXACT", "TransferSyntaxUID": syntax, "PixelData": frame}
    levels = dicom.read(write(tmp_path / "a.dcm", pixels, **about)).levels
    assert np.array_equal(np.rint(levels * (2**bits - 1) / 255), pixels)


@pytest.mark.parametrize("name", ["RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian", "expb", "implicit"])
def test_every_lossless_copy_of_a_film_has_its_levels(name):
    own, plain = (dicom.read(FOLDER / file) for file in (f"MR_small_{name}.dcm", "MR_small.dcm"))
    assert np.array_equal(own.levels, plain.levels)


def test_a_syntax_that_takes_the_extra_says_so(tmp_path, monkeypatch):
    header = lossless_jpeg(RAMP.astype(int), 12, 1)[:19]
    path = twelve_bits(tmp_path / "a.dcm", TransferSyntaxUID=JPEGLosslessSV1, PixelData=encapsulate([header]))
    monkeypatch.setattr(dicom, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"JPEG Lossless.* takes another decoder: pip install pylibjpeg-libjpeg .*\[dicom\]"
    ):
        dicom.read(path)


def test_a_frame_that_declares_another_size_is_never_decoded(tmp_path):
    small = pydicom.dcmread(FOLDER / "MR_small_jpeg_ls_lossless.dcm")
    frame = bytearray(next(generate_frames(small.PixelData, number_of_frames=1)))
    start = frame.index(b"\xff\xf7") + 5
    frame[start : start + 4] = struct.pack(">HH", 60_000, 60_000)  # seven gigabytes, and minutes
    for content, said in ((bytes(frame), "of 60000x60000 pixels"), (b"\xff\xd8not a frame", "without a size")):
        path = twelve_bits(tmp_path / "a.dcm", TransferSyntaxUID=JPEGLSLossless, PixelData=encapsulate([content]))
        with pytest.raises(ValueError, match=f"damaged pixels: a frame {said}, and 64x64 in the header"):
            dicom.read(path)


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm"])
def test_a_file_without_preamble_is_read(tmp_path, name):
    whole, path = pydicom.dcmread(FOLDER / name), tmp_path / "film"
    implicit, little = whole.original_encoding
    buffer = pydicom.filebase.DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = implicit, little
    pydicom.filewriter.write_dataset(buffer, pydicom.Dataset(whole))
    path.write_bytes(buffer.getvalue())
    assert dicom.is_dicom(path)
    assert np.array_equal(dicom.read(path).levels, dicom.read(FOLDER / name).levels)
    assert ImageFiles(32, max_upscale=1).read(path).pixels.shape == (32, 32)
    if not little:
        with pytest.raises(ValueError, match="a big-endian DICOM cannot hold changed pixels"):
            dicom.derive(path, tmp_path / "b.dcm", lambda levels: levels)
        return
    dicom.derive(path, tmp_path / "b.dcm", lambda levels: levels)
    assert np.array_equal(pydicom.dcmread(tmp_path / "b.dcm").pixel_array, whole.pixel_array)


def test_seven_bits_stored_in_eight_are_consistent(tmp_path):
    pixels = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64) % 128
    levels = dicom.read(write(tmp_path / "a.dcm", pixels, BitsStored=7, HighBit=6)).levels
    np.testing.assert_allclose(levels, pixels / 127 * 255, rtol=1e-6)


# --- without the patient --------------------------------------------------------------------------

# What the standard asks of a Secondary Capture (types 1 and 2 of PS3.3 A.8.1's mandatory modules), and what we add.
REQUIRED = {
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality", "ConversionType", "Rows"),
    *("SamplesPerPixel", "Columns", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelData"),
    "PixelRepresentation",
}
EMPTY = {
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName", "PatientOrientation"),
}
OWN = {
    *("SpecificCharacterSet", "ImageType", "SeriesDescription", "SeriesNumber", "InstanceNumber", "WindowCenter"),
    *("DerivationDescription", "WindowWidth", "VOILUTFunction", "BurnedInAnnotation", "ImageComments"),
    "PlanarConfiguration",
}
RECIPE = '{"target": "chest x-ray, \u200bohne Herzschrittmacher – é"}'


def full_of_secrets(path, rng):
    """A film with every text, name, date and number attribute of the dictionary filled in, and private ones."""
    codes = dict.fromkeys(("PN", "LO", "SH", "ST", "LT", "UT", "UC", "UR"), "Secret{}")
    codes |= {"DA": "1951{:02d}13", "TM": "0713{:02d}", "DT": "195107130713{:02d}", "AS": "0{:02d}Y"}
    codes |= {"UI": "1.2.99999.{}", "IS": "777{}", "AE": "SECRET{}"}
    data = pydicom.dcmread(twelve_bits(path, BurnedInAnnotation=["YES", "NO"][rng.integers(2)]))
    taken = {*data.keys(), 0x00280008}
    for tag, (vr, *_, keyword) in DicomDictionary.items():
        if vr in codes and keyword and tag not in taken and tag >> 16 not in (0, 2, 4):
            data.add_new(tag, vr, codes[vr].format(rng.integers(10, 60)))
    block = data.private_block(0x0099, "Secret Maker", create=True)
    block.add_new(1, "LO", "Secret private")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.save_as(path)
    return path


def test_no_identifying_attribute_is_in_any_of_a_hundred_exports(tmp_path):
    rng, uids = np.random.default_rng(0), set()
    for number in range(100):
        if number % 10 == 0:
            source = full_of_secrets(tmp_path / f"{number}.dcm", rng)
            secret = pydicom.dcmread(source)
            assert len(secret) > 1000
        shape = (*rng.integers(8, 40, 2).tolist(), *([3] if number % 3 == 0 else []))
        kind = np.uint8 if len(shape) == 3 or number % 2 else np.uint16
        pixels = rng.integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
        content = dicom.secondary_capture(pixels, f"{RECIPE} {number}", source)
        made = pydicom.dcmread(io.BytesIO(content))
        assert made.pixel_array.dtype == kind and np.array_equal(made.pixel_array, pixels)
        assert {element.keyword for element in made} <= REQUIRED | EMPTY | OWN
        assert all(made.get(name) not in (None, "") for name in REQUIRED)
        assert all(name in made and not made.get(name) for name in EMPTY)
        assert b"secret" not in content.lower() and b"1951" not in content.replace(pixels.tobytes(), b"")
        assert made.BurnedInAnnotation == secret.BurnedInAnnotation and list(made.ImageType) == ["DERIVED", "SECONDARY"]
        mine = {made.SOPInstanceUID, made.StudyInstanceUID, made.SeriesInstanceUID}
        assert len(mine) == 3 and not mine & (uids | {element.value for element in secret if element.VR == "UI"})
        assert made.file_meta.MediaStorageSOPInstanceUID == made.SOPInstanceUID
        uids |= mine


@pytest.mark.parametrize("bits", [8, 16])
def test_an_export_shows_what_its_pixels_say_and_how_it_was_made(tmp_path, bits):
    pixels = np.random.default_rng(0).integers(10, 2**bits - 10, (40, 30)).astype(f"uint{bits}")
    content = dicom.secondary_capture(pixels, RECIPE)
    assert content == dicom.secondary_capture(pixels, RECIPE) != dicom.secondary_capture(pixels.T, RECIPE)
    (tmp_path / "a.dcm").write_bytes(content)
    np.testing.assert_allclose(dicom.read(tmp_path / "a.dcm").levels, pixels / (2**bits - 1) * 255, rtol=1e-5)
    made = pydicom.dcmread(tmp_path / "a.dcm")
    assert made.DerivationDescription == f"PRISM counterfactual: generated pixels, not for diagnosis. {RECIPE}"
    assert "BurnedInAnnotation" not in made, "it is not known"
    long = pydicom.dcmread(io.BytesIO(dicom.secondary_capture(pixels, "é" * 600)))
    assert long.ImageComments == "é" * 600 and "The recipe is in ImageComments" in long.DerivationDescription


def test_fields_of_the_patient_are_copied_if_they_are_named(tmp_path):
    source, pixels = twelve_bits(tmp_path / "a.dcm"), np.zeros((8, 8), np.uint8)
    made = pydicom.dcmread(io.BytesIO(dicom.secondary_capture(pixels, RECIPE, source, ["PatientID", "StationName"])))
    assert made.PatientID == "SECRET-1" and not made.PatientName and "StationName" not in made
    for other in (None, tmp_path / "b.png"):
        (tmp_path / "b.png").write_bytes(b"x")
        with pytest.raises(ValueError, match="no DICOM header to copy PatientID from"):
            dicom.secondary_capture(pixels, RECIPE, other, ["PatientID"])


# --- damage, and derived films --------------------------------------------------------------------


def test_no_damage_to_a_file_raises_anything_else(tmp_path):
    original = bytearray(twelve_bits(tmp_path / "a.dcm", WindowCenter=2000, WindowWidth=2000).read_bytes())
    rng = np.random.default_rng(0)
    header = len(original) - RAMP.nbytes
    for _ in range(120):
        broken = bytearray(original[: rng.integers(140, len(original))] if rng.random() < 0.3 else original)
        broken[rng.integers(132, min(header, len(broken)))] ^= int(rng.integers(1, 256))
        (tmp_path / "b.dcm").write_bytes(bytes(broken))
        with contextlib.suppress(ValueError):  # either a reason or a film, and nothing else
            assert dicom.read(tmp_path / "b.dcm", ["PatientAge"]).levels.ndim == 2


FILMS = {
    "12 bits without a window": {},
    "with a window": {"WindowCenter": 2000, "WindowWidth": 2400},
    "inverted": {"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 2000, "WindowWidth": 2400},
    "sigmoid": {"WindowCenter": 2000, "WindowWidth": 1200, "VOILUTFunction": "SIGMOID"},
    "rescaled": {"RescaleSlope": 0.5, "RescaleIntercept": -300, "WindowCenter": 600, "WindowWidth": 1500},
}


@pytest.mark.parametrize("kind", FILMS)
def test_a_derived_film_has_the_changed_levels_and_all_else_of_the_source(tmp_path, kind):
    source, target = (
        twelve_bits(tmp_path / "a.dcm", ImageType=["ORIGINAL", "PRIMARY", ""], **FILMS[kind]),
        tmp_path / "b",
    )
    old = dicom.read(source).levels

    def darker(levels):
        np.testing.assert_allclose(levels, old, atol=1e-4)
        return np.where(np.arange(64) < 20, np.maximum(levels - 40, 5), levels).astype(np.float32)

    dicom.derive(source, target, darker)
    before, after = pydicom.dcmread(source), pydicom.dcmread(target)
    assert np.array_equal(after.pixel_array[:, 20:], before.pixel_array[:, 20:])
    np.testing.assert_allclose(dicom.read(target).levels[:, :20], darker(old)[:, :20], atol=0.6)
    for keyword in ("BitsStored", "PhotometricInterpretation", "PatientID", "RescaleSlope"):
        assert after.get(keyword) == before.get(keyword)
    assert before.get("WindowCenter") in (None, after.WindowCenter)
    np.testing.assert_allclose(dicom.read(target).levels[:, 20:], old[:, 20:], atol=1e-4)
    assert after.SOPInstanceUID == after.file_meta.MediaStorageSOPInstanceUID
    original = before.file_meta.MediaStorageSOPInstanceUID
    assert after.SOPInstanceUID != original == after.SourceImageSequence[0].ReferencedSOPInstanceUID
    assert list(after.ImageType) == ["DERIVED", "SECONDARY", ""] and "not for diagnosis" in after.DerivationDescription


def test_values_beyond_the_window_stay_where_levels_hardly_change(tmp_path):
    source = twelve_bits(tmp_path / "a.dcm", WindowCenter=2000, WindowWidth=1000)
    dicom.derive(source, tmp_path / "b.dcm", lambda levels: levels - np.float32(1e-3))
    old, new = (pydicom.dcmread(path).pixel_array.astype(int) for path in (source, tmp_path / "b.dcm"))
    assert np.abs(new - old).max() <= 1
    dicom.derive(source, tmp_path / "c.dcm", lambda levels: np.full_like(levels, 100))
    assert np.ptp(pydicom.dcmread(tmp_path / "c.dcm").pixel_array) == 0
