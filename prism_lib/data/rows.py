"""The rows of a prepared folder's table: captions, prompts of an edit, which rows an edit suits, and the truth."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prism_lib.data.chest import DEVICES, NOT_THERE
from prism_lib.data.folder import REPORT, Folder, load_info, load_table, load_vocabulary, read_images, truth_is_known
from prism_lib.language.captions import sample_caption
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.language.labels import CHEST, Vocabulary
from prism_lib.phantom.films import KINDS, with_devices
from prism_lib.phantom.patients import counterfactual, marker_mask, sample_patients

NO_DEVICES, WITH_DEVICES = Edit(remove=(DEVICES,)), Edit(add=(DEVICES,))
# Columns that say more than a label: the phantom's devices and side of an effusion, the kinds rendered into a film.
DETAIL_COLUMNS = {"devices": DEVICES, "effusion_side": "Pleural Effusion", "kinds": DEVICES}


def sample_captions(folder: Folder, table: pd.DataFrame, seed: int | str, count: int, share: float) -> list[list[str]]:
    """``count`` captions for every row, a ``share`` explicit; they depend on the seed and the row's file name alone.

    The first one is the column `text` of the folder's own seed and explicit share.
    """
    info = load_info(folder)
    return draw_captions(table, info["labels"], info["source"], load_vocabulary(folder), seed, count, share)


def draw_captions(
    table: pd.DataFrame, labels: list[str], source: str, vocab: Vocabulary, seed: int | str, count: int, share: float
) -> list[list[str]]:
    """`sample_captions` of a table that is not on disk yet; a free caption takes the place of those not explicit."""
    columns = ["file_name", *labels, *(name for name in (*DETAIL_COLUMNS, REPORT) if name in table)]
    captions = []
    for row in table[columns].to_dict("records"):
        rng = random.Random(f"{seed}:{row['file_name']}")
        known = {label: row[label] for label in labels}
        more = _details(row) if source == "phantom" else {}
        texts = [sample_caption(known, rng, vocab, 1.0 if REPORT in row else share, more) for _ in range(count)]
        if REPORT in row:
            texts = [text if rng.random() < share else str(row[REPORT]) for text in texts]
        captions.append(texts)
    return captions


def _details(row: Mapping[Any, Any]) -> dict[str, str]:
    """Phrases of a row that say more than its labels: {"Support Devices": "pacemaker and ecg leads"}."""
    phrases = {}
    if (shown := row.get("devices", row.get("kinds", NOT_THERE))) != NOT_THERE:
        phrases[DEVICES] = str(shown).replace("|", " and ")
    if row.get("effusion_side", NOT_THERE) != NOT_THERE:
        phrases["Pleural Effusion"] = f"{row['effusion_side']} pleural effusion"
    return phrases


def prompt_pairs(folder: Folder, table: pd.DataFrame, edit: Edit) -> list[PromptPair]:
    """Source and target prompt of an edit for every row, in the words of the folder's captions."""
    vocab = load_vocabulary(folder)
    return [edit.prompts(row, vocab) for row in table[load_info(folder)["labels"]].to_dict("records")]


def says_details(table: pd.DataFrame | Mapping[Any, Any], label: str) -> bool:
    """Whether a column of the table, or a value of the row, says which details of a label there are."""
    return any(column in table for column, of in DETAIL_COLUMNS.items() if of == label)


def editable(table: pd.DataFrame, edit: Edit, vocab: Vocabulary = CHEST) -> pd.DataFrame:
    """The rows that an edit applies to: what it removes is labelled present, what it adds is labelled absent.

    A detail ("pacemaker") is removed where the source records it, and added where its label is absent.
    """
    suits = pd.Series(True, index=table.index)
    for names, state in ((edit.remove, 1), (edit.add, 0)):
        for name in names:
            label = vocab.owners.get(name, name)
            if label not in table:
                raise ValueError(f"the data set has no label {label!r}; it has {', '.join(map(str, table))}")
            suits &= table[label].eq(state)
            if state and name != label:
                if not says_details(table, label):
                    raise ValueError(f"the data set does not say which rows have {name!r}; edit {label!r} instead")
                suits &= np.array([not lacks(row, name, label) for row in table.to_dict("records")], dtype=bool)
    return table[suits].reset_index(drop=True)


