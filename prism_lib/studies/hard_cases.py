"""Which images are hard to edit (the paper's App. H), and what happens to small text (its App. I).

Both read an `Evaluation` of phantoms, where the truth is known: `strata` says what makes an image hard, `by_stratum`
how far the edits of such images are from the truth, `corner_text` what happened to the burnt-in marker.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from diffusers import StableDiffusionPipeline
from torch import Tensor

from prism_lib.data.folder import load_info, require_truth
from prism_lib.data.rows import marker_masks
from prism_lib.evaluation.evaluate import Evaluation, choose_cases, interval
from prism_lib.evaluation.metrics import masked_l1
from prism_lib.language.edits import Edit
from prism_lib.studies.comparison import CRITERION, measure
from prism_lib.studies.editors import Editor


def study(
    pipe: StableDiffusionPipeline, folder: str | Path, change: Edit, count: int, editor: Editor, seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """Edit ``count`` test patients: {"hard_cases": `by_stratum`, "corner_text": `corner_text`}.

    ValueError, before any work, for real images.
    """
    require_truth(folder)
    cases = choose_cases(folder, change, count)
    (evaluation,) = measure(pipe, folder, {change: cases}, {"hard": editor})["hard"].evaluations
    marker = marker_masks(folder, cases)
    assert marker is not None  # of a phantom it is always known
    labels = [label for label in load_info(folder)["labels"] if label != "No Finding"]
    return {
        "hard_cases": by_stratum(evaluation, strata(evaluation, cases, labels), seed),
        "corner_text": corner_text(evaluation, marker, seed),
    }


def strata(evaluation: Evaluation, cases: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """What makes each image hard, a bool column per stratum; ``cases`` are the rows that were edited, in their order.

    Device kinds of the phantom's table; "with LABEL" for the findings that stay; "over bone and heart", where most of
    the true change lies on pixels brighter than the image's median; "faint", where the true change is weaker than that
    of half of these images. ValueError where the truth is not known or ``cases`` are others.
    """
    if evaluation.truth is None or evaluation.truth_mask is None:
        raise ValueError("the true counterfactual is not known, so it is unknown which images are hard")
    if cases["file_name"].tolist() != evaluation.table["file_name"].tolist():
        raise ValueError("the cases are not the images that were evaluated, or in another order")
    changed, truth = evaluation.truth_mask, evaluation.truth
    if not bool((pixels := changed.flatten(1).sum(1)).all()):
        raise ValueError(f"nothing had to change in {cases['file_name'].iloc[int((pixels == 0).nonzero()[0])]}")
    bright = truth > truth.flatten(1).median(1).values[:, None, None, None]
    over = (bright & changed).flatten(1).sum(1) / pixels
    strength = ((truth - evaluation.factual).abs() * changed).flatten(1).sum(1) / pixels
    columns: dict[str, list[bool]] = {}
    if "devices" in cases:
        kinds = cases["devices"].str.get_dummies("|").drop(columns="none", errors="ignore")
        columns |= {str(kind): kinds[kind].eq(1).tolist() for kind in kinds}
    changing = {*evaluation.edit.remove, *evaluation.edit.add}
    columns |= {f"with {label}": cases[label].eq(1).tolist() for label in labels if label not in changing}
    columns |= {"over bone and heart": (over > 0.5).tolist(), "over lung": (over <= 0.5).tolist()}
    faint = strength < strength.quantile(0.5)
    columns |= {"faint": faint.tolist(), "distinct": (~faint).tolist()}
    return pd.DataFrame(columns, index=evaluation.table.index)


def by_stratum(evaluation: Evaluation, hard: pd.DataFrame, seed: int = 0) -> dict[str, dict[str, float]]:
    """Images and mean error to the truth of every stratum that has any, and of "all"; intervals over patients."""
    numbers = {}
    everyone = pd.DataFrame({"all": True}, index=hard.index)
    for name, members in everyone.join(hard).items():
        table = evaluation.table[members]
        if len(table):
            found = interval(CRITERION, table[CRITERION], table["patient_id"], seed)
            numbers[str(name)] = {"images": float(len(table)), **found}
    return numbers


def corner_text(evaluation: Evaluation, marker: Tensor, seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean |difference| to the input on the pixels of the side marker, ``marker`` bool (N, 1, H, W), by path.

    "autoencoder": encoded and decoded, unedited; "latent path": edited, without the composite; "composite": the result.
    """
    if marker.shape != evaluation.mask.shape or not bool(marker.flatten(1).any(1).all()):
        raise ValueError(f"the marker must be a mask {tuple(evaluation.mask.shape)} with pixels in every image")
    paths = {
        "autoencoder": evaluation.reconstruction,
        "latent path": evaluation.raw,
        "composite": evaluation.edited,
    }
    patients = evaluation.table["patient_id"]
    numbers = {}
    for name, images in paths.items():
        values = pd.Series(masked_l1(images, evaluation.factual, marker).tolist(), index=patients.index)
        numbers[name] = interval("marker_l1", values, patients, seed)
    return numbers
