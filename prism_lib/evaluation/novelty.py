"""Is an image like those that a model was trained on? A distance, and the threshold from which it is new.

After Graham et al. (CVPR Workshops, 2023): logarithms of the errors of noise prediction at several noise levels and of
the autoencoder's round trip; the score is their Mahalanobis distance to those of images like the training images. The
reference is `novelty.json` beside the weights and holds for exactly these weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib import paths
from prism_lib.files import model_hash, write_text
from prism_lib.models.pipeline import decode_latents, encode_images, encode_prompts, predict_noise

FILE = "novelty.json"
TIMESTEPS = (100, 300, 500, 700)
_FLOOR = 1e-8  # of an error, so that a blank image has a logarithm


@dataclass(frozen=True)
class Reference:
    """Mean and covariance of the log errors on known images, and the score from which an image is new.

    `weights` is the hash of the U-Net and autoencoder measured; `share` of held-out images lie below `threshold`.
    """

    weights: str
    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    threshold: float
    share: float
    images: int

    def scores(self, errors: Tensor) -> Tensor:
        """Mahalanobis distances (N,) of rows of `log_errors`."""
        centred = errors.double() - torch.tensor(self.mean, dtype=torch.float64)
        precision = torch.linalg.inv(torch.tensor(self.covariance, dtype=torch.float64))
        return torch.einsum("ni,ij,nj->n", centred, precision, centred).clamp(min=0).sqrt()

    def is_new(self, score: float) -> bool:
        """Whether a score is beyond what known images reach; NaN counts as new."""
        return not score <= self.threshold


@torch.no_grad()
def log_errors(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """Log errors (N, 1 + len(TIMESTEPS)) of images (N, C, H, W): autoencoder, then noise prediction without words.

    All images meet the same noise, so that a row does not depend on the others.
    """
    return torch.cat([_batch_errors(pipe, batch) for batch in tqdm(images.split(8), "novelty", leave=False)])


def _batch_errors(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    latents = encode_images(pipe.vae, images)
    decoded = decode_latents(pipe.vae, latents, images.shape[1]).to(images)
    columns = [(decoded - images).abs().mean((1, 2, 3)).cpu()]
    embeds = encode_prompts(pipe, [""]).expand(len(images), -1, -1)
    generator = torch.Generator().manual_seed(0)  # of the CPU: the same noise on every machine
    noises = torch.randn(len(TIMESTEPS), 1, *latents.shape[1:], generator=generator)
    for timestep, noise in zip(TIMESTEPS, noises, strict=True):
        at = torch.full((len(images),), timestep, device=latents.device)
        noise = noise.to(latents).expand_as(latents)
        noisy = pipe.scheduler.add_noise(latents, noise, at)
        velocity = pipe.scheduler.config.prediction_type == "v_prediction"
        target = pipe.scheduler.get_velocity(latents, noise, at) if velocity else noise
        prediction = predict_noise(pipe, noisy, timestep, embeds)
        columns.append((prediction - target).square().mean((1, 2, 3)).cpu())
    return torch.stack(columns, dim=1).double().clamp(min=_FLOOR).log()


def measure(pipe: StableDiffusionPipeline, images: Tensor, share: float = 0.99) -> Reference:
    """The reference of a model from images (N, C, H, W) of its training distribution that it was not trained on.

    Half of them give mean and covariance, the other half the threshold that `share` of them stay below.
    """
    if len(images) < 4 * (1 + len(TIMESTEPS)):
        raise ValueError(f"{len(images)} images are too few to measure what is usual; at least 20 are needed")
    if not 0.5 <= share < 1:
        raise ValueError(f"share is {share}; expected a value in [0.5, 1)")
    errors = log_errors(pipe, images)
    fitted, held_out = errors[::2], errors[1::2]
    mean, covariance = tuple(fitted.mean(0).tolist()), tuple(map(tuple, torch.cov(fitted.T).tolist()))
    reference = Reference(weights(pipe), mean, covariance, math.inf, share, len(images))
    return replace(reference, threshold=torch.quantile(reference.scores(held_out), share).item())


def weights(pipe: StableDiffusionPipeline) -> str:
    """A hash of the two networks that the errors depend on."""
    return f"{model_hash(pipe.unet)[:16]}-{model_hash(pipe.vae)[:16]}"


def save(reference: Reference, folder: Path) -> Path:
    """Write `novelty.json` beside a model's weights."""
    return write_text(folder / FILE, json.dumps(asdict(reference), indent=1) + "\n")


def load(model: str, pipe: StableDiffusionPipeline) -> Reference | None:
    """The reference beside a model's weights, or None where there is none for exactly these weights."""
    places = (paths.weights() / model, Path(model).expanduser(), paths.runs() / model)
    path = next((place / FILE for place in places if (place / FILE).is_file()), None)
    if path is None:
        return None
    try:
        reference = TypeAdapter(Reference).validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no reference of `evaluation.novelty`: {error}") from None
    return reference if reference.weights == weights(pipe) else None
