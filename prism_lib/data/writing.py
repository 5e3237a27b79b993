"""The long part of preparing a data set: read, reduce and write every image, in several processes if asked.

Batches come back in order, so the result does not depend on the number of processes. Every finished batch leaves a
record: a run that was stopped, even by kill -9, keeps the batches whose files are there, byte for byte.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Generator, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from prism_lib.data.images import Reader, Rejection
from prism_lib.files import file_hash, write_text

BATCH = 32  # rows that a reader gets at once


@dataclass(frozen=True)
class Written:
    """An image that was written: hashes of the file and of its pixels, and the columns that its source file gave."""

    file_name: str
    file_hash: str
    pixel_hash: str
    columns: Mapping[str, Any]


Outcome = Written | Rejection


def write_images(
    images: Reader, plan: pd.DataFrame, folder: Path, key: str, processes: int = 1
) -> Generator[list[Outcome]]:
    """Write the images of `plan` to its "file_name"s below `folder`; yields the outcomes of every batch, in order.

    Batches that work of the same `key` has finished are not read again. RuntimeError if one of the processes dies.
    """
    from prism_lib.devices import side_by_side  # late: it loads torch, which the reading processes do not need

    batches = (plan.iloc[start : start + BATCH] for start in range(0, len(plan), BATCH))
    try:
        yield from side_by_side(partial(_write_batch, images, folder, key), batches, processes)
    except BrokenProcessPool as error:
        reason = "a process that reads images died, perhaps for want of memory"
        raise RuntimeError(f"{reason}; finished images are kept, and processes=1 needs less") from error


def _write_batch(images: Reader, folder: Path, key: str, rows: pd.DataFrame) -> list[Outcome]:
    """One batch. A batch with a rejected file leaves no record, because the file may be repaired until the next run."""
    record = folder / f"{key}-{rows.index[0]}.json"
    if record.is_file():
        finished = [Written(**item) for item in json.loads(record.read_text(encoding="utf-8"))]
        files = [(folder / item.file_name, item.file_hash) for item in finished]
        if all(file.is_file() and file_hash(file) == digest for file, digest in files):
            return [*finished]
    outcomes: list[Outcome] = []
    for file_name, image in zip(rows["file_name"], images(rows), strict=True):
        if isinstance(image, Rejection):
            outcomes.append(image)
            continue
        file = io.BytesIO()
        Image.fromarray(image.pixels).save(file, format="PNG")
        try:
            (folder / file_name).write_bytes(file.getbuffer())
        except OSError as error:
            raise OSError(error.errno, f"cannot write {file_name}: {error.strerror}", str(folder)) from error
        pixels = hashlib.sha256(repr(image.pixels.shape).encode() + image.pixels.tobytes()).hexdigest()
        outcomes.append(Written(file_name, hashlib.sha256(file.getbuffer()).hexdigest(), pixels, dict(image.columns)))
    if all(isinstance(item, Written) for item in outcomes):
        write_text(record, json.dumps([asdict(item) for item in outcomes]))
    return outcomes
