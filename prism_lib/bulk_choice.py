"""Bulk edits that are chosen among candidates: what a row may ask for, and what became of it.

A row with `sweep` makes a candidate of every combination of settings (`editing.sweep`) and takes the best of those that
pass (`selection.select`). A guide classifier may score, the judge never. That nothing passes is an outcome of the row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_lib import paths
from prism_lib.edit_config import EditConfig
from prism_lib.editing import SCORES, Counterfactual
from prism_lib.image_text import load_image_text_model, weight_files
from prism_lib.profiles import coerce
from prism_lib.prompts import Edit
from prism_lib.selection import (
    Criteria,
    Guide,
    GuideScorer,
    IdentityScorer,
    Scorer,
    Selection,
    SimilarityScorer,
    load_guide,
    select,
)

MADE, SELECTED, REJECTED = "made", "selected", "no candidate passed"


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
        known = (*SCORES, *IdentityScorer.NAMES)
        known += (*(GuideScorer.NAMES if self.guide else ()), *(SimilarityScorer.NAMES if self.similarity else ()))
        if not (self.best or self.guide or self.similarity):
            raise ValueError("a sweep needs a guide or a similarity to choose by, or best, the score to maximise")
        for name, bounds in (("at_least", self.at_least), ("at_most", self.at_most)):
            for score, bound in bounds.items():
                if isinstance(bound, bool) or not isinstance(bound, int | float):
                    raise ValueError(f"{name} is {bound!r} for {score!r}; expected a number")
        for score in (self.criteria.best, *self.at_least, *self.at_most):
            if score not in known:
                takers = {"a guide": GuideScorer.NAMES, "a similarity": SimilarityScorer.NAMES}
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

    def digests(self) -> dict[str, str]:
        """SHA-256 of the weights of what scores: another guide of the same name chooses other results."""
        found = {}
        if self.guide:
            found["guide"] = _sha256(paths.weights() / self.guide / "model.safetensors")
        if self.similarity:
            found["similarity"] = " ".join(_sha256(file) for file in weight_files(self.similarity))
        return found


class Chooser:
    """Chooses among candidates; every guide and every image-text model is loaded once."""

    def __init__(self) -> None:
        self._guides: dict[str, Guide] = {}
        self._similarities: dict[str, SimilarityScorer] = {}

    def scorers(self, choice: Choice, edit: Edit) -> list[Scorer]:
        """What scores an edit's candidates; ValueError for a guide that is the judge or does not read the edit."""
        scorers: list[Scorer] = [IdentityScorer()]
        if choice.guide:
            if choice.guide not in self._guides:
                self._guides[choice.guide] = load_guide(choice.guide)
            scorers.append(GuideScorer(self._guides[choice.guide], edit))
        if choice.similarity:
            if choice.similarity not in self._similarities:
                self._similarities[choice.similarity] = SimilarityScorer(load_image_text_model(choice.similarity))
            scorers.append(self._similarities[choice.similarity])
        return scorers

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


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
