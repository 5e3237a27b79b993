"""All editors on the same images: each tuned within one budget on validation patients, then measured on test patients.

The criterion is one for all: the mean error to the true counterfactual where pixels had to change. The budget is a
number of settings, the same for each method; ours is tuned with it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.data.folder import load_info, read_images, require_truth
from prism_lib.data.rows import prompt_pairs
from prism_lib.devices import check_trained_in
from prism_lib.editing.methods import METHODS, RECOMMENDED
from prism_lib.evaluation.evaluate import choose_cases, evaluate_results
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import Classifier, ClassifierConfig, named_network
from prism_lib.records import Timer
from prism_lib.studies.ablation import Measurement, counted_rows, summarise
from prism_lib.studies.edict import Edict
from prism_lib.studies.editors import PLAIN, Editor, LEdits, PromptToPrompt, SDEdit, TwoMasks
from prism_lib.studies.ganterfactual import GanConfig, train_for
from prism_lib.studies.imagic import Imagic

CRITERION = "true_error_ratio"
BUDGET = 4

GAN = "GANterfactual"

# Edit -> rows of a prepared table that it suits.
Cases = Mapping[Edit, pd.DataFrame]


@dataclass(frozen=True)
class Tuned:
    """The settings chosen for one method, and the criterion of each candidate in the order tried."""

    editor: Editor
    errors: tuple[float, ...]
    candidates: tuple[Editor, ...]

    def as_record(self) -> dict[str, Any]:
        """Plain values: the chosen settings, and every candidate with its error."""
        tried = [
            {"settings": settings(editor), CRITERION: error}
            for editor, error in zip(self.candidates, self.errors, strict=True)
        ]
        return {"chosen": settings(self.editor), "tried": tried}


@dataclass(frozen=True)
class StudyConfig:
    """What `run` compares, and how much work goes into it.

    `methods` are names of `candidates` or `GAN`; none stand for all. `images` are test patients for each edit and
    `tuning_images` validation patients; `budget` is the most settings that a method may try. The GAN has one setting,
    and its guide is a small classifier of its own, never the judge; both are trained in `mixed_precision` ("no" or
    "bf16"), while the editors' is that of the pipeline.
    """

    methods: tuple[str, ...] = ()
    images: int = 3
    tuning_images: int = 1
    budget: int = BUDGET
    steps: int = 25
    imagic_steps: int = 200
    gan_steps: int = 2000
    gan_filters: int = 32
    guide_steps: int = 200
    guide_images: int = 512
    seed: int = 0
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))  # notebooks and JSON have lists
        known = [*candidates(self.steps, self.imagic_steps), GAN]
        if unknown := [name for name in self.methods if name not in known]:
            raise ValueError(f"unknown method {unknown[0]!r}; known: {', '.join(known)}")
        check_trained_in(self.mixed_precision)
        for name in ("images", "tuning_images", "budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(frozen=True)
class Study:
    """What `run` found: how each method was tuned, what it does on test patients, and what both took in seconds."""

    tuned: Mapping[str, Tuned]
    measured: Mapping[str, Measurement]
    seconds: float


def run(
    pipe: StableDiffusionPipeline,
    folder: str | Path,
    edits: Sequence[Edit],
    config: StudyConfig,
    output: Path,
    judge: Classifier | None = None,
) -> Study:
    """Train the GAN, tune every method on validation patients, compare all on test patients.

    GANs are kept below ``output`` and not trained again. ValueError, before any work, for real images: methods are
    tuned by the true counterfactuals.
    """
    require_truth(folder)
    validation, test = (
        {change: choose_cases(folder, change, count, split) for change in edits}
        for split, count in (("val", config.tuning_images), ("test", config.images))
    )
    with Timer() as timer:
        tried = {
            name: editors[: config.budget] for name, editors in candidates(config.steps, config.imagic_steps).items()
        }
        wanted = config.methods or (*tried, GAN)
        if GAN in wanted:
            labels = tuple(load_info(folder)["labels"])
            precision = config.mixed_precision
            guide = ClassifierConfig(labels, steps=config.guide_steps, mixed_precision=precision)
            guide = named_network("densenet-tiny", guide)
            recipe = GanConfig(
                labels[0], config.gan_steps, filters=config.gan_filters, seed=config.seed, mixed_precision=precision
            )
            tried[GAN] = [train_for(folder, edits, output, recipe, guide, config.guide_images)]
        tuned = tune(pipe, folder, validation, {name: tried[name] for name in wanted}, config.budget)
        editors = {name: result.editor for name, result in tuned.items()}
        measured = compare(pipe, folder, test, editors, judge)
    return Study(tuned, measured, timer.seconds)


def candidates(steps: int = 25, imagic_steps: int = 200) -> dict[str, list[Editor]]:
    """`BUDGET` settings per method; those whose inversion is not in `editing.methods.METHODS` are left out.

    A smaller budget takes the first of each; ours begin with the editor's default. `steps` are the DDIM steps of all,
    `imagic_steps` the optimizer steps of each of Imagic's two fits.
    """
    scales, windows = (3.0, 7.5), (0.4, 0.8)
    others = [{"guidance_scale": scale} for scale in (2.8, 1.6)]
    plain = [replace(PLAIN, guidance_scale=scale, cross_replace_steps=window) for scale in scales for window in windows]
    grid: dict[str, list[Editor]] = {
        "PRISM (ours)": [
            PromptToPrompt(RECOMMENDED, steps),
            PromptToPrompt("direct", steps),
            *(PromptToPrompt(RECOMMENDED, steps, config) for config in others),
        ],
        "null-text + prompt-to-prompt": [PromptToPrompt("null_text", steps, config, "off") for config in plain],
        "DDIM + prompt-to-prompt": [PromptToPrompt("ddim", steps, config, "off") for config in plain],
        "EDICT": [Edict(scale, strength, num_inference_steps=steps) for scale in scales for strength in (0.8, 0.5)],
        "two masks, edit-friendly": [TwoMasks(w, steps, margin) for w in scales for margin in (2, 8)],
        "LEDITS++": [
            LEdits(scale, threshold, num_inference_steps=steps) for scale in (3.0, 7.5) for threshold in (0.8, 0.95)
        ],
        "SDEdit": [SDEdit(strength, w, steps) for w in scales for strength in (0.3, 0.6)],
        "Imagic": [
            Imagic(eta, imagic_steps, unet_steps=imagic_steps, num_inference_steps=steps)
            for eta in (0.7, 0.9, 0.5, 1.0)
        ],
    }
    known = {name: [e for e in editors if getattr(e, "method", "direct") in METHODS] for name, editors in grid.items()}
    return {name: editors for name, editors in known.items() if editors}


def tune(
    pipe: StableDiffusionPipeline,
    folder: str | Path,
    cases: Cases,
    candidates: Mapping[str, Sequence[Editor]],
    budget: int = BUDGET,
) -> dict[str, Tuned]:
    """The best of at most ``budget`` settings of each method, by `CRITERION` on ``cases``.

    ValueError before any work if a method has more settings than the budget or none, if a case is a test patient, or
    if the true counterfactuals are not known.
    """
    require_truth(folder)
    for name, editors in candidates.items():
        if not 1 <= len(editors) <= budget:
            raise ValueError(f"{name} has {len(editors)} settings to try; the budget of every method is {budget}")
    for change, rows in cases.items():
        if tested := rows.loc[rows["split"] == "test", "patient_id"].tolist():
            raise ValueError(f"tuning must not see test patients; {change.key} has {tested[0]}")
    tuned = {}
    with tqdm(total=sum(map(len, candidates.values())), desc="tune") as progress:
        for name, editors in candidates.items():
            errors = []
            for editor in editors:
                found = measure(pipe, folder, cases, editor)
                errors.append(float(pd.concat([e.table[CRITERION] for e in found.evaluations]).mean()))
                progress.update()
            best = min(range(len(errors)), key=errors.__getitem__)
            tuned[name] = Tuned(editors[best], tuple(errors), tuple(editors))
    return tuned


def compare(
    pipe: StableDiffusionPipeline,
    folder: str | Path,
    cases: Cases,
    editors: Mapping[str, Editor],
    judge: Classifier | None = None,
) -> dict[str, Measurement]:
    """Measure every editor on the same images; `ablation.summarise` turns the answer into a record's numbers."""
    if not editors or not cases:
        raise ValueError(f"need at least one editor and one edit, got {len(editors)} and {len(cases)}")
    return {
        name: measure(pipe, folder, cases, editor, judge)
        for name, editor in tqdm(editors.items(), desc="compare", total=len(editors))
    }


