"""Which edits of a sweep can still share a U-Net row, step by step.

Edits of one image that have done the same so far have the same latents: they are one row until they differ, and then
the row forks. A sweep over five windows of self-attention so costs 140 rows in 50 steps instead of 250.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """The rows of one step.

    `leads` holds one edit of each row, to ask for settings; `origins` the row of the step before that each goes on
    from, and `row_of` the row of every edit.
    """

    leads: tuple[int, ...]
    origins: tuple[int, ...]
    row_of: tuple[int, ...]


def stages(edits: int, num_steps: int, behaviour: Callable[[int, int], Hashable]) -> list[Stage]:
    """The stages of `edits` edits, given what `behaviour(edit, step)` makes of the latents at each step.

    Behaviour must name all that the edit does at that step, its image included; rows keep the order of their edits.
    """
    found: list[Stage] = []
    history: tuple[int, ...] = (0,) * edits
    for step in range(num_steps):
        place: dict[Hashable, int] = {}
        row_of, leads = [], []
        for edit in range(edits):
            key = history[edit], behaviour(edit, step)
            if key not in place:
                place[key] = len(place)
                leads.append(edit)
            row_of.append(place[key])
        found.append(Stage(tuple(leads), tuple(history[lead] for lead in leads), tuple(row_of)))
        history = tuple(row_of)
    return found
