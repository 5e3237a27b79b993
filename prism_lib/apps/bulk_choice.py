"""Bulk edits that are chosen among candidates: what a row may ask for; `apps.bulk_chooser` then chooses.

A row with `sweep` makes a candidate of every combination of settings (`editing.sweep`) and takes the best of those that
pass (`selection.select`). A guide classifier may score, the judge never. That nothing passes is an outcome of the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prism_lib.apps.profiles import coerce
from prism_lib.evaluation import criteria
from prism_lib.evaluation.criteria import Criteria


@dataclass(frozen=True)
class Choice:
    """How the result of a row is chosen.

    Args:
        sweep: values to try by field of `EditConfig`, {"self_replace_steps": [0.2, 0.4]}.
        guide: a classifier below PRISM_WEIGHTS that scores `guide` and `guide_gain`; "" for none.
        similarity: a CLIP or SigLIP model that scores as `SimilarityScorer` says, such as `directional`: a folder, also
            below PRISM_RUNS or PRISM_WEIGHTS, or a hub id; "" for none.
        best: the score to maximise; "" for `guide_gain`, or for `directional` without a guide.
        at_least, at_most: bounds by score that a candidate has to keep.
    """

    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict, hash=False)
    guide: str = ""
    similarity: str = ""
    best: str = ""
    at_least: Mapping[str, float] = field(default_factory=dict, hash=False)
    at_most: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        known = (*criteria.EDIT, *criteria.IDENTITY)
        known += (*(criteria.GUIDE if self.guide else ()), *(criteria.SIMILARITY if self.similarity else ()))
        if not (self.best or self.guide or self.similarity):
            raise ValueError("a sweep needs a guide or a similarity to choose by, or best, the score to maximise")
        for name, bounds in (("at_least", self.at_least), ("at_most", self.at_most)):
            for score, bound in bounds.items():
                if isinstance(bound, bool) or not isinstance(bound, int | float):
                    raise ValueError(f"{name} is {bound!r} for {score!r}; expected a number")
        for score in (self.criteria.best, *self.at_least, *self.at_most):
            if score not in known:
                takers = {"a guide": criteria.GUIDE, "a similarity": criteria.SIMILARITY}
                hint = "".join(f" (it takes {what})" for what, names in takers.items() if score in names)
                raise ValueError(f"unknown score {score!r}{hint}; known: {', '.join(known)}")

    @classmethod
    def of(cls, values: Mapping[str, Any], fields: Mapping[str, Any]) -> Choice:
        """From the columns of a row; every value of the sweep in the type of its field's default in `fields`."""
        if unknown := sorted(set(values["sweep"]) - set(fields)):
            raise ValueError(f"sweep: unknown setting {', '.join(map(repr, unknown))}; known: {', '.join(fields)}")
        if empty := [
            name for name, tried in values["sweep"].items() if not isinstance(tried, list | tuple) or not tried
        ]:
            raise ValueError(f"sweep: {empty[0]} takes a list of values to try, not {values['sweep'][empty[0]]!r}")
        tried = {name: [coerce(name, value, fields[name]) for value in own] for name, own in values["sweep"].items()}
        return cls(**{**values, "sweep": tried})

    @property
    def criteria(self) -> Criteria:
        """As `selection` takes them."""
        best = self.best or ("guide_gain" if self.guide else "directional")
        return Criteria(best, self.at_least, self.at_most)
