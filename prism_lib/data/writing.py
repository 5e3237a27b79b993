"""The long part of preparing a data set: read, reduce and write every image, in several processes if asked.

Rows go out in batches of fixed size and come back in order, a few batches ahead of the writer, so memory does not grow
with the table and the result does not depend on the number of processes. Every finished batch is a line in a journal.
A run that was stopped, even by kill -9, goes on behind the batches whose files are all there, byte for byte.

A process that only reads image files loads neither torch nor diffusers.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from prism_lib.data.images import Rejection
from prism_lib.data.sources import BATCH, Reader

JOURNAL = "journal.jsonl"
BATCHES_AHEAD = 4  # per process: enough that none waits, few enough that memory stays flat


@dataclass(frozen=True)
class Written:
    """An image that was written: hashes of the file and of its pixels, and what only its source file knew."""

    file_name: str
    file_hash: str
    pixel_hash: str
    columns: Mapping[str, Any] = field(default_factory=dict)


Outcome = Written | Rejection


def write_images(
    images: Reader, plan: pd.DataFrame, folder: Path, key: str, processes: int = 1
) -> Generator[list[Outcome]]:
    """Write the images of `plan` to its "file_name"s below `folder`; yields what became of every batch, in order.

    Args:
        key: whose work the journal in `folder` may be continued; that of another key is begun again.
        processes: how many processes read and write; 1 is this one.
    """
    starts = range(0, len(plan), BATCH)
    done = _resume(folder, key)
    _begin(folder / JOURNAL, key, done)
    left = [start for start in starts if start not in done]
    missing = (plan.iloc[start : start + BATCH] for start in left)
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        fresh = _in_parallel(images, missing, folder, processes) if processes > 1 else _here(images, missing, folder)
        for start in starts:
            outcome = done.pop(start, None)
            if outcome is None:
                outcome = next(fresh)
                journal.write(json.dumps({"start": start, "outcome": [asdict(item) for item in outcome]}) + "\n")
                journal.flush()
            yield outcome


def _here(images: Reader, batches: Iterator[pd.DataFrame], folder: Path) -> Iterator[list[Outcome]]:
    return (_write_batch(images, rows, folder) for rows in batches)


def _in_parallel(
    images: Reader, batches: Iterator[pd.DataFrame], folder: Path, processes: int
) -> Iterator[list[Outcome]]:
    """Spawned processes: a forked one would inherit the threads and locks of torch and of the notebook."""
    context = multiprocessing.get_context("spawn")
    pending: deque[Future[list[Outcome]]] = deque()
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_one_thread)
    try:
        for rows in batches:
            pending.append(pool.submit(_write_batch, images, rows, folder))
            if len(pending) >= BATCHES_AHEAD * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            'a process that reads images ended: out of memory, or a script without `if __name__ == "__main__":`; '
            "what is finished is kept, and processes=1 needs neither"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """Processes are the parallelism; threads in each would only get in each other's way."""
    os.environ["OMP_NUM_THREADS"] = "1"


def _write_batch(images: Reader, rows: pd.DataFrame, folder: Path) -> list[Outcome]:
    """Write one batch; runs in any process."""
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


def _resume(folder: Path, key: str) -> dict[int, list[Outcome]]:
    """The batches that a journal of this key has finished and whose files are whole.

    Rejected files may have been mended since, so their batches are read again.
    """
    try:
        lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines()
        if not lines or json.loads(lines[0]) != {"key": key}:
            return {}
    except (FileNotFoundError, ValueError):
        return {}
    done: dict[int, list[Outcome]] = {}
    for line in lines[1:]:
        try:
            entry = json.loads(line)
        except ValueError:
            break  # the line at which the run was killed
        if all("file_hash" in item and _is_whole(folder, item) for item in entry["outcome"]):
            done[entry["start"]] = [Written(**item) for item in entry["outcome"]]
    return done


def _is_whole(folder: Path, item: Mapping[str, Any]) -> bool:
    try:
        return hashlib.sha256((folder / item["file_name"]).read_bytes()).hexdigest() == item["file_hash"]
    except OSError:
        return False


def _begin(journal: Path, key: str, done: Mapping[int, Sequence[Outcome]]) -> None:
    """Write the journal with what is still valid of it."""
    partial = journal.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"key": key}) + "\n")
        for start, outcome in done.items():
            file.write(json.dumps({"start": start, "outcome": [asdict(item) for item in outcome]}) + "\n")
    partial.replace(journal)
