"""Action and prediction: edit an inverted image by a pair of prompts, and put the result back into the input.

Unlike the reference implementations, guidance points away from the source prompt and the target takes the source's
correction (`EditConfig.negative`, `.correct_drift`), so a pair of equal prompts gives exactly the reconstruction.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.editing import kept, masks
from prism_lib.editing.denoising import EditTask, Outcome, denoise, edit_controller
from prism_lib.editing.inversion import Callback, Inversion
from prism_lib.editing.masks import Areas
from prism_lib.editing.settings import Settings, resolved
from prism_lib.language.edits import Pairs, PromptPair
from prism_lib.models.pipeline import Pipe, decode_latents

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_RECOMMENDED: Mapping[str, Any] = MappingProxyType({})  # no override: all as the model recommends
_CPU_ROWS = 12  # of a U-Net call; larger calls outgrow a CPU's caches and take up to twice as long per row


@dataclass(frozen=True)
class Counterfactual:
    """One edited image with what it was made of; images are (C, H, W) in [0, 1], masks (1, H, W).

    `image` is the composite, `raw` the decoded edit without mask, `factual` the input and `reconstruction` the source
    as the model decodes it. `mask` is soft, and exactly 0 where `image` equals the input. `settings` is an
    `EditConfig`, or a baseline's own.
    """

    image: Tensor
    raw: Tensor
    factual: Tensor
    reconstruction: Tensor
    mask: Tensor
    pair: PromptPair
    scores: Mapping[str, float]
    settings: Any


def stack(results: Sequence[Counterfactual], name: str = "image") -> Tensor:
    """One field of many results as a batch: (N, C, H, W), or (N, 1, H, W) for "mask"."""
    return torch.stack([getattr(result, name) for result in results])


def edit(
    pipe: Pipe,
    inversion: Inversion,
    pairs: Pairs,
    settings: Settings = _RECOMMENDED,
    *,
    mask: Tensor | str = "auto",
    keep: Tensor | None = None,
    callback: Callback | None = None,
) -> list[Counterfactual]:
    """Edit every image of an inversion by its own prompt pair (prompt-to-prompt).

    `settings` is an `EditConfig`, or overrides of what the model recommends for each pair. `mask` is "auto", "off" (the
    raw edit, no composite) or a user's own, (N, 1, H, W) boolean or in [0, 1], which also bounds the edit in latent
    space. `keep`, of the same shape, marks pixels that stay the input's inside any mask. `callback(i, timestep,
    latents)` is called after step i of every batch and may raise to cancel. A batch too large for memory is halved.
    """
    (results,) = zip(*sweep(pipe, inversion, pairs, [settings], mask=mask, keep=keep, callback=callback), strict=True)
    return list(results)


@torch.no_grad()
def sweep(
    pipe: Pipe,
    inversion: Inversion,
    pairs: Pairs,
    settings: Sequence[Settings],
    *,
    mask: Tensor | str = "auto",
    keep: Tensor | None = None,
    callback: Callback | None = None,
) -> list[list[Counterfactual]]:
    """Edit every image by its pair under several settings: a list per image, with one result per setting, in order.

    The results equal those of one `edit` per setting at less cost: edits of an image share its source, and their own
    rows while they act alike. The first setting's `batch_size` counts images. The other arguments are those of `edit`.
    """
    if len(pairs) != len(inversion):
        raise ValueError(f"{len(inversion)} inverted images need as many prompt pairs, got {len(pairs)}")
    if not settings:
        raise ValueError("a sweep needs at least one setting")
    count = len(settings)
    steps = inversion.schedule.num_steps
    tasks = [EditTask(n, pair, resolved(pipe, pair, steps, one)) for n, pair in enumerate(pairs) for one in settings]
    for task in tasks:
        if task.pair.source != (prompt := inversion.prompts[task.image]):
            started = f"image {task.image} was inverted as {prompt!r}"
            raise ValueError(f"{started}, but its edit starts from {task.pair.source!r}")
        if task.config.local_blend and not (task.pair.source_words or task.pair.target_words):
            raise ValueError(f"local_blend needs words to look for, but the edit of image {task.image} names none")
        if task.config.kinds_network:
            kept.kinds_folder(task.config.kinds_network)  # FileNotFoundError if it is missing
    areas = Areas.checked(mask, keep, inversion.images)
    edit_controller(pipe, tasks, inversion)  # ValueError for a word that a prompt lacks, before the first step
    size = tasks[0].config.batch_size
    if pipe.device.type == "cpu":
        size = max(1, min(size, _CPU_ROWS // (1 + 2 * count)))
    with tqdm(total=inversion.start * len(tasks), desc="edit", leave=False) as progress:

        def made(rows: slice) -> list[Counterfactual]:
            first, last = tasks[rows][0].image, tasks[rows][-1].image
            images, batch = slice(first, last + 1), [replace(task, image=task.image - first) for task in tasks[rows]]
            progress.n = inversion.start * rows.start
            outcome = denoise(pipe, inversion[images], batch, areas[images], progress, callback, first)
            return _finish(pipe, inversion[images], batch, outcome, areas[images])

        results = in_parts(len(tasks), count * size, made)
    return [results[start : start + count] for start in range(0, len(tasks), count)]


def in_parts(count: int, size: int, work: Callable[[slice], list[Result]]) -> list[Result]:
    """The results of `work` for `count` rows, by slices of at most `size` rows, as one list with a result per row.

    Rows that raise torch.OutOfMemoryError are done in halves, and no later slice is larger than these. A single row
    that does not fit raises. Rows must be independent, so that smaller slices change results by rounding alone.
    """
    results: list[Result] = []
    while (start := len(results)) < count:
        stop = min(start + size, count)
        try:
            results += work(slice(start, stop))
            continue
        except torch.OutOfMemoryError:
            if stop - start == 1:
                raise
        # Outside of the handler: its traceback would keep the tensors of the failed attempt alive.
        size = (stop - start) // 2
        logger.warning("out of memory: going on with at most %d at a time", size)
        torch.cuda.empty_cache()
    return results


def scored(
    factual: Tensor, image: Tensor, raw: Tensor, reconstruction: Tensor, mask: Tensor, pairs: Pairs, settings: object
) -> list[Counterfactual]:
    """Batches (N, ...) as N results of equal settings.

    Scores: the share of pixels in the mask, the mean change of the result, and that of `raw` outside the mask.
    """
    outside = (mask == 0).to(factual)
    kept_out = ((raw - reconstruction).abs().mean(1, keepdim=True) * outside).sum((1, 2, 3))
    scores = {
        "mask_area": (1 - outside).mean((1, 2, 3)).tolist(),
        "change": (image - factual).abs().mean((1, 2, 3)).tolist(),
        "change_outside_mask": (kept_out / outside.sum((1, 2, 3)).clamp(min=1)).tolist(),
    }
    tensors = zip(image, raw, factual, reconstruction, mask, strict=True)
    return [
        Counterfactual(*row, pair, {name: values[n] for name, values in scores.items()}, settings)
        for n, (row, pair) in enumerate(zip(tensors, pairs, strict=True))
    ]


def _finish(
    pipe: Pipe, inversion: Inversion, tasks: Sequence[EditTask], outcome: Outcome, areas: Areas
) -> list[Counterfactual]:
    """Decode every row once, then find masks and composite for all edits of equal settings together."""
    images, channels = inversion.images, inversion.images.shape[1]
    batches = outcome.target.split(len(images))
    decoded = torch.cat([decode_latents(pipe.vae, batch, channels) for batch in batches]).to(images)
    sources = decode_latents(pipe.vae, outcome.source, channels).to(images)
    finished: dict[int, Counterfactual] = {}
    for config in dict.fromkeys(task.config for task in tasks):
        own = [k for k, task in enumerate(tasks) if task.config == config]
        rows, places = [outcome.row_of[k] for k in own], [tasks[k].image for k in own]
        factual, raw, reconstruction, bounds = images[places], decoded[rows], sources[places], areas[places]
        weight = config.mask.attention_weight
        coarse = masks.evidence(outcome.word_maps[rows], outcome.noise_change[rows], weight).to(images)
        free = isinstance(bounds.mask, str) and bounds.mask == "off"
        if isinstance(bounds.mask, Tensor):
            mask = bounds.mask
        elif free:
            mask = torch.ones_like(factual[:, :1])
        else:
            change = masks.pixel_change(raw, reconstruction, config.mask.smooth)
            mask = masks.automatic_mask(change, coarse, config.mask)
            if config.protect_text:
                text = kept.burnt_in_text(factual, config.protect_text == "anywhere")
                mask = masks.without(mask, text, config.mask.feather)
            if config.kinds_network:
                edited = [tasks[k].pair for k in own]
                others = kept.other_devices(factual, reconstruction - raw, edited, config.kinds_network)
                mask = masks.without(mask, others, config.mask.feather)
        if bounds.keep is not None:
            mask = masks.without(mask, bounds.keep, config.mask.feather)
        image = raw
        if not free or bounds.keep is not None:
            image = masks.composite(factual, raw, reconstruction, mask, config.mask.replaced)
        results = scored(factual, image, raw, reconstruction, mask, [tasks[k].pair for k in own], config)
        finished |= dict(zip(own, results, strict=True))
    return [finished[k] for k in range(len(tasks))]
