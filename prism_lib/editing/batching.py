"""Batches that shrink where the accelerator's memory does not hold them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def in_parts(parts: Sequence[slice], work: Callable[[slice], list[Result]]) -> list[Result]:
    """What `work` makes of every part (`slice`s with start and stop), one after the other, as one list.

    A part that raises torch.OutOfMemoryError is done in halves, and so on; no later part is larger than those. A single
    row that does not fit raises. Rows must not depend on each other: then smaller parts change results by rounding
    alone.
    """
    results: list[Result] = []
    waiting = list(reversed(parts))
    limit = max((part.stop - part.start for part in parts), default=0)
    while waiting:
        part = waiting.pop()
        if part.stop - part.start > limit:
            waiting.append(slice(part.start + limit, part.stop))
            part = slice(part.start, part.start + limit)
        try:
            results += work(part)
            continue
        except torch.OutOfMemoryError:
            if part.stop - part.start == 1:
                raise
        # Outside of the handler: its traceback would keep the tensors of the failed attempt alive.
        limit = (part.stop - part.start) // 2
        waiting.append(part)
        logger.warning("out of memory: going on with at most %d at a time", limit)
        torch.cuda.empty_cache()
    return results
