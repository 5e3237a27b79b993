"""Tables that come with images: read whole, checked row by row before any work, and kept inside their folder.

Every message names the file, the line (the header is line 1), and the value. The result is a `Source`.
"""

import codecs
import difflib
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated

import pandas as pd
from pydantic import Field
from pydicom.datadict import tag_for_keyword

from prism_lib import paths
from prism_lib.configs import checked
from prism_lib.data.folder import REPORT, SPLITS
from prism_lib.data.images import IMAGE_SUFFIXES, ImageFiles, Reader, Rejection
from prism_lib.language.labels import vocabulary


@dataclass(frozen=True)
class Source:
    """Images with labels, before they are prepared.

    `table` has a row per image: "name" (unique, becomes the file name), "patient_id", the columns `labels` with values
    1, 0, -1 or missing, and any others; a "split" that is not empty is given. `rejected` are files without a row.
    """

    table: pd.DataFrame
    labels: tuple[str, ...]
    label_policy: str
    images: Reader
    rejected: tuple[Rejection, ...] = ()
    left_out: Mapping[str, Mapping[Hashable, int]] = field(default_factory=dict)  # what is not taken, and how often


def seeded_order(names: Iterable[object], seed: int) -> list[str]:
    """The distinct names in an order drawn from `seed` by a hash, whatever order they come in."""
    return sorted(sorted(set(map(str, names))), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())


def draw_patients(table: pd.DataFrame, num_images: int, seed: int) -> pd.DataFrame:
    """At most `num_images` rows: whole patients in an order drawn from `seed`, the last perhaps cut short."""
    rank = {patient: place for place, patient in enumerate(seeded_order(table["patient_id"], seed))}
    order = table.assign(_rank=table["patient_id"].map(rank)).sort_values(["_rank", "name"])
    return order.drop(columns="_rank").head(num_images)


def split_patients(patients: pd.Series, shares: Sequence[float], seed: int) -> dict[str, str]:
    """Patient -> split; shares are exact to one patient, and a share above 0 gets at least one."""
    order = seeded_order(patients, seed)
    if len(order) < sum(share > 0 for share in shares):
        raise ValueError(f"{len(order)} patients are too few for a split of {tuple(shares)}; (0, 0, 1) makes one part")
    exact = [share * len(order) for share in shares]
    sizes = [max(int(count), int(count > 0)) for count in exact]
    while sum(sizes) != len(order):
        step = 1 if sum(sizes) < len(order) else -1
        movable = [i for i, size in enumerate(sizes) if step > 0 or size > 1]
        sizes[max(movable, key=lambda i: step * (exact[i] - sizes[i]))] += step
    names = [name for name, count in zip(SPLITS, sizes, strict=True) for _ in range(count)]
    return dict(zip(order, names, strict=True))


def find_table(data_root: Path, patterns: Sequence[str]) -> Path:
    """The one table in a folder whose name fits a pattern; FileNotFoundError if there is none or several."""
    if not data_root.is_dir():
        raise FileNotFoundError(f"data root {data_root} is not a folder")
    found = [path for pattern in patterns for path in sorted(data_root.glob(pattern))]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"expected one table {' or '.join(patterns)} in {data_root}, found {names}")
    return found[0]