def measure(
    pipe: StableDiffusionPipeline, folder: str | Path, cases: Cases, editor: Editor, judge: Classifier | None = None
) -> Measurement:
    """One editor on the images of all edits, with seconds and U-Net rows per image."""
    evaluations = []
    with counted_rows(pipe.unet) as rows:
        for change, table in cases.items():
            images, pairs = read_images(folder, table), prompt_pairs(folder, table, change)
            with Timer() as timer:
                edited = editor(pipe, images, pairs, change)
            evaluations.append(evaluate_results(folder, table, change, edited, judge, timer.seconds))
    return Measurement(editor, tuple(evaluations), sum(rows) / sum(map(len, cases.values())))


def record(measured: Mapping[str, Measurement], tuned: Mapping[str, Tuned], seed: int = 0) -> dict[str, Any]:
    """The metrics of the record `baselines`: per method, all edits together and each alone; how it was tuned apart."""
    tuning = {name: result.as_record()["tried"] for name, result in tuned.items()}
    return {"methods": summarise(measured, seed, by_edit=True), "tuning": tuning}


def sheet(measured: Mapping[str, Measurement], edit: int = 0, image: int = 0) -> tuple[Tensor, list[str]]:
    """One image as every method edits it, with titles: original, truth where it is known, then the methods."""
    first = next(iter(measured.values())).evaluations[edit]
    panels = {"original": first.factual[image]}
    if first.truth is not None:
        panels["true counterfactual"] = first.truth[image]
    panels |= {name: found.evaluations[edit].edited[image] for name, found in measured.items()}
    return torch.stack(list(panels.values())), list(panels)


def settings(editor: Editor) -> dict[str, Any]:
    """An editor's name and values, for a record."""
    made: Any = editor  # the protocol does not say that editors are dataclasses
    return {
        "editor": type(editor).__name__,
        **(asdict(made) if is_dataclass(made) and not isinstance(made, type) else {}),
    }
