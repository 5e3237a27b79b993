"""Does an edit take along what it did not ask for (the paper's App. G: cardiomegaly leaves, and the pacemaker with it)?

On the phantom the other finding's own share of the picture is known: it is the difference that its removal would make.
How far an edit went along that difference, where its own truth changes nothing, is `carried_along`: 0 leaves the other
finding as it was, 1 removes it. Edits are worded either with what is absent ("without cardiomegaly", as ours) or as
PRISM's captions are, where what is absent is not said.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
from diffusers import StableDiffusionPipeline
from torch import Tensor

from prism_lib.data.folder import load_info, load_table, read_images, require_truth
from prism_lib.data.rows import editable, prompt_pairs, true_counterfactual
from prism_lib.evaluation.evaluate import evaluate_results, interval
from prism_lib.language.captions import caption
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.language.labels import vocabulary
from prism_lib.studies.editors import PromptToPrompt

WORDINGS = ("negated", "prism")
OURS = PromptToPrompt()


def carried_along(edited: Tensor, factual: Tensor, without: Tensor, region: Tensor) -> Tensor:
    """How much of the other finding an edit removed, (N,): its change projected on the removal's, inside the region.

    <edited - factual, without - factual> / |without - factual|^2 over ``region`` (N, 1, H, W); ``without`` is the true
    image without the other finding. ValueError for an image where the region holds none of it.
    """
    if not edited.shape == factual.shape == without.shape:
        raise ValueError(f"shapes differ: {tuple(edited.shape)}, {tuple(factual.shape)}, {tuple(without.shape)}")
    removal = (without - factual) * region
    size = removal.square().sum((1, 2, 3))
    if bool((size == 0).any()):
        raise ValueError(f"image {int((size == 0).nonzero()[0])} shows nothing of the other finding in the region")
    return ((edited - factual) * removal).sum((1, 2, 3)) / size


def choose_cases(folder: str | Path, change: Edit, other: str, count: int, split: str = "test") -> pd.DataFrame:
    """The first ``count`` phantoms that the edit suits and that have the other finding, one per patient."""
    rows = editable(load_table(folder, split), change)
    if other not in rows or other in (*change.remove, *change.add):
        raise ValueError(f"{other!r} is no other label of {folder} than those that {change.key} changes")
    rows = rows[rows[other] == 1].drop_duplicates("patient_id")
    if len(rows) < count:
        raise ValueError(f"{len(rows)} patients of {split!r} suit {change.key} and have {other!r}; {count} asked for")
    return rows.head(count).reset_index(drop=True)


def measure(
    pipe: StableDiffusionPipeline,
    folder: str | Path,
    cases: pd.DataFrame,
    change: Edit,
    other: str,
    editor: PromptToPrompt = OURS,
    wording: str = "negated",
) -> pd.DataFrame:
    """A row per image of a phantom folder: `evaluation`'s columns, and `carried_along`."""
    if wording not in WORDINGS:
        raise ValueError(f"unknown wording {wording!r}; known: {', '.join(WORDINGS)}")
    require_truth(folder)
    removed = true_counterfactual(folder, cases, Edit(remove=(other,)))
    asked = true_counterfactual(folder, cases, change)
    assert removed is not None and asked is not None
    images = read_images(folder, cases)
    pairs = (prompt_pairs if wording == "negated" else prism_pairs)(folder, cases, change)
    found = evaluate_results(folder, cases, change, editor(pipe, images, pairs, change))
    share = carried_along(found.edited, images, removed[0], ~asked[1])
    return found.table.assign(carried_along=share.tolist())


def prism_pairs(folder: str | Path, cases: pd.DataFrame, change: Edit) -> list[PromptPair]:
    """Source and target in PRISM's own caption, which names what is present and is silent about the rest."""
    info = load_info(folder)
    vocab, pairs = vocabulary(info["config"]["vocabulary"]), []
    for row in cases.to_dict("records"):
        labels = {label: row[label] for label in info["labels"]}
        source, target = (caption(state, "prism", vocab) for state in (labels, change.apply(labels, vocab)))
        pairs.append(Edit.text(source, target).prompts(labels, vocab))
    return pairs


def study_here(
    pipe: StableDiffusionPipeline,
    folder: str | Path,
    change: Edit,
    other: str,
    count: int,
    editor: PromptToPrompt = OURS,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """`study` of the one model at hand."""
    return study({load_info(folder)["config"]["confounding"]: (pipe, Path(folder))}, change, other, count, editor, seed)


def study(
    models: dict[float, tuple[StableDiffusionPipeline, Path]],
    change: Edit,
    other: str,
    count: int,
    editor: PromptToPrompt = OURS,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """The record's numbers by confounding, wording and mask; ``models`` are pipelines with the folder they learnt from.

    Cases come from the folder of the *least* confounding, so that all models edit the same patients.
    """
    if not models:
        raise ValueError("need at least one model to study")
    folder = models[min(models)][1]
    cases = choose_cases(folder, change, other, count)
    numbers = {}
    for confounding, (pipe, _) in sorted(models.items()):
        for wording in WORDINGS:
            for mask in ("auto", "off"):
                table = measure(pipe, folder, cases, change, other, replace(editor, mask=mask), wording)
                values = {"confounding": confounding, "images": float(len(table))}
                for name in ("carried_along", "true_error_ratio"):
                    values |= interval(name, table[name], table["patient_id"], seed)
                numbers[f"confounding {confounding:g}, {wording}, mask {mask}"] = values
    return numbers
