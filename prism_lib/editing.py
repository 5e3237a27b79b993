"""Action and prediction: edit an inverted image by a pair of prompts, and put the result back into the input.

Source and target start from the same noise x*_T and share the trajectory: at every step one U-Net call
evaluates the source, the negative prompt and the target of each image (3 evaluations), prompt-to-prompt hands
the source's attention to the target, and direct inversion returns the source to its stored latents. After
decoding, only pixels inside a mask take the edit; all others are the input's own.

Two choices differ from the reference implementations, and both can be switched back:

- `negative="source"` guides away from the *source prompt* instead of the empty one. The guidance is then
  exactly the difference that the edit asks for, and vanishes where the two prompts agree.
- `correct_drift` gives the target the correction that direct inversion gives the source. It costs nothing,
  and an edit that changes no word reproduces the source exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib import ddim, masks
from prism_lib.alignment import ALIGNMENTS, align, word_mask
from prism_lib.attention import Controller, WordMaps, controlled
from prism_lib.inversion import Callback, Inversion, predict_noise
from prism_lib.masks import COMPOSITES, Areas, MaskConfig
from prism_lib.models import decode_latents, encode_prompts
from prism_lib.prompts import PromptPair

NEGATIVES = ("source", "empty")


@dataclass(frozen=True)
class EditConfig:
    """Settings of one edit. Windows are shares of the steps in [0, 1], counted from the noisiest.

    A longer `self_replace_steps` keeps *more* of the source's structure. `word_weight` multiplies the target's
    attention to the words of the edit inside the cross window. Self-attention is injected in layers of at most
    `self_max_tokens` queries. `protect_text` keeps letters burnt into the corners out of the automatic mask.
    `local_blend` confines the edit in latent space to where the edit's words look.
    """

    guidance_scale: float = 3.0
    cross_replace_steps: float = 0.1
    self_replace_steps: float = 0.2
    alignment: str = "refine"
    word_weight: float = 1.0
    negative: str = "source"
    correct_drift: bool = True
    inject_negative: bool = False
    self_max_tokens: int = 32 * 32
    local_blend: bool = False
    local_blend_threshold: float = 0.3
    local_blend_start: float = 0.2
    composite: str = "change"
    protect_text: bool = True
    mask: MaskConfig = field(default_factory=MaskConfig)
    batch_size: int = 4

    def __post_init__(self) -> None:
        shares = ("cross_replace_steps", "self_replace_steps", "local_blend_threshold", "local_blend_start")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a value in [0, 1]")
        for name in ("guidance_scale", "word_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number, 0 or more")
        for name, known in (("alignment", ALIGNMENTS), ("negative", NEGATIVES), ("composite", COMPOSITES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")


@dataclass(frozen=True)
class Counterfactual:
    """One edited image with what it was made of; images are (C, H, W) in [0, 1], masks (1, H, W).

    `image` is the composite and `raw` the decoded edit before it; `factual` is the input and `reconstruction`
    the source as the model gives it back. `mask` is soft and exactly 0 where the input is untouched.
    """

    image: Tensor
    raw: Tensor
    factual: Tensor
    reconstruction: Tensor
    mask: Tensor
    pair: PromptPair
    scores: Mapping[str, float]
    settings: EditConfig


def stack(results: Sequence[Counterfactual], name: str = "image") -> Tensor:
    """One field of many results as a batch: (N, C, H, W), or (N, 1, H, W) for "mask"."""
    return torch.stack([getattr(result, name) for result in results])


@dataclass
class _Outcome:
    """What a batch of edits leaves behind: the two clean latents and the evidence collected on the way."""

    source: Tensor
    target: Tensor
    noise_change: Tensor
    word_maps: Tensor


@torch.no_grad()
def edit(
    pipe: StableDiffusionPipeline,
    inversion: Inversion,
    pairs: Sequence[PromptPair],
    config: EditConfig = EditConfig(),
    *,
    mask: Tensor | str = "auto",
    keep: Tensor | None = None,
    callback: Callback | None = None,
) -> list[Counterfactual]:
    """Edit every image of an inversion by its own prompt pair: prompt-to-prompt on a shared trajectory.

    `mask` is "auto", "off" (no composite: the raw edit) or the user's own, (N, 1, H, W) boolean or in [0, 1],
    which then also bounds the edit in latent space. `keep`, of the same shape, marks pixels that stay the
    input's whatever the mask says. `callback(i, timestep, latents)` is called after step i of every batch and
    may raise to cancel.
    """
    _check_pairs(inversion, pairs, config)
    areas = Areas.checked(mask, keep, inversion.images)
    controllers = [_controller(pipe, pairs[rows], inversion, config) for rows in _batches(len(pairs), config)]
    results: list[Counterfactual] = []
    steps = inversion.schedule.num_steps * len(controllers)
    with tqdm(total=steps, desc="edit", leave=False) as progress:
        for controller, rows in zip(controllers, _batches(len(pairs), config), strict=True):
            part = inversion[rows]
            outcome = _denoise(pipe, part, pairs[rows], config, controller, areas[rows], progress, callback)
            results += _finish(pipe, part, pairs[rows], config, outcome, areas[rows])
    return results


def _denoise(
    pipe: StableDiffusionPipeline,
    inversion: Inversion,
    pairs: Sequence[PromptPair],
    config: EditConfig,
    controller: Controller,
    areas: Areas,
    progress: tqdm,
    callback: Callback | None,
) -> _Outcome:
    """Walk source and target down from x*_T together; one U-Net call of 3 N rows a step."""
    schedule = inversion.schedule
    embeds = _embeds(pipe, pairs, config)
    source = target = inversion.latents[-1].to(pipe.device)
    cells = areas.cells(*source.shape[-2:])
    cells = None if cells is None else cells.to(source)
    noise_change = torch.zeros_like(source[:, :1])
    with controlled(pipe.unet, controller):
        for index, level in enumerate(range(schedule.num_steps, 0, -1)):
            controller.step = index
            timestep = schedule.timesteps[level]
            prediction = predict_noise(pipe, torch.cat([source, target, target]), timestep, embeds)
            of_source, of_negative, of_target = prediction.chunk(3)
            noise_change += (of_target - of_source).abs().mean(1, keepdim=True)

            guided = ddim.guided(of_negative, of_target, config.guidance_scale)
            target = ddim.step(schedule, target, guided, level)
            stepped = ddim.step(schedule, source, of_source, level)
            source = inversion.latents[level - 1].to(source) if inversion.exact else stepped
            if config.correct_drift:
                target = target + (source - stepped)
            if (bounds := _bounds(config, controller, cells, index / schedule.num_steps, source)) is not None:
                target = source + bounds * (target - source)

            progress.update()
            if callback is not None:
                callback(index, timestep, target)
    return _Outcome(source, target, noise_change / schedule.num_steps, _word_maps(controller, source))


def _bounds(
    config: EditConfig, controller: Controller, cells: Tensor | None, progress: float, latents: Tensor
) -> Tensor | None:
    """Where the target's latents may differ from the source's, (N, 1, h, w), or None for everywhere."""
    if not config.local_blend or progress < config.local_blend_start:
        return cells
    attended = masks.attention_region(_word_maps(controller, latents), config.local_blend_threshold)
    return attended if cells is None else attended * cells


def _finish(
    pipe: StableDiffusionPipeline,
    inversion: Inversion,
    pairs: Sequence[PromptPair],
    config: EditConfig,
    outcome: _Outcome,
    areas: Areas,
) -> list[Counterfactual]:
    """Decode, find the mask and composite with the input."""
    images = inversion.images
    channels = images.shape[1]
    raw = decode_latents(pipe.vae, outcome.target, channels).to(images)
    reconstruction = decode_latents(pipe.vae, outcome.source, channels).to(images)
    if isinstance(areas.mask, Tensor):
        mask = areas.mask
    elif areas.off:
        mask = torch.ones_like(images[:, :1])
    else:
        coarse = masks.evidence(outcome.word_maps, outcome.noise_change, config.mask.attention_weight)
        change = masks.pixel_change(raw, reconstruction, config.mask.smooth)
        mask = masks.automatic_mask(change, coarse.to(images), config.mask)
        if config.protect_text:
            mask = masks.without(mask, masks.burnt_in_text(images), config.mask.feather)
    if areas.keep is not None:
        mask = masks.without(mask, areas.keep, config.mask.feather)
    unbounded = areas.off and areas.keep is None
    image = raw if unbounded else masks.composite(images, raw, reconstruction, mask, config.composite)
    scores = _scores(images, image, raw, reconstruction, mask)
    return [
        Counterfactual(
            image=image[n],
            raw=raw[n],
            factual=images[n],
            reconstruction=reconstruction[n],
            mask=mask[n],
            pair=pair,
            scores={name: values[n] for name, values in scores.items()},
            settings=config,
        )
        for n, pair in enumerate(pairs)
    ]


def _scores(images: Tensor, image: Tensor, raw: Tensor, reconstruction: Tensor, mask: Tensor) -> dict[str, list[float]]:
    """Per image: share of pixels in the mask, mean change of the result, and change kept out by the mask."""
    outside = (mask == 0).to(images)
    kept_out = ((raw - reconstruction).abs().mean(1, keepdim=True) * outside).sum((1, 2, 3))
    return {
        "mask_area": (1 - outside).mean((1, 2, 3)).tolist(),
        "change": (image - images).abs().mean((1, 2, 3)).tolist(),
        "change_outside_mask": (kept_out / outside.sum((1, 2, 3)).clamp(min=1)).tolist(),
    }


def _controller(
    pipe: StableDiffusionPipeline, pairs: Sequence[PromptPair], inversion: Inversion, config: EditConfig
) -> Controller:
    """Token alignment, weights and windows of a batch; raises for words that a prompt does not hold."""
    tokenizer, length = pipe.tokenizer, pipe.tokenizer.model_max_length
    alignments = [align(tokenizer, pair.source, pair.target, length, config.alignment) for pair in pairs]
    source = torch.stack([word_mask(tokenizer, pair.source, pair.source_words, length) for pair in pairs])
    target = torch.stack([word_mask(tokenizer, pair.target, pair.target_words, length) for pair in pairs])
    half_height, half_width = ((side + 1) // 2 for side in inversion.latents.shape[-2:])
    steps = inversion.schedule.num_steps
    return Controller.of(
        alignments,
        1 + (config.word_weight - 1) * target,
        pipe.device,
        cross_steps=round(config.cross_replace_steps * steps),
        self_steps=round(config.self_replace_steps * steps),
        self_max_tokens=config.self_max_tokens,
        inject_negative=config.inject_negative,
        maps=WordMaps(source.to(pipe.device), target.to(pipe.device), half_height * half_width),
    )


def _embeds(pipe: StableDiffusionPipeline, pairs: Sequence[PromptPair], config: EditConfig) -> Tensor:
    """Text embeddings of source, negative and target rows, (3 N, L, D)."""
    sources = [pair.source for pair in pairs]
    negatives = sources if config.negative == "source" else [""] * len(pairs)
    return encode_prompts(pipe, [*sources, *negatives, *(pair.target for pair in pairs)])


def _word_maps(controller: Controller, latents: Tensor) -> Tensor:
    """Mean attention to the edit's words so far, (N, 2, h, w)."""
    assert controller.maps is not None
    return controller.maps.mean(*latents.shape[-2:])


def _batches(count: int, config: EditConfig) -> Iterator[slice]:
    for start in range(0, count, config.batch_size):
        yield slice(start, min(start + config.batch_size, count))


def _check_pairs(inversion: Inversion, pairs: Sequence[PromptPair], config: EditConfig) -> None:
    if len(pairs) != len(inversion):
        raise ValueError(f"{len(inversion)} inverted images need as many prompt pairs, got {len(pairs)}")
    for index, (pair, prompt) in enumerate(zip(pairs, inversion.prompts, strict=True)):
        if pair.source != prompt:
            raise ValueError(f"image {index} was inverted as {prompt!r}, but its edit starts from {pair.source!r}")
        if config.local_blend and not (pair.source_words or pair.target_words):
            raise ValueError(f"local_blend needs words to look for, but the edit of image {index} names none")
