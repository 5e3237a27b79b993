"""EDICT: two latents that denoise each other, so that every step can be undone (Wallace, Gokul & Naik, CVPR 2023).

A step makes x from y's noise and then y from the new x's, and mixes the two a little, because they would drift apart.
Each part is affine in what it changes and so has an exact inverse: the image comes back to rounding, with guidance too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.editing.counterfactuals import Counterfactual
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.models import schedule as ddim
from prism_lib.models.pipeline import decode_latents, encode_images, encode_prompts, full_precision, predict_noise
from prism_lib.models.schedule import Schedule, clean_and_noise
from prism_lib.studies.editors import unmasked

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Edict:
    """Invert under the source prompt, denoise under the target prompt; an editor, see `studies.editors`.

    `strength` is the share of the steps that are walked, `mixing` the paper's p: 1 does not mix. Four U-Net rows a step
    in either direction. Latents are float64, as published: mixing multiplies rounding by 1 / p a step.
    """

    guidance_scale: float = 3.0
    strength: float = 0.8
    mixing: float = 0.93
    num_inference_steps: int = 50

    def __post_init__(self) -> None:
        for name in ("strength", "mixing"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in (0, 1]")
        if self.top < 1:
            raise ValueError(f"strength {self.strength} of {self.num_inference_steps} steps leaves none to walk")

    @property
    def top(self) -> int:
        """The level that inversion walks up to."""
        return int(self.strength * self.num_inference_steps)

    @torch.no_grad()
    def __call__(
        self, pipe: StableDiffusionPipeline, images: Tensor, pairs: Sequence[PromptPair], change: Edit
    ) -> list[Counterfactual]:
        clean = encode_images(pipe.vae, images)
        with full_precision(pipe.unet):  # what is rounded on the way up is amplified on the way down
            noised = self.up(pipe, clean, [pair.source for pair in pairs])
            edited, _ = self.down(pipe, noised, [pair.target for pair in pairs])
        return unmasked(pipe, images, pairs, decode_latents(pipe.vae, edited.to(clean), images.shape[1]), self)

    def up(self, pipe: StableDiffusionPipeline, clean: Tensor, prompts: Sequence[str]) -> Pair:
        """From clean latents (N, c, h, w) to the pair at level `top`."""
        schedule, embeds = self._prepared(pipe, prompts)
        pair = clean.double(), clean.double()
        for level in tqdm(range(1, self.top + 1), desc="EDICT up", leave=False):
            y, x = _swapped(pair, level)
            y = (y - (1 - self.mixing) * x) / self.mixing
            x = (x - (1 - self.mixing) * y) / self.mixing
            scale, shift = _coefficients(schedule, level)
            y = (y - shift * self._noise(pipe, x, embeds, schedule, level)) / scale
            x = (x - shift * self._noise(pipe, y, embeds, schedule, level)) / scale
            pair = _swapped((y, x), level)
        return pair

    def down(self, pipe: StableDiffusionPipeline, pair: Pair, prompts: Sequence[str]) -> Pair:
        """From the pair at level `top` to two clean latents; under the prompts of `up` they are its own."""
        schedule, embeds = self._prepared(pipe, prompts)
        for level in tqdm(range(self.top, 0, -1), desc="EDICT down", leave=False):
            y, x = _swapped(pair, level)
            scale, shift = _coefficients(schedule, level)
            x = scale * x + shift * self._noise(pipe, y, embeds, schedule, level)
            y = scale * y + shift * self._noise(pipe, x, embeds, schedule, level)
            x = self.mixing * x + (1 - self.mixing) * y
            y = self.mixing * y + (1 - self.mixing) * x
            pair = _swapped((y, x), level)
        return pair

    def _prepared(self, pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> tuple[Schedule, Tensor]:
        """The schedule, and embeddings (2 N, L, D) of no words and of the prompts."""
        schedule = Schedule.from_config(pipe.scheduler.config, self.num_inference_steps)
        return schedule, encode_prompts(pipe, [*[""] * len(prompts), *prompts])

    def _noise(
        self, pipe: StableDiffusionPipeline, latents: Tensor, embeds: Tensor, schedule: Schedule, level: int
    ) -> Tensor:
        """The guided prediction of the noise in latents at a level."""
        prediction = predict_noise(pipe, torch.cat([latents] * 2), schedule.timesteps[level], embeds)
        unconditional, conditional = prediction.chunk(2)
        guided = ddim.guided(unconditional, conditional, self.guidance_scale)
        return clean_and_noise(schedule, latents, guided, level)[1]


def _swapped(pair: Pair, level: int) -> Pair:
    """The two latents take turns at who goes first, or one of them would always lead."""
    return (pair[1], pair[0]) if level % 2 else pair


def _coefficients(schedule: Schedule, level: int) -> tuple[float, float]:
    """A DDIM step from `level` as scale * sample + shift * noise."""
    here, below = schedule.alphas[level], schedule.alphas[level - 1]
    scale = (below / here) ** 0.5
    return scale, (1 - below) ** 0.5 - scale * (1 - here) ** 0.5
