"""Abduction: from an image to the latents that the diffusion model would have made it from.

Most methods walk up the same DDIM trajectory x*_0 .. x*_T, conditional on the source prompt and without guidance, at
one U-Net evaluation per step. They differ in what an edit then does with it (`editing.descent`):

- "direct" (Ju et al., ICLR 2024) keeps the whole trajectory and returns the source to it after every step, so
  the source is reconstructed exactly, at no further cost;
- "ddim" lets the source find its own way down from x*_T and so shows what plain inversion loses;
- "negative_prompt" (Miyake et al., 2023) is "ddim" with the target guided away from the source prompt;
- "null_text" (Mokady et al., CVPR 2023), the paper's, optimises the unconditional embedding of every step so that
  guided sampling follows the trajectory;
- "edit_friendly" (Huberman-Spiegelglas et al., CVPR 2024) noises the image independently at every level. The noise maps
  follow from the source's predictions, which an edit makes anyway: inverting costs no evaluation at all;
- "bdia" (Zhang et al., 2023) integrates over two levels, which can be undone exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.editing.descent import DESCENTS, Descent
from prism_lib.editing.inversion_config import InversionConfig
from prism_lib.editing.reuse import remember
from prism_lib.files import image_hash
from prism_lib.models import schedule as ddim
from prism_lib.models.pipeline import (
    check_images,
    decode_latents,
    encode_images,
    encode_prompts,
    full_precision,
    image_factor,
    predict_noise,
)
from prism_lib.models.schedule import Schedule, inverse_step, move

Callback = Callable[[int, int, Tensor], None]
_USUAL = InversionConfig()


@dataclass(frozen=True)
class Inversion:
    """The abduced trajectory of N images.

    `latents` is (T + 1, N, c, h, w) by level (0 clean, T noise), `images` (N, C, H, W) in [0, 1] are the
    inputs, and `prompts` the source prompts that the trajectory was conditioned on. `negative_embeds` (T + 1, N, L, D),
    by level, are null-text inversion's; level 0 is not used.
    """

    images: Tensor
    prompts: tuple[str, ...]
    latents: Tensor
    schedule: Schedule
    method: str
    config: InversionConfig = _USUAL
    negative_embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Inversion:
        """The inversion of some of the images, by slice."""
        embeds = None if self.negative_embeds is None else self.negative_embeds[:, rows]
        images, prompts, latents = self.images[rows], self.prompts[rows], self.latents[:, rows]
        return replace(self, images=images, prompts=prompts, latents=latents, negative_embeds=embeds)

    @property
    def descent(self) -> Descent:
        """How an edit goes down from here."""
        return DESCENTS[self.method]

    @property
    def start(self) -> int:
        """The level that an edit starts from; T but for edit-friendly inversion with `skip`."""
        skip = self.config.skip if self.method == "edit_friendly" else 0.0
        return max(1, self.schedule.num_steps - int(skip * self.schedule.num_steps))

    @property
    def exact(self) -> bool:
        """Whether an edit returns the source to the stored trajectory after each step."""
        return self.descent.returns

    def reconstruct(self, pipe: StableDiffusionPipeline) -> Tensor:
        """The images as this inversion gives them back, (N, C, H, W): what an edit without change would show.

        An exact method returns what it stored (the autoencoder's round trip, but for null-text, whose own way down it
        is); the others denoise x*_T again (T evaluations).
        """
        latents = self.latents[0] if self.exact else _denoise(pipe, self)
        return decode_latents(pipe.vae, latents, self.images.shape[1]).to(self.images.device)

    def reconstruction_error(self, pipe: StableDiffusionPipeline) -> Tensor:
        """Mean absolute difference of reconstruction and *input*, (N,), in units of the [0, 1] range."""
        return (self.reconstruct(pipe) - self.images).abs().mean((1, 2, 3))

    def save(self, path: str | Path, pipe: StableDiffusionPipeline) -> Path:
        """Write what `pipe` made, for `inversion_store.load_inversion` to open for the same images and model only."""
        from prism_lib.editing.inversion_store import save_inversion  # which is built on this module

        return save_inversion(path, self, pipe)


@torch.no_grad()
def invert(
    pipe: StableDiffusionPipeline,
    images: Tensor,
    prompts: Sequence[str],
    method: str = "direct",
    num_inference_steps: int = 50,
    *,
    config: InversionConfig = _USUAL,
    batch_size: int = 8,
    callback: Callback | None = None,
) -> Inversion:
    """Invert images (N, C, H, W) in [0, 1], C 1 or 3, each under its own source prompt; T evaluations per
    image.

    `callback(i, timestep, latents)` is called after step i of every batch and may raise to cancel. Inside of
    `reuse.kept` nothing is inverted twice, and then it is not called.
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

    def abduce() -> Inversion:
        embeds = encode_prompts(pipe, prompts)
        clean = torch.cat([encode_images(pipe.vae, batch) for batch in images.split(batch_size)])
        with full_precision(pipe.unet, DESCENTS[method].exact):
            latents = METHODS[method](pipe, clean, embeds, schedule, batch_size, callback)
        inversion = Inversion(images, tuple(prompts), latents, schedule, method, config)
        if method == "edit_friendly":
            inversion = replace(inversion, latents=_noised_apart(inversion))
        elif method == "null_text":
            inversion = _null_text(pipe, inversion, embeds, batch_size)
        check_finite(inversion.latents.isfinite().flatten(2).all(2), 0, f"{method} inversion")
        return inversion

    seen = images.shape, image_hash(images), tuple(prompts)
    return remember((pipe, seen, method, schedule, config, batch_size), abduce)


