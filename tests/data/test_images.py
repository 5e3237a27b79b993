"""Pixels reach eight bits once, unstretched, the right way up, whatever the file holds."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from prism_lib.data.full_size import put_back, put_back_file
from prism_lib.data.images import ImageFiles, Picture
from tests.formats import dicom, noise


def read_image(path, *settings, **more):
    return ImageFiles(*settings, **more).read(path).pixels


def save(tmp_path, pixels):
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    return path


def test_letterbox_keeps_proportions_and_crop_keeps_the_centre(tmp_path):
    pixels = np.zeros((64, 128), np.uint8)
    pixels[:, 32:96] = 200
    path = save(tmp_path, pixels)
    letterbox, crop = read_image(path, 32), read_image(path, 32, "crop")
    assert letterbox[:8].max() == letterbox[24:].max() == 0
    assert letterbox[8:24, 10:22].min() >= 199
    assert letterbox[8:24, :6].max() <= 4
    assert crop[:, 2:30].min() >= 190


def test_reducing_is_antialiased(tmp_path):
    # Stripes finer than the target's pixels become their mean, not stripes of another width.
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))
    reduced = read_image(save(tmp_path, stripes), 32)
    assert np.abs(reduced[2:-2, 2:-2].astype(int) - 127).max() <= 2


def test_sixteen_bits_are_used(tmp_path):
    # A ramp so fine that taking the upper byte first would give another mean: 16 bits reduce to 8 only once.
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 257 * 4, (64, 1))
    reduced = read_image(save(tmp_path, ramp), 64)
    assert np.array_equal(reduced, np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))


def test_sixteen_bits_last_until_after_the_resize(tmp_path):
    # Two levels below one step of eight bits, whose mean crosses it: rounding first would keep them apart.
    checks = np.full((128, 128), 100 * 257 + 120, np.uint16)
    checks[::2, ::2] = 100 * 257 + 140
    assert set(np.unique(read_image(save(tmp_path, checks), 32))) == {100}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA"])
def test_other_modes_become_the_same_gray(tmp_path, mode):
    gray = noise(0, 48, 48)
    gray.convert(mode).save(tmp_path / "image.png")
    assert np.array_equal(read_image(tmp_path / "image.png", 48), np.array(gray))


def test_colour_is_kept_and_gray_is_repeated(tmp_path):
    colour = noise(1, 48, 48, channels=3)
    colour.save(tmp_path / "image.png")
    assert np.array_equal(read_image(tmp_path / "image.png", 48, "letterbox", "RGB"), np.array(colour))
    colour.quantize(16).save(tmp_path / "palette.png")
    expected = np.array(Image.open(tmp_path / "palette.png").convert("RGB"))
    assert np.array_equal(read_image(tmp_path / "palette.png", 48, "letterbox", "RGB"), expected)
    gray = noise(2, 48, 48)
    gray.save(tmp_path / "gray.png")
    assert np.array_equal(read_image(tmp_path / "gray.png", 48, "crop", "RGB"), np.stack([np.array(gray)] * 3, -1))


def test_colour_is_letterboxed_band_by_band(tmp_path):
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[..., 1] = 90
    pixels[:, 64:, 1] = 91
    square = read_image(save(tmp_path, pixels), 32, "letterbox", "RGB")
    assert square.shape == (32, 32, 3)
    assert not square[:8].any() and not square[24:].any() and not square[..., [0, 2]].any()
    assert square[8:24, :14, 1].tolist() == [[90] * 14] * 16


def test_transparent_pixels_are_black_whatever_colour_they_hide(tmp_path):
    pixels = np.full((48, 48, 4), 200, np.uint8)
    pixels[..., 3] = 255
    pixels[:24, :, 3] = 0
    read = read_image(save(tmp_path, pixels), 48, "letterbox", "RGB")
    assert (read[:24] == 0).all() and (read[24:] == 200).all()


def test_cmyk_is_looked_up(tmp_path):
    Image.merge("CMYK", [noise(3, 48, 48), *(Image.new("L", (48, 48), 0) for _ in range(3))]).save(tmp_path / "a.tif")
    read = read_image(tmp_path / "a.tif", 48, "letterbox", "RGB")
    assert np.array_equal(read[..., 0], 255 - np.array(noise(3, 48, 48)))
    assert (read[..., 1:] == 255).all()


@pytest.mark.parametrize(("orientation", "turned"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)])
def test_exif_orientation_is_applied(tmp_path, orientation, turned):
    image = noise(4, 64, 48)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    image.transpose(turned).save(tmp_path / "upright.png")
    assert np.array_equal(read_image(tmp_path / "turned.png", 48), read_image(tmp_path / "upright.png", 48))


def test_enlarging_is_allowed_by_name_only(tmp_path):
    noise(5, 30, 30).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 32, max_upscale=1.1).shape == (32, 32)
    with pytest.raises(ValueError, match=r"30x30 pixels is smaller than 36x36 by more than 1\.1 times"):
        read_image(tmp_path / "a.png", 36, max_upscale=1.1)


def test_truncated_jpeg_is_named(tmp_path):
    noise(6, 64, 64).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    with pytest.raises(ValueError, match="unreadable image: image file is truncated"):
        read_image(tmp_path / "a.jpg", 32)


def test_several_frames_are_refused(tmp_path):
    noise(7).save(tmp_path / "a.gif", save_all=True, append_images=[noise(8)])
    with pytest.raises(ValueError, match="2 frames"):
        read_image(tmp_path / "a.gif", 32)


def test_dicom_is_told_by_its_signature_and_its_spacing_follows_the_resize(tmp_path):
    pixels = np.array(noise(9, 64, 48))
    path = dicom(tmp_path / "film.bin", pixels, WindowCenter=128, WindowWidth=256, PixelSpacing=[0.2, 0.2])
    Image.fromarray(pixels).save(tmp_path / "film.png")
    assert np.abs(read_image(path, 32).astype(int) - read_image(tmp_path / "film.png", 32)).max() <= 1
    picture = ImageFiles(32, header=("PatientAge",)).read(path)
    assert isinstance(picture, Picture)
    assert picture.columns == {"pixel_spacing_mm": pytest.approx(0.4), "PatientAge": "067Y"}


def film_with_wire(height=420, width=300, size=96):
    """A grainy film, the same with a dense wire, both letterboxed, and the wire's mask: levels."""
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[:height, :width]
    ground = 90 + 40 * np.sin(columns / 60) + rows / 12
    wire = 80 * (np.abs(columns - width / 2 - rows / 9) < 2.5)
    grain = rng.normal(0, 3, (height, width))
    clean, film = (np.rint(ground + part + grain).astype(np.float32) for part in (0, wire))
    factual, edited = (ImageFiles(size)._fit(Image.fromarray(image)).astype(np.float32) for image in (film, clean))
    mask = ndimage.binary_dilation(np.abs(factual - edited) >= 1, iterations=2).astype(np.float32)
    return film, clean, wire, factual, edited, mask


