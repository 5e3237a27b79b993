"""Settings of an edit, and what a model recommends for it.

Good settings differ between models, so `editing.json` beside a model's weights holds its defaults, and exceptions by
what is edited. A model without that file gets the defaults of `EditConfig`, those published for prompt-to-prompt.
"""

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, cast

from pydantic import Field, NonNegativeInt

from prism_lib.configs import Share, checked, read
from prism_lib.editing.masks import MaskConfig
from prism_lib.editing.methods import InversionConfig
from prism_lib.files import write_text
from prism_lib.language.edits import PromptPair

if TYPE_CHECKING:  # plans check settings without loading a model
    from prism_lib.models.pipeline import Pipe

logger = logging.getLogger(__name__)

FILE = "editing.json"
Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@checked()
class EditConfig:
    """Settings of one edit. Windows are shares of the steps in [0, 1], counted from the noisiest.

    Guidance acts from `guidance_start` to `guidance_end` (Kynkaanniemi et al., NeurIPS 2024), away from the source
    prompt or the empty one (`negative`). Where an edit adds something, its scale is `addition_factor` times
    `guidance_scale`. A longer `self_replace_steps` keeps *more* of the source's structure. `word_weight` multiplies the
    target's attention to the words of the edit inside the cross window. With `correct_drift` the target takes over the
    correction that the inversion gives the source, so that an edit that changes no word reproduces the source.

    `local_blend` limits the edit in latent space to cells with attention to its words (Hertz et al., 2023). `confine`
    limits it to cells with at least this share of the greatest evidence (`editing.masks`); 0 is off. `protect_text`
    keeps what is bright in dark corners out of the automatic mask as letters, "anywhere" letters, words and side
    markers wherever they are. `kinds_network`, found as a classifier is, keeps devices of other kinds out of the
    automatic mask of an edit that removes kinds that it knows (`editing.kept`). With a `side` of the patient and no
    area of the user's own, the outer third of the image at the other side stays the source's in latent space, and in
    the first steps what the target asks for there is asked for on this side, mirrored.
    """

    guidance_scale: Scale = 7.5
    addition_factor: Scale = 1.0
    guidance_start: Share = 0.0
    guidance_end: Share = 1.0
    cross_replace_steps: Share = 0.8
    self_replace_steps: Share = 0.4
    word_weight: Scale = 1.0
    negative: Literal["source", "empty"] = "source"
    correct_drift: bool = True
    local_blend: bool = False
    local_blend_threshold: Share = 0.3
    local_blend_start: Share = 0.2
    confine: Share = 0.0
    side: Literal["", "left", "right"] = ""
    protect_text: bool | Literal["anywhere"] = True
    kinds_network: str = ""
    mask: MaskConfig = field(default_factory=MaskConfig)
    batch_size: Annotated[int, Field(ge=1)] = 8

    def __post_init__(self) -> None:
        if self.guidance_start > self.guidance_end:
            raise ValueError(f"guidance_start is {self.guidance_start}, after guidance_end, {self.guidance_end}")


Overrides = Mapping[str, Any]  # fields of `EditConfig` that replace what the model recommends
Settings = EditConfig | Overrides
Model = Union["Pipe", str, Path]  # a pipeline or the folder of its weights
AnySettings = TypeVar("AnySettings", bound=EditConfig | Mapping[str, Any])


@checked()
class Rule:
    """Settings of edits that remove or add (`when`) one of the `phrases`; without phrases, any phrase."""

    when: Literal["remove", "add"]
    settings: dict[str, Any]
    phrases: tuple[str, ...] = ()


@checked()
class FewSteps:
    """What replaces some `defaults` and, if given, the `inversion` of a `Recommendation` in at most `steps` steps."""

    steps: NonNegativeInt
    defaults: dict[str, Any] = field(default_factory=dict)
    inversion: InversionConfig | None = None


