"""The long part of preparing a data set: read, reduce and write every image, in several processes if asked.

Batches come back in order, so the result does not depend on the number of processes. Every finished batch is a line in
a journal: a run that was stopped, even by kill -9, continues after the batches whose files are there, byte for byte.
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

JOURNAL = "journal.jsonl"
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

    A journal in `folder` with the same `key` is continued. RuntimeError if one of the processes dies.
    """
    from prism_lib.devices import side_by_side  # late: it loads torch, which the reading processes do not need

    starts, done = range(0, len(plan), BATCH), _resume(folder, key)
    head = [json.dumps({"key": key}), *(_line(start, outcome) for start, outcome in done.items())]
    write_text(folder / JOURNAL, "\n".join(head) + "\n")
    missing = [plan.iloc[start : start + BATCH] for start in starts if start not in done]
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        fresh = side_by_side(partial(_write_batch, images, folder), missing, processes)
        for start in starts:
            outcome = done.pop(start, None)
            if outcome is None:
                try:
                    outcome = next(fresh)
                except BrokenProcessPool as error:
                    reason = "a process that reads images died, perhaps for want of memory"
                    raise RuntimeError(f"{reason}; finished images are kept, and processes=1 needs less") from error
                journal.write(_line(start, outcome) + "\n")
                journal.flush()
            yield outcome


def _write_batch(images: Reader, folder: Path, rows: pd.DataFrame) -> list[Outcome]:
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
    return outcomes


def _line(start: int, outcome: list[Outcome]) -> str:
    return json.dumps({"start": start, "outcome": [asdict(item) for item in outcome]})


def _resume(folder: Path, key: str) -> dict[int, list[Outcome]]:
    """The batches that a journal of this key has finished and whose files are whole.

    A batch with a rejected file is read again, because the file may have been repaired since.
    """
    path, done = folder / JOURNAL, dict[int, list[Outcome]]()
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if lines[:1] != [json.dumps({"key": key})]:
        return {}
    for line in lines[1:]:
        try:
            entry = json.loads(line)
        except ValueError:
            break  # the line at which the run was killed
        batch = [Written(**item) for item in entry["outcome"] if "file_hash" in item]
        files = [(folder / item.file_name, item.file_hash) for item in batch]
        whole = all(file.is_file() and file_hash(file) == digest for file, digest in files)
        if whole and len(batch) == len(entry["outcome"]):
            done[entry["start"]] = [*batch]
    return done
