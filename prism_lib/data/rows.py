"""Prepared data sets as notebooks and studies use them: which rows an edit suits, and what the truth would be.

`prepare` writes a folder (`data.preparation`); its form is in `data.folder`. Readers need `load_table`
and `read_images`, and nothing of how it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from prism_lib.data.any_table import Columns
from prism_lib.data.cases import prompt_pairs
from prism_lib.data.folder import Folder, load_info, load_table, read_images
from prism_lib.data.preparation import prepare
from prism_lib.data.prepare_config import PrepareConfig
from prism_lib.data.sources import DETAIL_COLUMNS, details
from prism_lib.language.edits import Edit
from prism_lib.language.labels import CHEST
from prism_lib.phantom.patients import counterfactual, sample_patients

__all__ = [
    "Columns",
    "Example",
    "PrepareConfig",
    "edit_examples",
    "editable",
    "label_counts",
    "load_info",
    "load_table",
    "prepare",
    "prompt_pairs",
    "read_images",
    "true_counterfactual",
]


def editable(table: pd.DataFrame, edit: Edit) -> pd.DataFrame:
    """The rows that an edit applies to: what it removes is labelled present, what it adds absent.

    A detail ("pacemaker") is removed where the source says that it is there, and added where its label is absent.
    """
    suits = pd.Series(True, index=table.index)
    for names, state in ((edit.remove, 1), (edit.add, 0)):
        for name in names:
            label = CHEST.owners.get(name, name)
            if label not in table:
                raise ValueError(f"the data set has no label {label!r}; it has {', '.join(map(str, table))}")
            suits &= table[label].eq(state)
            if state and name != label:
                suits &= _said(table, label, name)
    return table[suits].reset_index(drop=True)


def _said(table: pd.DataFrame, label: str, detail: str) -> pd.Series:
    """Which rows have this detail of a label."""
    if not set(DETAIL_COLUMNS) <= set(table.columns):
        raise ValueError(f"the data set does not say which rows have {detail!r}; edit {label!r} instead")
    return table.apply(lambda row: detail in details("phantom", row).get(label, "").split(" and "), axis=1)


def true_counterfactual(folder: Folder, table: pd.DataFrame, edit: Edit) -> tuple[Tensor, Tensor] | None:
    """True counterfactuals (N, 1, H, W) of a table's rows, and masks (bool) of what had to change.

    None for real images: nobody knows how the same patient would have looked.
    """
    info = load_info(folder)
    if info["source"] != "phantom":
        return None
    config = info["config"]
    patients = sample_patients(table["phantom_index"].tolist(), config["seed"], config["confounding"])
    return counterfactual(patients, config["size"], **edit.attributes)


def label_counts(folder: Folder, when: str = "after", split: str = "train") -> pd.DataFrame:
    """How often each label of a split is present, absent, uncertain and not mentioned, as `dataset.json` has it.

    "blank, not absent" is the share of those neither present nor uncertain that nobody said were absent. `when` is
    "before" (as the source has them) or "after" (as they are stored).
    """
    splits = load_info(folder)["counts"][when]
    if split not in splits:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
    counts = pd.DataFrame(splits[split]["labels"]).T
    blank = counts["not mentioned"] / (counts["not mentioned"] + counts["absent"])
    return counts.assign(**{"blank, not absent": blank})


@dataclass(frozen=True)
class Example:
    """An edit and an image that it suits: panels (K, C, H, W) with a title each, the factual image first."""

    edit: Edit
    panels: Tensor
    titles: tuple[str, ...]


def edit_examples(folder: Folder, edits: Sequence[Edit]) -> list[Example]:
    """The first image that each edit suits, with true counterfactual and mask where they are known.

    An edit that suits no image of the data set is left out; ValueError if none suits any.
    """
    table, examples = load_table(folder), []
    for edit in edits:
        row = editable(table, edit).head(1)
        if row.empty:
            continue
        panels = [read_images(folder, row)]
        truth = true_counterfactual(folder, row, edit)
        panels += [] if truth is None else [truth[0], truth[1].float()]
        titles = ("factual", f"true counterfactual: {edit.key.replace('_', ' ')}", "what had to change")
        examples.append(Example(edit, torch.cat(panels), titles[: len(panels)]))
    if not examples:
        raise ValueError(f"no image in {folder} suits any of {', '.join(edit.key for edit in edits) or 'no edits'}")
    return examples
