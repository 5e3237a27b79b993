"""What an edit of a film leaves as it is: burnt-in letters, and devices of other kinds than those that it names."""

import json
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn

from prism_lib.language.edits import Pairs, PromptPair, affirmed
from prism_lib.models.classifier import find_classifier

READS = 256  # pixels a side that a network of kinds reads
OWN = 0.25  # share of the named kinds from which on a place is theirs, chosen on validation films


def build_kinds(count: int) -> nn.Module:
    """A MONAI U-Net that says of which kind the devices are that an edit removed, by `kinds_input`.

    Its logits are (N, count, READS / 2, READS / 2), and mean nothing where no device was removed.
    """
    from monai.networks.nets import BasicUNet  # three seconds: only where one is built

    return BasicUNet(2, 10, count, (24, 32, 64, 96, 128, 24))


def kinds_input(films: Tensor, removed: Tensor) -> Tensor:
    """Films and what an edit removed (N, 1, READS, READS), in blocks of 2 x 2 pixels, and the place of each block."""
    blocks = [F.pixel_unshuffle(values, 2) for values in (films - 0.5, (10 * removed).clamp(-1, 4))]
    line = torch.linspace(-1, 1, READS // 2)
    places = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(films), -1, -1, -1)
    return torch.cat([*blocks, places], 1)


def kinds_folder(network: str) -> Path:
    """Where a network of kinds of devices lies, found as a classifier is; FileNotFoundError if a file is missing."""
    folder = find_classifier(network)
    if missing := [name for name in ("kinds.json", "model.safetensors") if not (folder / name).is_file()]:
        raise FileNotFoundError(f"no network of kinds of devices at {folder}: {missing[0]} is missing")
    return folder


def named_kinds(pair: PromptPair, network: str) -> list[int]:
    """The places in the network's list of the kinds that a pair removes; none if it adds or removes all devices."""
    kinds = json.loads((kinds_folder(network) / "kinds.json").read_text(encoding="utf-8"))
    texts = (pair.lost, affirmed(pair.source), *(kind.replace(" and", "").split() for kind in kinds))
    lost, said, *words = ({word.removesuffix("s") for word in text} for text in texts)
    named = [place for place, phrase in enumerate(words) if phrase <= said and phrase & lost]
    return [] if pair.adds or {"support", "device"} <= lost else named


@cache
def load_kinds(folder: Path) -> nn.Module:
    """The network whose ``model.safetensors`` is beside the names of its kinds in ``kinds.json``."""
    with torch.random.fork_rng(devices=[]):
        network = build_kinds(len(json.loads((folder / "kinds.json").read_text(encoding="utf-8")))).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    return network


@torch.no_grad()
def other_devices(films: Tensor, removed: Tensor, pairs: Pairs, network: str) -> Tensor:
    """Where an edit removed nothing, or hardly anything of the kinds that its pair names, bool (N, 1, H, W).

    Films and what was removed are (N, C, H, W). Nowhere, where `named_kinds` are none.
    """
    others = torch.zeros_like(films[:, :1], dtype=torch.bool)
    for row, pair in enumerate(pairs):
        if not (named := named_kinds(pair, network)):
            continue
        gray = torch.stack([films[row], removed[row]]).mean(1, keepdim=True).cpu().float()
        film, lost = F.adaptive_avg_pool2d(gray, READS).split(1)
        amount = F.avg_pool2d(lost.clamp(min=0), 2)
        share = load_kinds(kinds_folder(network))(kinds_input(film, lost)).softmax(1)[:, named].sum(1, keepdim=True)
        own, every = (F.avg_pool2d(values, 3, stride=1, padding=1) for values in (share * amount, amount))
        own = F.interpolate(own / every.clamp(min=1e-7), films.shape[-2:], mode="bilinear")
        others[row] = own[0].to(others.device) < OWN
    return others


def burnt_in_text(images: Tensor, anywhere: bool = False, *, contrast: float = 0.3, extent: float = 0.16) -> Tensor:
    """Letters burnt into the corners of a film, or `anywhere`, bool (N, 1, H, W).

    A letter is at most `extent` of the width in size and at least `contrast` brighter than the dark ground around it.
    It lies in a corner (outer seventh in x, outer quarter in y) and touches no border; a wire that leaves the film
    does. Letters `anywhere` are bright, of one gray and crisp, and nothing as bright leads away from them: an L, R, AP
    or PA that is not in the middle of the film, tilted or mirrored too, and level rows of at least four strokes, each
    with the plate, ring or initials within 0.8 of its height. Dark letters, arrows and cut letters are not found.
    Corners of real films also show bones, clips and cables: there, `anywhere` asks for crisp ink on dark ground.
    """
    gray = images.mean(1).cpu().numpy()
    width = gray.shape[-1]
    found = np.zeros(gray.shape, dtype=bool)
    size = max(3, round(0.05 * width))
    for image, text in zip(gray, found, strict=True):
        relief = image - ndimage.maximum_filter(ndimage.minimum_filter(image, size), size)
        labels, count = ndimage.label(relief > contrast, np.ones((3, 3)))
        for label, box in enumerate(ndimage.find_objects(labels, count), 1):
            rows, columns = box
            x, y = (columns.start + columns.stop) / 2 / width, (rows.start + rows.stop) / 2 / len(image)
            inside = min(rows.start, columns.start) > 0 and rows.stop < len(image) and columns.stop < width
            small = max(rows.stop - rows.start, columns.stop - columns.start) <= extent * width
            corner = inside and small and abs(x - 0.5) > 0.36 and abs(y - 0.5) > 0.25
            if corner and not (anywhere and _bone_or_device(relief, labels == label)):
                text[box] |= labels[box] == label
        # with the soft rims of the letters
        text[:] = ndimage.binary_dilation(text, iterations=max(1, round(0.008 * width)))
        for rows, columns in _letter_boxes(image.astype(float)) if anywhere else ():
            rim = round(0.8 * (rows.stop - rows.start))
            text[max(rows.start - rim, 0) : rows.stop + rim, max(columns.start - rim, 0) : columns.stop + rim] = True
    return torch.from_numpy(found)[:, None].to(images.device)


