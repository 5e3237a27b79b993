"""What the paper and its users compare with, as editors: settings that are called with images and prompt pairs.

An editor is a frozen dataclass of settings; `editor(pipe, images, pairs, change)` gives a `Counterfactual` per image,
so that every method is measured by the same functions as ours. Here are those that train nothing: prompt-to-prompt on
any inversion, SDEdit, LEDITS++ and editing between two masks. `studies.edict` holds one with an
inversion of its own, `studies.imagic` and `studies.ganterfactual` the two that train; `studies.comparison` tunes
and compares all of them.

The classes of diffusers share the caller's U-Net and autoencoder. The scheduler is always a copy, and attention
processors are put back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from prism_lib.editing.counterfactuals import Counterfactual, edit, stack
from prism_lib.editing.inversion import invert
from prism_lib.editing.methods import RECOMMENDED
from prism_lib.editing.settings import EditConfig, Settings
from prism_lib.evaluation.evaluate import edit_images
from prism_lib.files import stable_seed
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.models.pipeline import decode_latents, encode_images, mixed_calls


class Editor(Protocol):
    """Images (N, C, H, W) in [0, 1], a prompt pair for each and the edit they stand for -> N results."""

    def __call__(
        self, pipe: StableDiffusionPipeline, images: Tensor, pairs: Sequence[PromptPair], change: Edit
    ) -> list[Counterfactual]: ...


@dataclass(frozen=True)
class PromptToPrompt:
    """Prompt-to-prompt on an inversion (Hertz et al., ICLR 2023), ours with the defaults.

    `mask` is "auto" or "off". `PLAIN` are the settings of the reference implementations.
    """

    method: str = RECOMMENDED
    num_inference_steps: int = 50
    edit: Settings = field(default_factory=dict, hash=False)
    mask: str = "auto"

    def __call__(
        self, pipe: StableDiffusionPipeline, images: Tensor, pairs: Sequence[PromptPair], change: Edit
    ) -> list[Counterfactual]:
        steps = self.num_inference_steps
        return edit_images(
            pipe, images, pairs, self.edit, mask=self.mask, method=self.method, num_inference_steps=steps
        )


# Null-text inversion's editor as published: guidance from the empty prompt, cross .8, self .4, local blend, no mask.
PLAIN = EditConfig(negative="empty", correct_drift=False, local_blend=True)


@dataclass(frozen=True)
class TwoMasks:
    """Editing between two masks on edit-friendly inversion, after RadEdit (Perez-Garcia et al., ECCV 2024).

    RadEdit's user draws what to edit and what to keep. So that nobody's knowledge of the truth enters, the edit mask
    is here the one that our own editor finds, `margin` pixels wider, and everything further away is kept. No attention
    is injected, and guidance is from the empty prompt.
    """

    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    margin: int = 4
    method: str = "edit_friendly"
    find: Settings = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise ValueError(f"margin is {self.margin}; expected 0 pixels or more")

    def __call__(
        self, pipe: StableDiffusionPipeline, images: Tensor, pairs: Sequence[PromptPair], change: Edit
    ) -> list[Counterfactual]:
        prompts, steps = [pair.source for pair in pairs], self.num_inference_steps
        inverted = invert(pipe, images, prompts, self.method, steps)  # first, for an unknown method fails here
        found = stack(edit_images(pipe, images, pairs, self.find, num_inference_steps=steps), "mask")
        # Soft, not cut off at a threshold: else a rounding error could move the mask's border.
        wide = torch.nn.functional.max_pool2d(found, 2 * self.margin + 1, 1, self.margin)
        config = EditConfig(
            guidance_scale=self.guidance_scale,
            cross_replace_steps=0.0,
            self_replace_steps=0.0,
            negative="empty",
            correct_drift=False,
        )
        edited = edit(pipe, inverted, pairs, config, mask=wide)
        return [replace(result, settings=self) for result in edited]


@dataclass(frozen=True)
class SDEdit:
    """Noise the image to `strength` and denoise it under the target prompt (Meng et al., ICLR 2022).

    diffusers' `StableDiffusionImg2ImgPipeline`. `negative` is "source" or "empty", as in `EditConfig`.
    """

    strength: float = 0.5
    guidance_scale: float = 7.5
    num_inference_steps: int = 50
    negative: str = "empty"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; expected a share in (0, 1]")
        if int(self.num_inference_steps * self.strength) < 1:
            raise ValueError(f"strength {self.strength} of {self.num_inference_steps} steps leaves none to denoise")
        if self.negative not in ("source", "empty"):
            raise ValueError(f"negative is {self.negative!r}; expected source or empty")

    @torch.no_grad()
    def __call__(
        self, pipe: StableDiffusionPipeline, images: Tensor, pairs: Sequence[PromptPair], change: Edit
    ) -> list[Counterfactual]:
        scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        image_to_image = StableDiffusionImg2ImgPipeline(**_parts(pipe, scheduler))
        image_to_image.set_progress_bar_config(disable=True)
        with mixed_calls(pipe.unet):
            latents = image_to_image(
                prompt=[pair.target for pair in pairs],
                negative_prompt=[pair.source if self.negative == "source" else "" for pair in pairs],
                image=images.expand(-1, pipe.vae.config.in_channels, -1, -1),
                strength=self.strength,
                guidance_scale=self.guidance_scale,
                num_inference_steps=self.num_inference_steps,
                generator=[generator(image, self.seed) for image in images],
                output_type="latent",
            ).images
        return unmasked(pipe, images, pairs, decode_latents(pipe.vae, latents, images.shape[1]), self)


@dataclass(frozen=True)
class LEdits:
    """LEDITS++ (Brack et al., CVPR 2024), diffusers' `LEditsPPPipelineStableDiffusion`.

    The target prompt is added as one concept and the source prompt taken away as another, because our model was taught
    absences in words. `threshold` is the quantile that opens the mask; `intersect` also asks the attention, which needs
    a U-Net that attends at a quarter of the latents' size. One image at a time: concepts are a batch's, not an image's.
    """

    edit_guidance_scale: float = 5.0
    threshold: float = 0.9
    skip: float = 0.15
    num_inference_steps: int = 30
    intersect: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("threshold", "skip"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in [0, 1)")

    @torch.no_grad()
    def __call__(
        self, pipe: StableDiffusionPipeline, images: Tensor, pairs: Sequence[PromptPair], change: Edit
    ) -> list[Counterfactual]:
        scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="sde-dpmsolver++", solver_order=2
        )
        ledits = LEditsPPPipelineStableDiffusion(**_parts(pipe, scheduler))
        ledits.set_progress_bar_config(disable=True)
        latents = []
        with _same_processors(pipe.unet), mixed_calls(pipe.unet):
            for image, pair in zip(images, pairs, strict=True):
                noise = generator(image, self.seed)
                ledits.invert(
                    image=image[None].expand(-1, pipe.vae.config.in_channels, -1, -1),
                    num_inversion_steps=self.num_inference_steps,
                    skip=self.skip,
                    generator=noise,
                )
                edited = ledits(
                    editing_prompt=[pair.target, pair.source],
                    reverse_editing_direction=[False, True],
                    edit_guidance_scale=[self.edit_guidance_scale] * 2,
                    edit_threshold=[self.threshold] * 2,
                    use_intersect_mask=self.intersect,
                    generator=noise,
                    output_type="latent",
                )
                latents.append(edited.images)
        return unmasked(pipe, images, pairs, decode_latents(pipe.vae, torch.cat(latents), images.shape[1]), self)


def unmasked(
    pipe: StableDiffusionPipeline,
    images: Tensor,
    pairs: Sequence[PromptPair],
    edited: Tensor,
    settings: object,
    reconstruction: Tensor | None = None,
) -> list[Counterfactual]:
    """Results of a method without a mask: everything was open; the reconstruction is the autoencoder's by default."""
    if reconstruction is None:
        reconstruction = decode_latents(pipe.vae, encode_images(pipe.vae, images), images.shape[1])
    edited, reconstruction = edited.to(images), reconstruction.to(images)
    change = (edited - images).abs().mean((1, 2, 3)).tolist()
    return [
        Counterfactual(
            image=edited[n],
            raw=edited[n],
            factual=images[n],
            reconstruction=reconstruction[n],
            mask=torch.ones_like(images[n, :1]),
            pair=pair,
            scores={"mask_area": 1.0, "change": change[n], "change_outside_mask": 0.0},
            settings=settings,
        )
        for n, pair in enumerate(pairs)
    ]


def generator(image: Tensor, seed: int) -> torch.Generator:
    """A generator for one image, (C, H, W), which its pixels and the seed decide: no result depends on the batch."""
    return torch.Generator().manual_seed(seed_of(image, seed))


def seed_of(image: Tensor, seed: int) -> int:
    """The seed of `generator`."""
    return stable_seed(seed, hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).hexdigest())


def _parts(pipe: StableDiffusionPipeline, scheduler: object) -> dict[str, Any]:
    """The same networks for another of diffusers' pipelines, with a scheduler of its own."""
    parts: dict[str, Any] = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet")}
    return parts | {
        "scheduler": scheduler,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@contextmanager
def _same_processors(unet: UNet2DConditionModel) -> Iterator[None]:
    """LEDITS++ replaces all attention processors and leaves its own behind."""
    before = dict(unet.attn_processors)
    try:
        yield
    finally:
        unet.set_attn_processor(before)
