"""Chooses among the candidates of a bulk row (`bulk_plan.Choice`), and writes down what became of each."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from prism_lib import paths
from prism_lib.apps.bulk_plan import Choice, Task
from prism_lib.editing.counterfactuals import Counterfactual
from prism_lib.editing.settings import EditConfig
from prism_lib.evaluation.selection import (
    GuideScorer,
    IdentityScorer,
    Scorer,
    SimilarityScorer,
    load_guide,
    select,
)
from prism_lib.files import file_hash
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import Classifier
from prism_lib.models.image_text import load_image_text_model, weight_files

MADE, SELECTED, REJECTED = "made", "selected", "no candidate passed"


class Chooser:
    """Chooses among candidates; every guide and every image-text model is loaded once, before the work.

    A guide that is missing, is the judge or does not read its edit raises ValueError or FileNotFoundError.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._guides: dict[str, Classifier] = {}
        self._similarities: dict[str, SimilarityScorer] = {}
        for choice, edit in {(t.settings.choice, t.edit): None for t in tasks if t.settings.choice is not None}:
            self.scorers(choice, edit)

    def scorers(self, choice: Choice, edit: Edit) -> list[Scorer]:
        """What scores the candidates of an edit."""
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

    def choose(self, task: Task, candidates: Sequence[Counterfactual]) -> tuple[Counterfactual | None, dict[str, Any]]:
        """The result of one image, None if nothing passed, and the columns that say how it came about.

        Candidates are scored image by image, so that no score depends on an image's neighbours.
        """
        choice = task.settings.choice
        if choice is None:
            (only,) = candidates
            return only, _columns(task, MADE, only, only.scores)
        selection = select(candidates, self.scorers(choice, task.edit), choice.criteria)
        tried = zip(task.settings.candidates, selection.scores, selection.failures, strict=True)
        rows = [
            {"settings": {name: given[name] for name in choice.sweep}, "scores": scores, "failures": failures}
            for given, scores, failures in tried
        ]
        winner = selection.winner
        if winner is None:
            columns = _columns(task, REJECTED, candidates[0], {}, without=choice.sweep)
        else:
            columns = _columns(task, SELECTED, candidates[winner], selection.scores[winner])
        return selection.best, columns | {"winner": winner, "candidates": json.dumps(rows)}


def _columns(
    task: Task, status: str, result: Counterfactual, scores: Mapping[str, float], without: Container[str] = ()
) -> dict[str, Any]:
    """The columns of settings, all that were used, status and scores."""
    assert isinstance(result.settings, EditConfig)
    settings = json.loads(task.settings.text)
    settings["edit"] = {name: value for name, value in record(result.settings).items() if name not in without}
    named = {f"score_{name}": value for name, value in scores.items()}
    return {"settings": json.dumps(settings, sort_keys=True), "status": status, **named}


def weights(choice: Choice | None) -> list[str]:
    """SHA-256 of the weights of what scores: another guide of the same name chooses other results."""
    files = [] if choice is None or not choice.guide else [paths.weights() / choice.guide / "model.safetensors"]
    files += [] if choice is None or not choice.similarity else weight_files(choice.similarity)
    return [file_hash(file) for file in files]


def record(settings: EditConfig) -> dict[str, Any]:
    """Settings for the manifest; how many images are computed at a time is no setting of the result."""
    return {name: value for name, value in asdict(settings).items() if name != "batch_size"}
