"""Composition and reversibility of edits, which need no true counterfactual and so apply to real images too.

Axioms of Monteiro et al. ("Measuring axiomatic soundness of counterfactual image models", ICLR 2023). Values are L1
distances to the original in units of the autoencoder's own error; images are inverted and edited in full every time.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from diffusers import StableDiffusionPipeline

from prism_lib.data.folder import Folder, read_images
from prism_lib.data.rows import prompt_pairs
from prism_lib.editing.counterfactuals import stack
from prism_lib.editing.settings import Settings
from prism_lib.evaluation import metrics
from prism_lib.evaluation.evaluate import Evaluation, edit_jobs
from prism_lib.language.edits import Edit, PromptPair


def composition(
    pipe: StableDiffusionPipeline, folder: Folder, cases: pd.DataFrame, settings: Settings, **how: Any
) -> pd.DataFrame:
    """Edit nothing: a row per image, with the distance of the composite (`image`) and of the decoded latents (`raw`).

    ``how`` is what `evaluate.edit_jobs` takes.
    """
    original, pairs = read_images(folder, cases), prompt_pairs(folder, cases, Edit())
    ((results, _),) = edit_jobs(pipe, [(original, pairs)], settings, **how)
    reconstruction = stack(results, "reconstruction")
    distances = {
        name: metrics.relative_l1(stack(results, name), original, reconstruction).tolist() for name in ("image", "raw")
    }
    return cases[["file_name", "patient_id"]].assign(**distances)


def reversibility(
    pipe: StableDiffusionPipeline,
    folder: Folder,
    cases: pd.DataFrame,
    evaluation: Evaluation,
    settings: Settings,
    **how: Any,
) -> pd.DataFrame:
    """Undo the ``evaluation`` of an edit of ``cases``: a row per image, with the distance in column `image`."""
    names = [table["file_name"].tolist() for table in (cases, evaluation.table)]
    if names[0] != names[1]:
        raise ValueError(f"the cases are {names[0]}, but the evaluated edit is of {names[1]}")
    there = prompt_pairs(folder, cases, evaluation.edit)
    back = [PromptPair(pair.target, pair.source, pair.target_words, pair.source_words) for pair in there]
    ((returned, _),) = edit_jobs(pipe, [(evaluation.edited, back)], settings, **how)
    distances = metrics.relative_l1(stack(returned), evaluation.factual, evaluation.reconstruction)
    return cases[["file_name", "patient_id"]].assign(image=distances.tolist())
