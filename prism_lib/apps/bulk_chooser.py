"""Chooses among the candidates of a bulk row (`apps.bulk_choice`), and writes down what became of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_lib import paths
from prism_lib.apps.bulk_choice import Choice
from prism_lib.editing.counterfactuals import Counterfactual
from prism_lib.editing.settings import EditConfig
from prism_lib.evaluation.selection import (
    GuideScorer,
    IdentityScorer,
    Scorer,
    Selection,
    SimilarityScorer,
    load_guide,
    select,
)
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import Classifier
from prism_lib.models.image_text import load_image_text_model, weight_files

MADE, SELECTED, REJECTED = "made", "selected", "no candidate passed"


class Chooser:
    """Chooses among candidates; every guide and every image-text model is loaded once."""

    def __init__(self) -> None:
        self._guides: dict[str, Classifier] = {}
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


def digests(choice: Choice) -> dict[str, str]:
    """SHA-256 of the weights of what scores: another guide of the same name chooses other results."""
    found = {}
    if choice.guide:
        found["guide"] = _sha256(paths.weights() / choice.guide / "model.safetensors")
    if choice.similarity:
        found["similarity"] = " ".join(_sha256(file) for file in weight_files(choice.similarity))
    return found


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
