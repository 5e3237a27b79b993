"""The walk down of an edit: sources and targets from x*_T to clean latents, in one U-Net call a step.

Each call holds a row per image for its source and one per edit for its target prompt, and while the edit is guided one
for its negative prompt. A step gives the targets the source's attention, guides them, returns the source to its
trajectory (`editing.methods`) and keeps the targets within their bounds. Edits of one image that have done the same so
far share a row and fork where they differ: five windows of self-attention cost 140 rows in 50 steps instead of 250.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from prism_lib.editing import masks
from prism_lib.editing.alignment import align, token_span, word_mask
from prism_lib.editing.attention import Controller, WordMaps, controlled
from prism_lib.editing.inversion import Callback, Inversion, check_finite
from prism_lib.editing.masks import Areas
from prism_lib.editing.settings import EditConfig
from prism_lib.language.edits import PromptPair
from prism_lib.models.pipeline import encode_prompts, predict_noise

CONFINE_START = 0.3  # share of the steps without confinement: before it, evidence is mostly noise


@dataclass(frozen=True)
class EditTask:
    """One edit: the image's place in its batch, prompts and settings."""

    image: int
    pair: PromptPair
    config: EditConfig

    @property
    def guidance_scale(self) -> float:
        """The scale that its pair of prompts calls for."""
        return self.config.guidance_scale * (self.config.addition_factor if self.pair.adds else 1.0)


@dataclass(frozen=True)
class Stage:
    """The rows of one step.

    `leads` holds one edit of each row, to ask for settings; `origins` the row of the step before that each goes on
    from, and `row_of` the row of every edit.
    """

    leads: tuple[int, ...]
    origins: tuple[int, ...]
    row_of: tuple[int, ...]


def stages(edits: int, num_steps: int, behaviour: Callable[[int, int], Hashable]) -> list[Stage]:
    """The stages of `edits` edits, given what `behaviour(edit, step)` makes of the latents at each step.

    Behaviour must name all that the edit does at that step, its image included; rows keep the order of their edits.
    """
    found: list[Stage] = []
    history: tuple[int, ...] = (0,) * edits
    for step in range(num_steps):
        place: dict[Hashable, int] = {}
        row_of, leads = [], []
        for edit in range(edits):
            key = history[edit], behaviour(edit, step)
            if key not in place:
                place[key] = len(place)
                leads.append(edit)
            row_of.append(place[key])
        found.append(Stage(tuple(leads), tuple(history[lead] for lead in leads), tuple(row_of)))
        history = tuple(row_of)
    return found


@dataclass
class Outcome:
    """What a batch of edits leaves behind: clean latents and the evidence collected on the way.

    `source` is by image; `target`, `noise_change` and `word_maps` by row, and `row_of` says which row an edit ended in.
    """

    source: Tensor
    target: Tensor
    noise_change: Tensor
    word_maps: Tensor
    row_of: tuple[int, ...]


def denoise(
    pipe: StableDiffusionPipeline,
    inversion: Inversion,
    tasks: Sequence[EditTask],
    controller: Controller,
    areas: Areas,
    progress: tqdm,
    callback: Callback | None,
    first: int,
) -> Outcome:
    """Walk sources and targets down together, in one U-Net call a step: N sources, K targets and the negatives of those
    that are guided; K grows where edits fork."""
    schedule, how = inversion.schedule, inversion.how
    source = inversion.latents[inversion.start].to(pipe.device)
    target = source[[task.image for task in tasks]]
    cells = areas.cells(*source.shape[-2:])
    cells = None if cells is None else cells.to(source)
    noise_change = torch.zeros_like(target[:, :1])
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
                else:
                    target, noise_change = target[list(stage.leads)], noise_change[list(stage.leads)]
            controller.step = index
            timestep = schedule.timesteps[level]
            negatives = controller.guided_rows
            rows = torch.cat([source, target[negatives], target])
            prediction = predict_noise(pipe, rows, timestep, texts.embeds(stage, level, controller.guided))
            of_source, of_negative, of_target = prediction.split([len(source), len(negatives), len(target)])
            noise_change = noise_change + (of_target - controller.of_parents(of_source)).abs().mean(1, keepdim=True)

            guided = of_target.clone()
            if controller.guided:
                guided[negatives] = _guided(of_negative, of_target[negatives], [own[row] for row in controller.guided])
            stepped_target = how.step(schedule, target, guided, level)
            stepped = how.step(schedule, source, of_source, level)
            source = inversion.latents[level - 1].to(source) if how.returns else stepped
            corrects = [task.config.correct_drift if how.corrects is None else how.corrects for task in own]
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
    return Outcome(source, target, noise_change / len(walk), _word_maps(controller, source), walk[-1].row_of)


