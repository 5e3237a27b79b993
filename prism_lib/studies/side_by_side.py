"""Classifiers that are trained side by side: a small network keeps one core busy and no more.

Every process has one thread, so that none waits for another, and classifiers do not depend on how many there are. One
process is this one, with all of its threads: sums are then rounded otherwise, which training amplifies.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from prism_lib.models.classifier import ClassifierConfig, predict, train_classifier

Key = TypeVar("Key")


@dataclass(frozen=True)
class Task:
    """One classifier: what `train_classifier` takes, and the images (M, 1, H, W) that it reads afterwards."""

    images: Tensor
    labels: Tensor
    groups: Tensor
    config: ClassifierConfig
    read: Tensor

    def run(self, progress: bool = True) -> Tensor:
        """Train; probabilities (M, L) of `read`."""
        model = train_classifier(self.images, self.labels, self.config, groups=self.groups, progress=progress)
        return predict(model, self.read)


def train(tasks: Iterable[tuple[Key, Task]], processes: int = 1) -> Iterator[tuple[Key, Tensor]]:
    """Every task's key and readings, as they are finished; with one process here, and in order.

    Tasks are drawn as they are needed, so memory does not grow with their number.
    """
    if processes == 1:
        for key, task in tasks:
            yield key, task.run()
        return
    # Spawned: a forked process would inherit the threads and locks of torch and of the notebook.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))
    pending: dict[Future[np.ndarray], Key] = {}
    try:
        for key, task in tasks:
            pending[pool.submit(_run, *_plain(task))] = key
            if len(pending) > processes:  # one more than can run, so that none waits
                yield from _finished(pending)
        while pending:
            yield from _finished(pending)
    except BrokenProcessPool as error:
        raise RuntimeError(
            'a process that trains a classifier ended: out of memory, or a script without `if __name__ == "__main__":`'
            "; what is finished is kept, and processes=1 needs neither"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(pending: dict[Future[np.ndarray], Key]) -> Iterator[tuple[Key, Tensor]]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), torch.from_numpy(future.result())


def _plain(task: Task) -> tuple[ClassifierConfig, dict[str, np.ndarray]]:
    """Arrays, which are copied through a pipe: tensors would fill the shared memory, which containers keep small."""
    arrays = {name: value.numpy() for name, value in vars(task).items() if isinstance(value, Tensor)}
    return task.config, arrays


def _run(config: ClassifierConfig, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Runs in another process."""
    task = Task(config=config, **{name: torch.from_numpy(value) for name, value in arrays.items()})
    return task.run(progress=False).numpy()
