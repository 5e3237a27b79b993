"""Composition and reversibility of edits, which need no true counterfactual and so apply to real images too.

Axioms of Monteiro et al. ("Measuring axiomatic soundness of counterfactual image models", ICLR 2023). Values are L1
distances to the original in units of the autoencoder's own error; images are inverted and edited in full every time.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline

from prism_lib.data.folder import Folder, read_images
from prism_lib.data.rows import prompt_pairs
from prism_lib.editing.counterfactuals import stack
from prism_lib.editing.settings import Settings
from prism_lib.evaluation import metrics
from prism_lib.evaluation.evaluate import Evaluation, edit_jobs
from prism_lib.language.edits import Edit, PromptPair

# The composite with the input, and the decoded latents without it.
PATHS = ("image", "raw")


def composition(
    pipe: StableDiffusionPipeline, folder: Folder, cases: pd.DataFrame, settings: Settings, rounds: int = 3, **how: Any
) -> pd.DataFrame:
    """Edit nothing, again and again: a row per image, columns `image_k` and `raw_k` after round k.

    Either path goes on from its own result; ``how`` is what `evaluate.edit_jobs` takes.
    """
    if rounds < 1:
        raise ValueError(f"composition needs at least one round, got {rounds}")
    original, pairs = read_images(folder, cases), prompt_pairs(folder, cases, Edit())
    ((first, _),) = edit_jobs(pipe, [(original, pairs)], settings, **how)
    reconstruction, columns = stack(first, "reconstruction"), {}
    before, images = dict.fromkeys(PATHS, original), {name: stack(first, name) for name in PATHS}
    for number in range(1, rounds + 1):
        # Images that the last round did not change stay as they are; of composites that is most.
        moving = [name for name in PATHS if number > 1 and not torch.equal(images[name], before[name])]
        done = edit_jobs(pipe, [(images[name], pairs) for name in moving], settings, **how)
        for name, (results, _) in zip(moving, done, strict=True):
            before[name], images[name] = images[name], stack(results, name)
        for name in PATHS:
            columns[f"{name}_{number}"] = metrics.relative_l1(images[name], original, reconstruction).tolist()
    return cases[["file_name", "patient_id"]].assign(**columns)


def reversibility(
    pipe: StableDiffusionPipeline,
    folder: Folder,
    cases: pd.DataFrame,
    evaluation: Evaluation,
    settings: Settings,
    **how: Any,
) -> pd.DataFrame:
    """Edit, and edit back: a row per image, with the distance in column `image`.

    The first of ``cases`` are those of the ``evaluation``, already edited; the others are edited here.
    """
    known = min(len(cases), len(evaluation.table))
    names = [table["file_name"].tolist()[:known] for table in (cases, evaluation.table)]
    if names[0] != names[1]:
        raise ValueError(f"the cases begin with {names[0]}, but the evaluated edit is of {names[1]}")
    original, there = read_images(folder, cases), prompt_pairs(folder, cases, evaluation.edit)
    ((more, _),) = edit_jobs(pipe, [(original[known:], there[known:])], settings, **how)
    edited, reconstruction = evaluation.edited[:known], evaluation.reconstruction[:known]
    if more:
        edited = torch.cat([edited, stack(more)])
        reconstruction = torch.cat([reconstruction, stack(more, "reconstruction")])
    back = [PromptPair(pair.target, pair.source, pair.target_words, pair.source_words) for pair in there]
    ((returned, _),) = edit_jobs(pipe, [(edited, back)], settings, **how)
    distances = metrics.relative_l1(stack(returned), original, reconstruction)
    return cases[["file_name", "patient_id"]].assign(image=distances.tolist())
