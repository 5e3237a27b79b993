"""The inversions: how each finds a trajectory from an image to noise, and how an edit follows it back. One registry.

- "edit_friendly" (Huberman-Spiegelglas et al., CVPR 2024) noises the image independently at every level. The noise maps
  follow from the source's predictions, which an edit makes anyway, so the inversion needs no evaluation of the model;
- "direct" (Ju et al., ICLR 2024) walks up by DDIM and returns the source to that trajectory after every step of an
  edit, so that the source is reconstructed exactly;
- "ddim" denoises the source from x*_T without that return, and so shows what plain inversion loses;
- "negative_prompt" (Miyake et al., 2023) is "ddim" with the target guided away from the source prompt;
- "null_text" (Mokady et al., CVPR 2023), which PRISM uses, optimises the unconditional embedding of every step so that
  guided sampling follows the trajectory.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from prism_lib.configs import checked
from prism_lib.models import schedule as ddim
from prism_lib.models.schedule import Schedule, clean_and_noise

RECOMMENDED = "edit_friendly"  # the smallest error to the truth on validation phantoms

# (latents (N, c, h, w), level, prompt embeddings (N, L, D)) -> the U-Net's prediction (N, c, h, w)
Predict = Callable[[Tensor, int, Tensor], Tensor]
# (step, level, latents there): called after every step
Report = Callable[[int, int, Tensor], None]
# (schedule, latents at `level`, prediction there, level) -> latents at level - 1
Step = Callable[[Schedule, Tensor, Tensor, int], Tensor]


@checked()
class InversionConfig:
    """Settings of null-text and edit-friendly inversion.

    Null-text: the `guidance_scale` of the source, at most `inner_steps` of Adam per step, its first `learning_rate`,
    and the loss (`threshold`) below which the first step ends early. Edit-friendly: `skip`, the share of the noisiest
    steps that an edit leaves out, the `seed` of the noise, and the `spacing` of the timesteps (`Schedule.from_config`).
    """

    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 7.5
    inner_steps: Annotated[int, Field(ge=1)] = 10
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-2
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-5
    skip: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: int = 0
    spacing: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class Source:
    """A batch to invert: images (N, C, H, W), clean latents (N, c, h, w), embeddings (N, L, D) of prompts and of ""."""

    images: Tensor
    clean: Tensor
    embeds: Tensor
    empty: Tensor


# latents (T + 1, N, c, h, w) by level, and null-text inversion's embeddings (T + 1, N, L, D), whose level 0 is not used
Trajectory = tuple[Tensor, Tensor | None]
Abduce = Callable[[Predict, Source, Schedule, InversionConfig, Report], Trajectory]


def ddim_trajectory(
    predict: Predict, source: Source, schedule: Schedule, config: InversionConfig, report: Report
) -> Trajectory:
    """DDIM upwards, conditional on the prompt and without guidance (Dhariwal & Nichol, 2021); T evaluations."""
    latents = [source.clean]
    for level in range(1, schedule.num_steps + 1):
        prediction = predict(latents[-1], level, source.embeds)
        latents.append(ddim.step(schedule, latents[-1], prediction, level - 1, to=level))
        report(level - 1, level, latents[-1])
    return torch.stack(latents), None


def independent_trajectory(
    predict: Predict, source: Source, schedule: Schedule, config: InversionConfig, report: Report
) -> Trajectory:
    """Every level noised independently; the seed of an image's noise is made of its pixels and `config.seed`."""
    latents = source.clean.expand(schedule.num_steps + 1, *source.clean.shape).clone()
    for n, image in enumerate(source.images):
        content = image.cpu().contiguous().numpy().tobytes() + str(config.seed).encode()
        seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1
        noise = torch.randn(latents[1:, n].shape, generator=torch.Generator().manual_seed(seed)).to(latents)
        for level in range(1, schedule.num_steps + 1):
            signal, scale = schedule.alphas[level] ** 0.5, (1 - schedule.alphas[level]) ** 0.5
            latents[level, n] = signal * latents[0, n] + scale * noise[level - 1]
    return latents, None


def null_text_trajectory(
    predict: Predict, source: Source, schedule: Schedule, config: InversionConfig, report: Report
) -> Trajectory:
    """DDIM upwards, then `optimise_null_text` along it."""
    walked, _ = ddim_trajectory(predict, source, schedule, config, report)
    return optimise_null_text(predict, walked, source, schedule, config, report)


