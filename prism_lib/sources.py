"""Where images come from: each source offers one table and a way to read the image of a row.

A source knows its own format and nothing of the prepared folder that `prism_lib.datasets` writes. It returns
a `Source`: a table with a row per image, whose label columns bear CheXpert's names, and an iterator over
images. An image that cannot be used is returned as a `Rejection` with the reason instead of an exception,
because one truncated file among 100,000 is news, not the end. A table that breaks its format is an error.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from prism_lib import phantom
from prism_lib.labels import NIH_LABELS, NO_FINDING, PHANTOM_LABELS

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
FITS = ("letterbox", "crop")
PHANTOM_BATCH = 32
# What PIL's decoders raise, whatever the damage.
_DECODING_ERRORS = (OSError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
NONE = "none"  # an empty cell would turn a column of words into one of numbers where all are empty


@dataclass(frozen=True)
class Rejection:
    """A file that could not be used, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Images with labels, before they are prepared.

    `table` has a row per image: "name" (unique, becomes the file name), "patient_id", the columns `labels`
    with values 1, 0, -1 or missing, and whatever else is known. `images(table)` yields, in the table's order,
    a gray image (H, W) uint8 or a Rejection; `rejected` are files that never made it into the table.
    `details(row)` are phrases more precise than a label.
    """

    table: pd.DataFrame
    labels: tuple[str, ...]
    label_policy: str
    images: Callable[[pd.DataFrame], Iterator[np.ndarray | Rejection]]
    details: Callable[[Mapping[str, Any]], dict[str, str]] = lambda row: {}
    rejected: tuple[Rejection, ...] = ()


def seeded_order(names: pd.Series | pd.Index, seed: int) -> list[str]:
    """The distinct names in an order drawn from `seed` by a hash: how they come in makes no difference."""
    unique = sorted(set(map(str, names)))
    return sorted(unique, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())


def phantom_source(num_images: int, seed: int, confounding: float, size: int) -> Source:
    """`num_images` phantom patients, rendered in batches at `size` x `size` (see `prism_lib.phantom`)."""
    patients = phantom.sample_patients(num_images, seed, confounding)
    table = patients.labels()
    table = table.replace({"devices": {"": NONE}, "effusion_side": {"": NONE}})
    table.insert(0, "name", table["patient_id"])
    table["phantom_index"] = patients.index

    def images(rows: pd.DataFrame) -> Iterator[np.ndarray]:
        for start in range(0, len(rows), PHANTOM_BATCH):
            index = rows["phantom_index"].iloc[start : start + PHANTOM_BATCH].tolist()
            batch = phantom.render(phantom.sample_patients(index, seed, confounding), size)
            yield from (batch[:, 0] * 255).round().byte().numpy()

    policy = "every label is known, 1 or 0, because the phantom's causal model set it"
    return Source(table, PHANTOM_LABELS, policy, images, _phantom_details)


def details(source: str, row: Mapping[str, Any]) -> dict[str, str]:
    """Phrases more precise than a label that a source knows of a row; {} where it knows none."""
    return _phantom_details(row) if source == "phantom" else {}


def _phantom_details(row: Mapping[str, Any]) -> dict[str, str]:
    """{"Support Devices": "pacemaker and ecg leads", "Pleural Effusion": "left pleural effusion"}"""
    details = {}
    if row["devices"] != NONE:
        details["Support Devices"] = str(row["devices"]).replace("|", " and ")
    if row["effusion_side"] != NONE:
        details["Pleural Effusion"] = f"{row['effusion_side']} pleural effusion"
    return details


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
    "Support Devices, which NIH did not look for, is not mentioned for any image"
)


def nih_source(data_root: Path, num_images: int, seed: int, size: int, fit: str) -> Source:
    """At most `num_images` radiographs in the format of NIH ChestX-ray14 (Wang et al., CVPR 2017).

    The folder holds NIH's own table, and the images anywhere below it. Whole patients are drawn by `seed`,
    the last of them perhaps cut short. A row whose image is not there becomes a rejection; a path that leads
    out of the folder is an error.
    """
    table_path = _nih_table_path(data_root)
    table = _read_nih_table(table_path)
    paths = _find_images(table["source_file"], data_root)
    table["path"] = pd.Series(paths, index=table.index, dtype=object)
    missing = table.loc[table["path"].isna(), "source_file"]
    rejected = tuple(Rejection(name, f"not found below {data_root}") for name in missing)
    rank = {patient: place for place, patient in enumerate(seeded_order(table["patient_id"], seed))}
    table = table[table["path"].notna()].sort_values(
        ["patient_id", "name"], key=lambda column: column.map(rank) if column.name == "patient_id" else column
    )
    table = table.head(num_images)
    _check_inside(table, data_root, table_path)

    def images(rows: pd.DataFrame) -> Iterator[np.ndarray | Rejection]:
        for name, path in zip(rows["source_file"], rows["path"], strict=True):
            try:
                yield read_gray(Path(path), size, fit)
            except ValueError as error:
                yield Rejection(name, str(error))

    labels = (NO_FINDING, *NIH_LABELS.values(), "Support Devices")
    return Source(table, labels, NIH_POLICY, images, rejected=rejected)


def _nih_table_path(data_root: Path) -> Path:
    if not data_root.is_dir():
        raise FileNotFoundError(f"data root {data_root} is not a folder")
    found = [path for pattern in NIH_TABLES for path in sorted(data_root.glob(pattern))]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"expected one table {' or '.join(NIH_TABLES)} in {data_root}, found {names}")
    return found[0]


def _read_nih_table(path: Path) -> pd.DataFrame:
    """NIH's table in our columns; row i stands in line i + 2 of the file."""
    try:
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable CSV table: {error}") from error
    if absent := [column for column in NIH_COLUMNS if column not in raw]:
        raise ValueError(f"{path} lacks the column {absent[0]!r}; it has {', '.join(raw.columns)}")
    table = raw[list(NIH_COLUMNS)].rename(columns=NIH_COLUMNS).apply(lambda column: column.str.strip())
    for column, name in (("source_file", "Image Index"), ("patient_id", "Patient ID")):
        _refuse(table[column] == "", table[column], path, f"empty {name}")
    _refuse(table["source_file"].map(_leaves_root), table["source_file"], path, "path outside the data root")
    table.insert(0, "name", table["source_file"].map(lambda file: PurePosixPath(file).stem))
    _refuse(table["name"].duplicated(), table["source_file"], path, "repeated Image Index")
    table["age"] = pd.to_numeric(table["age"].str.rstrip("Yy"), errors="coerce")
    table.loc[~table["age"].between(0, 120), "age"] = float("nan")  # the table has patients of 414 years
    return pd.concat([table.drop(columns="findings"), _nih_labels(table["findings"], path)], axis=1)


