"""Chest X-rays in the published formats: CheXpert (Irvin et al., AAAI 2019), ChestX-ray14 (Wang et al., CVPR 2017)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pandas as pd

from prism_lib.data import tables
from prism_lib.data.images import ImageFiles
from prism_lib.data.sources import Source, draw_patients
from prism_lib.data.tables import refuse
from prism_lib.language.labels import CHEXPERT_LABELS, NIH_LABELS, NO_FINDING

_ABOUT = {"Path": "source_file", "Sex": "sex", "Age": "age", "Frontal/Lateral": "projection", "AP/PA": "view"}
CHEXPERT_COLUMNS = _ABOUT | {label: label for label in CHEXPERT_LABELS}
CHEXPERT_POLICY = (
    "1 mentioned as present, 0 as absent, -1 as uncertain, blank not mentioned (CheXpert's labeller read the reports); "
    "nearly all reports of films without devices do not mention devices: a blank is not an absence"
)
View = Literal["frontal", "lateral", "all"]
_CHEXPERT_PATH = r"^CheXpert-v1\.0[^/]*/(?P<file>(?:train|valid)/(?P<patient>patient\d+)/study\d+/view\d+_\w+\.jpg)$"


def chexpert_source(data_root: Path, num_images: int, seed: int, reader: ImageFiles, view: View, test: bool) -> Source:
    """At most `num_images` images of CheXpert v1.0 or v1.0-small, the folder with train.csv and valid.csv.

    The published validation set is kept apart. With `test` it is the whole test split, beside and not among the
    `num_images`, and the patients of train.csv are to be split between train and val; otherwise it is left out.
    """
    table, path = _read_chexpert(data_root, "train.csv", view)
    table, rejected = tables.found(table, tables.listed_images(table.pop("_file"), data_root), data_root)
    table = draw_patients(table, num_images, seed)
    if test:
        kept, _ = _read_chexpert(data_root, "valid.csv", view)
        if both := set(kept["patient_id"]) & set(table["patient_id"]):
            raise ValueError(f"{path}: patient {min(both)} is in valid.csv too: one patient in two given splits")
        kept, more = tables.found(kept, tables.listed_images(kept.pop("_file"), data_root), data_root)
        table, rejected = pd.concat([table.assign(split=""), kept.assign(split="test")]), rejected + more
    return Source(table, CHEXPERT_LABELS, CHEXPERT_POLICY, reader, rejected=rejected)


def _read_chexpert(data_root: Path, name: str, view: View) -> tuple[pd.DataFrame, Path]:
    path = tables.find_table(data_root, [name])
    table = tables.read_table(path, CHEXPERT_COLUMNS)
    tables.refuse_names(table, path, "Path")
    parts = table["source_file"].str.extract(_CHEXPERT_PATH)
    expected = "Path is not CheXpert-v1.0.../train/patientNNNNN/studyN/viewN_frontal.jpg"
    refuse(parts["file"].isna(), table["source_file"], path, expected)
    projection = table["projection"].str.lower()
    refuse(~projection.isin(("frontal", "lateral")), table["projection"], path, "Frontal/Lateral is neither of both")
    labels = {label: tables.label_values(table[label], path, label) for label in CHEXPERT_LABELS}
    table = table.assign(
        **labels,
        patient_id=parts["patient"],
        name=parts["file"].str.split("/", n=1).str[1].str.removesuffix(".jpg").str.replace("/", "_"),
        sex=tables.sexes(table["sex"]),
        age=tables.ages(table["age"]),
        projection=projection,
        _file=parts["file"],  # the folder may have been renamed since it was published
    )
    table = table if view == "all" else table[projection == view]
    if table.empty:
        raise ValueError(f"{path} has no {view} image")
    return table, path


NIH_TABLES = ("Data_Entry_2017*.csv", "labels.csv")
NIH_COLUMNS = {
    "Image Index": "source_file",
    "Finding Labels": "findings",
    "Patient ID": "patient_id",
    "Patient Age": "age",
    "Patient Gender": "sex",
    "View Position": "view",
}
NIH_POLICY = (
    "1 where the finding is listed, 0 where it is not (NIH's text mining looked for all 14); "
    "Support Devices, which NIH did not look for, is never mentioned"
)


def nih_source(data_root: Path, num_images: int, seed: int, reader: ImageFiles) -> Source:
    """At most `num_images` radiographs in the format of NIH ChestX-ray14.

    The folder holds NIH's own table, and the images anywhere below it. Whole patients are drawn by `seed`,
    the last of them perhaps cut short.
    """
    path = tables.find_table(data_root, NIH_TABLES)
    table = _read_nih_table(path)
    table, rejected = tables.found(table, tables.find_images(table["source_file"], data_root), data_root)
    labels = (NO_FINDING, *NIH_LABELS.values(), "Support Devices")
    return Source(draw_patients(table, num_images, seed), labels, NIH_POLICY, reader, rejected=rejected)


def _read_nih_table(path: Path) -> pd.DataFrame:
    table = tables.read_table(path, NIH_COLUMNS)
    tables.refuse_names(table, path, "Image Index")
    refuse(table["patient_id"] == "", table["patient_id"], path, "empty Patient ID")
    table.insert(0, "name", tables.stems(table["source_file"]))
    refuse(table["name"].duplicated(), table["source_file"], path, "repeated Image Index")
    table["age"] = tables.ages(table["age"])  # the table has patients of 414 years
    return pd.concat([table.drop(columns="findings"), _nih_labels(table["findings"], path)], axis=1)


def _nih_labels(findings: pd.Series, path: Path) -> pd.DataFrame:
    """One column per label from "Effusion|Mass": 1 listed, 0 not listed, all missing for Support Devices."""
    names = {NO_FINDING: NO_FINDING, **NIH_LABELS}
    listed = findings.map(lambda text: [part.strip() for part in text.split("|")])
    unknown = listed.map(lambda parts: not names.keys() >= set(parts))
    refuse(unknown, findings, path, f"unknown label (known: {', '.join(names)})")
    refuse(listed.map(lambda parts: NO_FINDING in parts and len(parts) > 1), findings, path, "contradiction")
    columns = {label: listed.map(lambda parts, n=name: float(n in parts)) for name, label in names.items()}
    return pd.DataFrame({**columns, "Support Devices": float("nan")}, index=findings.index)
