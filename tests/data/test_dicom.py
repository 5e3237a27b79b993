"""DICOM films as a viewer shows them; nothing of a header but what was asked for."""

import contextlib
import struct

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLSLossless

from prism_lib.data import dicom
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
        ({"BitsAllocated": 12}, "inconsistent bits: 12 allocated"),
        ({"BitsAllocated": None}, "unreadable DICOM"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR, not MONOCHROME1"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "pixels are RGB"),
        ({"PixelSpacing": [0.1, 0.3]}, "pixels are not square: PixelSpacing is 0.1 x 0.3 mm"),
        ({"Rows": 100}, "of pixel data|length of the pixel data|pixel data"),
        ({"PixelData": RAMP[:1].tobytes() * 64}, "nothing"),
    ],
)
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


def test_unsupported_transfer_syntax_names_the_plugin(tmp_path):
    frames = encapsulate([b"\xff\xd8\xff\xf7not a frame"])
    path = twelve_bits(tmp_path / "a.dcm", TransferSyntaxUID=JPEGLSLossless, PixelData=frames)
    with pytest.raises(ValueError, match=r"JPEG-LS Lossless .*needs a plugin: .*(pyjpegls|pylibjpeg|gdcm)"):
        dicom.read(path)


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