@checked()
class Recommendation:
    """The content of `editing.json`: `defaults`, `rules` in the order of their application, and where `measured`.

    `inversion` holds settings of `InversionConfig`, such as the share of the steps that edits leave out.
    An edit of several phrases takes the widest guidance window, the greatest factor and the least confinement of them.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    measured: str = ""
    inversion: InversionConfig = field(default_factory=InversionConfig)
    few_steps: FewSteps = field(default_factory=lambda: FewSteps(0))

    def __post_init__(self) -> None:
        both = self.defaults | self.few_steps.defaults
        for settings in (self.defaults, both, *(rule.settings for rule in self.rules)):
            EditConfig(**settings)

    def at(self, num_inference_steps: int) -> "Recommendation":
        """What applies to runs of so many steps."""
        few = self.few_steps
        if num_inference_steps > few.steps:
            return self
        return replace(self, defaults=self.defaults | few.defaults, inversion=few.inversion or self.inversion)

    def settings(self, pair: PromptPair) -> dict[str, Any]:
        """The settings for an edit by a pair of prompts."""
        found = [self._of(phrase.lower(), pair) for phrase in pair.target_words] or [self._of("", pair)]
        merge = {"addition_factor": max, "guidance_start": min, "guidance_end": max, "confine": min, "side": min}
        merged = {name: choose(asdict(one)[name] for one in found) for name, choose in merge.items()}
        return {item.name: getattr(found[0], item.name) for item in fields(EditConfig)} | merged

    def _of(self, phrase: str, pair: PromptPair) -> EditConfig:
        """The settings of one phrase, which is added unless the edit adds nothing or the target denies the phrase."""
        when = "add" if pair.adds and not pair.lost.intersection(phrase.split()) else "remove"
        settings = dict(self.defaults)
        for rule in self.rules:
            if rule.when == when and (not rule.phrases or phrase in rule.phrases):
                settings |= rule.settings
        return EditConfig(**settings)


def recommended(model: Model, pair: PromptPair, num_inference_steps: int = 50, **overrides: Any) -> EditConfig:
    """What a model recommends for an edit in so many steps; `overrides` replace fields of it and of its mask.

    `model` is a pipeline or the folder of its weights. The factor of additions is 1 where the edit adds nothing, and a
    recommended start of guidance is never after an overridden end. ValueError for a wrong field or value.
    """
    settings = _recommendation(_folder(model)).at(num_inference_steps).settings(pair)
    if isinstance(mask := overrides.get("mask"), Mapping):
        overrides["mask"] = asdict(settings["mask"]) | dict(mask)
    settings |= ({"side": pair.side} if pair.side else {}) | overrides
    if "guidance_start" not in overrides and "guidance_end" in overrides:
        settings["guidance_start"] = min(settings["guidance_start"], overrides["guidance_end"])
    return EditConfig(**settings | ({} if pair.adds else {"addition_factor": 1.0}))


def recommended_inversion(model: Model, num_inference_steps: int = 50, **overrides: Any) -> InversionConfig:
    """What it recommends for the inversion in so many steps; `overrides` (of `InversionConfig`) replace its values."""
    return replace(_recommendation(_folder(model)).at(num_inference_steps).inversion, **overrides)


def write_settings(folder: Path, content: Mapping[str, Any]) -> Recommendation:
    """Write the fields of a `Recommendation` as ``editing.json`` into a folder; ValueError if one is wrong."""
    made = read(Recommendation, content, FILE)
    write_text(folder / FILE, json.dumps(content, indent=2) + "\n")
    _recommendation.cache_clear()
    return made


def resolved(pipe: "Pipe", pair: PromptPair, num_inference_steps: int, settings: Settings) -> EditConfig:
    """An `EditConfig` as it is; a mapping as overrides of what the model recommends for so many steps."""
    return settings if isinstance(settings, EditConfig) else recommended(pipe, pair, num_inference_steps, **settings)


def grid(settings: AnySettings, **values: Sequence[Any]) -> list[AnySettings]:
    """All combinations of some fields, with the others as in `settings`: `grid({}, self_replace_steps=(0.2, 0.4))`."""
    if empty := [name for name, choices in values.items() if isinstance(choices, str) or not len(choices)]:
        raise ValueError(f"{empty[0]} is {values[empty[0]]!r}; expected values to try")
    rows = [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
    made = (replace(settings, **row) if isinstance(settings, EditConfig) else {**settings, **row} for row in rows)
    return [cast(AnySettings, one) for one in made]


def _folder(model: Model) -> str:
    """Where a pipeline was loaded from; "" for one that was built in memory."""
    return str(model if isinstance(model, str | Path) else model.config.get("_name_or_path") or "")


@cache
def _recommendation(folder: str) -> Recommendation:
    """The content of the file beside the weights; ValueError names a wrong file."""
    path = Path(folder) / FILE
    if not folder or not path.is_file():
        logger.warning("%s has no %s: edits take the published settings", folder or "this pipeline", FILE)
        return Recommendation()
    return read(Recommendation, path.read_bytes(), f"{path} holds no settings of edits")
