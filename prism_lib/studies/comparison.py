"""What settings and other methods are worth: editors on the same images, by quality, seconds and U-Net evaluations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from prism_lib.configs import checked
from prism_lib.data.folder import Folder, load_info, read_images
from prism_lib.data.rows import known_truth, prompt_pairs
from prism_lib.editing.methods import RECOMMENDED
from prism_lib.editing.settings import EditConfig, grid
from prism_lib.evaluation import evaluate
from prism_lib.evaluation.evaluate import Cases, Editor, Evaluation, Judge, Made, choose_cases
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import ClassifierConfig, named_network
from prism_lib.models.pipeline import Pipe
from prism_lib.studies.editors import PLAIN, Edict, Imagic, LEdits, PromptToPrompt, SDEdit, TwoMasks
from prism_lib.studies.ganterfactual import GanConfig, train_for

CRITERION = "true_error_ratio"
BUDGET = 4
GAN = "GANterfactual"

# Columns of `evaluation` that an editor is summarised by, where they are known.
COLUMNS = (
    *("true_error_ratio", "cpg", "flipped", "side_effect_rate"),
    *("identity_l1", "reconstruction_l1", "mask_recall", "latent_outside_l1_ratio"),
)

Place = tuple[Edit, str]  # an edit and an editor's effect


class Measurement(NamedTuple):
    """An editor's evaluations, one per edit, and the rows that its U-Net calls had per image."""

    evaluations: tuple[Evaluation, ...]
    unet_evaluations: float

    @property
    def seconds_per_image(self) -> float:
        """Seconds of inversion and edit, for one image and one edit."""
        return sum(each.seconds for each in self.evaluations) / sum(len(each.table) for each in self.evaluations)


class Tuned(NamedTuple):
    """The best editor of one method, and of every candidate its `settings` and `CRITERION` as plain values."""

    editor: Editor
    tried: list[dict[str, Any]]


@checked()
class ComparisonConfig:
    """What `compare_methods` compares, and how much work goes into it. The guide of the GAN is never the judge."""

    methods: tuple[str, ...] = ()  # names of `candidates` or `GAN`; none stand for all
    images: PositiveInt = 3  # test patients for each edit
    tuning_images: PositiveInt = 1  # validation patients for each edit
    budget: PositiveInt = BUDGET  # the most settings of a method
    steps: PositiveInt = 25
    imagic_steps: PositiveInt = 200
    gan_steps: PositiveInt = 2000
    gan_filters: PositiveInt = 32
    guide_steps: PositiveInt = 200
    guide_images: PositiveInt = 512
    seed: int = 0
    mixed_precision: Literal["no", "bf16"] = "no"  # of GAN and guide; the editors use that of the pipeline

    def __post_init__(self) -> None:
        known = [*candidates(), GAN]
        if unknown := [name for name in self.methods if name not in known]:
            raise ValueError(f"unknown method {unknown[0]!r}; known: {', '.join(known)}")


def vary(base: PromptToPrompt, **values: Sequence[Any]) -> dict[str, PromptToPrompt]:
    """Variants with every combination of ``values`` of the editor's fields or settings; named as "mask off"."""
    own = {item.name for item in fields(PromptToPrompt)} - {"settings"}
    variants, nothing = {}, dict[str, Any]()
    for chosen in grid(nothing, **values):
        overrides = {name: value for name, value in chosen.items() if name not in own}
        EditConfig(**overrides)  # an unknown name or a value out of range is named here, not after hours of work
        (settings,) = grid(base.settings, **{name: [value] for name, value in overrides.items()})
        named = {name: f"{value:g}" if isinstance(value, float) else value for name, value in chosen.items()}
        name = ", ".join(f"{name} {value}" for name, value in named.items())
        variants[name] = replace(base, settings=settings, **{name: chosen[name] for name in own & set(chosen)})
    return variants


def measure(
    pipe: Pipe, folder: Folder, cases: Cases, editors: Mapping[str, Editor], judge: Judge = None, *, share: bool = False
) -> dict[str, Measurement]:
    """Edit the images of ``cases`` with every editor, on all cores; editors of equal `effect` are measured once.

    With ``share`` editors share what they invert; their seconds then say nothing.
    """
    if not cases or not editors:
        raise ValueError(f"need at least one edit and one editor, got {len(cases)} and {len(editors)}")
    inputs = {change: (read_images(folder, rows), prompt_pairs(folder, rows, change)) for change, rows in cases.items()}
    places: dict[str, list[Place]] = {name: [] for name in editors}
    groups: dict[tuple[Any, ...], dict[Place, Editor]] = {}  # of editors that share what they invert
    for change, (_, pairs) in inputs.items():
        for name, editor in editors.items():
            place = change, editor.effect(pipe, pairs)
            places[name].append(place)
            groups.setdefault((change, type(editor), editor.inverts) if share else place, {}).setdefault(place, editor)
    jobs = [(*inputs[change], change, list(group.values())) for (change, *_), group in groups.items()]
    edited = evaluate.edit_jobs(pipe, jobs)
    made: dict[Place, Made] = {}
    for group, own in zip(groups.values(), edited, strict=True):
        made |= zip(group, own, strict=True)
    evaluations = {
        place: evaluate.evaluate_results(folder, cases[place[0]], place[0], one.results, judge, one.seconds)
        for place, one in made.items()
    }
    total = sum(map(len, cases.values()))
    return {
        name: Measurement(tuple(evaluations[place] for place in own), sum(made[place].rows for place in own) / total)
        for name, own in places.items()
    }


