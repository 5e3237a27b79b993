"""An edit of a film's reduced image, put back at the film's own size and depth."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from PIL import Image, ImageOps
from scipy import fft, ndimage

from prism_lib.data import dicom
from prism_lib.files import atomic

Content = Callable[[np.ndarray], bytes]  # of a file with some levels
SAME = 8.0  # gray levels by which a film, made as small as its image, differs from it at most in the mean


def put_back_file(
    source: Path, target: Path, factual: ArrayLike, edited: ArrayLike, mask: ArrayLike, content: Content | None = None
) -> None:
    """Write the film in `source` with the edit of its letterboxed image: `put_back` of a `Counterfactual`'s tensors.

    All are (1, S, S) in [0, 1]. A target ".dcm" is a derived DICOM, any other a PNG of the file's bits (16 of a DICOM),
    upright, without alpha; all channels change alike. `content` makes another kind of file of such levels.
    """
    images = [np.asarray(image, dtype=np.float32) for image in (factual, edited, mask)]
    if len({image.shape for image in images}) > 1 or images[0].shape != (1, *images[0].shape[-1:] * 2):
        raise ValueError(f"expected three images (1, S, S); got {', '.join(str(image.shape) for image in images)}")

    def change(levels: np.ndarray) -> np.ndarray:
        return put_back(levels, images[0][0] * 255, images[1][0] * 255, images[2][0])

    if target.suffix == ".dcm" and content is None:
        return dicom.derive(source, target, change)
    if dicom.is_dicom(source):
        new, top = change(dicom.read(source).levels) * 257, 65535
    else:
        with Image.open(source) as file:
            film = ImageOps.exif_transpose(file)
        if film.has_transparency_data and not film.mode.startswith("I"):  # on black, as its image
            film = Image.alpha_composite(Image.new("RGBA", film.size, "black"), film.convert("RGBA"))
        top = 65535 if film.mode.startswith("I") else 255
        old = np.asarray(film if film.mode == "L" or top > 255 else film.convert("RGB"))
        levels = np.float32(255 / top) * np.asarray(film if top > 255 else film.convert("L"), dtype=np.float32)
        delta = (change(levels) - levels) * (top // 255)
        new = old + (delta if old.ndim == 2 else delta[..., None])
    pixels = np.rint(new).clip(0, top).astype(np.uint16 if top > 255 else np.uint8)
    with atomic(target) as partial:
        if content is None:
            Image.fromarray(pixels).save(partial, "PNG")
        else:
            partial.write_bytes(content(pixels))


def put_back(levels: np.ndarray, factual: np.ndarray, edited: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """An edit of a film's letterboxed image, at the film's own size; where the mask is 0 the film stays to the bit.

    The film is (H, W), the image and its edit (S, S), all levels in [0, 255]; the mask (S, S) is in [0, 1]. The change
    is enlarged and added. Where its steps exceed the film's grain, finer detail would leave a ghost of what changed:
    grain of the film's spectrum and level replaces it.
    """
    change, scale = edited - factual, len(factual) / max(levels.shape)
    rows, columns = (max(1, round(side * scale)) for side in levels.shape)
    top, left = (len(factual) - rows) // 2, (len(factual) - columns) // 2

    def enlarged(image: np.ndarray, resample: Image.Resampling) -> np.ndarray:
        inner = Image.fromarray(image[top : top + rows, left : left + columns].astype(np.float32))
        return np.asarray(inner.resize(levels.shape[::-1], resample))

    inner = Image.fromarray(levels.astype(np.float32)).resize((columns, rows), Image.Resampling.LANCZOS)
    other = np.abs(np.asarray(inner).clip(0, 255) - factual[top : top + rows, left : left + columns]).mean()
    if other > SAME:
        raise ValueError(f"the film is not the one that was edited: they differ by {other:.0f} of 255 gray levels")
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
