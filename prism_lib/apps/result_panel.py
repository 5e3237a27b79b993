"""The result in the explorer: before and after under one slider, difference, mask, candidates and scores."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np

from prism_lib.apps.gallery import Case
from prism_lib.apps.outcomes import Outcome
from prism_lib.apps.panels import Line, Panel
from prism_lib.reporting.pictures import MODES, before_after, difference, framed, overlay, png, view

LARGE, SMALL = "400px", "188px"


class ResultPanel(Panel):
    """Original and counterfactual under one slider, the difference, the mask, scores and candidates."""

    def __init__(self, chosen: Callable[[Outcome], None]) -> None:
        self._chosen = chosen
        self._before: np.ndarray | None = None
        self._after: np.ndarray | None = None
        self.warning, self.caption, self.scores = Line(), Line(), widgets.HTML()
        self.compare, self.difference, self.mask = (
            widgets.Image(format="png", layout={"width": side, "height": side}) for side in (LARGE, SMALL, SMALL)
        )
        self.share = widgets.FloatSlider(
            value=1.0, min=0, max=1, step=0.01, readout=False, layout={"flex": "1 1 auto"},
            tooltip="slide from the original to the counterfactual",
        )  # fmt: skip
        self.share.add_class("prism-slider")
        self.mode = widgets.ToggleButtons(
            options=list(MODES), tooltips=["draw a curtain", "cross-fade"], style={"button_width": "80px"}
        )
        self.candidates = widgets.HBox(layout={"flex_flow": "row wrap"})
        ends = [_caption("original"), self.share, _caption("counterfactual")]
        large = [self.compare, widgets.HBox(ends, layout={"width": LARGE}), self.mode]
        small = [
            _caption("difference: red is brighter, blue darker", SMALL),
            self.difference,
            _caption("where the edit may show", SMALL),
            self.mask,
        ]
        pictures = widgets.HBox(
            [widgets.VBox(large, layout={"margin": "0 14px 0 0"}), widgets.VBox(small)],
            layout={"flex_flow": "row wrap"},
        )
        super().__init__("Result", [self.warning, self.caption, pictures, self.candidates, self.scores])
        self.share.observe(self._draw, "value")
        self.mode.observe(self._draw, "value")

    def show_case(self, case: Case, notice: str) -> None:
        """A new image, not edited yet."""
        self._before = self._after = view(case.image[0])
        blank = np.full_like(self._before, 255)
        self._draw()
        self.difference.value, self.mask.value = png(blank), png(self._before)
        self.caption.say(f"{case.title}: not edited yet.", "note")
        self.warning.say(notice, "warning")
        self.scores.value, self.candidates.children = "", []

    def show_box(self, case: Case, box: tuple[int, int, int, int] | None) -> None:
        """The rectangle that a mask would be, on the image at hand."""
        picture = view(case.image[0])
        self.mask.value = png(picture if box is None else framed(picture, box))

    def show(self, outcome: Outcome, case: Case) -> None:
        """One counterfactual."""
        result = outcome.result
        self._before, self._after = view(result.factual), view(result.image)
        self._draw()
        self.difference.value = png(difference(result.image, result.factual))
        self.mask.value = png(overlay(result.factual, result.mask))
        what = outcome.edit.key.replace("_", " ") if not outcome.edit.source else outcome.edit.target
        ready = f"quick look at {outcome.recipe.steps} steps" if outcome.preview else f"{outcome.recipe.steps} steps"
        self.caption.say(f"{case.title}: {what} ({ready})", "note")
        self.warning.say(outcome.notice, "warning")
        self.scores.value = _score_table(outcome, case)

    def show_candidates(self, outcomes: Sequence[Outcome]) -> None:
        """Thumbnails to choose from, where there is more than one."""
        self.candidates.children = [self._thumbnail(outcome) for outcome in outcomes] if len(outcomes) > 1 else []

    def _thumbnail(self, outcome: Outcome) -> widgets.Widget:
        recipe = outcome.recipe
        choose = widgets.Button(
            description=f"choose {recipe.guidance_scale:g} / {recipe.self_replace_steps:g}",
            tooltip="strength / structure kept: show this candidate", layout={"width": "130px"},
        )  # fmt: skip
        choose.on_click(self.guarded(lambda _: self._chosen(outcome)))
        picture = widgets.Image(value=png(view(outcome.result.image)), format="png", width=130, height=130)
        return widgets.VBox([picture, choose, widgets.HTML(_short_scores(outcome))], layout={"margin": "4px 8px 0 0"})

    def _draw(self, change: Any = None) -> None:
        if self._before is not None and self._after is not None:
            shown = before_after(self._before, self._after, self.share.value, self.mode.value)
            self.compare.value = png(shown)


def _caption(text: str, width: str = "auto") -> widgets.HTML:
    """Words beside a picture, as wide as they are or wrapped to a width."""
    return widgets.HTML(f'<span class="prism-note">{text}</span>', layout={"flex": "0 0 auto", "width": width})


_NAMES = {
    "true_error_ratio": ("error against the true counterfactual", "0 is exact, 1 is no edit"),
    "ssim": ("likeness to the original (SSIM)", "1 is identical"),
    "mask_area": ("share of pixels in the mask", ""),
    "change": ("mean change of a pixel", "of the grey range"),
    "change_outside_mask": ("change that the mask kept out", "of the grey range"),
}


def _score_table(outcome: Outcome, case: Case) -> str:
    measured = [(*_NAMES[name], outcome.scores[name]) for name in _NAMES if name in outcome.scores]
    numbers = "".join(f"<tr><td>{name}</td><td>{value:.3f}</td><td>{unit}</td></tr>" for name, unit, value in measured)
    read = {label: outcome.scores.get(f"reads {label}") for label in case.readings}
    judged = "".join(
        f"<tr><td>{html.escape(label)}</td><td>{case.readings[label]:.2f} → {after:.2f}</td><td></td></tr>"
        for label, after in read.items()
        if after is not None
    )
    head = "<tr><th>judge</th><th>before → after</th><th></th></tr>" if judged else ""
    return f"<table>{head}{judged}<tr><th>measured</th><th></th><th></th></tr>{numbers}</table>"


def _short_scores(outcome: Outcome) -> str:
    name = "true_error_ratio" if "true_error_ratio" in outcome.scores else "change"
    label = "error" if name == "true_error_ratio" else "change"
    return f"{label} {outcome.scores[name]:.3f}<br>SSIM {outcome.scores['ssim']:.3f}"