def fine(image):
    return image - ndimage.gaussian_filter(image, 4)


def test_an_edit_is_put_back_without_a_ghost_and_with_the_films_grain():
    film, clean, wire, factual, edited, mask = film_with_wire()
    new = put_back(film, factual, edited, mask)
    assert new.shape == film.shape
    far = ~ndimage.binary_dilation(wire > 0, iterations=30)
    assert np.array_equal(new[far], film[far]) and not np.array_equal(new, film)
    sharp = fine(wire.astype(np.float32))
    ghost = (fine(new - clean) * sharp).sum() / (sharp**2).sum()
    assert abs(ghost) < 0.05
    core = ndimage.binary_dilation(wire > 0, iterations=2)
    assert fine(new)[core].std() == pytest.approx(fine(clean)[core].std(), rel=0.2)
    assert np.abs(ndimage.gaussian_filter(new - clean, 4))[core].mean() < 1.5


def test_where_the_mask_is_zero_or_nothing_changed_every_pixel_stays():
    film, _, _, factual, edited, mask = film_with_wire()
    assert np.array_equal(put_back(film, factual, edited, 0 * mask), film)
    np.testing.assert_allclose(put_back(film, factual, factual, mask), film, atol=1e-4)
    everywhere = put_back(film, factual, factual + 10, np.ones_like(mask))
    np.testing.assert_allclose(everywhere, film + 10, atol=1e-3)


