"""The panels that `apps.explorer` connects: where the image comes from, what to change, how, and the result."""

import html
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import traitlets

from prism_lib import paths
from prism_lib.apps.recipe import Case, Outcome, unmeasured
from prism_lib.apps.session import WORDS, Session, list_images, sentence
from prism_lib.data.uploads import ACCEPT
from prism_lib.editing.methods import METHODS, RECOMMENDED
from prism_lib.editing.settings import recommended, recommended_inversion
from prism_lib.language.edits import NO_EDIT
from prism_lib.models.pipeline import image_size
from prism_lib.reporting.plots import difference, overlay, png, view

MAX_CHOICES = 500  # of images in one list
FEW_STEPS = 12  # of an edit, where the model has settings for few steps


class Line(widgets.HTML):
    """One line of text that can be an error, a note or a warning, or nothing at all."""

    def say(self, text: str, kind: str = "error") -> None:
        role = "alert" if kind == "error" else "status"
        self.value = f'<div class="prism-{kind}" role="{role}">{html.escape(text)}</div>' if text else ""


class Panel(widgets.VBox):
    """A titled column that ends in the line for what went wrong in it."""

    def __init__(self, title: str, children: Sequence[widgets.Widget]) -> None:
        self.line = Line()
        super().__init__([widgets.HTML(f"<h4>{title}</h4>"), *children, self.line])
        self.add_class("prism-panel")

    def guarded(self, act: Callable[..., None]) -> Callable[..., None]:
        """A handler whose failures become the panel's own line instead of a traceback."""

        def handler(*arguments: Any) -> None:
            self.line.say("")
            self.add_class("prism-works")
            try:
                act(*arguments)
            except Exception as error:  # a person clicked: whatever happens, they are told and can go on
                self.line.say(sentence(error))
            self.remove_class("prism-works")

        return handler

    def on_change(self, act: Callable[..., None], *controls: widgets.Widget) -> None:
        for control in controls:
            control.observe(self.guarded(act), "value")


def button(text: str, act: Callable[..., None], name: str = "", width: str = "118px", **more: Any) -> widgets.Button:
    """A button that calls `act` with itself; `name` is the one of its tooltip, if that is not the text."""
    made = widgets.Button(description=text, tooltip=WORDS["tooltips"][name or text], layout={"width": width}, **more)
    made.on_click(act)
    return made


def _control(kind: type[widgets.Widget], name: str, **more: Any) -> widgets.Widget:
    look = {"layout": {"width": "98%"}, "style": {"description_width": "100px"}}
    return kind(description=name, tooltip=WORDS["tooltips"][name], **look, **more)


def _forms(choice: widgets.Widget, *forms: Sequence[widgets.Widget]) -> widgets.Stack:
    """The controls that go with each option of a choice, of which those of the present one are shown."""
    boxes = [widgets.VBox(form, layout={"width": "100%"}) for form in forms]
    shown = widgets.Stack(boxes, selected_index=choice.index, layout={"width": "100%"})
    widgets.dlink((choice, "index"), (shown, "selected_index"))
    return shown


