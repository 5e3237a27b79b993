"""Settings of one edit, shared by what plans edits, what walks them and what puts them back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prism_lib.alignment import ALIGNMENTS
from prism_lib.masks import COMPOSITES, MaskConfig

NEGATIVES = ("source", "empty")
PROXIMALS = ("none", "l0", "l1")
# Measured on validation phantoms: a large heart comes without more guidance, fluid with half of what a device needs.
_FLUID = ("pleural effusion", "pleural fluid", *(f"{side} pleural effusion" for side in ("left", "right", "bilateral")))
ADDITION_SHARES = dict.fromkeys(("cardiomegaly", "enlarged heart"), 0.0) | dict.fromkeys(_FLUID, 0.5)


@dataclass(frozen=True)
class EditConfig:
    """Settings of one edit. Windows are shares of the steps in [0, 1], counted from the noisiest.

    Guidance acts in the first `guidance_end` of the steps (Kynkaanniemi et al., NeurIPS 2024): early steps decide what
    there is; late ones without guidance draw it as the model has seen it, for a U-Net row less per edit. Where an edit
    adds something, its scale is `addition_factor` times `guidance_scale`: of what has to go the image itself says what
    it is and where, of what has to come only the words do. `addition_shares` says, by phrase of the edit, how much of
    that excess a finding needs; what it does not name needs all. A longer
    `self_replace_steps` keeps *more* of the source's structure. `word_weight` multiplies the target's attention to the
    words of the edit inside the cross window. `word_windows` gives words or phrases of the target prompt a cross window
    of their own, {"without": 0.8}, in place of `cross_replace_steps`. Self-attention is injected in layers of at most
    `self_max_tokens` queries. `protect_text` keeps letters burnt into the corners out of the automatic mask.
    `local_blend` confines the edit in latent space to where the edit's words look. `confine` does so by the evidence of
    the automatic mask, words and change of noise together: from `confine_start` on, latents with less than this share
    of the greatest evidence return to the source's; 0 is off. `proximal` drops ("l0") or also shrinks ("l1") the
    guidance below its own `proximal_quantile`.
    """

    guidance_scale: float = 2.0
    addition_factor: float = 2.0
    addition_shares: Mapping[str, float] = field(default_factory=lambda: dict(ADDITION_SHARES), hash=False)
    guidance_end: float = 0.4
    cross_replace_steps: float = 0.1
    self_replace_steps: float = 0.3
    alignment: str = "refine"
    word_weight: float = 1.0
    word_windows: Mapping[str, float] = field(default_factory=dict, hash=False)
    negative: str = "source"
    correct_drift: bool = True
    inject_negative: bool = False
    self_max_tokens: int = 32 * 32
    local_blend: bool = False
    local_blend_threshold: float = 0.3
    local_blend_start: float = 0.2
    confine: float = 0.27
    confine_start: float = 0.3
    proximal: str = "none"
    proximal_quantile: float = 0.7
    composite: str = "change"
    protect_text: bool = True
    mask: MaskConfig = field(default_factory=MaskConfig)
    batch_size: int = 4

    def __post_init__(self) -> None:
        shares = (
            "guidance_end",
            "cross_replace_steps",
            "self_replace_steps",
            "local_blend_threshold",
            "local_blend_start",
        )
        for name in (*shares, "confine", "confine_start", "proximal_quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a value in [0, 1]")
        for name in ("word_windows", "addition_shares"):
            by_word = getattr(self, name)
            if not isinstance(by_word, Mapping):
                raise ValueError(f"{name} is {by_word!r}; expected a share by word")
            for word, share in by_word.items():
                if not (isinstance(word, str) and isinstance(share, float | int) and 0 <= share <= 1):
                    raise ValueError(f"{name} is {share!r} for {word!r}; expected a value in [0, 1] by word")
        for name in ("guidance_scale", "addition_factor", "word_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number, 0 or more")
        choices = {"alignment": ALIGNMENTS, "negative": NEGATIVES, "composite": COMPOSITES, "proximal": PROXIMALS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")

    def strengthening(self, words: Sequence[str]) -> float:
        """What the guidance of an edit that adds these phrases is multiplied by."""
        shares = [self.addition_shares.get(word.lower(), 1.0) for word in words]
        return 1 + max(shares, default=1.0) * (self.addition_factor - 1)


def grid(config: EditConfig, **values: Sequence[Any]) -> list[EditConfig]:
    """All combinations of some settings, the others as in `config`: `grid(config, self_replace_steps=(0.2, 0.4))`."""
    if empty := [name for name, choices in values.items() if isinstance(choices, str) or not len(choices)]:
        raise ValueError(f"{empty[0]} is {values[empty[0]]!r}; expected values to try")
    return [replace(config, **dict(zip(values, row, strict=True))) for row in itertools.product(*values.values())]