def summarise(measured: Mapping[str, Measurement], seed: int = 0, *, by_edit: bool = False) -> dict[str, Any]:
    """Means with 95 % intervals over patients, seconds, U-Net evaluations, by editor; with ``by_edit`` by edit too."""
    summary = {}
    for name, measurement in measured.items():
        table = pd.concat([evaluation.table for evaluation in measurement.evaluations], ignore_index=True)
        known = [column for column in COLUMNS if column in table and table[column].notna().all()]
        values: dict[str, Any] = evaluate.summarise_rows(table[["file_name", "patient_id", *known]], seed)
        values["seconds_per_image"] = measurement.seconds_per_image
        values["unet_evaluations"] = measurement.unet_evaluations
        for evaluation in measurement.evaluations if by_edit else ():
            values[evaluation.edit.key] = summarise({name: measurement._replace(evaluations=(evaluation,))}, seed)[name]
        summary[name] = values
    return summary


def sheet(measured: Mapping[str, Measurement], edit: int = 0) -> tuple[Tensor, list[str]]:
    """The first image as every editor edits it, with titles: original, truth where it is known, then the editors."""
    first = next(iter(measured.values())).evaluations[edit]
    panels = {"original": first.factual[0]}
    if first.truth is not None:
        panels["true counterfactual"] = first.truth[0]
    panels |= {name: found.evaluations[edit].edited[0] for name, found in measured.items()}
    return torch.stack([*panels.values()]), [name.replace("_replace_steps", "").replace(", ", "\n") for name in panels]


def compare_methods(
    pipe: Pipe, folder: Folder, edits: Sequence[Edit], config: ComparisonConfig, output: Path, judge: Judge = None
) -> tuple[dict[str, Tuned], dict[str, Measurement]]:
    """Train the GAN, kept below ``output``; tune every method on validation patients; measure all on test patients."""
    validation, test = (
        {change: choose_cases(folder, change, count, split) for change in edits}
        for split, count in (("val", config.tuning_images), ("test", config.images))
    )
    for change, rows in validation.items():
        known_truth(folder, rows.head(1), change)  # ValueError before anything is trained
    tried: dict[str, Sequence[Editor]] = {
        name: editors[: config.budget] for name, editors in candidates(config.steps, config.imagic_steps).items()
    }
    wanted = config.methods or (*tried, GAN)
    if GAN in wanted:
        labels, precision = tuple(load_info(folder)["labels"]), config.mixed_precision
        guide = ClassifierConfig(labels, steps=config.guide_steps, mixed_precision=precision)
        guide = named_network("densenet-tiny", guide)
        gan = GanConfig(config.gan_steps, filters=config.gan_filters, seed=config.seed, mixed_precision=precision)
        tried[GAN] = [train_for(folder, edits, output, gan, guide, config.guide_images)]
    tuned = tune(pipe, folder, validation, {name: tried[name] for name in wanted})
    editors = {name: result.editor for name, result in tuned.items()}
    return tuned, measure(pipe, folder, test, editors, judge)


def candidates(steps: int = 25, imagic_steps: int = 200) -> dict[str, list[Editor]]:
    """`BUDGET` settings per method, ours begin with the default; `imagic_steps` are those of each of Imagic's fits."""
    scales, windows = (3.0, 7.5), (0.4, 0.8)
    plain = grid(PLAIN, guidance_scale=scales, cross_replace_steps=windows)
    return {
        "PRISM (ours)": [
            PromptToPrompt(RECOMMENDED, steps),
            PromptToPrompt("direct", steps),
            *(PromptToPrompt(RECOMMENDED, steps, {"guidance_scale": scale}) for scale in (2.8, 1.6)),
        ],
        "null-text + prompt-to-prompt": [PromptToPrompt("null_text", steps, config, "off") for config in plain],
        "DDIM + prompt-to-prompt": [PromptToPrompt("ddim", steps, config, "off") for config in plain],
        "EDICT": [Edict(scale, strength, num_inference_steps=steps) for scale in scales for strength in (0.8, 0.5)],
        "two masks, edit-friendly": [TwoMasks(w, steps, margin) for w in scales for margin in (2, 8)],
        "LEDITS++": [
            LEdits(scale, threshold, num_inference_steps=steps) for scale in scales for threshold in (0.8, 0.95)
        ],
        "SDEdit": [SDEdit(strength, w, steps) for w in scales for strength in (0.3, 0.6)],
        "Imagic": [
            Imagic(eta, imagic_steps, unet_steps=imagic_steps, num_inference_steps=steps)
            for eta in (0.7, 0.9, 0.5, 1.0)
        ],
    }


def tune(pipe: Pipe, folder: Folder, cases: Cases, candidates: Mapping[str, Sequence[Editor]]) -> dict[str, Tuned]:
    """The best settings of each method, by `CRITERION` on ``cases`` of no test patient."""
    for change, rows in cases.items():
        if tested := rows.loc[rows["split"] == "test", "patient_id"].tolist():
            raise ValueError(f"tuning must not see test patients; {change.key} has {tested[0]}")
    tried = {f"{name} {n}": editor for name, editors in candidates.items() for n, editor in enumerate(editors)}
    found = measure(pipe, folder, cases, tried, share=True)
    tuned = {}
    for name, editors in candidates.items():
        measured = [found[f"{name} {n}"].evaluations for n in range(len(editors))]
        errors = [float(pd.concat([each.table[CRITERION] for each in own]).mean()) for own in measured]
        settings = [{"editor": type(editor).__name__, **asdict(cast(Any, editor))} for editor in editors]
        known = [{"settings": own, CRITERION: error} for own, error in zip(settings, errors, strict=True)]
        tuned[name] = Tuned(editors[errors.index(min(errors))], known)
    return tuned
