"""Any images with a table: `file_name`, `patient_id`, a column per label, and other columns by name only.

Labels have the vocabulary's names and are 1, 0, -1 (uncertain) or blank (not mentioned). A column `split` with train,
val or test is kept. The images are PNG, JPEG, TIFF and the like, or DICOM files (dataset "dicom").
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from prism_lib.data import dicom, tables
from prism_lib.data.folder import SPLITS
from prism_lib.data.images import ImageFiles
from prism_lib.data.tables import Source, draw_patients, refuse
from prism_lib.language.labels import vocabulary

REQUIRED = {"file_name": "source_file", "patient_id": "patient_id"}
POLICY = "1 present, 0 absent, -1 uncertain, blank not mentioned, as in the table"
# Columns of every prepared table.
RESERVED = frozenset({"name", "text", "path", "source_file", "pixel_spacing_mm", *REQUIRED, "split"})


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Columns:
    """Which of a table's columns are read; no other column and no other header field is copied."""

    labels: tuple[str, ...] = ()  # the label columns; () is every column that is nothing else
    extra: tuple[str, ...] = ()  # columns to carry along unchanged
    header: tuple[str, ...] = ()  # of DICOM files, the header fields to copy, by keyword ("PatientAge")


def table_source(
    data_root: Path, num_images: int, seed: int, reader: ImageFiles, name: str, columns: Columns, vocab: str
) -> Source:
    """At most `num_images` images of a table in `data_root`, by whole patients drawn from `seed`."""
    path = tables.find_table(data_root, [name])
    labels = _labels(tables.read_header(path), path, columns, vocab)
    if reader.header is not None:
        dicom.check_keywords(reader.header)
    for column in (*columns.extra, *columns.header):
        if column in RESERVED or column in labels:
            raise ValueError(f"column {column!r} cannot be carried along: the prepared table has another of that name")
    carried = {column: column for column in (*labels, *columns.extra)}
    table = tables.read_table(path, REQUIRED | carried, {"split": "split"})
    tables.refuse_names(table, path, "file_name")
    refuse(table["patient_id"] == "", table["patient_id"], path, "empty patient_id")
    table = table.assign(**{label: tables.label_values(table[label], path, label) for label in labels})
    # One file name without folders: "site1/a.png" -> "site1_a".
    names = table["source_file"].map(lambda file: str(Path(file).with_suffix("")).replace("\\", "/").replace("/", "_"))
    table.insert(0, "name", names)
    refuse(table["name"].duplicated(), table["source_file"], path, "another file_name differs only in '/' or '.'")
    if "split" in table:
        refuse(~table["split"].isin(SPLITS), table["split"], path, f"split is none of {', '.join(SPLITS)}")
        crossing = table.groupby("patient_id")["split"].transform("nunique") > 1
        refuse(crossing, table["patient_id"], path, "one patient in two given splits")
    table, rejected = tables.found(table, table["source_file"], data_root)
    return Source(draw_patients(table, num_images, seed), labels, POLICY, reader, rejected=rejected)


def _labels(header: Sequence[str], path: Path, columns: Columns, name: str) -> tuple[str, ...]:
    """The label columns; ValueError for one outside the vocabulary, because a label without words cannot be edited."""
    known = vocabulary(name).labels
    others = {*REQUIRED, "split", *columns.extra}
    labels = columns.labels or tuple(column for column in header if column not in others)
    if not labels:
        raise ValueError(f"{path} has no label column beside {', '.join(header)}")
    for label in labels:
        if label not in known:
            close = difflib.get_close_matches(label, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"{path}: vocabulary {name!r} lacks the label {label!r}; {hint}It has {', '.join(known)}. "
                f"Columns that are no labels are left out where the labels are named, or carried along by name"
            )
    return labels