def check_finite(finite: Tensor, first: int, what: str) -> None:
    """Raise FloatingPointError naming step and image if any of (steps, N) is False; one look for a whole batch."""
    if not bool(finite.all()):
        step, image = (~finite).nonzero()[0].tolist()
        raise FloatingPointError(f"{what}: the latents of image {first + image} are not finite after step {step}")


def invert_ddim(
    pipe: StableDiffusionPipeline,
    clean: Tensor,
    prompt_embeds: Tensor,
    schedule: Schedule,
    batch_size: int,
    callback: Callback | None = None,
) -> Tensor:
    """From clean latents (N, c, h, w) to the trajectory (T + 1, N, c, h, w) (Dhariwal & Nichol, 2021)."""

    def up(sample: Tensor, prediction: Tensor, level: int, below: Tensor | None) -> Tensor:
        return inverse_step(schedule, sample, prediction, level)

    return _walk_up(pipe, clean, prompt_embeds, schedule, batch_size, callback, lambda level: level, up)


def invert_bdia(
    pipe: StableDiffusionPipeline,
    clean: Tensor,
    prompt_embeds: Tensor,
    schedule: Schedule,
    batch_size: int,
    callback: Callback | None = None,
) -> Tensor:
    """The trajectory of bidirectional integration (Zhang et al., 2023), gamma 1: z[k+1] from z[k-1] and z[k]."""

    def up(sample: Tensor, prediction: Tensor, level: int, below: Tensor | None) -> Tensor:
        if below is None:
            return inverse_step(schedule, sample, prediction, level)
        above, down = (move(schedule, sample, prediction, level - 1, level - 1 + n) for n in (1, -1))
        return below - (down - above)

    # Level 0 is never seen by the U-Net: the first step is plain DDIM inversion.
    return _walk_up(pipe, clean, prompt_embeds, schedule, batch_size, callback, lambda level: max(level - 1, 1), up)


def _walk_up(
    pipe: StableDiffusionPipeline,
    clean: Tensor,
    prompt_embeds: Tensor,
    schedule: Schedule,
    batch_size: int,
    callback: Callback | None,
    told: Callable[[int], int],
    up: Callable[[Tensor, Tensor, int, Tensor | None], Tensor],
) -> Tensor:
    """The trajectory (T + 1, N, c, h, w), one prediction a step, batch after batch.

    On the way to a level the U-Net hears the timestep of ``told(level)``; ``up(sample, prediction, level, below)``
    is the latent there, made of the one at level - 1 and, from the second step on, the one ``below`` it.
    """
    trajectory = clean.new_empty(schedule.num_steps + 1, *clean.shape)
    trajectory[0] = clean
    batches = range(0, len(clean), batch_size)
    with tqdm(total=schedule.num_steps * len(batches), desc="invert", leave=False) as progress:
        for start in batches:
            rows = slice(start, start + batch_size)
            for level in range(1, schedule.num_steps + 1):
                sample, timestep = trajectory[level - 1, rows], schedule.timesteps[told(level)]
                prediction = predict_noise(pipe, sample, timestep, prompt_embeds[rows])
                below = trajectory[level - 2, rows] if level > 1 else None
                trajectory[level, rows] = up(sample, prediction, level, below)
                progress.update()
                if callback is not None:
                    callback(level - 1, timestep, trajectory[level, rows])
    return trajectory


def invert_apart(
    pipe: StableDiffusionPipeline,
    clean: Tensor,
    prompt_embeds: Tensor,
    schedule: Schedule,
    batch_size: int,
    callback: Callback | None = None,
) -> Tensor:
    """Clean latents at every level, still without noise: (T + 1, N, c, h, w)."""
    return clean.expand(schedule.num_steps + 1, *clean.shape)


def _noised_apart(inversion: Inversion) -> Tensor:
    """Each level noised on its own, from a generator per image seeded by the image's pixels."""
    schedule, latents = inversion.schedule, inversion.latents.clone()
    for n, image in enumerate(inversion.images):
        content = image.cpu().contiguous().numpy().tobytes() + str(inversion.config.seed).encode()
        seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1
        noise = torch.randn(latents[1:, n].shape, generator=torch.Generator().manual_seed(seed)).to(latents)
        for level in range(1, schedule.num_steps + 1):
            signal, scale = schedule.alphas[level] ** 0.5, (1 - schedule.alphas[level]) ** 0.5
            latents[level, n] = signal * latents[0, n] + scale * noise[level - 1]
    return latents