def optimise_null_text(
    predict: Predict, walked: Tensor, source: Source, schedule: Schedule, config: InversionConfig, report: Report
) -> tuple[Tensor, Tensor]:
    """Embeddings under which guided sampling follows a trajectory, and the latents it gives (Mokady et al., alg. 1).

    Images are independent: each has its own mean loss, Adam works element by element, and an image below its threshold
    keeps its embedding and leaves the batch. The conditional prediction of a step is made once, without gradients.
    """
    latents, stored = walked.clone(), source.empty.new_zeros(schedule.num_steps + 1, *source.empty.shape)
    embeds, sample = source.empty, walked[-1]

    def advance(sample: Tensor, conditional: Tensor, negative: Tensor, level: int) -> Tensor:
        """A guided DDIM step."""
        prediction = ddim.guided(predict(sample, level, negative), conditional, config.guidance_scale)
        return ddim.step(schedule, sample, prediction, level)

    for index in range(schedule.num_steps):
        level = schedule.num_steps - index
        conditional = predict(sample, level, source.embeds)
        embeds = embeds.clone().requires_grad_()
        optimizer = torch.optim.Adam([embeds], lr=config.learning_rate * (1 - index / (2 * schedule.num_steps)))
        running = torch.ones(len(sample), dtype=torch.bool, device=sample.device)
        rows = running.nonzero()[:, 0]
        for inner in range(config.inner_steps):
            tried = embeds.detach()[rows].requires_grad_()
            with torch.enable_grad():
                below = advance(sample[rows], conditional[rows], tried, level)
                losses = (below - walked[level - 1, rows]).square().mean((1, 2, 3))
                (gradient,) = torch.autograd.grad(losses.sum(), tried)
            embeds.grad = torch.zeros_like(embeds).index_copy(0, rows, gradient)
            before = embeds.detach().clone()
            optimizer.step()
            embeds.data = torch.where(running[:, None, None], embeds.data, before)
            running[rows] &= losses.detach() >= config.threshold + index * 2e-5
            # Counting the running images synchronises a GPU, so it is done every third step only.
            if sample.device.type == "cpu" or inner % 3 == 2:
                rows = running.nonzero()[:, 0]
                if not len(rows):
                    break
        embeds = embeds.detach()
        stored[level] = embeds
        sample = latents[level - 1] = advance(sample, conditional, embeds, level)
        report(index, level, sample)
    return latents, stored


def ddpm_mean(schedule: Schedule, sample: Tensor, prediction: Tensor, level: int) -> Tensor:
    """The mean of a DDPM step (eta 1), to which edit-friendly inversion adds its noise map.

    The source's noise map, already scaled, is its stored latent minus this mean; the target adds the same. No map is
    divided by the standard deviation, which can be 0 at the last step (Huberman-Spiegelglas et al., CVPR 2024).
    """
    here, below = schedule.alphas[level], schedule.alphas[level - 1]
    variance = max(0.0, (1 - below) / (1 - here) * (1 - here / below))
    clean, noise = clean_and_noise(schedule, sample, prediction, level)
    return below**0.5 * clean + max(0.0, 1 - below - variance) ** 0.5 * noise


@dataclass(frozen=True)
class Method:
    """An inversion: `abduce` finds the trajectory, `step` and the flags say how an edit follows it back.

    `returns`: the source goes back to the stored trajectory after every step. `corrects`: the target takes over that
    correction (None: as the edit's `correct_drift` says). `negative`: the target is guided away from the edit's own
    choice ("edit"), the source prompt ("source") or the trajectory's embeddings ("stored"). `random`: the trajectory
    depends on a seed. `walks`: the number of walks of T steps that the inversion makes.
    """

    abduce: Abduce = ddim_trajectory
    step: Step = ddim.step
    returns: bool = True
    corrects: bool | None = None
    negative: Literal["edit", "source", "stored"] = "edit"
    random: bool = False
    walks: int = 1


METHODS: Mapping[str, Method] = {
    "edit_friendly": Method(independent_trajectory, ddpm_mean, corrects=True, random=True, walks=0),
    "direct": Method(),
    "ddim": Method(returns=False),
    "negative_prompt": Method(returns=False, negative="source"),
    "null_text": Method(null_text_trajectory, corrects=False, negative="stored", walks=2),
}


def method_of(name: str) -> Method:
    """The inversion of this name; ValueError lists the known names."""
    if name not in METHODS:
        raise ValueError(f"unknown inversion method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def edit_steps(method: str, config: InversionConfig, num_steps: int) -> int:
    """The steps that an edit takes: all, or fewer for edit-friendly inversion with `skip`."""
    return max(1, num_steps - int((config.skip if method == "edit_friendly" else 0.0) * num_steps))
