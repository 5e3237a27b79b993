"""Is an image like those that a model was trained on? A distance, and what 95 % or more of known images stay below.

The larger of two parts counts. Layout: the distance to probabilistic principal components (Tipping and Bishop, J. R.
Stat. Soc. B, 1999) of the image at 16 x 16, its mean and contrast taken out, so that exposure does not matter. Blur:
how far the finest detail falls short of the next coarser. The reference is `novelty.json` beside the weights, which
`python -m benchmarks.unusual_inputs` writes.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate

from prism_lib import paths
from prism_lib.configs import checked, read

FILE = "novelty.json"
GRID = 16
FLAT = 1e-4  # contrast below which an image is blank


@checked()
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


def load(model: str) -> Reference | None:
    """The reference beside a model's weights, or None where there is none."""
    places = (paths.weights() / model, Path(model).expanduser(), paths.runs() / model)
    path = next((place / FILE for place in places if (place / FILE).is_file()), None)
    fault = f"{path} is no reference of `evaluation.novelty`"
    return None if path is None else read(Reference, path.read_bytes(), fault)
