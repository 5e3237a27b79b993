"""Does an edit change a finding that it should leave alone (the paper's App. G: a pacemaker goes with cardiomegaly)?

On the phantom the other finding's own share of the picture is known: it is the difference that its removal would make.
How far an edit went along that difference, where its own truth changes nothing, is `carried_along`: 0 leaves the other
finding as it was, 1 removes it. Prompts either name what is absent ("without cardiomegaly", as ours) or do not mention
it, as PRISM's captions.
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


def carried_along(edited: Tensor, factual: Tensor, without: Tensor, region: Tensor) -> Tensor:
    """How much of the other finding an edit removed, (N,): its change projected on the removal's, inside the region.

    <edited - factual, without - factual> / |without - factual|^2 over ``region`` (N, 1, H, W); ``without`` is the true
    image without the other finding. ValueError for an image where the region shows none of it.
    """
    if not edited.shape == factual.shape == without.shape:
        raise ValueError(f"shapes differ: {tuple(edited.shape)}, {tuple(factual.shape)}, {tuple(without.shape)}")
    removal = (without - factual) * region
    size = removal.square().sum((1, 2, 3))
    if bool((size == 0).any()):
        raise ValueError(f"image {int((size == 0).nonzero()[0])} shows nothing of the other finding in the region")
    return ((edited - factual) * removal).sum((1, 2, 3)) / size


def cases_with_both(folder: str | Path, change: Edit, other: str, count: int, split: str = "test") -> pd.DataFrame:
    """The first ``count`` phantoms that the edit suits and that have the other finding, one per patient."""
    rows = editable(load_table(folder, split), change)
    if other not in rows or other in (*change.remove, *change.add):
        raise ValueError(f"{other!r} is no other label of {folder} than those that {change.key} changes")
    rows = rows[rows[other] == 1].drop_duplicates("patient_id")
    if len(rows) < count:
        raise ValueError(f"{len(rows)} patients of {split!r} suit {change.key} and have {other!r}; {count} are needed")
    return rows.head(count).reset_index(drop=True)


def measure(
    pipe: StableDiffusionPipeline,
    folder: str | Path,
    cases: pd.DataFrame,
    change: Edit,
    other: str,
    editor: PromptToPrompt,
    wording: str = "negated",
) -> pd.DataFrame:
    """A row per image of a phantom folder: the columns of an evaluation, and `carried_along`."""
    if wording not in WORDINGS:
        raise ValueError(f"unknown wording {wording!r}; known: {', '.join(WORDINGS)}")
    require_truth(folder)
    removed, wanted = (true_counterfactual(folder, cases, edit) for edit in (Edit(remove=(other,)), change))
    assert removed is not None and wanted is not None
    images = read_images(folder, cases)
    pairs = (prompt_pairs if wording == "negated" else prism_pairs)(folder, cases, change)
    found = evaluate_results(folder, cases, change, editor(pipe, images, pairs, change))
    share = carried_along(found.edited, images, removed[0], ~wanted[1])
    return found.table.assign(carried_along=share.tolist())


def prism_pairs(folder: str | Path, cases: pd.DataFrame, change: Edit) -> list[PromptPair]:
    """Prompts as PRISM's captions: what is absent is not mentioned."""
    info = load_info(folder)
    vocab, pairs = vocabulary(info["config"]["vocabulary"]), []
    for row in cases.to_dict("records"):
        labels = {label: row[label] for label in info["labels"]}
        source, target = (caption(state, "prism", vocab) for state in (labels, change.apply(labels, vocab)))
        pairs.append(Edit.text(source, target).prompts(labels, vocab))
    return pairs


def study(
    pipe: StableDiffusionPipeline,
    folder: str | Path,
    change: Edit,
    other: str,
    count: int,
    editor: PromptToPrompt,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """The record's numbers of ``count`` test patients by wording and mask, named with the folder's confounding."""
    require_truth(folder)
    cases = cases_with_both(folder, change, other, count)
    confounding, numbers = load_info(folder)["config"]["confounding"], {}
    for wording in WORDINGS:
        for mask in ("auto", "off"):
            table = measure(pipe, folder, cases, change, other, replace(editor, mask=mask), wording)
            values = {"confounding": confounding, "images": float(len(table))}
            for name in ("carried_along", "true_error_ratio"):
                values |= interval(name, table[name], table["patient_id"], seed)
            numbers[f"confounding {confounding:g}, {wording}, mask {mask}"] = values
    return numbers
