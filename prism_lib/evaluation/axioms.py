"""Composition and reversibility: what any sound counterfactual model must do, whatever the truth is.

Two of the axioms of Monteiro et al. ("Measuring axiomatic soundness of counterfactual image models", ICLR 2023), which
need no true counterfactual and so apply to real images too. Both are L1 distances to the original in units of the
autoencoder's own error, 1 being as close as the model can decode; images are inverted and edited in full every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline

from prism_lib.data.folder import read_images
from prism_lib.data.rows import prompt_pairs
from prism_lib.editing.counterfactuals import stack
from prism_lib.editing.settings import Settings
from prism_lib.evaluation import metrics
from prism_lib.evaluation.evaluate import edit_images, interval
from prism_lib.language.edits import Edit, PromptPair

# The composite with the input, and the decoded latents without it.
PATHS = ("image", "raw")


def composition(
    pipe: StableDiffusionPipeline,
    folder: str | Path,
    cases: pd.DataFrame,
    settings: Settings,
    rounds: int = 3,
    **how: Any,
) -> pd.DataFrame:
    """Edit nothing, again and again: a row per image, columns `image_k` and `raw_k` after round k.

    Either path goes on from its own result; ``how`` is what `inversion.invert` takes.
    """
    if rounds < 1:
        raise ValueError(f"composition needs at least one round, got {rounds}")
    original, pairs = read_images(folder, cases), prompt_pairs(folder, cases, Edit())
    first = edit_images(pipe, original, pairs, settings, **how)
    reconstruction, columns = stack(first, "reconstruction"), {}
    for name in PATHS:
        before, images = original, stack(first, name)
        for number in range(1, rounds + 1):
            if number > 1 and not torch.equal(images, before):  # a fixed point stays one: the composite mostly is
                before, images = images, stack(edit_images(pipe, images, pairs, settings, **how), name)
            columns[f"{name}_{number}"] = metrics.relative_l1(images, original, reconstruction).tolist()
    return cases[["file_name", "patient_id"]].assign(**columns)


def reversibility(
    pipe: StableDiffusionPipeline,
    folder: str | Path,
    cases: pd.DataFrame,
    change: Edit,
    settings: Settings,
    paths: Sequence[str] = PATHS,
    **how: Any,
) -> pd.DataFrame:
    """Edit, and edit back: a row per image, a column for each of the ``paths``, which cost an edit each."""
    original, there = read_images(folder, cases), prompt_pairs(folder, cases, change)
    back = [PromptPair(pair.target, pair.source, pair.target_words, pair.source_words) for pair in there]
    edited = edit_images(pipe, original, there, settings, **how)
    reconstruction, columns = stack(edited, "reconstruction"), {}
    for name in paths:
        returned = stack(edit_images(pipe, stack(edited, name), back, settings, **how), name)
        columns[name] = metrics.relative_l1(returned, original, reconstruction).tolist()
    return cases[["file_name", "patient_id"]].assign(**columns)


def summarise(table: pd.DataFrame, seed: int = 0) -> dict[str, float]:
    """Means of the columns with 95 % intervals over patients, as a record keeps them."""
    summary: dict[str, float] = {"images": float(len(table))}
    for name in table.columns.drop(["file_name", "patient_id"]):
        summary |= interval(name, table[name], table["patient_id"], seed)
    return summary
