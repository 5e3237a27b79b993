"""The controls of the explorer: where the image comes from, what to change, and how.

Each panel is a column of ipywidgets with a line of its own for what went wrong in it. A panel knows nothing of the
others; the explorer (`apps.explorer`) connects them.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from prism_lib import paths
from prism_lib.apps.gallery import Case, sentence
from prism_lib.apps.session import SWEEPS, Study
from prism_lib.data.folder import load_table
from prism_lib.data.uploads import ACCEPT
from prism_lib.editing.methods import METHODS, RECOMMENDED
from prism_lib.editing.settings import recommended
from prism_lib.language.edits import NO_EDIT
from prism_lib.language.labels import label_state

MAX_CHOICES = 500  # of images in one list
NARROW = widgets.Layout(width="98%")
STYLE = """<style>
.prism { max-width: 1320px; color: var(--jp-ui-font-color1, inherit); }
.prism .widget-label, .prism .widget-html-content, .prism .widget-readout { color: inherit; }
.prism-panel { border: 1px solid var(--jp-border-color2, #8888); border-radius: 6px; margin: 0 0 8px;
  padding: 8px 10px; }
.prism-panel h4 { margin: 0 0 4px; font-size: 14px; }
.prism-error { color: var(--jp-error-color1, #d32f2f); line-height: 1.35; }
.prism-note { line-height: 1.35; opacity: .85; }
.prism-warning { border-left: 4px solid var(--jp-warn-color1, #f57c00); padding: 4px 8px; line-height: 1.35; }
.prism table { border-collapse: collapse; line-height: 1.5; }
.prism td, .prism th { padding: 1px 10px 1px 0; text-align: left; font-variant-numeric: tabular-nums; }
.prism pre { white-space: pre-wrap; margin: 4px 0; font-size: 12px; user-select: all; }
.prism img { background: #000; border: 1px solid var(--jp-border-color2, #8888); }
.prism-state { white-space: nowrap; opacity: .85; padding-left: 6px; }
</style>"""


class Line(widgets.HTML):
    """One line of text that can be an error, a note or a warning, or nothing at all."""

    def say(self, text: str, kind: str = "error") -> None:
        role = "alert" if kind == "error" else "status"
        self.value = f'<div class="prism-{kind}" role="{role}">{html.escape(text)}</div>' if text else ""


def heading(text: str) -> widgets.HTML:
    """The title of a panel."""
    return widgets.HTML(f"<h4>{html.escape(text)}</h4>")


class Panel(widgets.VBox):
    """A titled column that ends in the line for what went wrong in it."""

    def __init__(self, title: str, children: Sequence[widgets.Widget]) -> None:
        self.line = Line()
        super().__init__([heading(title), *children, self.line])
        self.add_class("prism-panel")

    def guarded(self, act: Callable[..., None]) -> Callable[..., None]:
        """A handler whose failures become the panel's own line instead of a traceback."""

        @wraps(act)
        def handler(*arguments: Any) -> None:
            self.line.say("")
            try:
                act(*arguments)
            except Exception as error:  # a person clicked: whatever happens, they are told and can go on
                self.line.say(sentence(error))

        return handler


class SourcePanel(Panel):
    """Choose a phantom patient, an image of a prepared folder, or a file."""

    def __init__(self, study: Study, opened: Callable[[Case], None], seed: int, patient: int) -> None:
        self._study, self._opened = study, opened
        self.kind = widgets.ToggleButtons(
            options=["phantom", "folder", "own file"],
            tooltips=["a patient of the causal model", "a folder made by 01_data", "PNG, JPEG, TIFF or DICOM"],
            style={"button_width": "104px"},
        )
        self.patient = widgets.BoundedIntText(
            value=patient, min=0, max=10**6, description="patient", tooltip="which patient of the population"
        )
        self.seed = widgets.BoundedIntText(
            value=seed, min=0, max=10**9, description="seed", tooltip="which population of phantom patients"
        )
        self.folder = widgets.Text(
            value="prepared/phantom",
            description="folder",
            tooltip="absolute, or below PRISM_DATA",
            continuous_update=False,
        )
        self.row = widgets.Dropdown(options=[], description="image", tooltip="the images of its test split")
        self.upload = widgets.FileUpload(accept=ACCEPT, multiple=False, description="upload", tooltip="up to 10 MB")
        self.path = widgets.Text(
            description="or path", placeholder="a file on this machine", continuous_update=False, tooltip="of any size"
        )
        for wide in (self.patient, self.seed, self.folder, self.row, self.path):
            wide.layout = NARROW
        self._forms = {
            "phantom": widgets.VBox([self.patient, self.seed]),
            "folder": widgets.VBox([self.folder, self.row]),
            "own file": widgets.VBox([self.upload, self.path]),
        }
        self._form = widgets.VBox([self._forms["phantom"]])
        super().__init__("Image", [self.kind, self._form])
        self.kind.observe(self.guarded(self._show_form), "value")
        self.patient.observe(self.guarded(self.open_phantom), "value")
        self.seed.observe(self.guarded(self.open_phantom), "value")
        self.folder.observe(self.guarded(self._list_folder), "value")
        self.row.observe(self.guarded(self._open_row), "value")
        self.upload.observe(self.guarded(self._open_upload), "value")
        self.path.observe(self.guarded(self._open_path), "value")

    def open_phantom(self, change: Any = None) -> None:
        self._opened(self._study.open_phantom(self.seed.value, self.patient.value))

    def _show_form(self, change: Any) -> None:
        self._form.children = [self._forms[self.kind.value]]
        if self.kind.value == "phantom":
            self.open_phantom()
        elif self.kind.value == "folder" and not self.row.options:
            self._list_folder()

    def _folder(self) -> Path:
        return paths.data() / Path(self.folder.value.strip()).expanduser()

    def _list_folder(self, change: Any = None) -> None:
        self.row.options = []
        table = load_table(self._folder(), "test")
        self.row.options = table["file_name"].head(MAX_CHOICES).tolist()

    def _open_row(self, change: Any) -> None:
        if self.row.value:
            self._opened(self._study.open_row(self._folder(), self.row.value))

    def _open_upload(self, change: Any) -> None:
        if self.upload.value:
            file = self.upload.value[0]
            self._opened(self._study.open_upload(file["name"], bytes(file["content"])))

    def _open_path(self, change: Any) -> None:
        if self.path.value.strip():
            self._opened(self._study.open_file(self.path.value.strip()))


class EditPanel(Panel):
    """Say what should be different: a button per label, or words."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._rows = widgets.VBox()
        self.buttons: dict[tuple[str, str], widgets.ToggleButton] = {}
        self.text = widgets.Text(
            placeholder="remove the pacemaker, keep the effusion",
            tooltip="a sentence, or 'source prompt -> target prompt'",
            layout=NARROW,
        )
        super().__init__("What should be different?", [self._rows, widgets.Label("or in words"), self.text])

    def show(self, case: Case) -> None:
        """A row per label with its present state, and a button for each change that makes sense."""
        self.buttons, rows = {}, []
        for label, phrase in self._study.vocab.phrases.items():
            known = label_state(label, case.labels.get(label))
            verbs = ["remove", "add"] if known is None else ["remove" if known else "add"]
            for verb in verbs:
                self.buttons[verb, label] = widgets.ToggleButton(
                    description=f"{verb} {phrase}", tooltip=f"press to {verb} {phrase}", layout={"width": "190px"}
                )
                self.buttons[verb, label].observe(self._exclude, "value")
            rows += [
                widgets.HBox([self.buttons[verb, label], widgets.HTML(_state(case, label) if verb == verbs[0] else "")])
                for verb in verbs
            ]
        self._rows.children = rows

    def _exclude(self, change: Any) -> None:
        """A label cannot be both removed and added."""
        pressed = next(key for key, button in self.buttons.items() if button is change["owner"])
        other = self.buttons.get(("add" if pressed[0] == "remove" else "remove", pressed[1]))
        if change["new"] and other is not None:
            other.value = False

    def pressed(self, verb: str) -> list[str]:
        """The labels whose button for this verb is down."""
        return [label for (name, label), button in self.buttons.items() if name == verb and button.value]


class SettingsPanel(Panel):
    """How to edit; each control says in its tooltip what it does."""

    def __init__(self, study: Study, steps: int) -> None:
        self._study, self._file = study, ""
        usual = recommended(paths.weights() / paths.SHIPPED, NO_EDIT)
        self.guidance = _slider(
            "strength",
            usual.guidance_scale,
            0,
            10,
            0.5,
            "guidance scale: how strongly the edit's words are followed; twice that where it adds something",
        )
        self.structure = _slider(
            "structure kept",
            usual.self_replace_steps,
            0,
            1,
            0.05,
            "share of steps with the original's self-attention: more keeps more of its shapes",
        )
        self.attention = _slider(
            "layout kept",
            usual.cross_replace_steps,
            0,
            1,
            0.05,
            "share of steps with the original's cross-attention: more keeps things where they are",
        )
        self.weight = _slider(
            "word weight", usual.word_weight, 0, 4, 0.25, "attention to the words of the edit, while the layout is kept"
        )
        self.method = widgets.Dropdown(
            options=list(METHODS),
            value=RECOMMENDED,
            description="method",
            tooltip="inversion: what explains the image",
        )
        self.steps = widgets.IntSlider(
            value=steps, min=2, max=100, description="steps", tooltip="DDIM steps: 20 is quick, 50 what the figures use"
        )
        self.sweep = widgets.Dropdown(
            options=[
                ("one result", ""),
                ("four strengths", "guidance_scale"),
                ("four degrees of structure", "self_replace_steps"),
            ],
            description="candidates",
            tooltip="run the edit at several values of a setting and choose by eye",
        )
        assert {value for _, value in self.sweep.options} == {"", *SWEEPS}
        self.mask = widgets.Dropdown(
            options=["automatic", "off", "rectangle", "file"],
            description="mask",
            tooltip="where the edit may show; all other pixels stay the input's own, bit for bit",
        )
        size = study.size
        self.rows = widgets.IntRangeSlider(
            value=(size // 4, 3 * size // 4),
            min=0,
            max=size,
            description="rows",
            tooltip="top and bottom of the rectangle, in pixels",
        )
        self.columns = widgets.IntRangeSlider(
            value=(size // 4, 3 * size // 4),
            min=0,
            max=size,
            description="columns",
            tooltip="left and right of the rectangle, in pixels",
        )
        self.mask_file = widgets.FileUpload(
            accept=ACCEPT, description="upload mask", tooltip="an image, white where the edit may show"
        )
        self._mask_form = widgets.VBox()
        controls = [self.guidance, self.structure, self.attention, self.weight, self.method, self.steps, self.sweep,
                    self.mask, self.rows, self.columns]  # fmt: skip
        for control in controls:
            control.layout, control.style = NARROW, {"description_width": "100px"}
        super().__init__("How", [*controls[:8], self._mask_form])
        self.mask.observe(self.guarded(self._show_mask_form), "value")
        self.mask_file.observe(self.guarded(self._read_mask), "value")

    def _show_mask_form(self, change: Any) -> None:
        forms = {"rectangle": [self.rows, self.columns], "file": [self.mask_file]}
        self._mask_form.children = forms.get(self.mask.value, [])

    def _read_mask(self, change: Any) -> None:
        self._file = ""
        if self.mask_file.value:
            file = self.mask_file.value[0]
            self._file = self._study.upload_mask(file["name"], bytes(file["content"]))
            self.line.say(f"Mask: {file['name']}.", "note")

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """The rectangle (top, left, bottom, right), where one is asked for."""
        if self.mask.value != "rectangle":
            return None
        (top, bottom), (left, right) = self.rows.value, self.columns.value
        return top, left, bottom, right

    def values(self) -> dict[str, Any]:
        """The settings as fields of a `Recipe`."""
        if self.mask.value == "file" and not self._file:
            raise ValueError("Upload a mask, or choose another kind of mask.")
        masks = {"automatic": "auto", "off": "off", "rectangle": self.box, "file": self._file}
        return {
            "guidance_scale": self.guidance.value,
            "self_replace_steps": self.structure.value,
            "cross_replace_steps": self.attention.value,
            "word_weight": self.weight.value,
            "method": self.method.value,
            "steps": self.steps.value,
            "mask": masks[self.mask.value],
        }


def _slider(name: str, value: float, low: float, high: float, step: float, tooltip: str) -> widgets.FloatSlider:
    return widgets.FloatSlider(value=value, min=low, max=high, step=step, description=name, tooltip=tooltip)


def _state(case: Case, label: str) -> str:
    """What is known of a label and what the judge reads, in a few words."""
    known = {True: "present", False: "absent", None: ""}[label_state(label, case.labels.get(label))]
    read = f"judge {case.readings[label]:.2f}" if label in case.readings else ""
    return f'<span class="prism-state">{", ".join(filter(None, (known, read)))}</span>'
