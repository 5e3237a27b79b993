"""How each inversion method goes one level down: the one place where editing asks which method it was.

A `Descent` says what a step is, whether the source returns to its stored trajectory after it, whether the target
always takes over the correction that this gives the source, and what the target is guided away from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from prism_lib.models import schedule as ddim
from prism_lib.models.schedule import Schedule, clean_and_noise, move

# (schedule, latents at `level`, prediction there, level, latents at level + 1 or None) -> latents at level - 1
Step = Callable[[Schedule, Tensor, Tensor, int, Tensor | None], Tensor]


@dataclass(frozen=True)
class Descent:
    """The way down of one method.

    `returns`: the source goes back to the stored trajectory after every step. `corrects`: the target takes over that
    correction: True, False or None for as the edit says. `negative`: "edit" for the edit's own choice, "source" for the
    source prompt, "stored" for the inversion's embeddings of each step. `exact`: a step is undone by arithmetic alone,
    which amplifies what the U-Net rounds, so both ways are walked in full precision.
    """

    step: Step
    returns: bool = True
    corrects: bool | None = None
    negative: str = "edit"
    exact: bool = False


def ddim_step(schedule: Schedule, sample: Tensor, prediction: Tensor, level: int, above: Tensor | None) -> Tensor:
    """A DDIM step (Song et al., ICLR 2021); what lay above does not matter."""
    return ddim.step(schedule, sample, prediction, level)


def ddpm_mean(schedule: Schedule, sample: Tensor, prediction: Tensor, level: int, above: Tensor | None) -> Tensor:
    """The mean mu of a DDPM step (eta 1), to which edit-friendly inversion adds its noise map.

    The source's noise map, scaled, is its stored latent minus its mean; the target adds the same. So no map is divided
    by a deviation, which the last step may have none of (Huberman-Spiegelglas et al., CVPR 2024).
    """
    here, below = schedule.alphas[level], schedule.alphas[level - 1]
    variance = max(0.0, (1 - below) / (1 - here) * (1 - here / below))
    clean, noise = clean_and_noise(schedule, sample, prediction, level)
    return below**0.5 * clean + max(0.0, 1 - below - variance) ** 0.5 * noise


def bdia_step(schedule: Schedule, sample: Tensor, prediction: Tensor, level: int, above: Tensor | None) -> Tensor:
    """A step of bidirectional integration with gamma 1: two levels down from `above`, by one prediction in between.

    z[k-1] = z[k+1] - D(k -> k+1) + D(k -> k-1) (Zhang et al., 2023). The first step has nothing above: plain DDIM.
    """
    if above is None:
        return ddim.step(schedule, sample, prediction, level)
    return above + (
        move(schedule, sample, prediction, level, level - 1) - move(schedule, sample, prediction, level, level + 1)
    )


DESCENTS: Mapping[str, Descent] = {
    "direct": Descent(ddim_step),
    "ddim": Descent(ddim_step, returns=False),
    "null_text": Descent(ddim_step, corrects=False, negative="stored"),
    "negative_prompt": Descent(ddim_step, returns=False, negative="source"),
    "edit_friendly": Descent(ddpm_mean, corrects=True),
    "bdia": Descent(bdia_step, corrects=True, exact=True),
}