UTF8 = "utf-8"
_SUFFIX = rf"(?i)({'|'.join(map(re.escape, (*IMAGE_SUFFIXES, '.dcm')))})$"
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_table(
    path: Path, columns: Mapping[str, str], optional: Mapping[str, str] | None = None, encoding: str = UTF8
) -> pd.DataFrame:
    """The named columns of a CSV file, and the `optional` ones that are there, as stripped text under our names.

    Row i is line i + 2. Commas, semicolons or tabs separate; what pandas reads as missing ("NaN", "None") is empty. A
    file may be compressed (.gz), or hold a JSON object a line (.json). ValueError where there is no row, "patient_id"
    is empty, or "source_file" is empty, leaves the data root, or occurs twice.
    """
    header = read_header(path, encoding)
    if absent := [column for column in columns if column not in header]:
        close = difflib.get_close_matches(absent[0], header, n=1)
        hint = f"; did {close[0]!r} mean that?" if close else ""
        raise ValueError(f"{path} lacks the column {absent[0]!r}; it has {', '.join(header)}{hint}")
    names = dict(columns) | {name: ours for name, ours in (optional or {}).items() if name in header}
    raw = _read_csv(path, encoding, names=header, header=0, usecols=list(names)).fillna("")
    if raw.empty:
        raise ValueError(f"{path} has a header and no rows")
    table = raw[list(names)].rename(columns=names).apply(lambda column: column.str.strip())
    for column, ours in names.items():
        if ours in ("source_file", "patient_id"):
            refuse(table[ours] == "", table[ours], path, f"empty {column}")
        if ours == "source_file":
            table[ours] = table[ours].str.replace("\\", "/")  # of Windows
            outside = table[ours].map(PureWindowsPath).map(lambda name: bool(name.anchor) or ".." in name.parts)
            refuse(outside, table[ours], path, "path outside the data root")
            refuse(table[ours].duplicated(), table[ours], path, f"repeated {column}")
    return table


def read_header(path: Path, encoding: str = UTF8) -> list[str]:
    """The column names of a CSV file; a name that occurs twice is an error."""
    header = _read_csv(path, encoding, header=None, nrows=1, keep_default_na=False).iloc[0].str.strip().tolist()
    while header and not header[-1]:  # of a spreadsheet: ";;" at the end of every line
        header.pop()
    if repeated := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"{path} has two columns {repeated[0]!r}")
    return header


def _read_csv(path: Path, encoding: str, **options: object) -> pd.DataFrame:
    try:
        if path.suffix == ".json":  # an object a line
            rows = pd.read_json(path, lines=True, dtype=False)
            words = rows.astype(object).where(rows.notna(), "").astype(str)
            return pd.DataFrame([rows.columns]) if "nrows" in options else words
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            first = file.readline()
        encoding = next((name for mark, name in _MARKS.items() if first.startswith(mark)), encoding)
        separator = max(",;\t", key=lambda mark: first.count(mark.encode()))
        settings = {"dtype": str, "skip_blank_lines": False, "sep": separator, "encoding": encoding} | options
        return pd.read_csv(path, **settings)  # type: ignore[call-overload]
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no table {path}") from None
    except (UnicodeError, LookupError) as error:
        raise ValueError(f"{path} is not in {encoding!r}; name its encoding, such as 'cp1252': {error}") from None
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a readable table: {error}") from error


def refuse(bad: pd.Series, values: pd.Series, path: Path, what: str) -> None:
    """ValueError naming the first bad row of a table that `read_table` returned."""
    if bad.any():
        row = int(bad.to_numpy().argmax())
        line = bad.index[row] + (1 if path.suffix == ".json" else 2)
        raise ValueError(f"{path}, line {line}: {what}: {values.iloc[row]!r} ({int(bad.sum())} such rows)")


def label_values(column: pd.Series, path: Path, label: str) -> pd.Series:
    """Text as 1 (or "True"), 0, -1 (uncertain) or NaN (blank); any other value is an error."""
    values = pd.to_numeric(column.str.lower().replace({"true": "1", "false": "0"}), errors="coerce").astype(float)
    refuse(~values.isin((1, 0, -1)) & (column != ""), column, path, f"label {label!r} is not 1, 0, -1 or blank")
    return values


def ages(column: pd.Series) -> pd.Series:
    """Years from "58", "058Y" or "45.0"; NaN where there is none or it is impossible."""
    years = pd.to_numeric(column.str.rstrip("Yy"), errors="coerce").astype(float)
    return years.where(years.between(0, 120))


def sexes(column: pd.Series) -> pd.Series:
    """M, F or "" from "Male", "female", "F", "Unknown", ..."""
    return column.str[:1].str.upper().where(lambda letter: letter.isin(("M", "F")), "")


