"""A shortcut in the training set, and what helps a classifier against it.

The protocol of FastDiME (Weng et al., ECCV 2024): in the training set D_k the target coincides with another attribute
in k % of the images with the target and in k % of those without; the test set has every combination equally often.
A classifier that reads the other attribute instead fails on the combinations that it rarely or never saw. Training
sets with the same images, and the same number of optimizer steps, are compared: as they are, with groups reweighted, by
Group-DRO, and with images added that fill the missing combinations (`studies.augmentation`).

A group is 2 target + shortcut: `GROUPS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from prism_lib.data.folder import Folder, load_table, read_images
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import ClassifierConfig
from prism_lib.studies.augmentation import Source

GROUPS = ("neither", "shortcut_only", "target_only", "both")


@dataclass(frozen=True)
class StudyConfig:
    """What is compared.

    Args:
        target, shortcut: the label that is asked for, and the one that goes with it in training.
        strengths: k as a fraction, 1 for D_100; 0.5 is balanced.
        images: images of the training set, half of them with the target; the same for every seed.
        added: images that a source adds, a quarter for each of four edits: shortcut removed and added with the target
            kept, target removed and added with the shortcut kept.
        size: pixels a side that the classifiers read.
        test_splits: the splits that make up the test set; nothing is chosen on either.
        seeds: of the classifiers: initial weights and order of the images.
    """

    target: str
    shortcut: str
    strengths: tuple[float, ...] = (1.0, 0.75, 0.5)
    images: int = 240
    added: int = 120
    size: int = 128
    test_splits: tuple[str, ...] = ("val", "test")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    draw_seed: int = 0
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    def __post_init__(self) -> None:
        if self.target == self.shortcut:
            raise ValueError(f"target and shortcut are both {self.target!r}")
        for label in (self.target, self.shortcut):
            if label not in self.classifier.labels:
                raise ValueError(f"the classifier has no label {label!r}; it has {', '.join(self.classifier.labels)}")
        if not self.strengths or not all(0 <= strength <= 1 for strength in self.strengths):
            raise ValueError(f"strengths must lie in [0, 1], got {self.strengths}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be one or more, each once, got {self.seeds}")
        if self.images < 4 or self.images % 2 or self.added < 4 or self.added % 4:
            raise ValueError(f"images must be even and added a multiple of 4, got {self.images} and {self.added}")
        if self.size < 32 or not self.classifier.steps:
            raise ValueError(f"need size >= 32 and a number of optimizer steps, got {self.size}")


@dataclass(frozen=True)
class TrainingSet:
    """Images (N, 1, H, W) in [0, 1], labels (N, L) with NaN for unknown, and groups (N,)."""

    images: Tensor
    labels: Tensor
    groups: Tensor

    def __add__(self, other: TrainingSet) -> TrainingSet:
        return TrainingSet(
            torch.cat([self.images, other.images]),
            torch.cat([self.labels, other.labels]),
            torch.cat([self.groups, other.groups]),
        )


def groups(table: pd.DataFrame, target: str, shortcut: str) -> pd.Series:
    """2 target + shortcut of every row, -1 where either is not known."""
    for label in (target, shortcut):
        if label not in table:
            raise ValueError(f"the data set has no label {label!r}; it has {', '.join(map(str, table))}")
    known = table[target].isin([0, 1]) & table[shortcut].isin([0, 1])
    return (2 * table[target] + table[shortcut]).where(known, -1).astype(int)


def training_rows(table: pd.DataFrame, config: StudyConfig, strength: float) -> pd.DataFrame:
    """The rows of D_k, drawn from a split; a smaller k keeps the larger one's rows as far as it has them."""
    half = config.images // 2
    together = round(half * strength)
    wanted = dict(zip(GROUPS, (together, half - together, half - together, together), strict=True))
    member = groups(table, config.target, config.shortcut)
    shuffled = table.sample(frac=1, random_state=config.draw_seed)
    parts = []
    for group, (name, count) in enumerate(wanted.items()):
        rows = shuffled[member.loc[shuffled.index] == group]
        if len(rows) < count:
            raise ValueError(
                f"the training split has {len(rows)} images of group {name!r} ({config.target} and {config.shortcut}); "
                f"{config.images} images at strength {strength:g} need {count}"
            )
        parts.append(rows.head(count))
    return pd.concat(parts, ignore_index=True)