def _null_text(pipe: StableDiffusionPipeline, inversion: Inversion, embeds: Tensor, batch_size: int) -> Inversion:
    """Optimise the unconditional embedding of every step (Mokady et al., CVPR 2023, algorithm 1), batch by batch."""
    empty = encode_prompts(pipe, [""] * len(inversion))
    latents = inversion.latents.clone()
    stored = empty.new_zeros(inversion.schedule.num_steps + 1, *empty.shape)
    for start in range(0, len(inversion), batch_size):
        rows = slice(start, start + batch_size)
        latents[:, rows], stored[:, rows] = optimise_null_text(
            pipe, inversion.latents[:, rows], embeds[rows], empty[rows], inversion.schedule, inversion.config
        )
    return replace(inversion, latents=latents, negative_embeds=stored)


# What `invert` does first; null-text and edit-friendly go on from there.
METHODS: Mapping[str, Callable[..., Tensor]] = {
    "direct": invert_ddim,
    "null_text": invert_ddim,
    "negative_prompt": invert_ddim,
    "edit_friendly": invert_apart,
    "ddim": invert_ddim,
    "bdia": invert_bdia,
}


def optimise_null_text(
    pipe: StableDiffusionPipeline,
    trajectory: Tensor,
    prompt_embeds: Tensor,
    empty_embeds: Tensor,
    schedule: Schedule,
    config: InversionConfig,
) -> tuple[Tensor, Tensor]:
    """The guided way down along a trajectory (T + 1, N, c, h, w), and the embeddings (T + 1, N, L, D) that lead it.

    Images are independent: the loss is each one's mean, Adam works element by element, and an image that has met its
    threshold keeps its embedding and leaves the batch. Only embeddings get gradients, and the conditional prediction of
    a step is made once.
    """
    latents, stored = trajectory.clone(), empty_embeds.new_zeros(schedule.num_steps + 1, *empty_embeds.shape)
    embeds, sample = empty_embeds, trajectory[-1]
    for index in tqdm(range(schedule.num_steps), desc="null text", leave=False):
        level = schedule.num_steps - index
        timestep = schedule.timesteps[level]
        conditional = predict_noise(pipe, sample, timestep, prompt_embeds)

        embeds = embeds.clone().requires_grad_()
        optimizer = torch.optim.Adam([embeds], lr=config.learning_rate * (1 - index / (2 * schedule.num_steps)))
        running = torch.ones(len(sample), dtype=torch.bool, device=sample.device)
        rows = running.nonzero()[:, 0]
        for inner in range(config.inner_steps):
            tried = embeds.detach()[rows].requires_grad_()
            with torch.enable_grad():
                below = _advance(pipe, sample[rows], conditional[rows], tried, schedule, level, config)
                losses = (below - trajectory[level - 1, rows]).square().mean((1, 2, 3))
                (gradient,) = torch.autograd.grad(losses.sum(), tried)
            embeds.grad = torch.zeros_like(embeds).index_copy(0, rows, gradient)
            before = embeds.detach().clone()
            optimizer.step()
            embeds.data = torch.where(running[:, None, None], embeds.data, before)
            running[rows] &= losses.detach() >= config.threshold + index * 2e-5
            # Asking which are left costs a GPU a synchronisation, so it is asked every third step only.
            if sample.device.type == "cpu" or inner % 3 == 2:
                rows = running.nonzero()[:, 0]
                if not len(rows):
                    break
        embeds = embeds.detach()
        stored[level] = embeds
        sample = latents[level - 1] = _advance(pipe, sample, conditional, embeds, schedule, level, config)
    return latents, stored


def _advance(
    pipe: StableDiffusionPipeline,
    sample: Tensor,
    conditional: Tensor,
    negative_embeds: Tensor,
    schedule: Schedule,
    level: int,
    config: InversionConfig,
) -> Tensor:
    """A guided DDIM step from `level`, given the conditional prediction."""
    unconditional = predict_noise(pipe, sample, schedule.timesteps[level], negative_embeds)
    guided = ddim.guided(unconditional, conditional, config.guidance_scale)
    return ddim.step(schedule, sample, guided, level)


@torch.no_grad()
def _denoise(pipe: StableDiffusionPipeline, inversion: Inversion) -> Tensor:
    """The conditional DDIM path down from x*_T, (N, c, h, w)."""
    schedule = inversion.schedule
    embeds = encode_prompts(pipe, inversion.prompts)
    latents = inversion.latents[-1]
    for level in tqdm(range(schedule.num_steps, 0, -1), desc="reconstruct", leave=False):
        prediction = predict_noise(pipe, latents, schedule.timesteps[level], embeds)
        latents = ddim.step(schedule, latents, prediction, level)
    return latents