class SourcePanel(Panel):
    """Choose a phantom patient, an image of a prepared folder, or a file."""

    def __init__(self, session: Session, opened: Callable[[Case], None], seed: int, data: str) -> None:
        self._session, self._opened = session, opened
        kinds, style = WORDS["kinds"], {"button_width": "104px"}
        first = "folder" if data else "phantom"
        self.kind = widgets.ToggleButtons(options=[*kinds], value=first, tooltips=[*kinds.values()], style=style)
        number, text, late = widgets.BoundedIntText, widgets.Text, {"continuous_update": False}
        self.patient = _control(number, "patient", value=1, max=10**6)
        self.seed = _control(number, "seed", value=seed, max=10**9)
        self.folder = _control(text, "folder", value=data or "prepared/phantom", **late)
        self.row = _control(widgets.Dropdown, "image", options=[])
        self.upload = widgets.FileUpload(accept=ACCEPT, description="upload", tooltip=WORDS["tooltips"]["upload"])
        self.path = _control(text, "or path", placeholder="a file on this machine", **late)
        forms = _forms(self.kind, [self.patient, self.seed], [self.folder, self.row], [self.upload, self.path])
        models = session.references
        options = [*([("by image", "")] if len(models) > 1 else []), *((name, name) for name in models)]
        self.model = _control(widgets.Dropdown, "model", options=options, value=session.chosen)
        self.resembles = Line()
        super().__init__("Image", [self.kind, forms, self.model, self.resembles])
        self.on_change(self.begin, self.kind)
        self.on_change(self._open_phantom, self.patient, self.seed)
        self.on_change(self._list_folder, self.folder)
        self.on_change(self._open_row, self.row)
        self.on_change(self._open_upload, self.upload)
        self.on_change(self._open_path, self.path)
        self.on_change(self._choose, self.model)

    def _show(self, case: Case | None) -> None:
        if case is not None:
            far = ", ".join(f"{model} {distance:.1f}" for model, distance in case.distances.items())
            said = f"Edited by {self._session.model}. Distances to the models' training images: {far}. " if far else ""
            self.resembles.say(said + unmeasured(self._session.model, None, self._session.vocab), "note")
            self._opened(case)

    def _choose(self, change: Any) -> None:
        if self.model.value != self._session.chosen:
            try:
                self._show(self._session.choose(self.model.value))
            finally:
                self.model.value = self._session.chosen  # the one before, if that fails

    def _open_phantom(self, change: Any = None) -> None:
        self._show(self._session.open_phantom(self.seed.value, self.patient.value))

    def begin(self, change: Any = None) -> None:
        """Open the phantom, or the first image of the folder, where that kind is chosen."""
        if self.kind.value == "phantom":
            self._open_phantom()
        elif self.kind.value == "folder" and not self.row.options:
            self._list_folder()

    def _folder(self) -> Path:
        return paths.data() / Path(self.folder.value.strip()).expanduser()

    def _list_folder(self, change: Any = None) -> None:
        self.row.options = []
        self.row.options = list_images(self._folder())[:MAX_CHOICES]
        self.row.index = 0 if self.row.options else None  # opens it

    def _open_row(self, change: Any) -> None:
        if self.row.value:
            self._show(self._session.open_row(self._folder(), self.row.value))

    def _open_upload(self, change: Any) -> None:
        for file in self.upload.value:  # one or none
            self._show(self._session.open_upload(file["name"], bytes(file["content"])))

    def _open_path(self, change: Any) -> None:
        if self.path.value.strip():
            self._show(self._session.open_file(Path(self.path.value.strip())))


