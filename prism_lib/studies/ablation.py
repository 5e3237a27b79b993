"""What each setting of the editor is worth: quality against the true counterfactual, and seconds, variant by variant.

`vary` turns a base setting and lists of values into variants, `measure` edits the same images with each of them, and
`summarise` gives the numbers of a record. `schedule` writes out, step by step, whose attention an edit uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from tqdm.auto import tqdm

from prism_lib.data.rows import prompt_pairs
from prism_lib.editing.denoising import CONFINE_START
from prism_lib.editing.methods import RECOMMENDED
from prism_lib.editing.settings import EditConfig, Settings, grid, resolved
from prism_lib.evaluation.evaluate import Evaluation, evaluate_edit, interval
from prism_lib.language.edits import NO_EDIT, Edit
from prism_lib.models.classifier import Classifier
from prism_lib.models.schedule import Schedule

# Columns of `evaluation` that a variant is summarised by, where they are known.
COLUMNS = (
    "true_error_ratio",
    "cpg",
    "flipped",
    "side_effect_rate",
    "identity_l1",
    "reconstruction_l1",
    "mask_recall",
    "latent_outside_l1_ratio",
)


@dataclass(frozen=True)
class Variant:
    """One way to edit; `mask` is "auto" or "off" (the raw decode, nothing put back into the input)."""

    method: str = RECOMMENDED
    num_inference_steps: int = 50
    edit: Settings = field(default_factory=dict, hash=False)
    mask: str = "auto"


@dataclass(frozen=True)
class Measurement:
    """A variant's evaluations, one per edit, and the rows its U-Net calls had per image."""

    variant: object
    evaluations: tuple[Evaluation, ...]
    unet_evaluations: float

    @property
    def images(self) -> int:
        """How many images were edited, over all edits."""
        return sum(len(evaluation.table) for evaluation in self.evaluations)

    @property
    def seconds_per_image(self) -> float:
        """Seconds of inversion and edit, for one image and one edit."""
        return sum(evaluation.seconds for evaluation in self.evaluations) / self.images


