"""The prepared folder, in Hugging Face's *imagefolder* convention: how it is written and read.

train/*.png, val/*.png, test/*.png; metadata.csv, a row per image (file_name, patient_id, split, text, labels), and
beside the images its rows of the split, where `load_dataset` looks for them; dataset.json, the origin of it all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from prism_lib.files import exclusive
from prism_lib.language.labels import Vocabulary, vocabulary

FORMAT = 2  # 2: captions are drawn as training draws them, label policies are mappings
SPLITS = ("train", "val", "test")
REPORT = "free_caption"  # column of captions that a person wrote, where there are such

Folder = str | os.PathLike[str]


def load_info(folder: Folder) -> dict[str, Any]:
    """The `dataset.json` of a prepared folder."""
    path = Path(folder) / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a prepared data set: it has no dataset.json; 01_data makes one")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}: prepare the data set again")
    return info


def load_vocabulary(folder: Folder) -> Vocabulary:
    """The words of a prepared folder's captions, as they were when it was prepared."""
    info = load_info(folder)
    return vocabulary(info["config"]["vocabulary"], info["labels"], info["config"].get("subject", ""))


def truth_is_known(folder: Folder) -> bool:
    """Whether true counterfactuals of a prepared folder's images can be rendered: only those of phantoms can."""
    return bool(load_info(folder)["source"] == "phantom")


def load_table(folder: Folder, split: str | None = None) -> pd.DataFrame:
    """The metadata of a prepared folder, all of it or one split; labels are 1, 0, -1 or NaN."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    labels = load_info(folder)["labels"]
    path = Path(folder) / "metadata.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no metadata.csv: prepare the data set again")
    table = pd.read_csv(path, dtype=dict.fromkeys(("file_name", "patient_id", "split", "text"), str))
    for column in ("file_name", "patient_id", "split", "text", *labels):
        if column not in table:
            raise ValueError(f"{path} lacks the column {column!r}")
    return table if split is None else table[table["split"] == split].reset_index(drop=True)


def read_images(folder: Folder, table: pd.DataFrame) -> Tensor:
    """The images of a table's rows, float32 (N, C, H, W) in [0, 1]; C is 1 for gray and 3 for colour."""
    if table.empty:
        raise ValueError(f"no images to read from {folder}: the table has no rows")
    root = Path(folder).resolve()
    images: list[np.ndarray] = []
    for name in table["file_name"]:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise ValueError(f"file_name {name!r} leads outside the prepared folder {root}")
        try:
            with Image.open(path) as file:
                pixels = np.atleast_3d(np.asarray(file))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
            raise ValueError(f"{path} is {pixels.shape} {pixels.dtype}; expected 8-bit gray or colour")
        images.append(pixels)
        if pixels.shape != images[0].shape:
            raise ValueError(f"{name} is {pixels.shape}, but the images before it are {images[0].shape}")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def image_batches(folder: Folder, table: pd.DataFrame) -> Iterator[Tensor]:
    """`read_images` of 64 rows at a time."""
    return (read_images(folder, table.iloc[first : first + 64]) for first in range(0, len(table), 64))


def write_metadata(folder: Path, metadata: pd.DataFrame, hashes: Mapping[str, str], info: Mapping[str, Any]) -> None:
    """Write the tables and dataset.json of a folder in the making, and remove images that `metadata` does not name.

    `hashes` has the SHA-256 of each file by name, in the order of the table; with the table's it is the content's hash.
    """
    kept = set(metadata["file_name"])
    for split in SPLITS:
        for path in (folder / split).iterdir():
            if f"{split}/{path.name}" not in kept:
                path.unlink()
    metadata.to_csv(folder / "metadata.csv", index=False)
    for name, rows in metadata.groupby("split"):
        own = rows.assign(file_name=rows["file_name"].str.removeprefix(f"{name}/"))
        own.to_csv(folder / str(name) / "metadata.csv", index=False)
    content = hashlib.sha256((folder / "metadata.csv").read_bytes())
    for name, digest in hashes.items():
        content.update(name.encode() + bytes.fromhex(digest))
    text = json.dumps({"format": FORMAT, **info, "content_hash": content.hexdigest()}, indent=2)
    (folder / "dataset.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def building(output: Path) -> Iterator[Path]:
    """A hidden sibling that becomes `output` when the block ends, and stays if it raises; RuntimeError if in use."""
    folder = output.with_name(f".{output.name}.partial")
    try:
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write to the output {output}: {error}") from error
    with exclusive(folder):
        try:
            yield folder
        except BaseException:
            if not any(folder.glob("*/*")):
                shutil.rmtree(folder)
            raise
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("metadata.csv", "dataset.json"):
            path.unlink()  # a record of the work
    folder.replace(output)
