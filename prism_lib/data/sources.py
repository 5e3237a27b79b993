"""Sources of images: each offers one table and a way to read the images of its rows.

This module has the shared parts and the phantom; `data.chest`, `data.skin` and `data.any_table` read files. A table
that breaks its format raises an error; an image that cannot be used gives a `Rejection`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from prism_lib.data.images import Picture, Rejection
from prism_lib.language.labels import PHANTOM_LABELS

BATCH = 32  # rows that a reader gets at once
NONE = "none"  # an empty cell would turn a column of words into one of numbers where all are empty

DETAIL_COLUMNS = ("devices", "effusion_side")  # of the phantom's table: more precise than labels

Reader = Callable[[pd.DataFrame], Iterator[Picture | Rejection]]


@dataclass(frozen=True)
class Source:
    """Images with labels, before they are prepared.

    `table` has a row per image: "name" (unique, becomes the file name), "patient_id", the columns `labels`
    with values 1, 0, -1 or missing, and any others; where it has "split", that row's split is given.
    `images(rows)` yields a `Picture` or a Rejection for each row in order, the same however the rows are batched by
    `BATCH`; it must be picklable, because other processes call it. `rejected` are files that never made it into the
    table.
    """

    table: pd.DataFrame
    labels: tuple[str, ...]
    label_policy: str
    images: Reader
    rejected: tuple[Rejection, ...] = ()


def seeded_order(names: Iterable[Any], seed: int) -> list[str]:
    """The distinct names in an order drawn from `seed` by a hash, whatever order they come in."""
    unique = sorted(set(map(str, names)))
    return sorted(unique, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())


def draw_patients(table: pd.DataFrame, num_images: int, seed: int) -> pd.DataFrame:
    """At most `num_images` rows: whole patients in an order drawn from `seed`, the last perhaps cut short."""
    rank = {patient: place for place, patient in enumerate(seeded_order(table["patient_id"], seed))}
    order = table.assign(_rank=table["patient_id"].map(rank)).sort_values(["_rank", "name"])
    return order.drop(columns="_rank").head(num_images)


@dataclass(frozen=True)
class Phantoms:
    """Renders the phantom patients of a table's rows (see `phantom.patients`)."""

    seed: int
    confounding: float
    size: int

    def __call__(self, rows: pd.DataFrame) -> Iterator[Picture | Rejection]:
        """The pictures in the rows' order."""
        from prism_lib.phantom.patients import render, sample_patients  # torch: only in a process that renders

        patients = sample_patients(rows["phantom_index"].tolist(), self.seed, self.confounding)
        for image in (render(patients, self.size)[:, 0] * 255).round().byte().numpy():
            yield Picture(image)


def phantom_source(num_images: int, seed: int, confounding: float, size: int) -> Source:
    """`num_images` phantom patients, rendered at `size` x `size`."""
    from prism_lib.phantom.patients import render, sample_patients

    patients = sample_patients(num_images, seed, confounding)
    table = patients.labels()
    table = table.replace({"devices": {"": NONE}, "effusion_side": {"": NONE}})
    table.insert(0, "name", table["patient_id"])
    table["phantom_index"] = patients.index
    policy = "every label is known, 1 or 0: the phantom's causal model set it"
    return Source(table, PHANTOM_LABELS, policy, Phantoms(seed, confounding, size))


def has_details(source: str) -> bool:
    """Whether a source records more of a finding than its label: the kind of a device, the side of fluid."""
    return source == "phantom"


def details(source: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Phrases of a row that are more precise than its labels; {} for a source without details.

    {"Support Devices": "pacemaker and ecg leads", "Pleural Effusion": "left pleural effusion"}
    """
    phrases: dict[str, str] = {}
    if has_details(source) and row["devices"] != NONE:
        phrases["Support Devices"] = str(row["devices"]).replace("|", " and ")
    if has_details(source) and row["effusion_side"] != NONE:
        phrases["Pleural Effusion"] = f"{row['effusion_side']} pleural effusion"
    return phrases
