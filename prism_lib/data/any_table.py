"""Any images with a table: `file_name`, `patient_id`, a column per label, and other columns by name only.

    file_name,patient_id,Cardiomegaly,Support Devices
    site1/a.png,p001,1,
    site1/b.png,p002,0,1

Labels are 1, 0, -1 (uncertain) or blank (not mentioned) and have the vocabulary's names. A column `split` with train,
val or test is kept. The images are PNG, JPEG, TIFF and the like, or DICOM files (dataset "dicom").
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prism_lib.data import dicom, tables
from prism_lib.data.folder import SPLITS
from prism_lib.data.images import ImageFiles
from prism_lib.data.sources import Source, draw_patients
from prism_lib.data.tables import refuse
from prism_lib.language.labels import Vocabulary

REQUIRED = {"file_name": "source_file", "patient_id": "patient_id"}
POLICY = "1 present, 0 absent, -1 uncertain, blank not mentioned, as in the table"
# Columns of every prepared table.
RESERVED = frozenset({"name", "text", "path", "source_file", "pixel_spacing_mm", *REQUIRED, "split"})


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Columns:
    """Which of a table's columns are read.

    Args:
        labels: the label columns; () is every column that is nothing else.
        extra: columns to carry along unchanged; no other column is copied.
        header: of DICOM files, the header fields to copy, by keyword ("PatientAge"); no other field is copied.
    """

    labels: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    header: tuple[str, ...] = ()


def table_source(
    data_root: Path,
    num_images: int,
    seed: int,
    reader: ImageFiles,
    table_name: str,
    columns: Columns,
    vocab: Vocabulary,
) -> Source:
    """At most `num_images` images of a table in `data_root`, by whole patients drawn from `seed`."""
    path = tables.find_table(data_root, [table_name])
    labels = _labels(tables.read_header(path), path, columns, vocab)
    if reader.header is not None:
        dicom.check_keywords(reader.header)
    for name in (*columns.extra, *columns.header):
        if name in RESERVED or name in labels:
            raise ValueError(f"column {name!r} cannot be carried along: the prepared table has another of that name")
    carried = {name: name for name in (*labels, *columns.extra)}
    table = tables.read_table(path, REQUIRED | carried, {"split": "split"})
    tables.refuse_names(table, path, "file_name")
    refuse(table["patient_id"] == "", table["patient_id"], path, "empty patient_id")
    table = table.assign(**{label: tables.label_values(table[label], path, label) for label in labels})
    table.insert(0, "name", _names(table["source_file"]))
    refuse(table["name"].duplicated(), table["source_file"], path, "another file_name differs only in '/' or '.'")
    if "split" in table:
        _check_splits(table, path)
    table, rejected = tables.found(table, tables.listed_images(table["source_file"], data_root), data_root)
    return Source(draw_patients(table, num_images, seed), labels, POLICY, reader, rejected=rejected)


def _labels(header: Sequence[str], path: Path, columns: Columns, vocab: Vocabulary) -> tuple[str, ...]:
    """The label columns; ValueError for one outside the vocabulary, because a label without words cannot be edited."""
    others = {*REQUIRED, "split", *columns.extra}
    labels = columns.labels or tuple(name for name in header if name not in others)
    if not labels:
        raise ValueError(f"{path} has no label column beside {', '.join(header)}")
    for label in labels:
        if label not in vocab.labels:
            close = difflib.get_close_matches(label, vocab.labels, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"{path}: vocabulary {vocab.name!r} lacks the label {label!r}; {hint}It has {', '.join(vocab.labels)}. "
                f"Columns that are no labels are left out where the labels are named, or carried along by name"
            )
    return labels


def _names(files: pd.Series) -> pd.Series:
    """One file name without folders: "site1/a.png" -> "site1_a"."""
    return files.map(lambda file: str(Path(file).with_suffix("")).replace("\\", "/").replace("/", "_"))


def _check_splits(table: pd.DataFrame, path: Path) -> None:
    refuse(~table["split"].isin(SPLITS), table["split"], path, f"split is none of {', '.join(SPLITS)}")
    crossing = table.groupby("patient_id")["split"].transform("nunique") > 1
    refuse(crossing, table["patient_id"], path, "one patient in two given splits")
