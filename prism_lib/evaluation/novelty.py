"""Is an image like those that a model was trained on? A distance, and what 95 % or more of known images stay below.

The larger of two parts counts. Layout: the distance to probabilistic principal components (Tipping and Bishop, J. R.
Stat. Soc. B, 1999) of the image at 16 x 16, its mean and contrast taken out, so that exposure does not matter. Blur:
how far the finest detail falls short of the next coarser. Both read pixels alone: half of the films that are upside
down or cut in half have errors of noise prediction (Graham et al., CVPR Workshops, 2023) like good ones. The reference
is `novelty.json` beside the weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate

from prism_lib import paths
from prism_lib.files import write_text

FILE = "novelty.json"
GRID, COMPONENTS = 16, 16
FLAT = 1e-4  # contrast below which an image is blank
FEWEST = 20  # images


@dataclass(frozen=True)
class Reference:
    """What is usual in images (C, H, W) of one `shape`; `share` of known images have both parts below their limit."""

    shape: tuple[int, int, int]
    mean: tuple[float, ...]  # of `layout`
    axes: tuple[tuple[float, ...], ...]  # its components, the variance along each, and that along any other direction
    variances: tuple[float, ...]
    rest: float
    sharpness: tuple[float, float]  # mean and standard deviation
    share: float
    images: int
    limits: tuple[float, float] = (1.0, 1.0)  # of layout and blur

    def scores(self, images: Tensor) -> Tensor:
        """Distances (N,) of images (N, C, H, W): over 1 is unlike; NaN for a blank one. ValueError for other shapes."""
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"images are {tuple(images.shape[1:])}, those that the reference is of {self.shape}")
        return (self.parts(images) / torch.tensor(self.limits, dtype=torch.float64)).amax(1)

    def parts(self, images: Tensor) -> Tensor:
        """Distance of the layout and lack of sharpness (N, 2), in standard deviations."""
        centred = layout(images) - torch.tensor(self.mean, dtype=torch.float64)
        along = centred @ torch.tensor(self.axes, dtype=torch.float64).T
        beside = (centred.square().sum(1) - along.square().sum(1)).clamp(min=0) / self.rest
        explained = (along.square() / torch.tensor(self.variances, dtype=torch.float64)).sum(1)
        usual, spread = self.sharpness
        return torch.stack([(explained + beside).sqrt(), (usual - sharpness(images)) / spread], dim=1)

    def is_new(self, score: float) -> bool:
        """Whether a score is beyond what known images reach; NaN counts as new."""
        return not score <= 1


def layout(images: Tensor) -> Tensor:
    """Images (N, C, H, W) at 16 x 16, each without its mean and contrast: (N, C * 256), NaN for a blank image."""
    small = adaptive_avg_pool2d(images.cpu(), GRID).flatten(1).double()
    centred = small - small.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()
    return centred / torch.where(spread > FLAT, spread, torch.nan)


def sharpness(images: Tensor) -> Tensor:
    """Logarithm (N,) of the detail of images (N, C, H, W) between 1 and 2 pixels over that between 2 and 4."""
    return torch.cat([_detail(batch).log() - _detail(avg_pool2d(batch, 2)).log() for batch in images.cpu().split(64)])


def _detail(levels: Tensor) -> Tensor:
    coarser = interpolate(avg_pool2d(levels, 2), size=levels.shape[-2:])
    return (levels - coarser).abs().mean((1, 2, 3)).double()


def measure(known: Tensor, held_out: Tensor, share: float = 0.95) -> Reference:
    """The reference of images (N, C, H, W) like the training images; `share` of those held out are below its limits."""
    if (fewest := min(len(known), len(held_out))) < FEWEST:
        raise ValueError(f"{fewest} images are too few to measure what is usual; at least {FEWEST} are needed")
    if not 0.5 <= share < 1:
        raise ValueError(f"share is {share}; expected a value in [0.5, 1)")
    rows, sharp = layout(known), sharpness(known)
    if not (torch.isfinite(rows).all() and torch.isfinite(sharp).all()):
        raise ValueError("blank images cannot be among those that say what is usual")
    mean = rows.mean(0)
    _, spread, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    variances = spread.square() / (len(rows) - 1)
    rest = variances[COMPONENTS:].sum().item() / (rows.shape[1] - COMPONENTS)
    channels, height, width = known.shape[1:]
    reference = Reference(
        shape=(channels, height, width),
        mean=tuple(mean.tolist()),
        axes=tuple(map(tuple, axes[:COMPONENTS].tolist())),
        variances=tuple(variances[:COMPONENTS].tolist()),
        rest=rest,
        sharpness=(sharp.mean().item(), sharp.std().item()),
        share=share,
        images=len(known) + len(held_out),
    )
    by_layout, by_blur = reference.parts(held_out).quantile((1 + share) / 2, dim=0).tolist()
    return replace(reference, limits=(by_layout, by_blur))


def save(reference: Reference, folder: Path) -> Path:
    """Write `novelty.json` beside a model's weights, to six digits."""
    content = json.loads(json.dumps(asdict(reference)), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    return write_text(folder / FILE, json.dumps(content) + "\n")


def load(model: str) -> Reference | None:
    """The reference beside a model's weights, or None where there is none."""
    places = (paths.weights() / model, Path(model).expanduser(), paths.runs() / model)
    path = next((place / FILE for place in places if (place / FILE).is_file()), None)
    if path is None:
        return None
    try:
        return TypeAdapter(Reference).validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no reference of `evaluation.novelty`: {error}") from None
