"""Work that a sweep over settings would do again and again, done once.

Inside of `kept` the same question gets the answer that was given before. `remember` asks; outside of the block it only
does the work, so nothing stays in memory and what is timed is timed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Result = TypeVar("Result")

_answers: ContextVar[dict[Hashable, Any] | None] = ContextVar("answers", default=None)


@contextmanager
def kept() -> Iterator[None]:
    """Keep answers until the block ends. Networks must not change inside of it; answers must not be changed at all."""
    token = _answers.set({})
    try:
        yield
    finally:
        _answers.reset(token)


def remember(question: Hashable, work: Callable[[], Result]) -> Result:
    """What `work` gives, or gave to the same question.

    ``question`` has to name all that decides it, models as themselves: the `id` of one that is gone can be another's.
    """
    answers = _answers.get()
    if answers is None:
        return work()
    if question not in answers:
        answers[question] = work()
    answer: Result = answers[question]
    return answer
