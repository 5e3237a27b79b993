"""Abduction: from an image to the latents that the diffusion model would have made it from.

Both methods walk up the same DDIM trajectory x*_0 .. x*_T, conditional on the source prompt and without
guidance, at one U-Net evaluation per step. They differ in what an edit then does with it:

- "direct" (Ju et al., ICLR 2024) keeps the whole trajectory and returns the source to it after every step, so
  the source is reconstructed exactly, at no further cost;
- "ddim" lets the source find its own way down from x*_T and so shows what plain inversion loses.

Further methods join `METHODS` under their own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.ddim import Schedule, inverse_step, step
from prism_lib.models import check_images, decode_latents, encode_images, encode_prompts, image_factor

Callback = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Inversion:
    """The abduced trajectory of N images.

    `latents` is (T + 1, N, c, h, w) by level (0 clean, T noise), `images` (N, C, H, W) in [0, 1] are the
    inputs, and `prompts` the source prompts that the trajectory was conditioned on.
    """

    images: Tensor
    prompts: tuple[str, ...]
    latents: Tensor
    schedule: Schedule
    method: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Inversion:
        """The inversion of some of the images, by slice."""
        return replace(self, images=self.images[rows], prompts=self.prompts[rows], latents=self.latents[:, rows])

    @property
    def exact(self) -> bool:
        """Whether an edit returns the source to the stored trajectory after each step."""
        return self.method == "direct"

    def reconstruct(self, pipe: StableDiffusionPipeline) -> Tensor:
        """The images as this inversion gives them back, (N, C, H, W): what an edit without change would show.

        Direct inversion returns the autoencoder's round trip; plain DDIM denoises x*_T again (T evaluations).
        """
        latents = self.latents[0] if self.exact else _denoise(pipe, self)
        return decode_latents(pipe.vae, latents, self.images.shape[1]).to(self.images.device)

    def reconstruction_error(self, pipe: StableDiffusionPipeline) -> Tensor:
        """Mean absolute difference of reconstruction and *input*, (N,), in units of the [0, 1] range."""
        return (self.reconstruct(pipe) - self.images).abs().mean((1, 2, 3))


@torch.no_grad()
def invert(
    pipe: StableDiffusionPipeline,
    images: Tensor,
    prompts: Sequence[str],
    method: str = "direct",
    num_inference_steps: int = 50,
    *,
    batch_size: int = 8,
    callback: Callback | None = None,
) -> Inversion:
    """Invert images (N, C, H, W) in [0, 1], C 1 or 3, each under its own source prompt; T evaluations per
    image.

    `callback(i, timestep, latents)` is called after step i of every batch and may raise to cancel.
    """
    if method not in METHODS:
        raise ValueError(f"unknown inversion method {method!r}; known: {', '.join(METHODS)}")
    check_images(images, image_factor(pipe.vae))
    if len(images) == 0:
        raise ValueError("there is no image to invert")
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise ValueError(f"{len(images)} images need as many prompts, got {prompts!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    schedule = Schedule.from_config(pipe.scheduler.config, num_inference_steps)
    embeds = encode_prompts(pipe, prompts)
    clean = torch.cat([encode_images(pipe.vae, batch) for batch in images.split(batch_size)])
    latents = METHODS[method](pipe, clean, embeds, schedule, batch_size, callback)
    return Inversion(images, tuple(prompts), latents, schedule, method)


def invert_ddim(
    pipe: StableDiffusionPipeline,
    clean: Tensor,
    prompt_embeds: Tensor,
    schedule: Schedule,
    batch_size: int,
    callback: Callback | None = None,
) -> Tensor:
    """From clean latents (N, c, h, w) to the trajectory (T + 1, N, c, h, w) (Dhariwal & Nichol, 2021)."""
    trajectory = clean.new_empty(schedule.num_steps + 1, *clean.shape)
    trajectory[0] = clean
    batches = range(0, len(clean), batch_size)
    with tqdm(total=schedule.num_steps * len(batches), desc="invert", leave=False) as progress:
        for start in batches:
            rows = slice(start, start + batch_size)
            for level in range(1, schedule.num_steps + 1):
                sample = trajectory[level - 1, rows]
                timestep = schedule.timesteps[level]
                prediction = predict_noise(pipe, sample, timestep, prompt_embeds[rows])
                trajectory[level, rows] = inverse_step(schedule, sample, prediction, level)
                progress.update()
                if callback is not None:
                    callback(level - 1, timestep, trajectory[level, rows])
    return trajectory


# Both walk the same way up; `Inversion.exact` is where they part.
METHODS: Mapping[str, Callable[..., Tensor]] = {"direct": invert_ddim, "ddim": invert_ddim}


def predict_noise(pipe: StableDiffusionPipeline, latents: Tensor, timestep: int, prompt_embeds: Tensor) -> Tensor:
    """One U-Net evaluation per row, in the U-Net's dtype; latents and the answer keep their own precision."""
    dtype = pipe.unet.dtype
    return pipe.unet(latents.to(dtype), timestep, encoder_hidden_states=prompt_embeds.to(dtype)).sample.to(latents)


@torch.no_grad()
def _denoise(pipe: StableDiffusionPipeline, inversion: Inversion) -> Tensor:
    """The conditional DDIM path down from x*_T, (N, c, h, w)."""
    schedule = inversion.schedule
    embeds = encode_prompts(pipe, inversion.prompts)
    latents = inversion.latents[-1]
    for level in tqdm(range(schedule.num_steps, 0, -1), desc="reconstruct", leave=False):
        prediction = predict_noise(pipe, latents, schedule.timesteps[level], embeds)
        latents = step(schedule, latents, prediction, level)
    return latents
