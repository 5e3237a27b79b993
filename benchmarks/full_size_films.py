"""How well edits are put back at a film's own size: `python -m benchmarks.full_size_films`.

It writes figures/phantom/full_size_films.json. Devices are rendered into films of 2,048 pixels, which then get grain;
film and truth are reduced to 512, the reduced truth is the edit, and `put_back` is compared with the enlarged change
(`plain`) and the enlarged edit (`smooth`). `l1` is the error to the true film where devices were, in gray levels of
255; `ghost` the share of the devices' detail finer than the reduced image that is left there; `gradient` the error of
the slope at the devices' edges, over two pixels, in levels a pixel; `grain` the fine detail's standard deviation over
the true film's; `outside` the number of changed pixels outside the mask. Films are phantoms, or with `--films FOLDER`
those without devices in a prepared folder, enlarged: then the record goes to figures/films/. No picture is recorded.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy import ndimage

from prism_lib import records
from prism_lib.data import load_table, put_back, read_images
from prism_lib.editing.masks import soften
from prism_lib.phantom import render, sample_patients, with_devices

SIZE, REDUCED, GRAIN = 2048, 512, 3.0


def resized(image: np.ndarray, size: int, how: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """An image (H, H) at another size, float32."""
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize((size, size), how))


def reduced(image: np.ndarray, size: int) -> np.ndarray:
    """As `data.images` prepares it: Lanczos, on 8 bits."""
    return resized(image, size, Image.Resampling.LANCZOS).round().clip(0, 255)


def fine(image: np.ndarray, size: int) -> np.ndarray:
    """What an image (H, H) has beyond the resolution of a reduced one."""
    return image - resized(resized(image, size, Image.Resampling.LANCZOS), len(image))


def films(folder: str, count: int, size: int) -> Iterator[np.ndarray]:
    """Films (size, size) without devices, on whole levels."""
    if folder:
        table = load_table(folder, "test")
        table = table[table["Support Devices"] == 0].drop_duplicates("patient_id").head(count)
        clean = read_images(folder, table)
    else:
        clean = render(sample_patients(count, seed=0).intervene(support_devices=0.0), size)
    for film in clean[:, 0].numpy() * 255:
        yield resized(film, size).round().clip(0, 255)


def plain(film: np.ndarray, factual: np.ndarray, edited: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The change, enlarged and added."""
    return film + (resized(mask, len(film), Image.Resampling.NEAREST) > 0) * resized(edited - factual, len(film))


def smooth(film: np.ndarray, factual: np.ndarray, edited: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The edit, enlarged and pasted by the mask."""
    return film + resized(mask, len(film), Image.Resampling.BILINEAR) * (resized(edited, len(film)) - film)


WAYS: dict[str, Callable[..., np.ndarray]] = {"put_back": put_back, "plain": plain, "smooth": smooth}


def measured(clean: np.ndarray, seed: int, size: int, grain: float) -> dict[str, dict[str, float]] | None:
    """The measures of each way on one film; None if its devices can hardly be seen."""
    devices = with_devices(torch.from_numpy(clean / 255).float()[None, None], [seed]).images[0, 0].numpy() * 255 - clean
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(clean.shape), 0.8)
    # 16 bits: grain is not rounded to whole levels
    truth = clean + grain * (noise / noise.std() * np.sqrt(clean / 128)).astype(np.float32)
    film, truth = ((257 * image).round().clip(0, 65535) / np.float32(257) for image in (truth + devices, truth))
    factual, perfect = reduced(film, size), reduced(truth, size)
    changed = (np.abs(resized(devices, size, Image.Resampling.BOX)) >= 1).astype(np.float32)
    mask = soften(torch.from_numpy(changed)[None, None], 2, 1)[0, 0].numpy()
    edited = factual + mask * (perfect - factual)
    where, sharp, blur = np.abs(devices) >= 1, fine(devices, size), len(film) / size / 2
    if where.sum() < 1e-3 * where.size:
        return None
    edges = np.hypot(*np.gradient(devices)) > 5
    found = {}
    for name, way in WAYS.items():
        new = way(film, factual, edited, mask)
        left, slope = fine(new - truth, size), np.gradient(ndimage.gaussian_filter(new - truth, blur))
        found[name] = {
            "l1": float(np.abs(new - truth)[where].mean()),
            "ghost": float((left * sharp)[where].sum() / (sharp**2)[where].sum()),
            "gradient": float(np.hypot(*slope)[edges].mean()) if edges.any() else float("nan"),
            "grain": float(fine(new, size)[where].std() / fine(truth, size)[where].std()),
            "outside": float((new != film)[resized(mask, len(film), Image.Resampling.NEAREST) == 0].sum()),
        }
    return found


def main() -> None:
    """Measure every way on the same films; means over films."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--films", default="", metavar="FOLDER", help="a prepared folder; default: phantoms")
    parser.add_argument("--count", type=int, default=12, help="films")
    parser.add_argument("--size", type=int, default=SIZE, help="of the films, in pixels")
    parser.add_argument("--reduced", type=int, default=REDUCED, help="of the reduced images, in pixels")
    parser.add_argument("--grain", type=float, default=GRAIN, help="standard deviation at mid-gray, in levels of 255")
    parser.add_argument("--figures", default="", metavar="FOLDER", help="where the record goes")
    asked = parser.parse_args()
    with records.Timer() as timer:
        clean = films(asked.films, asked.count, asked.size)
        found = [one for k, film in enumerate(clean) if (one := measured(film, k, asked.reduced, asked.grain))]
    means = {name: pd.DataFrame([one[name] for one in found]).mean().to_dict() for name in WAYS}
    records.record(
        "full_size_films",
        dataset="films" if asked.films else "phantom",
        notebook="benchmarks/full_size_films.py",
        parameters={name: getattr(asked, name) for name in ("count", "size", "reduced", "grain")},
        seed=0,
        metrics={"films": len(found), **means},
        figures_dir=Path(asked.figures) if asked.figures else "",
        model="none",
        seconds=timer.seconds,
    )


if __name__ == "__main__":
    main()