class EditPanel(Panel):
    """Say what should be different: a button per label, or words."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows = widgets.VBox()
        self.buttons: dict[tuple[str, str], widgets.ToggleButton] = {}
        hint, about = "remove the pacemaker, keep the effusion", "a sentence, or 'source prompt -> target prompt'"
        self.text = widgets.Text(placeholder=hint, tooltip=about, layout={"width": "98%"})
        super().__init__("What should be different?", [self._rows, widgets.Label("or in words"), self.text])

    def show(self, case: Case) -> None:
        """A row per label with its present state, and a button for each change that makes sense."""
        self.buttons, rows = {}, []
        for label, phrase in self._session.vocab.phrases.items():
            known = case.labels.get(label)
            said = [] if known is None else ["present" if known else "absent"]
            said += [f"judge {case.readings[label]:.2f}"] if label in case.readings else []
            for verb in ["remove", "add"] if known is None else ["remove" if known else "add"]:
                text, layout = f"{verb} {phrase}", {"width": "190px"}
                toggle = widgets.ToggleButton(description=text, tooltip=f"press to {text}", layout=layout)
                toggle.observe(partial(self._exclude, "add" if verb == "remove" else "remove", label), "value")
                self.buttons[verb, label] = toggle
                rows.append(widgets.HBox([toggle, widgets.HTML(f'<span class="prism-state">{", ".join(said)}</span>')]))
                said = []
        self._rows.children = rows

    def _exclude(self, verb: str, label: str, change: Any) -> None:
        """A label cannot be both removed and added."""
        if change["new"] and (verb, label) in self.buttons:
            self.buttons[verb, label].value = False

    def pressed(self, verb: str) -> list[str]:
        return [label for (name, label), button in self.buttons.items() if name == verb and button.value]


class SettingsPanel(Panel):
    """How to edit; each control says in its tooltip what it does."""

    def __init__(self, session: Session) -> None:
        self._session, self._model = session, ""
        slider, choice, pixels = widgets.FloatSlider, widgets.Dropdown, widgets.IntRangeSlider
        self.sliders = {
            field: _control(slider, name, max=high, step=step) for field, (name, high, step) in WORDS["sliders"].items()
        }
        self.method = _control(choice, "method", options=list(METHODS), value=RECOMMENDED)
        self.steps = _control(widgets.IntSlider, "steps", min=2, max=100)
        self.sweep = _control(choice, "candidates", options=list(WORDS["candidates"].items()))
        self.mask = _control(choice, "mask", options=["automatic", "off", "rectangle"])
        self.rows, self.columns = _control(pixels, "rows"), _control(pixels, "columns")
        forms = _forms(self.mask, [], [], [self.rows, self.columns])
        super().__init__("How", [*self.sliders.values(), self.method, self.steps, self.sweep, self.mask, forms])
        self._usual: dict[str, Any] = {}
        self.show_model()
        self.on_change(self._show_usual, self.steps)

    def show_model(self) -> None:
        """What the model recommends, and its size, if it is another than before."""
        session = self._session
        if session.model == self._model:
            return
        self._model = session.model
        few, usual = (recommended_inversion(session.pipe, steps) for steps in (FEW_STEPS, 50))
        self.steps.value = 50 if usual.skip else FEW_STEPS if few != usual else 20  # `skip` leaves most of them out
        self._usual = {}
        self._show_usual()
        for control in (self.rows, self.columns):
            control.max = size = image_size(session.pipe)
            control.value = size // 4, 3 * size // 4

    def _show_usual(self, change: Any = None) -> None:
        """What the model recommends for the number of steps, in sliders that were not moved."""
        before, self._usual = self._usual, vars(recommended(self._session.pipe, NO_EDIT, self.steps.value))
        for field, slider in self.sliders.items():
            slider.max = max(WORDS["sliders"][field][1], self._usual[field])
            if slider.value == before.get(field, slider.value):
                slider.value = self._usual[field]

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """The rectangle (top, left, bottom, right), where one is asked for."""
        (top, bottom), (left, right) = self.rows.value, self.columns.value
        return (top, left, bottom, right) if self.mask.value == "rectangle" else None

    def draw(self, box: Sequence[int]) -> None:
        """Ask for a rectangle (top, left, bottom, right)."""
        self.rows.value, self.columns.value = box[::2], box[1::2]
        self.mask.value = "rectangle"

    def values(self) -> dict[str, Any]:
        """The settings as arguments of `Session.recipe`."""
        mask = {"automatic": "auto", "off": "off", "rectangle": self.box}[self.mask.value]
        # A slider that was not moved leaves its setting to what the model recommends for the edit.
        moved = {name: slider.value for name, slider in self.sliders.items() if slider.value != self._usual[name]}
        return {"settings": moved, "method": self.method.value, "steps": self.steps.value, "mask": mask}


class Viewer(anywidget.AnyWidget):
    """Original, counterfactual, difference and mask, as PNG, under one zoom; `viewer.js` draws them.

    `box` is the rectangle (top, left, bottom, right) in pixels, drawn or to draw, or empty. `place` is the result's
    [number, count], number 0 without one. The message {"step": 1 or -1} asks for the one after or before.
    """

    _esm, _css = Path(__file__).with_name("viewer.js"), Path(__file__).with_name("explorer.css")
    before = traitlets.Bytes().tag(sync=True)
    after = traitlets.Bytes().tag(sync=True)
    difference = traitlets.Bytes().tag(sync=True)
    mask = traitlets.Bytes().tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    box = traitlets.List(traitlets.Int()).tag(sync=True)
    place = traitlets.List(traitlets.Int(), [0, 0]).tag(sync=True)

    def show(self, **shown: Any) -> None:
        """Set several traits in one message."""
        with self.hold_sync():
            for name, value in shown.items():
                self.set_trait(name, value)


class ResultPanel(Panel):
    """The pictures, scores and candidates."""

    def __init__(self, chosen: Callable[[Outcome], None]) -> None:
        self._chosen = chosen
        self.warning, self.caption, self.scores, self.viewer = Line(), Line(), widgets.HTML(), Viewer()
        self.candidates = widgets.HBox(layout={"flex_flow": "row wrap"})
        super().__init__("Result", [self.warning, self.caption, self.viewer, self.candidates, self.scores])

    def show_case(self, case: Case, results: int) -> None:
        """An image alone, of which there may be results."""
        picture = png(view(case.image[0]))
        self.viewer.show(before=picture, after=b"", difference=b"", mask=picture, title=case.title, place=[0, results])
        self.caption.say(f"{case.title}: not edited yet.", "note")
        self.warning.say(case.notice, "warning")
        self.scores.value, self.candidates.children = "", []

    def show(self, outcome: Outcome, place: list[int]) -> None:
        result, used = outcome.result, outcome.used
        what = outcome.edit.target or outcome.edit.key.replace("_", " ")
        steps = f"{'quick look at ' if outcome.preview else ''}{outcome.recipe.steps} steps"
        ready = f"{steps}, strength {used.guidance_scale * used.addition_factor:g}"
        title = f"{outcome.case.title}: {what} ({ready})"
        before, after = png(view(result.factual)), png(view(result.image))
        changed, mask = png(difference(result.image, result.factual)), png(overlay(result.factual, result.mask))
        self.viewer.show(before=before, after=after, difference=changed, mask=mask, title=title, place=place)
        self.caption.say(title, "note")
        self.warning.say(outcome.notice, "warning")
        self.scores.value = _score_table(outcome)

    def show_candidates(self, outcomes: Sequence[Outcome]) -> None:
        """Thumbnails to choose from, where there is more than one."""
        self.candidates.children = [self._thumbnail(outcome) for outcome in outcomes] if len(outcomes) > 1 else []

    def _thumbnail(self, outcome: Outcome) -> widgets.Widget:
        text = f"choose {outcome.used.guidance_scale:g} / {outcome.used.self_replace_steps:g}"
        choose = button(text, self.guarded(lambda _: self._chosen(outcome)), "choose", "130px")
        picture = widgets.Image(value=png(view(outcome.result.image)), format="png", width=130, height=130)
        scores = outcome.scores
        name, label = ("true_error_ratio", "error") if "true_error_ratio" in scores else ("change", "change")
        short = widgets.HTML(f"{label} {scores[name]:.3f}<br>SSIM {scores['ssim']:.3f}")
        return widgets.VBox([picture, choose, short], layout={"margin": "4px 8px 0 0"})


def _score_table(outcome: Outcome) -> str:
    scores, names, row = outcome.scores, WORDS["scores"], "<tr><td>{}</td><td>{}</td><td>{}</td></tr>"
    rows = ["<tr><th>judge</th><th>before → after</th><th></th></tr>"] if outcome.case.readings else []
    for label, before in outcome.case.readings.items():
        rows.append(row.format(html.escape(label), f"{before:.2f} → {scores[f'reads {label}']:.2f}", ""))
    rows.append("<tr><th>measured</th><th></th><th></th></tr>")
    rows += [row.format(text, f"{scores[name]:.3f}", unit) for name, (text, unit) in names.items() if name in scores]
    return f"<table>{''.join(rows)}</table>"
