"""A recipe, all that decides one counterfactual, bit for bit, and its outcome with the files that are kept of it."""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch import Tensor

from prism_lib import paths, records
from prism_lib.configs import checked
from prism_lib.data.dicom import is_dicom, secondary_capture
from prism_lib.data.full_size import Content, put_back_file
from prism_lib.data.uploads import read_file
from prism_lib.editing.counterfactuals import Counterfactual, edit
from prism_lib.editing.inversion import Callback, Inversion, invert
from prism_lib.editing.methods import RECOMMENDED, method_of
from prism_lib.editing.settings import EditConfig
from prism_lib.files import image_hash, write_bytes, write_text
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.language.labels import Labels, Vocabulary, label_state, vocabulary
from prism_lib.models.pipeline import Pipe, image_size, load_pipeline
from prism_lib.paths import FILMS, SHIPPED
from prism_lib.phantom import patients
from prism_lib.reporting.plots import difference, levels, png

UPLOADS = "file:explorer/uploads/"  # below PRISM_RUNS
SWEEPS: Mapping[str, tuple[float, ...]] = {
    "guidance_scale": (1.0, 2.0, 3.5, 5.0),
    "self_replace_steps": (0.0, 0.2, 0.4, 0.6),
}


def unmeasured(model: str, edit: Edit | None, vocab: Vocabulary) -> str:
    """What the model was measured for, if this edit, or any (None), is something else."""
    removed = {vocab.phrase(name) for name in edit.remove} if edit is not None and not edit.add else {""}
    if Path(model).name != FILMS or removed <= {"support devices", *vocabulary("films").owners}:
        return ""
    return f"{model} was measured for edits that remove support devices; others are outside what it was trained for."


@checked()
class Recipe:
    """One counterfactual: the prompts, the phrases that the edit is about, the model's name and how it is edited."""

    image: str  # "phantom:SEED/INDEX", or "file:PATH", absolute or below PRISM_DATA or PRISM_RUNS
    source: str
    target: str
    source_words: tuple[str, ...]
    target_words: tuple[str, ...]
    side: Literal["", "left", "right"] = ""  # of the patient, on which alone the edit may act
    model: str = SHIPPED
    mode: str = "L"  # PIL's name of the image's colours, or "RGB"
    method: str = RECOMMENDED
    steps: int = 20
    settings: dict[str, Any] = field(default_factory=dict, hash=False)  # fields of `EditConfig`
    mask: tuple[int, int, int, int] | str = "auto"  # or "off", or (top, left, bottom, right) in pixels

    def __post_init__(self) -> None:
        method_of(self.method)
        if isinstance(self.mask, str) and self.mask not in ("auto", "off"):
            raise ValueError(f"mask is {self.mask!r}; expected 'auto', 'off' or a rectangle")
        EditConfig(**self.settings)

    def run(
        self, pipe: Pipe | None = None, inversion: Inversion | None = None, callback: Callback | None = None
    ) -> Counterfactual:
        """The counterfactual. What is given is not loaded or computed again; `callback` may raise to cancel."""
        pipe = load_pipeline(self.model) if pipe is None else pipe
        if inversion is None:
            inversion = self.invert(pipe, load_image(self.image, image_size(pipe), self.mode), callback)
        mask = self.own_mask(inversion.images)
        pair = PromptPair(self.source, self.target, self.source_words, self.target_words, self.side)
        return edit(pipe, inversion, [pair], {**self.settings, "batch_size": 1}, mask=mask, callback=callback)[0]

    def invert(self, pipe: Pipe, image: Tensor, callback: Callback | None = None) -> Inversion:
        return invert(pipe, image, [self.source], method=self.method, num_inference_steps=self.steps, callback=callback)

    def own_mask(self, images: Tensor) -> Tensor | str:
        """The user's own rectangle as a mask (1, 1, H, W), or "auto" or "off"."""
        if isinstance(self.mask, str):
            return self.mask
        (top, left, bottom, right), (height, width) = self.mask, images.shape[-2:]
        if not (0 <= top < bottom <= height and 0 <= left < right <= width):
            raise ValueError(f"the rectangle {self.mask} is empty or leaves the image of {height} x {width} pixels")
        mask = torch.zeros(1, 1, height, width)
        mask[:, :, top:bottom, left:right] = 1
        return mask

    def sweep(self, over: str) -> list[Self]:
        return [replace(self, settings={**self.settings, over: value}) for value in SWEEPS[over]]

    def code(self) -> str:
        """Three lines of Python that give the same image in a fresh kernel."""
        usual = [(each.name, each.default) for each in fields(self)] + [("settings", {})]
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if (name, value) not in usual)
        return f"from prism_lib.apps import Recipe\nrecipe = Recipe({arguments})\nimage = recipe.run().image"


@dataclass(frozen=True)
class Case:
    """An image (1, C, H, W) to edit, what is known of it, and a warning where it is unlike the training images."""

    name: str  # in a `Recipe`
    title: str
    image: Tensor
    labels: Labels  # 1, 0 or missing
    readings: Mapping[str, float]  # the judge's probabilities
    distances: Mapping[str, float]  # to the training images of each model that can be compared
    notice: str
    content: bytes  # of the file that was opened, if any

    def state(self, label: str) -> bool | None:
        """Whether a label is present: as it is known, else as the judge reads it, else None."""
        known = label_state(label, self.labels.get(label))
        return self.readings[label] >= 0.5 if known is None and label in self.readings else known


