"""What training and evaluation ask of the rows of a prepared folder: captions, prompts of an edit, the side marker."""

from __future__ import annotations

import random
from typing import Any, cast

import pandas as pd
from torch import Tensor

from prism_lib.data.folder import Folder, load_info
from prism_lib.data.sources import details
from prism_lib.language.captions import sample_caption
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.language.labels import vocabulary
from prism_lib.phantom.patients import marker_mask, sample_patients


def sample_captions(
    folder: Folder, table: pd.DataFrame, seed: int | str, count: int, explicit_share: float
) -> list[list[str]]:
    """``count`` fresh captions for every row; a row's captions depend on seed and file name alone."""
    info = load_info(folder)
    vocab = vocabulary(info["config"]["vocabulary"])
    captions = []
    for row in table.to_dict("records"):
        rng = random.Random(f"{seed}:{row['file_name']}")
        labels = {label: row[label] for label in info["labels"]}
        more = details(info["source"], cast(dict[str, Any], row))
        captions.append([sample_caption(labels, rng, vocab, explicit_share, more) for _ in range(count)])
    return captions


def prompt_pairs(folder: Folder, table: pd.DataFrame, edit: Edit) -> list[PromptPair]:
    """Source and target prompt of an edit for every row, in the words that the folder's captions use."""
    info = load_info(folder)
    vocab = vocabulary(info["config"]["vocabulary"])
    return [edit.prompts({label: row[label] for label in info["labels"]}, vocab) for row in table.to_dict("records")]


def marker_masks(folder: Folder, table: pd.DataFrame) -> Tensor | None:
    """Pixels of the burnt-in side marker, bool (N, 1, H, W); None for real images, where nobody drew the outline."""
    info = load_info(folder)
    if info["source"] != "phantom":
        return None
    config = info["config"]
    patients = sample_patients(table["phantom_index"].tolist(), config["seed"], config["confounding"])
    return marker_mask(patients, config["size"])
