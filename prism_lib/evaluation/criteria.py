"""The names of all scores, and bounds on them; apart from `selection`, so that a plan is checked without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field

from pydantic import FiniteFloat
from pydantic.dataclasses import dataclass

EDIT = ("mask_area", "change", "change_outside_mask")
SIMILARITY = ("image_image", "image_text_source", "image_text", "directional", "consistency")
IDENTITY = ("ssim", "identity_l1")
GUIDE = ("guide", "guide_gain")


@dataclass(frozen=True)
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