@dataclass(frozen=True, eq=False)
class Outcome:
    """A counterfactual, what it was made from and what was measured on it; `notice` is a warning to show with it."""

    case: Case
    recipe: Recipe
    edit: Edit
    result: Counterfactual
    scores: Mapping[str, float]
    notice: str
    preview: bool = False

    @property
    def used(self) -> EditConfig:
        return self.result.settings  # of our own editor

    def code(self) -> str:
        """`Recipe.code`; what was uploaded is written where it finds it."""
        self._keep_upload()
        return self.recipe.code()

    def save(self) -> Path:
        """Write image, original, mask, difference, record and full-size film below PRISM_RUNS; returns the folder."""
        self._keep_upload()
        result, recipe = self.result, self.recipe
        digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
        words = re.sub(r"[^A-Za-z0-9]+", "-", f"{recipe.image[-24:]}-{self.edit.key}").strip("-")[:80]
        folder = paths.runs() / "explorer" / f"{words}-{digest}"
        for name, image in {"image": result.image, "original": result.factual, "mask": result.mask}.items():
            write_bytes(folder / f"{name}.png", png(levels(image)))
        write_bytes(folder / "difference.png", png(difference(result.image, result.factual)))
        about = {"model": Path(recipe.model).name, "method": recipe.method, "steps": recipe.steps, **recipe.settings}
        capture = exporter(result, about)
        write_bytes(folder / "image.dcm", capture(levels(result.image, 16 if len(result.image) == 1 else 8)))
        record = {
            "recipe": asdict(recipe),
            "scores": {name: float(f"{value:.6g}") for name, value in self.scores.items()},
            "settings": asdict(self.used),
            "notice": self.notice,
            "image_sha256": image_hash(result.image),
            "full_size": self._full_size(folder),
            "commit": records.commit(),
            "versions": records.versions(),
            "device": records.device(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_text(folder / "record.json", json.dumps(record, indent=2) + "\n")  # last: then the folder is complete
        return folder

    def _keep_upload(self) -> None:
        """Write an upload, as it was prepared, below PRISM_RUNS: what lies there already is the same."""
        if self.recipe.image.startswith(UPLOADS):
            write_bytes(paths.runs() / self.recipe.image.removeprefix("file:"), png(levels(self.result.factual)))

    def _full_size(self, folder: Path) -> str:
        """The name of the opened film with the edit in `folder`, or why there is none; "" if it is no larger."""
        if not self.case.content or len(self.result.image) > 1:
            return ""
        with tempfile.TemporaryDirectory() as place:
            film = Path(place) / "film"
            film.write_bytes(self.case.content)
            if not is_dicom(film):
                with Image.open(film) as file:
                    if max(file.size) <= self.result.image.shape[-1]:
                        return ""
            return put_back(film, folder / "full_size", self.result).removeprefix(f"{folder}/")


def put_back(film: Path, target: Path, result: Counterfactual, content: Content | None = None) -> str:
    """Write a film with the edit of its image, as `put_back_file` does; the path with its suffix, or why it cannot."""
    target = target.with_suffix(".dcm" if content or is_dicom(film) else ".png")
    try:
        put_back_file(film, target, result.factual.cpu(), result.image.cpu(), result.mask.cpu(), content)
    except (ValueError, KeyError) as error:
        return f"not written: {error}"
    return str(target)


def exporter(result: Counterfactual, told: Mapping[str, Any], film: str = "", header: Sequence[str] = ()) -> Content:
    """Makes a result's levels a DICOM Secondary Capture that tells its recipe, and no path: it may name a patient."""
    recipe = {"image_sha256": image_hash(result.factual), **asdict(result.pair), **told}
    source, text = Path(film) if film else None, json.dumps(recipe, ensure_ascii=False)
    return partial(secondary_capture, recipe=text, source=source, header=header)


def load_image(name: str, size: int, mode: str = "L") -> Tensor:
    """The image that `Recipe.image` names, (1, C, size, size) in [0, 1]; phantoms are gray in any mode."""
    if not name.startswith("file:"):
        return patients.render(phantom_patient(name), size)
    rest = name.removeprefix("file:")
    for path in (paths.data() / rest, paths.runs() / rest):
        if path.is_file():
            return read_file(path, size, mode)
    raise FileNotFoundError(f"there is no file {rest}, neither in {paths.data()} nor in {paths.runs()}")


def phantom_patient(name: str) -> patients.Patients:
    """The one patient that "phantom:SEED/INDEX" names."""
    if not (found := re.fullmatch(r"phantom:(\d+)/(\d+)", name)):
        raise ValueError(f"image is {name!r}; expected 'phantom:SEED/INDEX' or 'file:PATH', with two whole numbers")
    return patients.sample_patients([int(found[2])], int(found[1]))


def upload_name(image: Tensor) -> str:
    """The name of an uploaded image in a recipe: a file below PRISM_RUNS that its pixels decide."""
    return f"{UPLOADS}{image_hash(image)[:16]}.png"