def edit_controller(pipe: StableDiffusionPipeline, tasks: Sequence[EditTask], inversion: Inversion) -> Controller:
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
        guided_steps=[_guided_steps(task, steps) for task in tasks],
        parents=[task.image for task in tasks],
        maps=WordMaps(source.to(pipe.device), target.to(pipe.device), half_height * half_width),
    )


def _guided_steps(task: EditTask, steps: int) -> range:
    """The steps in which an edit needs its negative prediction: none where guidance adds nothing."""
    if task.guidance_scale == 1:
        return range(0)
    return range(round(task.config.guidance_start * steps), round(task.config.guidance_end * steps))


def _cross_steps(tokenizer: PreTrainedTokenizerBase, task: EditTask, length: int, steps: int) -> Tensor:
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


def _fork(everything: Controller, current: Controller, stage: Stage, index: int) -> Controller:
    """The controller of a stage: settings of its leads, with the maps that their rows have collected so far."""
    fresh = everything.select(stage.leads)
    if index and current.maps is not None:
        fresh.maps = current.select(stage.origins).maps
    return fresh


def _behaviour(task: EditTask, step: int, inversion: Inversion) -> Hashable:
    """All that an edit does to the latents at a step; settings that act later or not at all are left out."""
    config, steps = task.config, inversion.schedule.num_steps
    crosses = step < round(config.cross_replace_steps * steps)
    exceptions = {word for word, share in config.word_windows.items() if (step < round(share * steps)) != crosses}
    injects = step < round(config.self_replace_steps * steps)
    guides = step in _guided_steps(task, steps)
    blends = config.local_blend and step / steps >= config.local_blend_start
    confines = config.confine > 0 and step / steps >= CONFINE_START
    return (
        task.image,
        task.pair,
        config.correct_drift,
        (task.guidance_scale, config.negative) if guides else None,
        (config.alignment, config.word_weight, crosses, frozenset(exceptions)) if crosses or exceptions else None,
        injects,
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
    def of(cls, pipe: StableDiffusionPipeline, inversion: Inversion, tasks: Sequence[EditTask]) -> _Texts:
        away = inversion.how.negative
        negatives = [
            task.pair.source if "source" in (away, task.config.negative if away == "edit" else "") else ""
            for task in tasks
        ]
        embeds = encode_prompts(pipe, [*inversion.prompts, *negatives, *(task.pair.target for task in tasks)])
        source, negative, target = embeds.split([len(inversion), len(tasks), len(tasks)])
        stored = inversion.negative_embeds if away == "stored" else None
        return cls(source, negative, target, tuple(task.image for task in tasks), stored)

    def embeds(self, stage: Stage, level: int, guided: Sequence[int]) -> Tensor:
        """What the U-Net reads at a level for sources, the rows that are `guided`, and targets, (N + G + K, L, D)."""
        leads = list(stage.leads)
        if not guided:
            return torch.cat([self.source, self.target[leads]])
        away = [leads[row] for row in guided]
        negative = self.negative[away]
        if self.stored is not None:
            negative = self.stored[level, [self.images[lead] for lead in away]].to(negative)
        return torch.cat([self.source, negative, self.target[leads]])


def _guided(negative: Tensor, target: Tensor, tasks: Sequence[EditTask]) -> Tensor:
    """Classifier-free guidance of each row by its own scale."""
    return negative + _column([task.guidance_scale for task in tasks], target) * (target - negative)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor([float(value) for value in values]).to(like)[:, None, None, None]


def _by_image(rows: Tensor, tasks: Sequence[EditTask], images: int) -> Tensor:
    """Whether all rows of each image are fine, (N,)."""
    place = torch.tensor([task.image for task in tasks], device=rows.device)
    return torch.ones(images, dtype=torch.int, device=rows.device).scatter_reduce(0, place, rows.int(), "amin").bool()


def _bounds(
    tasks: Sequence[EditTask],
    controller: Controller,
    cells: Tensor | None,
    progress: float,
    latents: Tensor,
    noise_change: Tensor,
) -> Tensor | None:
    """Where the targets' latents may differ from their sources', (K, 1, h, w), or None for everywhere."""
    bounds = None if cells is None else controller.of_parents(cells)
    blending = [t.config.local_blend and progress >= t.config.local_blend_start for t in tasks]
    confined = [t.config.confine > 0 and progress >= CONFINE_START for t in tasks]
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


def _word_maps(controller: Controller, latents: Tensor) -> Tensor:
    """Mean attention to the edit's words so far, (N, 2, h, w)."""
    assert controller.maps is not None
    return controller.maps.mean(*latents.shape[-2:])
