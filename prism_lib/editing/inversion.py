"""Abduction: the latents, from clean to noise, from which the diffusion model makes a given image."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.editing.methods import RECOMMENDED, InversionConfig, Method, Source, edit_steps, method_of
from prism_lib.editing.settings import recommended_inversion
from prism_lib.files import check_images
from prism_lib.models.pipeline import Pipe, encode_images, encode_prompts, image_factor, predict_noise
from prism_lib.models.schedule import Schedule

Callback = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Inversion:
    """The trajectories of N images (N, C, H, W) in [0, 1], each conditioned on its source prompt.

    `latents` is (T + 1, N, c, h, w) by level, 0 clean and T noise. `negative_embeds` (T + 1, N, L, D), by level, are
    those of null-text inversion; level 0 is not used.
    """

    images: Tensor
    prompts: tuple[str, ...]
    latents: Tensor
    schedule: Schedule
    method: str
    config: InversionConfig
    negative_embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> "Inversion":
        """The inversion of a slice of the images."""
        embeds = None if self.negative_embeds is None else self.negative_embeds[:, rows]
        images, prompts, latents = self.images[rows], self.prompts[rows], self.latents[:, rows]
        return replace(self, images=images, prompts=prompts, latents=latents, negative_embeds=embeds)

    @property
    def how(self) -> Method:
        """The method's entry in the registry: how an edit follows the trajectory back."""
        return method_of(self.method)

    @property
    def start(self) -> int:
        """The level at which an edit starts: T, or less for edit-friendly inversion with `skip`."""
        return edit_steps(self.method, self.config, self.schedule.num_steps)


@torch.no_grad()
def invert(
    pipe: Pipe,
    images: Tensor,
    prompts: Sequence[str],
    method: str = RECOMMENDED,
    num_inference_steps: int = 50,
    *,
    config: InversionConfig | None = None,
    batch_size: int = 8,
    callback: Callback | None = None,
) -> Inversion:
    """Invert images (N, C, H, W) in [0, 1], C 1 or 3, each under its own source prompt; see `editing.methods`.

    Without a `config` the model's own is used (`settings.recommended_inversion`).
    `callback(i, timestep, latents)` is called after step i of every batch and may raise to cancel.
    """
    how, config = method_of(method), config or recommended_inversion(pipe, num_inference_steps)
    if len(images) == 0:
        raise ValueError("there is no image to invert")
    check_images(images, image_factor(pipe.vae))
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(f"{len(images)} images need as many prompts, got {prompts!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    spacing = config.spacing if method == "edit_friendly" else None
    schedule = Schedule.from_config(pipe.scheduler.config, num_inference_steps, spacing)
    embeds, (empty,) = encode_prompts(pipe, prompts), encode_prompts(pipe, [""])

    def predict(latents: Tensor, level: int, prompt_embeds: Tensor) -> Tensor:
        return predict_noise(pipe, latents, schedule.timesteps[level], prompt_embeds)

    batches = [slice(start, start + batch_size) for start in range(0, len(images), batch_size)]
    steps = how.walks * num_inference_steps * len(batches)
    with tqdm(total=steps, desc="invert", leave=False) if steps else nullcontext() as progress:

        def report(index: int, level: int, latents: Tensor) -> None:
            if progress is not None:
                progress.update()
            if callback is not None:
                callback(index, schedule.timesteps[level], latents)

        found = []
        for rows in batches:
            own = images[rows]
            source = Source(own, encode_images(pipe.vae, own), embeds[rows], empty.expand(len(own), -1, -1))
            found.append(how.abduce(predict, source, schedule, config, report))
    latents = torch.cat([walked for walked, _ in found], 1)
    check_finite(latents.isfinite().flatten(2).all(2), range(len(images)), f"{method} inversion")
    negatives = [embeds for _, embeds in found if embeds is not None]
    negative_embeds = torch.cat(negatives, 1) if negatives else None
    return Inversion(images, tuple(prompts), latents, schedule, method, config, negative_embeds)


def check_finite(finite: Tensor, images: Sequence[int], what: str) -> None:
    """Raise FloatingPointError naming step and image if any of `finite` (steps, rows) is False; `images` is by row."""
    if not bool(finite.all()):
        step, row = (~finite).nonzero()[0].tolist()
        raise FloatingPointError(f"{what}: the latents of image {images[row]} are not finite after step {step}")
