"""Choose among the candidates of a sweep: score all of them, filter, take the best that passes.

A `Scorer` turns counterfactuals into named numbers. Three are here: similarity in an image-text model (the filters of
InstructPix2Pix, LANCE and PRISM), identity, and a guide classifier. `select` merges the scores, applies the criteria to
every candidate and takes the best of all that pass. (PRISM's code resets its best within the sweep, so that a later,
worse edit can win.) An image of which no candidate passes gets the reasons instead of a winner.

The judge measures counterfactuals and must not choose them, or its numbers would prove nothing: `load_guide` refuses it
under every name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from prism_lib import paths
from prism_lib.editing.counterfactuals import Counterfactual, stack
from prism_lib.evaluation import metrics
from prism_lib.evaluation.criteria import GUIDE, IDENTITY, SIMILARITY, Criteria
from prism_lib.files import file_hash, image_hash
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import Classifier
from prism_lib.models.image_text import ImageTextModel

Scores = dict[str, float]


class Scorer(Protocol):
    """Names and computes scores of counterfactuals, each from its own image, prompts and mask alone."""

    def scores(self, candidates: Sequence[Counterfactual]) -> list[Scores]:
        """One mapping per candidate, all with the same names."""
        ...


@dataclass(frozen=True)
class SimilarityScorer:
    """How image and words agree, by an image-text model; cosines in [-1, 1].

    `image_image`: cos(I_source, I_edit). `image_text_source` and `image_text`: each image with its own prompt.
    `directional`: cos(I_edit - I_source, T_target - T_source) (Gal et al., 2022), 0 where either stands still.
    `consistency`: cos(I_edit, T_target) - cos(I_edit, T_source), positive where the edit reads as its target: the
    prediction consistency of LANCE as a margin.
    """

    NAMES: ClassVar = SIMILARITY

    model: ImageTextModel

    def scores(self, candidates: Sequence[Counterfactual]) -> list[Scores]:
        """Every distinct image and text is encoded once, however many candidates share it."""
        before, after = self._images([c.factual for c in candidates]), self._images([c.image for c in candidates])
        source, target = (self._texts([getattr(c.pair, side) for c in candidates]) for side in ("source", "target"))
        columns = {
            "image_image": (before * after).sum(1),
            "image_text_source": (before * source).sum(1),
            "image_text": (after * target).sum(1),
            "directional": metrics.directional_similarity(before, after, source, target),
            "consistency": (after * target).sum(1) - (after * source).sum(1),
        }
        return _rows(columns)

    def _images(self, images: Sequence[Tensor]) -> Tensor:
        keys = [image_hash(image) for image in images]
        distinct = dict(zip(keys, images, strict=True))
        place = {key: row for row, key in enumerate(distinct)}
        return self.model.embed_images(torch.stack(list(distinct.values())))[[place[key] for key in keys]]

    def _texts(self, texts: Sequence[str]) -> Tensor:
        place = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        return self.model.embed_texts(list(place))[[place[text] for text in texts]]


@dataclass(frozen=True)
class IdentityScorer:
    """How much of the input is left: `ssim` (1 is all) and `identity_l1` (0 is all) to the input image.

    What the edit changed outside its mask before the composite, `change_outside_mask`, is with every candidate.
    """

    NAMES: ClassVar = IDENTITY

    def scores(self, candidates: Sequence[Counterfactual]) -> list[Scores]:
        """SSIM and mean absolute difference of counterfactual and input."""
        images, factual = stack(candidates), stack(candidates, "factual")
        return _rows({"ssim": metrics.ssim(images, factual), "identity_l1": metrics.l1(images, factual)})


@dataclass(frozen=True)
class GuideScorer:
    """What a guide reads: `guide`, the least probability of the edit's own targets, and `guide_gain` over the input."""

    NAMES: ClassVar = GUIDE

    guide: Classifier
    edit: Edit

    def __post_init__(self) -> None:
        if unread := [name for name in (*self.edit.remove, *self.edit.add) if name not in self.guide.labels]:
            raise ValueError(f"the guide does not read {', '.join(unread)}; it reads {', '.join(self.guide.labels)}")
        if not self.edit.attributes:
            raise ValueError(f"a guide reads labels, and the edit {self.edit.key} names none")

    def scores(self, candidates: Sequence[Counterfactual]) -> list[Scores]:
        """Probabilities in [0, 1] and their gains in [-1, 1]."""
        after, before = (self._towards(stack(candidates, name)) for name in ("image", "factual"))
        return _rows({"guide": after.amin(1), "guide_gain": (after - before).amin(1)})

    def _towards(self, images: Tensor) -> Tensor:
        """Probability of the target value of each label that the edit changes, (N, changes)."""
        probabilities = self.guide.read(images)
        targets = [(name, 0) for name in self.edit.remove] + [(name, 1) for name in self.edit.add]
        columns = [probabilities[:, self.guide.labels.index(name)] for name, _ in targets]
        return torch.stack([p if target else 1 - p for p, (_, target) in zip(columns, targets, strict=True)], 1)