def lacks(row: Mapping[Any, Any], name: str, label: str) -> bool:
    """Whether a row says which details of a label it has, and a detail is none of them."""
    return says_details(row, label) and name != label and name not in _details(row).get(label, "").split(" and ")


class Truth(NamedTuple):
    """The truth about an edit of N phantoms, each field (N, 1, H, W)."""

    images: Tensor  # true counterfactuals in [0, 1]
    changed: Tensor  # bool, the pixels that had to change
    marker: Tensor  # bool, the burnt-in side marker and view text


def true_counterfactual(folder: Folder, table: pd.DataFrame, edit: Edit) -> Truth | None:
    """The truth about an edit of a table's rows: of phantoms, and where rendered devices are removed; else None.

    Of films whose `copy` is 0 it is also known without some kinds of devices: the others are rendered again.
    """
    removed, films = {*edit.remove}, "twin" in table and not edit.add and not table["twin"].eq(NOT_THERE).any()
    if films and (removed == {DEVICES} or (removed and removed <= {*KINDS} and table["copy"].eq(0).all())):
        images = read_images(folder, table.assign(file_name=table["twin"]))
        rest = [kind for kind in load_info(folder)["config"]["kinds"] or KINDS if kind not in removed]
        for image, seed, kinds in zip(images, table["film_seed"], table["kinds"], strict=True):
            if DEVICES not in removed and not {*kinds.split("|")} <= removed:
                image.copy_(with_devices(image[None], [seed], rest).images[0])
        changed = read_images(folder, table) != images
        return Truth(images, changed, torch.zeros_like(changed))
    if not truth_is_known(folder):
        return None
    config = load_info(folder)["config"]
    patients = sample_patients(table["phantom_index"].tolist(), config["seed"], config["confounding"])
    return Truth(*counterfactual(patients, config["size"], **edit.attributes), marker_mask(patients, config["size"]))


def known_truth(folder: Folder, table: pd.DataFrame, edit: Edit) -> Truth:
    """What `true_counterfactual` gives; ValueError where the truth is not known."""
    if (truth := true_counterfactual(folder, table, edit)) is None:
        raise ValueError(f"{folder} holds real images, whose truth of {edit.key} is unknown: this needs phantoms")
    return truth


def label_counts(folder: Folder, when: str = "after") -> pd.DataFrame:
    """How often labels in train, else in the first split, are present, absent, uncertain and not mentioned.

    ``when`` is "before" or "after" preparation; "blank, not absent" is the share of the rows neither present nor
    uncertain whose label is not mentioned.
    """
    splits = load_info(folder)["counts"][when]
    counts = pd.DataFrame(splits.get("train", next(iter(splits.values())))["labels"]).T
    blank = counts["not mentioned"] / (counts["not mentioned"] + counts["absent"])
    return counts.assign(**{"blank, not absent": blank})


@dataclass(frozen=True)
class Example:
    """An edit and an image that it suits: panels (K, C, H, W) with a title each, the factual image first."""

    edit: Edit
    panels: Tensor
    titles: tuple[str, ...]


def edit_examples(folder: Folder, edits: Sequence[Edit]) -> list[Example]:
    """The first image that each edit suits, with the truth if it is known; ValueError if no edit suits any image."""
    table, vocab, examples = load_table(folder), load_vocabulary(folder), []
    for edit in edits:
        row = editable(table, edit, vocab).head(1)
        if row.empty:
            continue
        panels = [read_images(folder, row)]
        if truth := true_counterfactual(folder, row, edit):
            panels += [truth.images, truth.changed.float()]
        titles = ("factual", f"true counterfactual: {edit.key.replace('_', ' ')}", "what had to change")
        examples.append(Example(edit, torch.cat(panels), titles[: len(panels)]))
    if not examples:
        raise ValueError(f"no image in {folder} suits any of {', '.join(edit.key for edit in edits) or 'no edits'}")
    return examples
