"""The counterfactual explorer: `explore()` gives a panel to click in, in JupyterLab, VS Code and Voila.

Edits run in the background; where no one can click, as under papermill, the notebook keeps a picture.
"""

import base64
import html
import json
import time
from functools import partial
from typing import Any

import diffusers
import ipywidgets as widgets
import matplotlib.pyplot as plt
import transformers
from IPython import get_ipython
from IPython.core.pylabtools import print_figure
from IPython.display import HTML, display

from prism_lib import records
from prism_lib.apps.panels import EditPanel, Line, ResultPanel, SettingsPanel, SourcePanel, button
from prism_lib.apps.recipe import Case, Outcome
from prism_lib.apps.session import WORDS, Fault, Session, sentence
from prism_lib.reporting import plots


def explore(
    model: str = "",
    judge: str = "phantom-judge",
    vocabulary: str = "",
    mode: str = "L",
    *,
    data: str = "",
    seed: int = 4001,
) -> "Explorer":
    """The explorer for a model: a shipped one, a pipeline folder (also below PRISM_RUNS) or a hub id.

    "" is the shipped one whose training images an image resembles. `judge` is a classifier below PRISM_WEIGHTS that
    reads every image, "" for none; `vocabulary` has the labels that are offered, "" for those that the model was
    fine-tuned with, else the phantom's; `mode` is "L" (gray) or "RGB". It begins with the folder `data`, prepared or of
    images, else with a phantom of the population `seed`.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # a wheel turns instead
    wheel = '<i class="fa fa-spinner fa-spin"></i> Loading the model.'
    shown = display(HTML(wheel), display_id=True) if get_ipython() else None
    try:
        return Explorer(Session.load(model, judge, vocabulary, mode), seed, data)
    finally:
        if shown is not None:
            shown.update(HTML(""))


class Explorer(widgets.VBox):
    """The panels of one `Session`, connected."""

    def __init__(self, session: Session, seed: int, data: str = "") -> None:
        self.session = session
        self.outcome: Outcome | None = None
        self._started = 0.0
        self.result = ResultPanel(self._show)
        self.viewer = self.result.viewer
        self.edit = EditPanel(session)
        self.settings = SettingsPanel(session)
        self.source = SourcePanel(session, self._opened, seed, data)
        self.run = button("Run", self._run, icon="play", button_style="primary")
        self.cancel = button("Cancel", lambda _: session.cancel(), icon="stop", disabled=True)
        self.progress = widgets.FloatProgress(max=1, layout={"width": "98%"})
        self.status = Line()
        guarded = self.result.guarded
        self.save = button("Save", guarded(self._save), icon="save")
        self.show_code = button("Show code", guarded(self._code), icon="code")
        self.files = widgets.HTML()
        self.settings.on_change(self._show_box, self.settings.mask, self.settings.rows, self.settings.columns)
        self.viewer.observe(guarded(self._drawn), "box")
        self.viewer.on_msg(guarded(self._step))
        buttons = widgets.HBox([self.run, self.cancel])
        left = {"flex": "0 1 380px", "min_width": "330px", "margin": "0 12px 0 0"}
        controls = [self.source, self.edit, buttons, self.progress, self.status, self.settings]
        right = {"flex": "1 1 350px", "min_width": "330px"}
        shown = [self.result, widgets.HBox([self.save, self.show_code]), self.files]
        columns = [widgets.VBox(controls, layout=left), widgets.VBox(shown, layout=right)]
        about = f"{records.device()}; for research, not for clinical use"
        title = widgets.HTML(f'<h4>Counterfactual explorer</h4><span class="prism-note">{html.escape(about)}</span>')
        super().__init__([title, widgets.HBox(columns, layout={"flex_flow": "row wrap", "align_items": "flex-start"})])
        self.add_class("prism")
        self._enable()
        self.source.guarded(self.source.begin)()

    def _opened(self, case: Case) -> None:
        self.edit.show(case)
        self.settings.show_model()
        self._show_case(case)

    def _show_case(self, case: Case) -> None:
        self.outcome = None
        self.result.show_case(case, len(self._made()))
        self._show_box()
        self._enable()

    def _show_box(self, change: Any = None) -> None:
        self.viewer.box = list(self.settings.box or ())

    def _drawn(self, change: Any) -> None:
        """A rectangle on the picture, drawn with the mouse, becomes the mask."""
        if self.viewer.box and tuple(self.viewer.box) != self.settings.box:
            self.settings.draw(self.viewer.box)

    def _run(self, _: Any) -> None:
        """Every complaint goes beside the control it is about."""
        lines = {"image": self.source.line, "edit": self.edit.line, "settings": self.settings.line, "run": self.status}
        for line in lines.values():
            line.say("")
        try:
            edit = self.session.edit(self.edit.pressed("remove"), self.edit.pressed("add"), self.edit.text.value)
            recipe, over = self.session.recipe(edit, **self.settings.values()), self.settings.sweep.value
            recipes, progress = recipe.sweep(over) if over else [recipe], partial(self.progress.set_trait, "value")
            self._started = time.monotonic()
            self.progress.value, self.files.value = 0, ""
            self.status.say("Running.", "busy")
            self.run.disabled, self.cancel.disabled = True, False
            self.session.start(recipes, edit, progress=progress, preview=self._show, done=self._done)
        except Exception as error:  # nothing that a click does may end in a traceback
            lines[error.control if isinstance(error, Fault) else "settings"].say(sentence(error))

    def _done(self, outcomes: list[Outcome], said: str) -> None:
        """Called from the thread of the run, whose last act it is."""
        self.run.disabled, self.cancel.disabled = False, True
        self.progress.value = 0 if said else 1
        done = f"Done in {time.monotonic() - self._started:.1f} s."
        self.status.say(said or done, "note" if said in ("", "Cancelled.") else "error")
        if any(map(self._at_hand, outcomes)) or (self.outcome is not None and self.outcome.preview):
            self._restore()

    def _at_hand(self, outcome: Outcome) -> bool:
        """Whether an outcome is of the image on the screen: another may have been opened during the run."""
        return self.session.case is not None and self.session.case.name == outcome.recipe.image

    def _made(self) -> list[Outcome]:
        """Every result of the image at hand, the oldest first."""
        return [outcome for run in self.session.history for outcome in run if self._at_hand(outcome)]

    def _show(self, outcome: Outcome) -> None:
        if self._at_hand(outcome):
            self.outcome, made = outcome, self._made()
            self.result.show(outcome, [made.index(outcome) + 1 if outcome in made else 0, len(made)])
            for run in self.session.history:
                if outcome in run:
                    self.result.show_candidates(run)
            self._enable()

    def _restore(self) -> None:
        """The latest run of the image at hand, or the image alone."""
        if runs := [run[0] for run in self.session.history if self._at_hand(run[0])]:
            self._show(runs[-1])
        elif self.session.case is not None:
            self._show_case(self.session.case)

    def _step(self, viewer: Any, message: Any, buffers: Any) -> None:
        """To the result before or after; the image alone and a quick look come after all results."""
        made = self._made()
        number = (made.index(self.outcome) if self.outcome in made else len(made)) + message["step"]
        if 0 <= number < len(made):
            self.files.value = ""
            self._show(made[number])

    def _save(self, _: Any) -> None:
        if self.outcome is not None:  # without one the button is disabled
            folder = self.outcome.save()
            lines = [f"Saved in <code>{html.escape(str(folder))}</code>."]
            film = json.loads((folder / "record.json").read_text(encoding="utf-8"))["full_size"]
            if film.startswith("full_size."):
                lines += [f"<code>{film}</code> is the film at its own size. {WORDS['full_size']}"]
                lines += ["It has the source's header, the patient's name included."] if film.endswith(".dcm") else []
            elif film:
                lines += [f"The film at its own size was {html.escape(film)}."]
            self.files.value = f'<span class="prism-note">{" ".join(lines)}</span>'

    def _code(self, _: Any) -> None:
        if self.outcome is not None:
            self.files.value = f"<pre>{html.escape(self.outcome.code())}</pre>"

    def _enable(self) -> None:
        self.save.disabled = self.show_code.disabled = self.outcome is None or self.outcome.preview

    def picture(self) -> bytes:
        """A PNG of the present state: the counterfactual sheet, or the image that waits for an edit."""
        if self.outcome is None:
            return self.viewer.before
        result = self.outcome.result
        figure = plots.counterfactual_sheet(result.factual[None].cpu(), result.image[None].cpu())
        plt.close(figure)
        return print_figure(figure, bbox_inches=None, dpi=100, facecolor="white")

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widgets, and the picture for viewers without them (papermill, GitHub, nbconvert)."""
        bundle = super()._repr_mimebundle_(**kwargs)
        content = bundle[0] if isinstance(bundle, tuple) else bundle
        content["image/png"] = base64.b64encode(self.picture()).decode()
        return bundle