def images_below(root: Path, *, by_stem: bool = False) -> dict[str, str]:
    """File name (or stem) -> path of every image anywhere below a folder; two images of one name are an error."""
    below: dict[str, str] = {}
    for folder, _, files in os.walk(root):
        for file in files:
            stem, suffix = os.path.splitext(file)  # noqa: PTH122 - a Path for each of 100,000 files takes seconds
            if suffix.lower() in IMAGE_SUFFIXES:
                path, key = os.path.join(folder, file), stem if by_stem else file  # noqa: PTH118
                if below.setdefault(key, path) != path:
                    raise ValueError(f"two images below {root} have one name: {below[key]} and {path}")
    return below


def found(
    table: pd.DataFrame, files: pd.Series, root: Path, below: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, tuple[Rejection, ...]]:
    """The rows whose file lies where its name says or in `below`, with its "path", and a rejection for every other row.

    ValueError for a link that leads out of the data root: a table must not open other files of the machine.
    """
    listed = ((name, f"{root}{os.sep}{name}") for name in files)
    paths = [p if os.path.isfile(p) else (below or {}).get(PurePosixPath(name).name) for name, p in listed]  # noqa: PTH113
    table = table.assign(path=pd.Series(paths, index=table.index, dtype="str"))
    missing = table["path"].isna()
    rejected = tuple(Rejection(name, f"not found below {root}") for name in table.loc[missing, "source_file"])
    table = table[~missing]
    inside = os.path.realpath(root) + os.sep
    for name, path in zip(table["source_file"], table["path"], strict=True):
        if not os.path.realpath(path).startswith(inside):
            raise ValueError(f"{name!r} is a link that leads outside the data root {root}")
    return table, rejected


@checked()
class ExtraLabels:
    """A table of labels that another table of the images lacks, such as FastDiME's of devices."""

    table: Path  # absolute or below PRISM_DATA
    labels: Annotated[Mapping[str, str], Field(min_length=1)]  # its columns, and the label that each is
    name: str = "file_name"  # its column of file names
    encoding: str = UTF8

    def __post_init__(self) -> None:
        if len({*self.labels.values()}) < len(self.labels):
            raise ValueError(f"two columns of {self.table} are one label: {dict(self.labels)}")


def joined(images: pd.DataFrame, extra: ExtraLabels) -> tuple[pd.DataFrame, list[str]]:
    """The labels of the images of a `Source` that the table has, and its names that are no image's.

    Names match by file name, by as much of the path as tells all files apart, or by "name"; the suffix does not count.
    ValueError for two rows of one name, and for no match at all.
    """
    path = paths.data() / extra.table
    table = read_table(path, {extra.name: "file", **extra.labels}, encoding=extra.encoding)
    values = pd.DataFrame({label: label_values(table[label], path, label) for label in extra.labels.values()})
    files = images["source_file"]
    for depth in range(1, 2 + int(max(names.str.count(r"[/\\]").max() for names in (table["file"], files)))):
        keys, tails = _tails(table["file"], depth), _tails(files, depth)
        if keys.is_unique and tails[~files.duplicated()].is_unique:
            break
    refuse(keys.duplicated(), table["file"], path, f"repeated {extra.name}")
    names = tails.where(tails.isin(keys), images["name"])
    if not (known := names.isin(keys)).any():
        raise ValueError(f"{path} names none of the images, such as {files.iloc[0]!r}")
    labels = values.set_index(keys).loc[names[known]].set_index(images.index[known])
    return labels, table.loc[~keys.isin(names), "file"].tolist()


def _tails(files: pd.Series, depth: int) -> pd.Series:
    """The last parts of paths without suffix, as one name: "study1/view1.jpg" -> "study1_view1"."""
    plain = files.str.replace("\\", "/").str.replace(_SUFFIX, "", regex=True)
    return plain.str.rsplit("/", n=depth).str[-depth:].str.join("_")


def with_labels(source: Source, extra: ExtraLabels) -> tuple[Source, list[str]]:
    """A source with the labels of another table, which count before its own; and the names there of no image."""
    if "source_file" not in source.table:
        raise ValueError(f"{extra.table} cannot be joined: the images of this data set have no files")
    table = source.table.reset_index(drop=True)
    labels, unmatched = joined(table, extra)
    table = table.assign(**labels.combine_first(table.reindex(columns=labels.columns)))
    return replace(source, table=table, labels=tuple(dict.fromkeys((*source.labels, *labels)))), unmatched


