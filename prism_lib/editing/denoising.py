"""Action and prediction in latent space: from the inverted noise x*_T to clean latents, in one U-Net call a step.

A call holds a row per image for its source, one per edit for its target prompt and, while the edit is guided, one for
its negative prompt. Edits of one image share a row until their settings first act differently, and fork there.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.editing import masks
from prism_lib.editing.alignment import align, word_mask
from prism_lib.editing.attention import Controller, WordMaps, controlled
from prism_lib.editing.inversion import Callback, Inversion, check_finite
from prism_lib.editing.masks import Areas
from prism_lib.editing.settings import EditConfig
from prism_lib.language.edits import PromptPair
from prism_lib.models.pipeline import Pipe, encode_prompts, predict_noise

CONFINE_START = 0.3  # share of the steps without confinement: before it, evidence is mostly noise


@dataclass(frozen=True)
class EditTask:
    """One edit: the index of its image, its prompts and its settings."""

    image: int
    pair: PromptPair
    config: EditConfig

    @property
    def guidance_scale(self) -> float:
        """The scale of guidance, times `addition_factor` where the edit adds something."""
        return self.config.guidance_scale * (self.config.addition_factor if self.pair.adds else 1.0)

    def guided_steps(self, steps: int) -> range:
        """The steps that need the negative prediction: none at scale 1, where guidance adds nothing."""
        if self.guidance_scale == 1:
            return range(0)
        return range(round(self.config.guidance_start * steps), round(self.config.guidance_end * steps))

    def blends(self, progress: float) -> bool:
        """Whether LocalBlend acts at this share of the steps."""
        return self.config.local_blend and progress >= self.config.local_blend_start

    def confines(self, progress: float) -> bool:
        """Whether the evidence confines the edit at this share of the steps."""
        return self.config.confine > 0 and progress >= CONFINE_START

    def behaviour(self, step: int, steps: int) -> Hashable:
        """What the edit does to the latents at a step; edits whose behaviour has been equal so far share a row."""
        config = self.config
        return (
            self.image,
            self.pair,
            config.correct_drift,
            (self.guidance_scale, config.negative) if step in self.guided_steps(steps) else None,
            config.word_weight if step < round(config.cross_replace_steps * steps) else None,
            step < round(config.self_replace_steps * steps),
            config.local_blend_threshold if self.blends(step / steps) else None,
            (config.confine, config.mask.attention_weight) if self.confines(step / steps) else None,
            config.side,
        )


def stages(images: Sequence[int], num_steps: int, behaviour: Callable[[int, int], Hashable]) -> list[tuple[int, ...]]:
    """The row of each edit of these `images`, by step; edits share a row while `behaviour(edit, step)` is equal.

    Rows that have forked stay apart, and rows keep the order of their edits.
    """
    found = [tuple(images)]
    for step in range(num_steps):
        keys = [(row, behaviour(edit, step)) for edit, row in enumerate(found[-1])]
        place = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        found.append(tuple(place[key] for key in keys))
    return found[1:]


@dataclass
class Outcome:
    """Clean latents of a batch of edits, and the evidence collected on the way.

    `source` is by image; `target`, `noise_change` and `word_maps` by row, and `row_of` is the row of each edit.
    """

    source: Tensor
    target: Tensor
    noise_change: Tensor
    word_maps: Tensor
    row_of: tuple[int, ...]


def denoise(
    pipe: Pipe,
    inversion: Inversion,
    tasks: Sequence[EditTask],
    areas: Areas,
    progress: tqdm,
    callback: Callback | None = None,
    first: int = 0,
) -> Outcome:
    """Edit a batch of images, each by one task or more; `first` is the number of its first image, for errors."""
    schedule, how = inversion.schedule, inversion.how
    source = target = inversion.latents[inversion.start].to(pipe.device)
    noise_change = torch.zeros_like(source[:, :1])
    cells = areas.cells(*source.shape[-2:])
    cells = None if cells is None else cells.to(source)
    source_text, negative_text, target_text = _embed(pipe, inversion, tasks)
    row_of = [task.image for task in tasks]  # at first one row per image
    walk = stages(row_of, inversion.start, lambda k, step: tasks[k].behaviour(step, schedule.num_steps))
    finite: list[Tensor] = []
    rows: list[EditTask] = []
    controller = edit_controller(pipe, tasks, inversion)
    with controlled(pipe.unet, controller) as processor:
        for index, stage in enumerate(walk):
            level = inversion.start - index
            timestep, progressed = schedule.timesteps[level], index / schedule.num_steps
            if max(stage) >= len(rows):  # edits fork: a new row continues the one that it shared
                leads = [stage.index(row) for row in range(max(stage) + 1)]
                rows, origins = [tasks[lead] for lead in leads], [row_of[lead] for lead in leads]
                target, noise_change, maps = target[origins], noise_change[origins], controller.maps
                controller = processor.controller = edit_controller(pipe, rows, inversion)
                controller.maps.continue_from(maps, origins)
            controller.step = index

            # One call predicts the noise of sources, negatives and targets.
            negatives = controller.index(controller.guided)
            latents = torch.cat([source, target[negatives], target])
            negative = negative_text[[leads[row] for row in controller.guided]]
            if how.negative == "stored" and inversion.negative_embeds is not None:
                negative = inversion.negative_embeds[level][[rows[row].image for row in controller.guided]].to(negative)
            prediction = predict_noise(pipe, latents, timestep, torch.cat([source_text, negative, target_text[leads]]))
            of_source, of_negative, of_target = prediction.split([len(source), len(negatives), len(target)])
            # Where an edit may not act its prompt goes on asking for it, which is no evidence of a change.
            sides = [masks.side_cells(source[0, :1], task.config.side) for task in rows]
            allowed = torch.stack(sides) if cells is None else controller.of_parents(cells)
            change = (of_target - controller.of_parents(of_source)).abs().mean(1, keepdim=True)
            noise_change = noise_change + allowed * change

            # Classifier-free guidance of each row by its own scale.
            scales = _column([rows[row].guidance_scale for row in controller.guided], of_target)
            guided = of_target.index_copy(0, negatives, of_negative + scales * (of_target[negatives] - of_negative))
            if cells is None and progressed < CONFINE_START:  # what comes on the other side is asked for on this one
                guided = guided + ((1 - allowed) * (guided - controller.of_parents(of_source))).flip(-1)
            # The target takes over the correction that returns the source to its trajectory.
            stepped = how.step(schedule, source, of_source, level)
            source = inversion.latents[level - 1].to(source) if how.returns else stepped
            corrects = [task.config.correct_drift if how.corrects is None else how.corrects for task in rows]
            correction = controller.of_parents(source - stepped) * _column(corrects, source)
            target = how.step(schedule, target, guided, level) + correction
            # Outside the region of an edit its latents are the source's.
            if cells is not None or any(t.config.side or t.blends(progressed) or t.confines(progressed) for t in rows):
                words, base = controller.maps.mean(*source.shape[-2:]), controller.of_parents(source)
                target = base + allowed * _region(rows, progressed, words, noise_change) * (target - base)

            row_of = list(stage)
            finite.append(target.isfinite().flatten(1).all(1)[controller.index(row_of)])
            progress.update(len(tasks))
            if callback is not None:
                callback(index, timestep, target)
    check_finite(torch.stack(finite), [first + task.image for task in tasks], "editing")
    return Outcome(source, target, noise_change / len(walk), controller.maps.mean(*source.shape[-2:]), walk[-1])


def edit_controller(pipe: Pipe, tasks: Sequence[EditTask], inversion: Inversion) -> Controller:
    """Token alignment, weights and windows of some edits; ValueError for a word that its prompt lacks."""
    tokenizer, length, device = pipe.tokenizer, pipe.tokenizer.model_max_length, pipe.device
    steps = inversion.schedule.num_steps
    pairs = [task.pair for task in tasks]
    transfer = torch.stack([align(tokenizer, pair.source, pair.target, length) for pair in pairs])
    source = torch.stack([word_mask(tokenizer, pair.source, pair.source_words, length) for pair in pairs])
    target = torch.stack([word_mask(tokenizer, pair.target, pair.target_words, length) for pair in pairs])
    weights = 1 + torch.tensor([task.config.word_weight - 1 for task in tasks])[:, None] * target
    half_height, half_width = ((side + 1) // 2 for side in inversion.latents.shape[-2:])
    return Controller(
        transfer=(transfer * weights[:, None, :]).to(device),
        own=((transfer.sum(1) == 0) * weights).to(device),  # a token without a counterpart keeps its own map
        cross_steps=[round(task.config.cross_replace_steps * steps) for task in tasks],
        self_steps=[round(task.config.self_replace_steps * steps) for task in tasks],
        guided_steps=[task.guided_steps(steps) for task in tasks],
        parents=[task.image for task in tasks],
        maps=WordMaps(source.to(device), target.to(device), half_height * half_width),
    )


def _embed(pipe: Pipe, inversion: Inversion, tasks: Sequence[EditTask]) -> tuple[Tensor, ...]:
    """Text embeddings of the sources (N, L, D), and of negative and target prompts by task, each (K, L, D)."""
    away = inversion.how.negative
    from_source = [away == "source" or (away == "edit" and task.config.negative == "source") for task in tasks]
    negatives = [task.pair.source if source else "" for task, source in zip(tasks, from_source, strict=True)]
    embeds = encode_prompts(pipe, [*inversion.prompts, *negatives, *(task.pair.target for task in tasks)])
    return embeds.split([len(inversion), len(tasks), len(tasks)])


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor([float(value) for value in values]).to(like)[:, None, None, None]


def _region(tasks: Sequence[EditTask], progress: float, words: Tensor, noise_change: Tensor) -> Tensor:
    """Where LocalBlend and confinement let the targets' latents differ from their sources', (K, 1, h, w)."""
    region = torch.ones_like(noise_change)
    for row, task in enumerate(tasks):
        own, config = slice(row, row + 1), task.config
        if task.blends(progress):
            region[own] *= masks.attention_region(words[own], config.local_blend_threshold)
        if task.confines(progress):
            evidence = masks.evidence(words[own], noise_change[own], config.mask.attention_weight)
            region[own] *= masks.evidence_region(evidence, config.confine)
    return region