def test_an_edit_reduces_to_the_edited_image():
    film, _, _, factual, edited, mask = film_with_wire()
    again = ImageFiles(96)._fit(Image.fromarray(put_back(film, factual, edited, mask)))
    assert np.abs(again - edited)[mask > 0].mean() < 1.5


@pytest.mark.parametrize("kind", ["png", "16 bits", "jpg", "colour"])
def test_files_keep_bits_size_and_all_pixels_outside_the_mask(tmp_path, kind):
    film, _, _, factual, edited, mask = film_with_wire()
    pixels = film.clip(0, 255).astype(np.uint8)
    if kind == "16 bits":
        pixels = pixels.astype(np.uint16) * 257 + np.random.default_rng(0).integers(0, 100, pixels.shape, np.uint16)
    if kind == "colour":
        pixels = np.stack([pixels, pixels, pixels - pixels // 30], axis=-1)
    source, target = tmp_path / f"film.{'jpg' if kind == 'jpg' else 'png'}", tmp_path / "new" / "film.png"
    Image.fromarray(pixels).save(source)
    old = np.asarray(Image.open(source)).astype(int)
    put_back_file(source, target, factual[None] / 255, edited[None] / 255, mask[None])
    new = np.asarray(Image.open(target)).astype(int)
    assert new.shape == old.shape and (new.max() > 255) == (kind == "16 bits")
    changed = new != old
    assert changed.any()
    near = np.asarray(Image.fromarray(mask[:, 13:82]).resize((300, 420), Image.Resampling.NEAREST)) > 0
    assert not changed[~near].any()
    unit = 257 if kind == "16 bits" else 1
    wire = (new - old)[np.abs(film - film_with_wire()[1]) > 0]
    assert wire.mean() / unit == pytest.approx(-80, abs=6)


def test_another_film_than_the_edited_one_is_refused():
    film, _, _, factual, edited, mask = film_with_wire()
    with pytest.raises(ValueError, match=r"not the one that was edited: they differ by \d\d of 255 gray levels"):
        put_back(film[:, ::-1], factual, edited, mask)


def test_a_transparent_film_is_put_back_on_black_as_its_image_was(tmp_path):
    pixels = np.full((128, 128, 2), 200, np.uint8)
    pixels[:, :, 1] = 255 * (np.arange(128) >= 64)
    Image.fromarray(pixels, "LA").save(tmp_path / "film.png")
    factual = ImageFiles(64).read(tmp_path / "film.png").pixels.astype(np.float32)
    mask = np.zeros_like(factual)
    mask[20:30, 40:50] = 1
    images = (image[None] / 255 for image in (factual, factual - 50 * mask, 255 * mask))
    put_back_file(tmp_path / "film.png", tmp_path / "new.png", *images)
    new = np.asarray(Image.open(tmp_path / "new.png").convert("L"))
    assert (new[:, :64] == 0).all() and new[50, 90] == 150 and new[100, 100] == 200


def test_shapes_that_do_not_match_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"\(1, 8, 8\), \(1, 8, 8\), \(8, 8\)"):
        put_back_file(
            tmp_path / "a.png", tmp_path / "b.png", np.zeros((1, 8, 8)), np.zeros((1, 8, 8)), np.zeros((8, 8))
        )
