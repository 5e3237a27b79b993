"""Action and prediction: edit an inverted image by a pair of prompts, and put the result back into the input.

Source and target start from the same noise x*_T and share the trajectory: at every step one U-Net call
evaluates the source, the negative prompt and the target of each image (3 evaluations), prompt-to-prompt hands
the source's attention to the target, and direct inversion returns the source to its stored latents. After
decoding, only pixels inside a mask take the edit; all others are the input's own.

One walk serves any number of edits of the same images: `edit` is the case of one, `edit_many` takes several prompt
pairs and `sweep` several settings. They share the source's row, and their own rows for as long as they agree
(`prism_lib.forking`). What a step is depends on the inversion (`prism_lib.descent`).

Two choices differ from the reference implementations, and both can be switched back:

- `negative="source"` guides away from the *source prompt* instead of the empty one. The guidance is then
  exactly the difference that the edit asks for, and vanishes where the two prompts agree.
- `correct_drift` gives the target the correction that direct inversion gives the source. It costs nothing,
  and an edit that changes no word reproduces the source exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from prism_lib import masks
from prism_lib.alignment import ALIGNMENTS, align, token_span, word_mask
from prism_lib.attention import Controller, WordMaps, controlled
from prism_lib.batching import in_parts
from prism_lib.forking import Stage, stages
from prism_lib.inversion import Callback, Inversion, check_finite, predict_noise
from prism_lib.masks import COMPOSITES, Areas, MaskConfig
from prism_lib.models import decode_latents, encode_prompts
from prism_lib.prompts import PromptPair

NEGATIVES = ("source", "empty")
PROXIMALS = ("none", "l0", "l1")
_NO_PAIR = PromptPair("", "", (), ())


@dataclass(frozen=True)
class EditConfig:
    """Settings of one edit. Windows are shares of the steps in [0, 1], counted from the noisiest.

    A longer `self_replace_steps` keeps *more* of the source's structure. `word_weight` multiplies the target's
    attention to the words of the edit inside the cross window. `word_windows` gives words or phrases of the target
    prompt a cross window of their own, {"without": 0.8}, in place of `cross_replace_steps`. Self-attention is injected
    in layers of at most `self_max_tokens` queries. `protect_text` keeps letters burnt into the corners out of the
    automatic mask.
    `local_blend` confines the edit in latent space to where the edit's words look. `confine` does so by the evidence of
    the automatic mask, words and change of noise together: from `confine_start` on, latents with less than this share
    of the greatest evidence return to the source's; 0 is off. `proximal` drops ("l0") or also shrinks ("l1") the
    guidance below its own `proximal_quantile`.
    """

    guidance_scale: float = 2.5
    cross_replace_steps: float = 0.1
    self_replace_steps: float = 0.3
    alignment: str = "refine"
    word_weight: float = 1.0
    word_windows: Mapping[str, float] = field(default_factory=dict, hash=False)
    negative: str = "source"
    correct_drift: bool = True
    inject_negative: bool = False
    self_max_tokens: int = 32 * 32
    local_blend: bool = False
    local_blend_threshold: float = 0.3
    local_blend_start: float = 0.2
    confine: float = 0.27
    confine_start: float = 0.3
    proximal: str = "none"
    proximal_quantile: float = 0.7
    composite: str = "change"
    protect_text: bool = True
    mask: MaskConfig = field(default_factory=MaskConfig)
    batch_size: int = 4

    def __post_init__(self) -> None:
        shares = ("cross_replace_steps", "self_replace_steps", "local_blend_threshold", "local_blend_start")
        for name in (*shares, "confine", "confine_start", "proximal_quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a value in [0, 1]")
        if not isinstance(self.word_windows, Mapping):
            raise ValueError(f"word_windows is {self.word_windows!r}; expected a share of the steps by word")
        for word, share in self.word_windows.items():
            if not (isinstance(word, str) and isinstance(share, float | int) and 0 <= share <= 1):
                raise ValueError(f"word_windows is {share!r} for {word!r}; expected a value in [0, 1] by word")
        for name in ("guidance_scale", "word_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number, 0 or more")
        choices = {"alignment": ALIGNMENTS, "negative": NEGATIVES, "composite": COMPOSITES, "proximal": PROXIMALS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")


@dataclass(frozen=True)
class Counterfactual:
    """One edited image with what it was made of; images are (C, H, W) in [0, 1], masks (1, H, W).

    `image` is the composite and `raw` the decoded edit before it; `factual` is the input and `reconstruction`
    the source as the model gives it back. `mask` is soft and exactly 0 where the input is untouched. `settings` are
    those of whatever made it: an `EditConfig`, or a baseline's own.
    """

    image: Tensor
    raw: Tensor
    factual: Tensor
    reconstruction: Tensor
    mask: Tensor
    pair: PromptPair
    scores: Mapping[str, float]
    settings: object


def stack(results: Sequence[Counterfactual], name: str = "image") -> Tensor:
    """One field of many results as a batch: (N, C, H, W), or (N, 1, H, W) for "mask"."""
    return torch.stack([getattr(result, name) for result in results])


@dataclass(frozen=True)
class _Task:
    """One edit: the image's place in its batch, prompts and settings."""

    image: int
    pair: PromptPair
    config: EditConfig