def _bone_or_device(relief: np.ndarray, part: np.ndarray) -> bool:
    """That a part (H, W) of a relief is tiny, soft, or hardly brighter than what is around it."""
    near = 2 * max(1, round(0.004 * part.shape[1])) + 1
    rim = ndimage.maximum_filter(part, near)
    around = ndimage.maximum_filter(rim, near) & ~rim
    gray = relief / np.median(relief[part])
    return bool(part.sum() < (0.015 * part.shape[1]) ** 2 or _crisp(gray, rim) < 0.62 or np.median(gray[around]) > 0.2)


def _crisp(gray: np.ndarray, rim: np.ndarray) -> float:
    """The share of letters and their rim, of those pixels with some ink, that are full of it."""
    return float((rim & (gray > 0.75)).sum() / (rim & (gray > 0.3)).sum())


def _letter_boxes(film: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Boxes of letters and words on a gray film (H, W); the limits were set on films of NIH and Hannover."""
    width, near = film.shape[1], 2 * max(1, round(0.004 * film.shape[1])) + 1
    relief = film - ndimage.grey_opening(film, max(3, round(0.026 * width) | 1))
    content = ndimage.find_objects((film > 0.05).astype(int))  # without padding
    # Over small gaps letters are joined to words.
    for level, gap in product((0.08, 0.11, 0.15, 0.2, 0.27, 0.36, 0.5), (1, round(0.012 * width) | 1)):
        labels, _ = ndimage.label(ndimage.binary_closing(relief > level, np.ones((1, gap))), np.ones((3, 3)))
        for label, box in enumerate(ndimage.find_objects(labels), 1):
            high, long = ((side.stop - side.start) / width for side in box)
            if not (0.011 <= high <= 0.065 and 0.3 * high <= long <= min(12 * high, 0.18)):
                continue
            around = tuple(slice(max(side.start - near, 0), side.stop + near) for side in box)
            part = labels[around] == label
            ink = part & (relief[around] > level)
            gray = relief[around] / np.median(relief[around][ink])
            rim = ndimage.maximum_filter(part, near)
            leads_away = np.percentile(gray[ndimage.maximum_filter(rim, near) & ~rim], 90)
            crisp = _crisp(gray, rim)
            if leads_away > 0.65 or crisp < 0.38 or not 0.15 < ink.sum() / (high * long * width**2) < 0.75:
                continue
            shape = (gray * ink).clip(max=1)[np.ix_(part.any(1), part.any(0))]
            strokes = np.median((np.diff(shape > 0.5, axis=1, prepend=False) & (shape > 0.5)).sum(1)[len(shape) // 5 :])
            word = high <= 0.037 and strokes >= max(4, 1.3 * long / high) and leads_away < min(0.49, 0.06 * strokes)
            y, x = (abs((side.start + side.stop) / size - 1) for side, size in zip(box, film.shape, strict=True))
            cut = any(s.start <= whole.start or whole.stop <= s.stop for s, whole in zip(box, content[0], strict=True))
            if not word and high >= 0.017 and crisp > 0.55 and (y > 0.74 or x > 0.52) and not cut:
                patterns, aspects = _glyphs()
                word = ((_pattern(shape) @ patterns) * (abs(np.log(long / high / aspects)) < 0.6)).max() > 0.82
            if word:
                yield box


@cache
def _glyphs() -> tuple[np.ndarray, np.ndarray]:
    """Patterns (256, G) of letters, upright, tilted by up to 28 degrees, slanted or mirrored, and width over height."""
    patterns, aspects, fonts = [], [], f"{get_data_path()}/fonts/ttf/DejaVuSans"
    tilts = [(tilt, tilt) for tilt in (-0.54, -0.36, -0.18, 0.18, 0.36, 0.54)] + [(0.2, 0)]
    shears = [(text, tilt) for text in "LR" for tilt in tilts] + [(text, (0, 0)) for text in ("L", "R", "AP", "PA")]
    for weight, (text, (x, y)) in product(("", "-Bold"), shears):
        image = Image.new("L", (240, 240))
        ImageDraw.Draw(image).text((120, 120), text, 255, ImageFont.truetype(f"{fonts}{weight}.ttf", 60), "mm")
        image = image.transform(image.size, Image.Transform.AFFINE, (1, x, -120 * x, -y, 1, 120 * y))
        shape = np.asarray(image.crop(image.getbbox()), float)
        patterns += [_pattern(shape[::a, ::b]) for a in (1, -1) for b in (1, -1)]
        aspects += [shape.shape[1] / shape.shape[0]] * 4
    return np.stack(patterns, 1), np.array(aspects)


def _pattern(shape: np.ndarray) -> np.ndarray:
    """A picture (H, W) as 16 x 16 blurred values of mean 0 and length 1."""
    cells = F.adaptive_avg_pool2d(torch.from_numpy(shape.copy())[None], 16)[0].numpy()
    cells = ndimage.gaussian_filter(cells, 1, mode="constant").ravel()
    return (cells - cells.mean()) / max(np.linalg.norm(cells - cells.mean()), 1e-9)