def load_guide(name: str, judge: str = "phantom-judge") -> Classifier:
    """The classifier `name` below PRISM_WEIGHTS as a guide; ValueError if it is the judge or a copy of its weights."""
    folders = paths.weights() / name, paths.weights() / judge
    weights = [path for folder in folders if (path := folder / "model.safetensors").is_file()]
    if folders[0].resolve() == folders[1].resolve() or (len(weights) == 2 and len({*map(file_hash, weights)}) == 1):
        raise ValueError(f"{name!r} is the judge {judge!r}: it measures counterfactuals and must not select them")
    return Classifier.load(folders[0])


@dataclass(frozen=True)
class Selection:
    """What became of the candidates of one image: every one's scores, why it failed (() if it passed), the winner.

    `winner` is its place among the candidates and `best` the candidate itself; both None if nothing passed.
    """

    scores: tuple[Scores, ...]
    failures: tuple[tuple[str, ...], ...]
    winner: int | None
    best: Counterfactual | None

    def summary(self) -> str:
        """One line: which candidate won, or why none did."""
        passed = sum(not reasons for reasons in self.failures)
        if self.winner is not None:
            return f"candidate {self.winner} of {len(self.scores)}, {passed} passed"
        reasons = "; ".join(f"{place}: {', '.join(found)}" for place, found in enumerate(self.failures))
        return f"none of {len(self.scores)} candidates passed ({reasons})"


def select(candidates: Sequence[Counterfactual], scorers: Sequence[Scorer], criteria: Criteria) -> Selection:
    """The best candidate of one image under `criteria`; of equals the first."""
    return select_each([candidates], scorers, criteria)[0]


def select_each(
    groups: Sequence[Sequence[Counterfactual]], scorers: Sequence[Scorer], criteria: Criteria
) -> list[Selection]:
    """`select` for every image of a sweep, with all candidates scored together."""
    if empty := [row for row, group in enumerate(groups) if not group]:
        raise ValueError(f"images {empty} have no candidates to select from")
    flat = [candidate for group in groups for candidate in group]
    if not flat:
        return []
    merged: list[Scores] = [dict(candidate.scores) for candidate in flat]
    for scorer in scorers:
        for scores, more in zip(merged, scorer.scores(flat), strict=True):
            if twice := scores.keys() & more.keys():
                raise ValueError(f"two scorers give {', '.join(sorted(twice))}")
            scores |= more
    selections, start = [], 0
    for group in groups:
        selections.append(_choose(group, merged[start : start + len(group)], criteria))
        start += len(group)
    return selections


def _choose(candidates: Sequence[Counterfactual], scores: Sequence[Scores], criteria: Criteria) -> Selection:
    failures = tuple(criteria.failures(values) for values in scores)
    passed = [place for place, reasons in enumerate(failures) if not reasons]
    winner = max(passed, key=lambda place: scores[place][criteria.best], default=None)
    return Selection(tuple(scores), failures, winner, None if winner is None else candidates[winner])


def _rows(columns: Mapping[str, Tensor]) -> list[Scores]:
    values = {name: column.tolist() for name, column in columns.items()}
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