def grid(config: EditConfig, **values: Sequence[Any]) -> list[EditConfig]:
    """All combinations of some settings, the others as in `config`: `grid(config, self_replace_steps=(0.2, 0.4))`."""
    if empty := [name for name, choices in values.items() if isinstance(choices, str) or not len(choices)]:
        raise ValueError(f"{empty[0]} is {values[empty[0]]!r}; expected values to try")
    return [replace(config, **dict(zip(values, row, strict=True))) for row in itertools.product(*values.values())]


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
    may raise to cancel. A batch that the accelerator's memory does not hold is begun again in halves.
    """
    (results,) = zip(*sweep(pipe, inversion, pairs, [config], mask=mask, keep=keep, callback=callback), strict=True)
    return list(results)


def sweep(
    pipe: StableDiffusionPipeline,
    inversion: Inversion,
    pairs: Sequence[PromptPair],
    configs: Sequence[EditConfig],
    *,
    mask: Tensor | str = "auto",
    keep: Tensor | None = None,
    callback: Callback | None = None,
) -> list[list[Counterfactual]]:
    """Edit every image by its pair under several settings: per image, one result per config, in order.

    The same as one `edit` per config, for less: all share the source, and candidates that agree up to a step share
    their rows until then. `batch_size` of the first config counts images, as it does in `edit`. Masks as in `edit`.
    """
    _check_pairs(inversion, pairs)
    return _edit_all(pipe, inversion, [[(p, c) for c in configs] for p in pairs], mask, keep, callback)


def edit_many(
    pipe: StableDiffusionPipeline,
    inversion: Inversion,
    pairs: Sequence[Sequence[PromptPair]],
    config: EditConfig = EditConfig(),
    *,
    mask: Tensor | str = "auto",
    keep: Tensor | None = None,
    callback: Callback | None = None,
) -> list[list[Counterfactual]]:
    """Edit every image by several prompt pairs, all of which start from the prompt it was inverted with."""
    _check_pairs(inversion, pairs)
    return _edit_all(pipe, inversion, [[(p, config) for p in own] for own in pairs], mask, keep, callback)


@torch.no_grad()
def _edit_all(
    pipe: StableDiffusionPipeline,
    inversion: Inversion,
    wanted: Sequence[Sequence[tuple[PromptPair, EditConfig]]],
    mask: Tensor | str,
    keep: Tensor | None,
    callback: Callback | None,
) -> list[list[Counterfactual]]:
    """The edits wanted of each image, in batches; every word is looked up before the first step."""
    if not all(wanted):
        raise ValueError("every image needs at least one edit: no settings or prompt pairs were given")
    for image, edits in enumerate(wanted):
        for pair, config in edits:
            _check_pair(image, pair, config, inversion.prompts[image])
    areas = Areas.checked(mask, keep, inversion.images)
    tasks = [_Task(image, pair, config) for image, own in enumerate(wanted) for pair, config in own]
    controller = _controller(pipe, tasks, inversion)
    with tqdm(total=inversion.start * len(tasks), desc="edit", leave=False) as progress:

        def made(rows: slice) -> list[Counterfactual]:
            """The results of consecutive tasks, which are one batch."""
            first, last = tasks[rows][0].image, tasks[rows][-1].image
            images, batch = slice(first, last + 1), [replace(task, image=task.image - first) for task in tasks[rows]]
            own = replace(controller.select(range(len(tasks))[rows]), parents=tuple(task.image for task in batch))
            part, progress.n = inversion[images], inversion.start * rows.start
            outcome = _denoise(pipe, part, batch, own, areas[images], progress, callback, first)
            return _finish(pipe, part, batch, outcome, areas[images])

        firsts, size = [0, *itertools.accumulate(map(len, wanted))], wanted[0][0][1].batch_size
        starts = [*firsts[:-1:size], len(tasks)]
        results = in_parts([slice(*bounds) for bounds in itertools.pairwise(starts)], made)
    return [results[start:stop] for start, stop in itertools.pairwise(firsts)]


@dataclass
class _Outcome:
    """What a batch of edits leaves behind: clean latents and the evidence collected on the way.

    `source` is by image; `target`, `noise_change` and `word_maps` by row, and `row_of` says which row an edit ended in.
    """

    source: Tensor
    target: Tensor
    noise_change: Tensor
    word_maps: Tensor
    row_of: tuple[int, ...]


def _denoise(
    pipe: StableDiffusionPipeline,
    inversion: Inversion,
    tasks: Sequence[_Task],
    controller: Controller,
    areas: Areas,
    progress: tqdm,
    callback: Callback | None,
    first: int,
) -> _Outcome:
    """Walk sources and targets down together; one U-Net call of N + 2 K rows a step, K growing where edits fork."""
    schedule, descent = inversion.schedule, inversion.descent
    source = inversion.latents[inversion.start].to(pipe.device)
    target = source[[task.image for task in tasks]]
    cells = areas.cells(*source.shape[-2:])
    cells = None if cells is None else cells.to(source)
    noise_change = torch.zeros_like(target[:, :1])
    source_above: Tensor | None = None
    target_above: Tensor | None = None
    texts = _Texts.of(pipe, inversion, tasks)
    finite: list[Tensor] = []
    walk = stages(len(tasks), inversion.start, lambda k, step: _behaviour(tasks[k], step, inversion))
    everything = controller
    with controlled(pipe.unet, everything) as processor:
        for index, stage in enumerate(walk):
            level = inversion.start - index
            own = [tasks[lead] for lead in stage.leads]
            if index == 0 or len(stage.leads) > len(target):
                controller = _fork(everything, controller, stage, index)
                processor.controller = controller
                if index:
                    target, noise_change = (t[list(stage.origins)] for t in (target, noise_change))
                    target_above = None if target_above is None else target_above[list(stage.origins)]
                else:
                    target, noise_change = target[list(stage.leads)], noise_change[list(stage.leads)]
            controller.step = index
            timestep = schedule.timesteps[level]
            rows = torch.cat([source, target, target])
            prediction = predict_noise(pipe, rows, timestep, texts.embeds(stage, level))
            of_source, of_negative, of_target = prediction.split([len(source), len(target), len(target)])
            noise_change = noise_change + (of_target - controller.of_parents(of_source)).abs().mean(1, keepdim=True)

            guided = _guided(of_negative, of_target, [task.config for task in own])
            stepped_target = descent.step(schedule, target, guided, level, target_above)
            stepped = descent.step(schedule, source, of_source, level, source_above)
            source_above, target_above = source, target
            source = inversion.latents[level - 1].to(source) if descent.returns else stepped
            corrects = [
                c.correct_drift if descent.corrects is None else descent.corrects for c in (t.config for t in own)
            ]
            target = stepped_target + controller.of_parents(source - stepped) * _column(corrects, source)
            base = controller.of_parents(source)
            progressed = index / schedule.num_steps
            if (bounds := _bounds(own, controller, cells, progressed, base, noise_change)) is not None:
                target = base + bounds * (target - base)

            finite.append(_by_image(target.isfinite().flatten(1).all(1), own, len(source)))
            progress.update(len(tasks))
            if callback is not None:
                callback(index, timestep, target)
    check_finite(torch.stack(finite), first, "editing")
    return _Outcome(source, target, noise_change / len(walk), _word_maps(controller, source), walk[-1].row_of)


def _fork(everything: Controller, current: Controller, stage: Stage, index: int) -> Controller:
    """The controller of a stage: settings of its leads, with the maps that their rows have collected so far."""
    fresh = everything.select(stage.leads)
    if index and current.maps is not None:
        fresh.maps = current.select(stage.origins).maps
    return fresh


def _behaviour(task: _Task, step: int, inversion: Inversion) -> Hashable:
    """All that an edit does to the latents at a step; settings that act later or not at all are left out."""
    config, steps = task.config, inversion.schedule.num_steps
    crosses = step < round(config.cross_replace_steps * steps)
    exceptions = {word for word, share in config.word_windows.items() if (step < round(share * steps)) != crosses}
    injects = step < round(config.self_replace_steps * steps)
    blends = config.local_blend and step / steps >= config.local_blend_start
    confines = config.confine > 0 and step / steps >= config.confine_start
    return (
        task.image,
        task.pair,
        (config.guidance_scale, config.negative, config.correct_drift, config.proximal, config.proximal_quantile),
        (config.alignment, config.word_weight, crosses, frozenset(exceptions)) if crosses or exceptions else None,
        (config.self_max_tokens, config.inject_negative) if injects else None,
        config.local_blend_threshold if blends else None,
        (config.confine, config.mask.attention_weight) if confines else None,
    )


@dataclass(frozen=True)
class _Texts:
    """Text embeddings of a batch: of its sources (N, L, D), and of negative and target prompts by task (K, L, D).

    `stored` holds the inversion's own negative embeddings by level, (T + 1, N, L, D), where it has them.
    """

    source: Tensor
    negative: Tensor
    target: Tensor
    images: tuple[int, ...]
    stored: Tensor | None

    @classmethod
    def of(cls, pipe: StableDiffusionPipeline, inversion: Inversion, tasks: Sequence[_Task]) -> _Texts:
        away = inversion.descent.negative
        negatives = [
            task.pair.source if "source" in (away, task.config.negative if away == "edit" else "") else ""
            for task in tasks
        ]
        embeds = encode_prompts(pipe, [*inversion.prompts, *negatives, *(task.pair.target for task in tasks)])
        source, negative, target = embeds.split([len(inversion), len(tasks), len(tasks)])
        stored = inversion.negative_embeds if away == "stored" else None
        return cls(source, negative, target, tuple(task.image for task in tasks), stored)

    def embeds(self, stage: Stage, level: int) -> Tensor:
        """What the U-Net reads at a level, (N + 2 K, L, D)."""
        leads = list(stage.leads)
        negative = self.negative[leads]
        if self.stored is not None:
            negative = self.stored[level, [self.images[lead] for lead in leads]].to(negative)
        return torch.cat([self.source, negative, self.target[leads]])


def _guided(negative: Tensor, target: Tensor, configs: Sequence[EditConfig]) -> Tensor:
    """Classifier-free guidance of each row by its own scale, proximal where asked for (Han et al., WACV 2024)."""
    direction = target - negative
    for row, config in enumerate(configs):
        if config.proximal != "none":
            size = direction[row].abs()
            limit = size.flatten().quantile(config.proximal_quantile)
            kept = size - limit if config.proximal == "l1" else size
            direction[row] = torch.where(size > limit, direction[row].sign() * kept, 0)
    return negative + _column([config.guidance_scale for config in configs], direction) * direction


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor([float(value) for value in values]).to(like)[:, None, None, None]


def _by_image(rows: Tensor, tasks: Sequence[_Task], images: int) -> Tensor:
    """Whether all rows of each image are fine, (N,)."""
    place = torch.tensor([task.image for task in tasks], device=rows.device)
    return torch.ones(images, dtype=torch.int, device=rows.device).scatter_reduce(0, place, rows.int(), "amin").bool()


def _bounds(
    tasks: Sequence[_Task],
    controller: Controller,
    cells: Tensor | None,
    progress: float,
    latents: Tensor,
    noise_change: Tensor,
) -> Tensor | None:
    """Where the targets' latents may differ from their sources', (K, 1, h, w), or None for everywhere."""
    bounds = None if cells is None else controller.of_parents(cells)
    blending = [t.config.local_blend and progress >= t.config.local_blend_start for t in tasks]
    confined = [t.config.confine > 0 and progress >= t.config.confine_start for t in tasks]
    if not any(blending) and not any(confined):
        return bounds
    maps = _word_maps(controller, latents)
    bounds = torch.ones_like(latents[:, :1]) if bounds is None else bounds.clone()
    for row, task in enumerate(tasks):
        own, config = slice(row, row + 1), task.config
        if blending[row]:
            bounds[own] *= masks.attention_region(maps[own], config.local_blend_threshold)
        if confined[row]:
            evidence = masks.evidence(maps[own], noise_change[own], config.mask.attention_weight)
            bounds[own] *= masks.evidence_region(evidence, config.confine)
    return bounds


def _finish(
    pipe: StableDiffusionPipeline,
    inversion: Inversion,
    tasks: Sequence[_Task],
    outcome: _Outcome,
    areas: Areas,
) -> list[Counterfactual]:
    """Decode every row once, then find masks and composite, together for the edits of equal settings."""
    images, channels = inversion.images, inversion.images.shape[1]
    batches = outcome.target.split(len(images))
    raw = torch.cat([decode_latents(pipe.vae, batch, channels) for batch in batches]).to(images)
    reconstruction = decode_latents(pipe.vae, outcome.source, channels).to(images)
    finished: dict[int, Counterfactual] = {}
    for config in {id(task.config): task.config for task in tasks}.values():
        own = [k for k, task in enumerate(tasks) if task.config is config]
        rows, places = [outcome.row_of[k] for k in own], [tasks[k].image for k in own]
        coarse = masks.evidence(outcome.word_maps[rows], outcome.noise_change[rows], config.mask.attention_weight).to(
            images
        )
        made = _composited(images[places], raw[rows], reconstruction[places], coarse, areas[places], config)
        finished |= {k: replace(made[n], pair=tasks[k].pair) for n, k in enumerate(own)}
    return [finished[k] for k in range(len(tasks))]


def _composited(
    images: Tensor, raw: Tensor, reconstruction: Tensor, coarse: Tensor, areas: Areas, config: EditConfig
) -> list[Counterfactual]:
    """Edits put back into their input images, not yet told their prompts."""
    if isinstance(areas.mask, Tensor):
        mask = areas.mask
    elif areas.off:
        mask = torch.ones_like(images[:, :1])
    else:
        change = masks.pixel_change(raw, reconstruction, config.mask.smooth)
        mask = masks.automatic_mask(change, coarse, config.mask)
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
            pair=_NO_PAIR,
            scores={name: values[n] for name, values in scores.items()},
            settings=config,
        )
        for n in range(len(images))
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


def _controller(pipe: StableDiffusionPipeline, tasks: Sequence[_Task], inversion: Inversion) -> Controller:
    """Token alignment, weights and windows of a batch; raises for words that a prompt does not hold."""
    tokenizer, length = pipe.tokenizer, pipe.tokenizer.model_max_length
    pairs, configs = [task.pair for task in tasks], [task.config for task in tasks]
    alignments = [
        align(tokenizer, pair.source, pair.target, length, config.alignment)
        for pair, config in zip(pairs, configs, strict=True)
    ]
    source = torch.stack([word_mask(tokenizer, pair.source, pair.source_words, length) for pair in pairs])
    target = torch.stack([word_mask(tokenizer, pair.target, pair.target_words, length) for pair in pairs])
    half_height, half_width = ((side + 1) // 2 for side in inversion.latents.shape[-2:])
    steps = inversion.schedule.num_steps
    return Controller.of(
        alignments,
        1 + torch.tensor([config.word_weight - 1 for config in configs])[:, None] * target,
        pipe.device,
        cross_steps=torch.stack([_cross_steps(tokenizer, task, length, steps) for task in tasks]),
        self_steps=[round(config.self_replace_steps * steps) for config in configs],
        self_max_tokens=[config.self_max_tokens for config in configs],
        inject_negative=[config.inject_negative for config in configs],
        parents=[task.image for task in tasks],
        maps=WordMaps(source.to(pipe.device), target.to(pipe.device), half_height * half_width),
    )


def _cross_steps(tokenizer: PreTrainedTokenizerBase, task: _Task, length: int, steps: int) -> Tensor:
    """Steps in which each token of the target takes over the source's attention, (length,)."""
    config, prompt = task.config, task.pair.target
    windows = torch.full((length,), round(config.cross_replace_steps * steps))
    owners: dict[int, str] = {}
    for word, share in config.word_windows.items():
        for token in token_span(tokenizer, prompt, word):
            if token in owners:
                raise ValueError(f"word_windows names a token twice, in {owners[token]!r} and {word!r}: {prompt!r}")
            owners[token] = word
            windows[token] = round(share * steps)
    return windows


def _word_maps(controller: Controller, latents: Tensor) -> Tensor:
    """Mean attention to the edit's words so far, (N, 2, h, w)."""
    assert controller.maps is not None
    return controller.maps.mean(*latents.shape[-2:])


def _check_pairs(inversion: Inversion, pairs: Sequence[object]) -> None:
    if len(pairs) != len(inversion):
        raise ValueError(f"{len(inversion)} inverted images need as many prompt pairs, got {len(pairs)}")


def _check_pair(image: int, pair: PromptPair, config: EditConfig, prompt: str) -> None:
    if pair.source != prompt:
        raise ValueError(f"image {image} was inverted as {prompt!r}, but its edit starts from {pair.source!r}")
    if config.local_blend and not (pair.source_words or pair.target_words):
        raise ValueError(f"local_blend needs words to look for, but the edit of image {image} names none")