# Any images with a table: image files or DICOM.
REQUIRED = {"file_name": "source_file", "patient_id": "patient_id"}
POLICY = "1 present, 0 absent, -1 uncertain, blank not mentioned, as in the table"
# Columns of every prepared table.
RESERVED = frozenset({"name", "text", "path", "source_file", "pixel_spacing_mm", REPORT, *REQUIRED, "split"})


@checked()
class Columns:
    """Which of a table's columns are read; no other column and no other header field is copied."""

    labels: tuple[str, ...] = ()  # the label columns; () is every column that is nothing else
    extra: tuple[str, ...] = ()  # columns to carry along unchanged
    header: tuple[str, ...] = ()  # of DICOM files, the header fields to copy, by keyword ("PatientAge")
    caption: str = ""  # the column of free captions, such as reports; they replace all but the explicit captions
    encoding: str = UTF8  # of the table; marks of UTF-8 and UTF-16 are seen


def table_source(
    data_root: Path, num_images: int, seed: int, reader: ImageFiles, name: str, columns: Columns, vocab: str
) -> Source:
    """At most `num_images` images of a table in `data_root`, by whole patients drawn from `seed`.

    The table has the columns file_name and patient_id, perhaps split, and one per label, by the vocabulary's names.
    """
    path = find_table(data_root, [name])
    labels = _labels(read_header(path, columns.encoding), path, columns, vocab)
    if wrong := [keyword for keyword in columns.header if tag_for_keyword(keyword) is None]:
        raise ValueError(f"header field {wrong[0]!r} is no keyword of DICOM's dictionary (one is 'PatientAge')")
    for place, column in enumerate(kept := (*labels, *columns.extra, *columns.header)):
        if column in RESERVED or column in kept[:place]:
            raise ValueError(f"column {column!r} cannot be carried along: the prepared table has another of that name")
    if columns.caption in (*REQUIRED, *kept):
        raise ValueError(f"column {columns.caption!r} cannot be the caption, for it is read as something else")
    carried = {column: column for column in (*labels, *columns.extra)}
    carried |= {columns.caption: REPORT} if columns.caption else {}
    table = read_table(path, REQUIRED | carried, {"split": "split"}, columns.encoding)
    if columns.caption:
        table[REPORT] = table[REPORT].str.split().str.join(" ")
        refuse(table[REPORT] == "", table["source_file"], path, f"no {columns.caption}")
    table = table.assign(**{label: label_values(table[label], path, label) for label in labels})
    # One file name without folders: "site1/a.png" -> "site1_a".
    table.insert(0, "name", table["source_file"].map(lambda file: str(Path(file).with_suffix("")).replace("/", "_")))
    refuse(table["name"].duplicated(), table["source_file"], path, "another file_name differs only in '/' or '.'")
    if "split" in table:
        refuse(~table["split"].isin(SPLITS), table["split"], path, f"split is none of {', '.join(SPLITS)}")
        crossing = table.groupby("patient_id")["split"].transform("nunique") > 1
        refuse(crossing, table["patient_id"], path, "one patient in two given splits")
    table, rejected = found(table, table["source_file"], data_root)
    return Source(draw_patients(table, num_images, seed), labels, POLICY, reader, rejected=rejected)


def _labels(header: Sequence[str], path: Path, columns: Columns, name: str) -> tuple[str, ...]:
    """The label columns; ValueError for one outside the vocabulary, because a label without words cannot be edited."""
    others = {*REQUIRED, "split", *columns.extra, columns.caption}
    labels = columns.labels or tuple(column for column in header if column not in others)
    if not labels:
        raise ValueError(f"{path} has no label column beside {', '.join(header)}")
    known = vocabulary(name, labels).labels
    for label in labels:
        if label not in known:
            close = difflib.get_close_matches(label, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"{path}: vocabulary {name!r} lacks the label {label!r}; {hint}It has {', '.join(known)}. Columns that "
                "are no labels are left out where the labels are named, or carried along by name; the vocabulary "
                "'labels', or a YAML file, has other labels"
            )
    return labels