def vary(base: Variant, **values: Sequence[Any]) -> dict[str, Variant]:
    """Every combination of the values of some fields of `Variant` or of its `EditConfig`, by name.

    `vary(base, self_replace_steps=[0, 0.4])` gives "self_replace_steps 0" and "self_replace_steps 0.4".
    """
    own = {item.name for item in fields(Variant)} - {"edit"}
    known = own | {item.name for item in fields(EditConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    variants = {}
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        (edit,) = grid(base.edit, **{name: [value] for name, value in chosen.items() if name not in own})
        variant = replace(base, edit=edit, **{name: value for name, value in chosen.items() if name in own})
        variants[", ".join(f"{name} {_short(value)}" for name, value in chosen.items())] = variant
    return variants


def measure(
    pipe: StableDiffusionPipeline,
    folder: str | Path,
    cases: Mapping[Edit, pd.DataFrame],
    variants: Mapping[str, Variant],
    judge: Classifier | None = None,
) -> dict[str, Measurement]:
    """Edit the images of `cases` (edit -> rows of a prepared table) with every variant.

    What comes to the same is measured once: the base, which is in every study, and settings that an edit needs anyway
    or cannot use, such as the factor of additions where something is removed.
    """
    if not cases or not variants:
        raise ValueError(f"need at least one edit and one variant, got {len(cases)} and {len(variants)}")
    pairs = {edit: prompt_pairs(folder, table, edit) for edit, table in cases.items()}
    images = sum(map(len, cases.values()))
    found: dict[tuple[Edit, str], tuple[Evaluation, int]] = {}
    done: dict[str, Measurement] = {}
    for variant in tqdm({repr(variant): variant for variant in variants.values()}.values(), desc="variants"):
        own = []
        for edit, table in cases.items():
            settled = [replace(variant, edit=resolved(pipe, pair, variant.edit)) for pair in pairs[edit]]
            if (key := (edit, repr(settled))) not in found:
                found[key] = _evaluate(pipe, folder, table, edit, variant, judge)
            own.append(found[key])
        evaluations = tuple(evaluation for evaluation, _ in own)
        done[repr(variant)] = Measurement(variant, evaluations, sum(rows for _, rows in own) / images)
    return {name: done[repr(variant)] for name, variant in variants.items()}


def _evaluate(
    pipe: StableDiffusionPipeline,
    folder: str | Path,
    table: pd.DataFrame,
    edit: Edit,
    variant: Variant,
    judge: Classifier | None,
) -> tuple[Evaluation, int]:
    """One edit with one variant, and the rows of its U-Net calls."""
    with counted_rows(pipe.unet) as rows:
        evaluation = evaluate_edit(
            pipe,
            folder,
            table,
            edit,
            variant.edit,
            method=variant.method,
            num_inference_steps=variant.num_inference_steps,
            judge=judge,
            mask=variant.mask,
        )
    return evaluation, sum(rows)


@contextmanager
def counted_rows(unet: nn.Module) -> Iterator[list[int]]:
    """Rows of every forward call of a U-Net inside the block: one row is one evaluation; gradients do not count."""
    rows: list[int] = []
    handle = unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        handle.remove()


def summarise(
    measured: Mapping[str, Measurement], seed: int = 0, *, by_edit: bool = False
) -> dict[str, dict[str, Any]]:
    """Per variant: means over images with 95 % bootstrap intervals over patients, seconds and U-Net evaluations.

    With ``by_edit`` also those of each edit alone, a dictionary by the edit's key.
    """
    summary: dict[str, dict[str, Any]] = {}
    for name, measurement in measured.items():
        table = pd.concat([evaluation.table for evaluation in measurement.evaluations], ignore_index=True)
        values: dict[str, Any] = {"images": float(len(table))}
        for column in COLUMNS:
            if column in table and table[column].notna().all():
                values |= interval(column, table[column], table["patient_id"], seed)
        values["seconds_per_image"] = measurement.seconds_per_image
        values["unet_evaluations"] = measurement.unet_evaluations
        for evaluation in measurement.evaluations if by_edit else ():
            alone = replace(measurement, evaluations=(evaluation,))
            values[evaluation.edit.key] = summarise({name: alone}, seed)[name]
        summary[name] = values
    return summary


def first_of_each(measured: Mapping[str, Measurement]) -> tuple[Tensor, list[str]]:
    """For a sheet: the first image of the first edit, its truth where known, and what each variant makes of it."""
    first = next(iter(measured.values())).evaluations[0]
    images = {"original": first.factual[0]} | ({} if first.truth is None else {"true counterfactual": first.truth[0]})
    images |= {name: measurement.evaluations[0].edited[0] for name, measurement in measured.items()}
    titles = [name.replace("_replace_steps", "").replace(", ", "\n") for name in images]
    return torch.stack(list(images.values())), titles


def schedule(settings: Settings, pipe: StableDiffusionPipeline, num_inference_steps: int) -> pd.DataFrame:
    """Whose attention the edited image uses, a row per step in the order they run (the noisiest first).

    Columns: `timestep`; `cross` (which word each place looks at) and `self` (which places belong together), each
    "source" or "own", words with a window of their own apart; `local_blend` and `confine`, whether latents far from the
    edit's words, or from the evidence of the edit, return to the source (for no finding).
    """
    config = resolved(pipe, NO_EDIT, settings)
    levels = Schedule.from_config(pipe.scheduler.config, num_inference_steps)
    cross, own = (
        round(share * num_inference_steps) for share in (config.cross_replace_steps, config.self_replace_steps)
    )
    steps = range(num_inference_steps)
    progress = [step / num_inference_steps for step in steps]
    return pd.DataFrame(
        {
            "timestep": [levels.timesteps[num_inference_steps - step] for step in steps],
            "cross": ["source" if step < cross else "own" for step in steps],
            "self": ["source" if step < own else "own" for step in steps],
            "local_blend": [config.local_blend and share >= config.local_blend_start for share in progress],
            "confine": [config.confine > 0 and share >= CONFINE_START for share in progress],
        },
        index=pd.RangeIndex(1, num_inference_steps + 1, name="step"),
    )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
