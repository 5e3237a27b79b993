"""Bulk edits that are chosen among candidates: what a row may ask for, and what became of it.

A row with `sweep` makes a candidate of every combination of settings (`editing.sweep`) and takes the best of those that
pass (`selection.select`). A guide classifier may score, the judge never. That nothing passes is an outcome of the row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prism_lib import paths
from prism_lib.edit_config import EditConfig
from prism_lib.editing import SCORES, Counterfactual
from prism_lib.profiles import coerce
from prism_lib.prompts import Edit
from prism_lib.selection import Criteria, Guide, GuideScorer, IdentityScorer, Scorer, Selection, load_guide, select

MADE, SELECTED, REJECTED = "made", "selected", "no candidate passed"


@dataclass(frozen=True)
class Choice:
    """How the result of a row is chosen.

    Args:
        sweep: values to try by field of `EditConfig`, {"self_replace_steps": [0.2, 0.4]}.
        guide: a classifier below PRISM_WEIGHTS that scores `guide` and `guide_gain`; "" for none.
        best: the score to maximise; "" for `guide_gain`.
        at_least, at_most: bounds by score that a candidate has to keep.
    """

    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict, hash=False)
    guide: str = ""
    best: str = ""
    at_least: Mapping[str, float] = field(default_factory=dict, hash=False)
    at_most: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        known = (*SCORES, *IdentityScorer.NAMES, *(GuideScorer.NAMES if self.guide else ()))
        if not self.best and not self.guide:
            raise ValueError("a sweep needs a guide to choose by, or best, the score to maximise")
        for name, bounds in (("at_least", self.at_least), ("at_most", self.at_most)):
            for score, bound in bounds.items():
                if isinstance(bound, bool) or not isinstance(bound, int | float):
                    raise ValueError(f"{name} is {bound!r} for {score!r}; expected a number")
        for score in (self.criteria.best, *self.at_least, *self.at_most):
            if score not in known:
                hint = " (it takes a guide)" if score in GuideScorer.NAMES else ""
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
        return Criteria(self.best or "guide_gain", self.at_least, self.at_most)

    def digest(self) -> str:
        """SHA-256 of the guide's weights: another guide of the same name chooses other results."""
        return hashlib.sha256((paths.weights() / self.guide / "model.safetensors").read_bytes()).hexdigest()


class Chooser:
    """Chooses among candidates; every guide is loaded once."""

    def __init__(self) -> None:
        self._guides: dict[str, Guide] = {}

    def scorers(self, choice: Choice, edit: Edit) -> list[Scorer]:
        """What scores an edit's candidates; ValueError for a guide that is the judge or does not read the edit."""
        if not choice.guide:
            return [IdentityScorer()]
        if choice.guide not in self._guides:
            self._guides[choice.guide] = load_guide(choice.guide)
        return [IdentityScorer(), GuideScorer(self._guides[choice.guide], edit)]

    def choose(
        self, choice: Choice | None, edit: Edit, candidates: Sequence[Counterfactual]
    ) -> tuple[Counterfactual | None, dict[str, Any]]:
        """The result of one image, None if nothing passed, and the columns that say how it came about.

        Candidates are scored image by image, so that no score depends on an image's neighbours.
        """
        if choice is None:
            (only,) = candidates
            return only, _columns(MADE, only.scores)
        selection = select(candidates, self.scorers(choice, edit), choice.criteria)
        winner = selection.winner
        columns = _columns(REJECTED, {}) if winner is None else _columns(SELECTED, selection.scores[winner])
        return selection.best, columns | {"winner": winner, "candidates": _record(choice, candidates, selection)}


def _columns(status: str, scores: Mapping[str, float]) -> dict[str, Any]:
    return {"status": status, **{f"score_{name}": value for name, value in scores.items()}}


def _record(choice: Choice, candidates: Sequence[Counterfactual], selection: Selection) -> str:
    """Every candidate as JSON: what was tried, its scores, and why it failed."""
    rows = []
    for candidate, scores, failures in zip(candidates, selection.scores, selection.failures, strict=True):
        assert isinstance(candidate.settings, EditConfig)
        tried = {name: getattr(candidate.settings, name) for name in choice.sweep}
        rows.append({"settings": tried, "scores": scores, "failures": failures})
    return json.dumps(rows)