def _nih_labels(findings: pd.Series, path: Path) -> pd.DataFrame:
    """One column per label from "Effusion|Mass": 1 listed, 0 not listed, all missing for Support Devices."""
    names = {NO_FINDING: NO_FINDING, **NIH_LABELS}
    listed = findings.map(lambda text: [part.strip() for part in text.split("|")])
    unknown = listed.map(lambda parts: not names.keys() >= set(parts))
    _refuse(unknown, findings, path, f"unknown label (known: {', '.join(names)})")
    _refuse(listed.map(lambda parts: NO_FINDING in parts and len(parts) > 1), findings, path, "contradiction")
    columns = {label: listed.map(lambda parts, n=name: float(n in parts)) for name, label in names.items()}
    return pd.DataFrame({**columns, "Support Devices": float("nan")}, index=findings.index)


def _refuse(bad: pd.Series, values: pd.Series, path: Path, what: str) -> None:
    if bad.any():
        row = int(bad.to_numpy().argmax())
        raise ValueError(f"{path}, line {row + 2}: {what}: {values.iloc[row]!r} ({int(bad.sum())} such rows)")


def _leaves_root(name: str) -> bool:
    """Whether a path in a table is absolute or climbs, on any system."""
    return bool(PureWindowsPath(name).anchor) or ".." in PureWindowsPath(name).parts


def _find_images(names: pd.Series, data_root: Path) -> list[Path | None]:
    """Each image, at its own path or anywhere below `data_root`; None if it is not there."""
    below: dict[str, Path] = {}
    for folder, _, files in os.walk(data_root):
        for file in files:
            path = Path(folder, file)
            if path.suffix.lower() in IMAGE_SUFFIXES and below.setdefault(file, path) != path:
                raise ValueError(f"two images below {data_root} have one name: {below[file]} and {path}")
    direct = (data_root / name for name in names)
    return [path if path.is_file() else below.get(path.name) for path in direct]


def _check_inside(table: pd.DataFrame, data_root: Path, table_path: Path) -> None:
    """Refuse links that lead out of the data root: a table must not open just any file of the machine."""
    root = data_root.resolve()
    outside = table["path"].map(lambda path: not path.resolve().is_relative_to(root))
    if outside.any():
        name = table.loc[outside, "source_file"].iloc[0]
        raise ValueError(f"{table_path}: {name!r} is a link that leads outside the data root {data_root}")


def read_gray(path: Path, size: int, fit: str = "letterbox") -> np.ndarray:
    """An image file as gray levels (size, size) uint8, reduced with antialiasing and never stretched.

    "letterbox" keeps the whole image and pads with black, "crop" keeps its centre. Gray levels are taken at
    the file's full depth and rounded once. Raises ValueError with the reason if the image cannot be used.
    """
    try:
        if path.stat().st_size == 0:
            raise ValueError("empty file")
        with Image.open(path) as file:
            _check_size(file.size, size, fit)
            gray = _full_depth(file)
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except _DECODING_ERRORS as error:
        raise ValueError(f"unreadable image: {error}") from None
    low, high = gray.getextrema()
    if low == high:
        raise ValueError(f"blank image: every pixel is {low:g}")
    return _fit(gray, size, fit)


def _check_size(shape: tuple[int, int], size: int, fit: str) -> None:
    if (max(shape) if fit == "letterbox" else min(shape)) < size:
        raise ValueError(f"image of {shape[0]}x{shape[1]} pixels is smaller than {size}x{size}")


def _full_depth(file: Image.Image) -> Image.Image:
    """Gray levels in [0, 255] as floats, so that 16-bit files lose nothing before they are resized."""
    if file.mode.startswith("I"):
        return Image.fromarray(np.asarray(file, dtype=np.float32) * np.float32(255 / 65535))
    if file.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    return file.convert("L").convert("F")


def _fit(gray: Image.Image, size: int, fit: str) -> np.ndarray:
    scale = size / (max(gray.size) if fit == "letterbox" else min(gray.size))
    width, height = (max(1, round(side * scale)) for side in gray.size)
    resized = np.asarray(gray.resize((width, height), Image.Resampling.LANCZOS))
    levels = resized.round().clip(0, 255).astype(np.uint8)
    if fit == "crop":
        top, left = (height - size) // 2, (width - size) // 2
        return levels[top : top + size, left : left + size]
    canvas = np.zeros((size, size), np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top : top + height, left : left + width] = levels
    return canvas
