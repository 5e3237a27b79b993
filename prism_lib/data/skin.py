"""Dermoscopic images in the published formats: ISIC 2019, ISIC 2020 and HAM10000.

Each image has one diagnosis, so all other diagnoses are known to be absent. A split never parts images of one lesion or
lesions of one patient. Artefacts (rulers, ink) are labels of the images in isic_bias.csv (Bissoto et al., CVPRW 2020).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from prism_lib.data import tables
from prism_lib.data.images import ImageFiles
from prism_lib.data.tables import Source, draw_patients, refuse
from prism_lib.language.labels import SKIN_ARTEFACTS, SKIN_DIAGNOSES

ARTEFACT_TABLE = "isic_bias.csv"
_POLICY = "one diagnosis is 1 and all others are 0; {unknown}; artefacts are not mentioned without a table of them"

UNKNOWN = "unknown"
# The archives' tables: file names, the meaning of columns, and the label of every diagnosis.
FORMATS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("skin.yaml").read_text(encoding="utf-8"))


def skin_source(data_root: Path, num_images: int, seed: int, reader: ImageFiles, archive: str) -> Source:
    """At most `num_images` images of one of `FORMATS`, by whole patients; its tables lie in `data_root`."""
    form = FORMATS[archive]
    path = tables.find_table(data_root, form["tables"])
    table = tables.read_table(path, form["columns"], form["optional"])
    if archive == "isic2019":
        table = _with_metadata(table, data_root).assign(diagnosis=_one_hot(table, path))
    about = table.assign(
        name=table["source_file"],
        patient_id=_patients(table, path),
        lesion_id=table.get("lesion", ""),
        sex=tables.sexes(table["sex"]),
        age=tables.ages(table["age"]),
    )[["name", "source_file", "patient_id", "lesion_id", "sex", "age", "site"]]
    diagnoses = _diagnoses(table, path, form["diagnoses"])
    table = pd.concat([about, diagnoses, _artefacts(table["source_file"], data_root)], axis=1)
    table, rejected = tables.found(table, table["source_file"], data_root, tables.images_below(data_root, by_stem=True))
    labels, policy = (*SKIN_DIAGNOSES, *SKIN_ARTEFACTS.values()), _POLICY.format(unknown=form["unknown"])
    return Source(draw_patients(table, num_images, seed), labels, policy, reader, rejected=rejected)


def _one_hot(table: pd.DataFrame, path: Path) -> pd.Series:
    """ISIC 2019: the one column that is 1."""
    codes = [code for code in (*FORMATS["isic2019"]["columns"], "UNK") if code != "image" and code in table]
    hot = pd.DataFrame({code: tables.label_values(table[code], path, code) == 1 for code in codes})
    refuse(hot.sum(axis=1) != 1, table["source_file"], path, f"not one of {', '.join(codes)} is 1, but")
    return hot.rename(columns={"UNK": UNKNOWN}).idxmax(axis=1)


def _diagnoses(table: pd.DataFrame, path: Path, known: dict[str, str]) -> pd.DataFrame:
    """A column of words: each label is 1 where the word means it and 0 where another one stands."""
    words = table["diagnosis"]
    refuse(~words.isin(list(known)), words, path, f"unknown diagnosis (known: {', '.join(known)})")
    meaning = words.map(known)
    labels = pd.DataFrame({label: (meaning == label).astype(float) for label in SKIN_DIAGNOSES}).mask(words == UNKNOWN)
    if "target" in table:
        target = tables.label_values(table["target"], path, "target")
        contradiction = (words != UNKNOWN) & (target != labels["Melanoma"])
        refuse(contradiction, table["source_file"], path, "target and diagnosis contradict each other")
        labels["Melanoma"] = target
    return labels


def _with_metadata(table: pd.DataFrame, data_root: Path) -> pd.DataFrame:
    """ISIC 2019 keeps age, sex, site and lesion in a table of their own."""
    path = tables.find_table(data_root, ["ISIC_2019_*Metadata.csv"])
    columns = {"image": "source_file", "age_approx": "age", "anatom_site_general": "site", "sex": "sex"}
    more = tables.read_table(path, columns, {"lesion_id": "lesion", "patient_id": "patient"})
    joined = table.merge(more, on="source_file", how="left", validate="one_to_one").set_index(table.index)
    refuse(joined["age"].isna(), joined["source_file"], path, "no row for the image")
    return joined


def _patients(table: pd.DataFrame, path: Path) -> pd.Series:
    """The patient, else the lesion, else the image."""
    patients = table["source_file"]
    for column in ("lesion", "patient"):
        if column in table:
            patients = patients.where(table[column] == "", table[column])
    if "lesion" in table:
        shared = patients.groupby(table["lesion"]).transform("nunique") > 1
        refuse(shared & (table["lesion"] != ""), table["lesion"], path, "one lesion of two patients")
    return patients


def _artefacts(names: pd.Series, data_root: Path) -> pd.DataFrame:
    """A column per artefact: 1 or 0 where `ARTEFACT_TABLE` covers the image, else missing."""
    unknown = pd.DataFrame(np.nan, names.index, list(SKIN_ARTEFACTS.values()))
    path = data_root.resolve() / ARTEFACT_TABLE
    if not path.is_file():
        return unknown
    there = {code: label for code, label in SKIN_ARTEFACTS.items() if code in tables.read_header(path)}
    images = pd.DataFrame({"source_file": names.str.removesuffix("_downsampled"), "name": names})
    labels, _ = tables.joined(images, tables.ExtraLabels(path, there, "image"))
    return unknown.assign(**labels)
