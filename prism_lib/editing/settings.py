"""Settings of one edit, shared by what plans edits, what walks them and what puts them back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from prism_lib.editing.alignment import ALIGNMENTS
from prism_lib.editing.masks import COMPOSITES, MaskConfig
from prism_lib.language.edits import PromptPair

NEGATIVES = ("source", "empty")
PROXIMALS = ("none", "l0", "l1")


@dataclass(frozen=True)
class Needs:
    """What an edit of one finding needs of the settings that an `EditConfig` leaves open (None)."""

    addition_factor: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 0.4
    confine: float = 0.27


# Measured on validation phantoms (CHANGELOG). Devices are thin and anywhere, so little is kept out. Which one comes is
# left to the first fifth of the denoising, without guidance: forced from the start, it is the same pacemaker in most
# patients. A kind that is named needs that force. Fluid and hearts lie together, and what parts elsewhere is by-catch.
_HEART = ("cardiomegaly", "enlarged heart")
_FLUID = ("pleural effusion", "pleural fluid", *(f"{side} pleural effusion" for side in ("left", "right", "bilateral")))
_DEVICES = ("support devices", "medical devices")
_KINDS = ("pacemaker", "central venous catheter", "ecg leads", "endotracheal tube")
_REMOVAL, _ADDITION = Needs(), Needs(addition_factor=2.0)
REMOVALS: Mapping[str, Needs] = (
    dict.fromkeys(_HEART, Needs(confine=0.33))
    | dict.fromkeys(_FLUID, Needs(confine=0.36))
    | dict.fromkeys((*_DEVICES, *_KINDS), Needs(confine=0.22))
)
ADDITIONS: Mapping[str, Needs] = (
    dict.fromkeys(_HEART, Needs(confine=0.25))
    | dict.fromkeys(_FLUID, Needs(addition_factor=1.75, confine=0.36))
    | dict.fromkeys(_DEVICES, Needs(addition_factor=1.5, guidance_start=0.2, guidance_end=0.7, confine=0.23))
    | dict.fromkeys(_KINDS, Needs(addition_factor=2.0, guidance_end=1.0))
)


@dataclass(frozen=True)
class EditConfig:
    """Settings of one edit. Windows are shares of the steps in [0, 1], counted from the noisiest.

    Guidance acts from `guidance_start` to `guidance_end` (Kynkaanniemi et al., NeurIPS 2024): early steps decide what
    there is; late ones without guidance draw it as the model has seen it, for a U-Net row less per edit. Where many
    things would do, guidance from the first step on makes all of them the likeliest one. Where an edit adds something,
    its scale is `addition_factor` times `guidance_scale`: of what has to go the image itself says what it is and where,
    of what has to come only the words do. A longer `self_replace_steps` keeps *more* of the source's structure.
    `word_weight` multiplies the target's attention to the words of the edit inside the cross window. `word_windows`
    gives words or phrases of the target prompt a cross window of their own, {"without": 0.8}, in place of
    `cross_replace_steps`. Self-attention is injected in layers of at most `self_max_tokens` queries. `protect_text`
    keeps letters burnt into the corners out of the automatic mask.
    `local_blend` confines the edit in latent space to where the edit's words look. `confine` does so by the evidence of
    the automatic mask, words and change of noise together: from `confine_start` on, latents with less than this share
    of the greatest evidence return to the source's; 0 is off. `proximal` drops ("l0") or also shrinks ("l1") the
    guidance below its own `proximal_quantile`.

    `addition_factor`, `guidance_start`, `guidance_end` and `confine` are None by default: each edit then takes what its
    findings need (`REMOVALS`, `ADDITIONS`), which `settled` tells. A number is taken for all edits, and an open start
    never lies after a given end.
    """

    guidance_scale: float = 2.0
    addition_factor: float | None = None
    guidance_start: float | None = None
    guidance_end: float | None = None
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
    confine: float | None = None
    confine_start: float = 0.3
    proximal: str = "none"
    proximal_quantile: float = 0.7
    composite: str = "change"
    protect_text: bool = True
    mask: MaskConfig = field(default_factory=MaskConfig)
    batch_size: int = 4

    def __post_init__(self) -> None:
        shares = (
            "guidance_start",
            "guidance_end",
            "cross_replace_steps",
            "self_replace_steps",
            "local_blend_threshold",
            "local_blend_start",
        )
        for name in (*shares, "confine", "confine_start", "proximal_quantile"):
            if not (self._open(name) or 0 <= getattr(self, name) <= 1):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a value in [0, 1]")
        if not isinstance(self.word_windows, Mapping):
            raise ValueError(f"word_windows is {self.word_windows!r}; expected a share by word")
        for word, share in self.word_windows.items():
            if not (isinstance(word, str) and isinstance(share, float | int) and 0 <= share <= 1):
                raise ValueError(f"word_windows is {share!r} for {word!r}; expected a value in [0, 1] by word")
        for name in ("guidance_scale", "addition_factor", "word_weight"):
            if not (self._open(name) or 0 <= getattr(self, name) < float("inf")):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number, 0 or more")
        choices = {"alignment": ALIGNMENTS, "negative": NEGATIVES, "composite": COMPOSITES, "proximal": PROXIMALS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        start, end = self.guidance_start, self.guidance_end
        if start is not None and end is not None and start > end:
            raise ValueError(f"guidance_start is {start}, after guidance_end, {end}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected at least 1")

    def settled(self, pair: PromptPair) -> EditConfig:
        """These settings with what is open (None) as the findings of ``pair`` need it: the most that one of them does.

        A removal has no factor: it is 1, whatever is set. ValueError where a given start lies after the needed end.
        """
        needs = [_needs(phrase, pair) for phrase in pair.target_words] or [_ADDITION if pair.adds else _REMOVAL]
        factor = max(need.addition_factor for need in needs) if self.addition_factor is None else self.addition_factor
        end = max(need.guidance_end for need in needs) if self.guidance_end is None else self.guidance_end
        start = min(end, *(n.guidance_start for n in needs)) if self.guidance_start is None else self.guidance_start
        return replace(
            self,
            addition_factor=factor if pair.adds else 1.0,
            guidance_start=start,
            guidance_end=end,
            confine=min(need.confine for need in needs) if self.confine is None else self.confine,
        )

    def _open(self, name: str) -> bool:
        """Whether a setting that findings may decide is left to them."""
        return name in _OPEN and getattr(self, name) is None


_OPEN = tuple(item.name for item in fields(Needs))


def _needs(phrase: str, pair: PromptPair) -> Needs:
    """What one phrase of an edit needs: it is added unless the edit adds nothing, or the target denies the phrase."""
    phrase = phrase.lower()
    adds = pair.adds and not pair.lost.intersection(phrase.split())
    return (ADDITIONS if adds else REMOVALS).get(phrase, _ADDITION if adds else _REMOVAL)


def grid(config: EditConfig, **values: Sequence[Any]) -> list[EditConfig]:
    """All combinations of some settings, the others as in `config`: `grid(config, self_replace_steps=(0.2, 0.4))`."""
    if empty := [name for name, choices in values.items() if isinstance(choices, str) or not len(choices)]:
        raise ValueError(f"{empty[0]} is {values[empty[0]]!r}; expected values to try")
    return [replace(config, **dict(zip(values, row, strict=True))) for row in itertools.product(*values.values())]
