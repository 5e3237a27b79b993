"""Choose among the candidates of a sweep: score all, filter, take the best that passes. The judge never scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from pydantic import FiniteFloat
from torch import Tensor

from prism_lib.configs import checked
from prism_lib.evaluation import metrics
from prism_lib.files import file_hash, image_hash
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import Classifier, find_classifier

if TYPE_CHECKING:  # a plan of a bulk run is checked without transformers
    from prism_lib.editing.counterfactuals import Counterfactual
    from prism_lib.models.image_text import ImageTextModel

EDIT = ("mask_area", "change", "change_outside_mask")
SIMILARITY = ("image_image", "image_text_source", "image_text", "directional", "consistency")
IDENTITY = ("ssim", "identity_l1")
GUIDE = ("guide", "guide_gain")

Scores = dict[str, float]


@checked()
class Criteria:
    """The score to maximise, and bounds (inclusive) that a candidate has to keep; they depend on the scoring model."""

    best: str = "directional"
    at_least: Mapping[str, FiniteFloat] = field(default_factory=dict)
    at_most: Mapping[str, FiniteFloat] = field(default_factory=dict)

    def failures(self, scores: Mapping[str, float]) -> tuple[str, ...]:
        """Why a candidate does not pass, () if it does; ValueError for a score that is not there."""
        names = {self.best, *self.at_least, *self.at_most}
        if missing := sorted(names - set(scores)):
            raise ValueError(f"no score {', '.join(missing)}; the scorers give {', '.join(scores)}")
        found = [f"{name} is {scores[name]}" for name in sorted(names) if not math.isfinite(scores[name])]
        found += [f"{n} {scores[n]:.4g} < {bound:g}" for n, bound in self.at_least.items() if scores[n] < bound]
        found += [f"{n} {scores[n]:.4g} > {bound:g}" for n, bound in self.at_most.items() if scores[n] > bound]
        return tuple(found)


@dataclass(frozen=True)
class SimilarityScorer:
    """How image and words agree, by an image-text model; cosines in [-1, 1] (the filters of LANCE and PRISM).

    `image_image`: cos(I_source, I_edit). `image_text_source` and `image_text`: each image with its own prompt.
    `directional`: cos(I_edit - I_source, T_target - T_source) (Gal et al., 2022), 0 where either stands still.
    `consistency`: cos(I_edit, T_target) - cos(I_edit, T_source), the prediction consistency of LANCE as a margin.
    """

    model: "ImageTextModel"

    def scores(self, candidates: "Sequence[Counterfactual]") -> list[Scores]:
        before, after = self._images([c.factual for c in candidates]), self._images([c.image for c in candidates])
        source, target = (self._texts([getattr(c.pair, side) for c in candidates]) for side in ("source", "target"))
        return _rows(
            {
                "image_image": (before * after).sum(1),
                "image_text_source": (before * source).sum(1),
                "image_text": (after * target).sum(1),
                "directional": metrics.directional_similarity(before, after, source, target),
                "consistency": (after * target).sum(1) - (after * source).sum(1),
            }
        )

    def _images(self, images: Sequence[Tensor]) -> Tensor:
        keys = [image_hash(image) for image in images]
        distinct = dict(zip(keys, images, strict=True))
        embeddings = self.model.embed_images(torch.stack(list(distinct.values())))
        return embeddings[[list(distinct).index(key) for key in keys]]

    def _texts(self, texts: Sequence[str]) -> Tensor:
        distinct = list(dict.fromkeys(texts))
        return self.model.embed_texts(distinct)[[distinct.index(text) for text in texts]]


@dataclass(frozen=True)
class IdentityScorer:
    """How much of the input is left: `ssim` (1 is all) and `identity_l1`, the mean absolute difference (0 is all)."""

    def scores(self, candidates: "Sequence[Counterfactual]") -> list[Scores]:
        images, factual = torch.stack([c.image for c in candidates]), torch.stack([c.factual for c in candidates])
        return _rows({"ssim": metrics.ssim(images, factual), "identity_l1": metrics.l1(images, factual)})


@dataclass(frozen=True)
class GuideScorer:
    """What a guide reads: `guide`, the least probability of the edit's own targets, and `guide_gain` over the input."""

    guide: Classifier
    edit: Edit

    def __post_init__(self) -> None:
        if unread := [name for name in (*self.edit.remove, *self.edit.add) if name not in self.guide.labels]:
            raise ValueError(f"the guide does not read {', '.join(unread)}; it reads {', '.join(self.guide.labels)}")
        if not self.edit.attributes:
            raise ValueError(f"a guide reads labels, and the edit {self.edit.key} names none")

    def scores(self, candidates: "Sequence[Counterfactual]") -> list[Scores]:
        after, before = self._towards([c.image for c in candidates]), self._towards([c.factual for c in candidates])
        return _rows({"guide": after.amin(1), "guide_gain": (after - before).amin(1)})

    def _towards(self, images: Sequence[Tensor]) -> Tensor:
        """Probability of the target value of each label that the edit changes, (N, changes)."""
        of = dict(zip(self.guide.labels, self.guide.read(torch.stack([*images])).unbind(1), strict=True))
        return torch.stack([*(1 - of[name] for name in self.edit.remove), *(of[name] for name in self.edit.add)], 1)


# Scores of counterfactuals, each from its own image, prompts and mask alone; all with the same names.
Scorer = SimilarityScorer | IdentityScorer | GuideScorer


def load_guide(name: str, judge: str = "phantom-judge") -> Classifier:
    """What `Classifier.load` makes of `name`, as a guide; ValueError if it is the judge or a copy of its weights."""
    folders = find_classifier(name), find_classifier(judge)
    weights = [path for folder in folders if (path := folder / "model.safetensors").is_file()]
    if folders[0].resolve() == folders[1].resolve() or (len(weights) == 2 and len({*map(file_hash, weights)}) == 1):
        raise ValueError(f"{name!r} is the judge {judge!r}: it measures counterfactuals and must not select them")
    return Classifier.load(name)


@dataclass(frozen=True)
class Selection:
    """Scores of all candidates, why each failed (() if it passed), the winner and its place (None if none passed)."""

    scores: tuple[Scores, ...]
    failures: tuple[tuple[str, ...], ...]
    winner: int | None
    best: "Counterfactual | None"


def select(
    groups: "Sequence[Sequence[Counterfactual]]", scorers: Sequence[Scorer], criteria: Criteria
) -> list[Selection]:
    """The best candidate of every image under ``criteria``, of equals the first."""
    if empty := [row for row, group in enumerate(groups) if not group]:
        raise ValueError(f"images {empty} have no candidates to select from")
    return [_best_of(group, scorers, criteria) for group in groups]


def _best_of(candidates: "Sequence[Counterfactual]", scorers: Sequence[Scorer], criteria: Criteria) -> Selection:
    merged: list[Scores] = [dict(candidate.scores) for candidate in candidates]
    for scorer in scorers:
        for scores, more in zip(merged, scorer.scores(candidates), strict=True):
            if twice := scores.keys() & more.keys():
                raise ValueError(f"two scorers give {', '.join(sorted(twice))}")
            scores |= more
    failures = tuple(criteria.failures(scores) for scores in merged)
    passed = [place for place, reasons in enumerate(failures) if not reasons]
    winner = max(passed, key=lambda place: merged[place][criteria.best], default=None)
    return Selection(tuple(merged), failures, winner, None if winner is None else candidates[winner])


def _rows(columns: Mapping[str, Tensor]) -> list[Scores]:
    values = {name: column.tolist() for name, column in columns.items()}
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