def balanced_rows(folder: Folder, config: StudyConfig) -> pd.DataFrame:
    """The balanced test set: as many rows of each group as the smallest has."""
    table = pd.concat([load_table(folder, split) for split in config.test_splits], ignore_index=True)
    member = groups(table, config.target, config.shortcut)
    sizes = [int((member == group).sum()) for group in range(4)]
    if not min(sizes):
        raise ValueError(f"no test image in group {GROUPS[sizes.index(0)]!r} of {config.target}, {config.shortcut}")
    return pd.concat([table[member == group].head(min(sizes)) for group in range(4)], ignore_index=True)


def additions(rows: pd.DataFrame, config: StudyConfig) -> list[tuple[pd.DataFrame, Edit]]:
    """What a source is asked for: training rows in which the two go together, and edits that part them."""
    member, asked = groups(rows, config.target, config.shortcut), []
    for group, verb in ((3, "remove"), (0, "add")):
        sources = rows[member == group]
        for label in (config.shortcut, config.target):
            if len(sources) < config.added // 4:
                raise ValueError(
                    f"{config.added} added images need {config.added // 4} training images of group "
                    f"{GROUPS[group]!r}, there are {len(sources)}"
                )
            edit = Edit(remove=(label,)) if verb == "remove" else Edit(add=(label,))
            asked.append((sources.head(config.added // 4), edit))
    return asked


def group_counts(rows: pd.DataFrame, config: StudyConfig) -> dict[str, int]:
    """How many rows each group has."""
    member = groups(rows, config.target, config.shortcut)
    return {name: int((member == group).sum()) for group, name in enumerate(GROUPS)}


def examples(
    folder: Folder, rows: pd.DataFrame, sources: Mapping[str, Source], config: StudyConfig, count: int = 1
) -> tuple[Tensor, list[str]]:
    """The first images of every edit and what each source makes of them, in rows of 1 + sources, with titles.

    The original's title is the edit.
    """
    panels, titles = [], []
    for chosen, edit in additions(rows, config):
        some = chosen.head(count)
        columns = [read_images(folder, some), *(source(some, edit) for source in sources.values())]
        panels.append(torch.stack([_resized(images, config.size) for images in columns], dim=1).flatten(0, 1))
        titles += [name.replace("_", " ") for name in (edit.key, *sources)] * len(some)
    return torch.cat(panels), titles


def load_images(folder: Folder, rows: pd.DataFrame, config: StudyConfig) -> TrainingSet:
    """The rows as they are."""
    chunks = [read_images(folder, rows.iloc[start : start + 64]) for start in range(0, len(rows), 64)]
    return _training_set(torch.cat([_resized(chunk, config.size) for chunk in chunks]), rows, config)


def added_images(rows: pd.DataFrame, source: Source, config: StudyConfig) -> TrainingSet:
    """What a source adds to the rows of a training set, with the labels that the edits give."""
    parts = []
    for chosen, edit in additions(rows, config):
        labels = pd.DataFrame(
            [edit.apply(cast(dict[str, Any], row)) for row in chosen[list(config.classifier.labels)].to_dict("records")]
        )
        parts.append(_training_set(_resized(source(chosen, edit), config.size), labels, config))
    return parts[0] + parts[1] + parts[2] + parts[3]


def _training_set(images: Tensor, rows: pd.DataFrame, config: StudyConfig) -> TrainingSet:
    labels = torch.tensor(rows[list(config.classifier.labels)].astype(float).to_numpy().tolist())
    member = torch.tensor(groups(rows, config.target, config.shortcut).to_numpy())
    return TrainingSet(images, torch.where((labels == 0) | (labels == 1), labels, torch.nan), member)


def _resized(images: Tensor, size: int) -> Tensor:
    """Gray images (N, 1, size, size), smoothed before they are made smaller."""
    gray = images.mean(1, keepdim=True)
    return F.interpolate(gray, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
