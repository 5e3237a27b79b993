"""DDIM as pure tensor functions: schedule, steps in either direction, guidance (Song et al., ICLR 2021).

A schedule of T steps has levels 0 (the clean latent) to T (noise), and a step leads from level k to k - 1. All
coefficients are Python floats in double precision, so a step costs no device synchronisation.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from prism_lib.configs import checked


@checked()
class Schedule:
    """The U-Net's timestep (-1 at level 0, which it never sees) and the cumulative product abar of each level."""

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"  # of the U-Net's output

    @property
    def num_steps(self) -> int:
        """The number of steps T; levels run from 0 to T."""
        return len(self.timesteps) - 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any], num_inference_steps: int, spacing: float | None = None) -> Self:
        """The DDIM schedule of any Stable Diffusion scheduler's `.config`; clipping and thresholding are ignored.

        With a `spacing` the timesteps are 0.02 + 0.92 x^spacing of all, x evenly from 0 to 1, so that a number above 1
        has more of them at little noise.
        """
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps!r}; expected a positive integer")
        scheduler = DDIMScheduler.from_config(dict(config))
        scheduler.set_timesteps(num_inference_steps)
        abar = scheduler.alphas_cumprod.double().tolist()
        ascending = [int(t) for t in scheduler.timesteps.flip(0)]
        if spacing is not None:
            shares = np.linspace(0, 1, num_inference_steps) ** spacing
            ascending = [round(t) for t in ((0.02 + 0.92 * shares) * len(abar)).tolist()]
            if len(set(ascending)) < len(ascending):
                raise ValueError(f"spacing={spacing} repeats timesteps in {num_inference_steps} steps")
        if ascending[0] < 0 or ascending[-1] >= len(abar):
            asked = f"num_inference_steps={num_inference_steps} asks for timestep {ascending[-1]}"
            raise ValueError(f"{asked}, but the model has 0 to {len(abar) - 1}")
        alphas = (float(scheduler.final_alpha_cumprod), *(abar[t] for t in ascending))
        return cls((-1, *ascending), alphas, prediction_type=scheduler.config["prediction_type"])


def clean_and_noise(schedule: Schedule, sample: Tensor, prediction: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """The clean latent x0 and the noise eps in a sample at `level`, as the U-Net's output has them."""
    signal, noise = _scales(schedule, level)
    if schedule.prediction_type == "v_prediction":
        return signal * sample - noise * prediction, signal * prediction + noise * sample
    return (sample - noise * prediction) / signal, prediction


def step(schedule: Schedule, sample: Tensor, prediction: Tensor, level: int, to: int | None = None) -> Tensor:
    """One deterministic DDIM step from `level` to `to`, by default the level below; the U-Net saw this `sample`.

    On the way up it saw it at the timestep of `to`, as in null-text inversion and diffusers' DDIMInverseScheduler.
    """
    clean, noise = clean_and_noise(schedule, sample, prediction, level)
    signal_scale, noise_scale = _scales(schedule, level - 1 if to is None else to)
    return signal_scale * clean + noise_scale * noise


def guided(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, eps_u + w (eps_c - eps_u) (Ho & Salimans, 2022)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def _scales(schedule: Schedule, level: int) -> tuple[float, float]:
    """sqrt(abar) and sqrt(1 - abar) at a level."""
    if not 0 <= level <= schedule.num_steps:
        raise ValueError(f"level {level} is outside this schedule's 0 to {schedule.num_steps}")
    return schedule.alphas[level] ** 0.5, (1.0 - schedule.alphas[level]) ** 0.5
