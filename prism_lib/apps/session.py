"""What the explorer does, without what it looks like: images, edits, runs that can be cancelled, saved files."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from prism_lib import paths, records
from prism_lib.apps.profiles import one_line
from prism_lib.apps.recipe import Recipe, image_size, keep_upload, load_image, phantom_patient, upload_name
from prism_lib.data.folder import load_info, load_table
from prism_lib.data.uploads import read_upload
from prism_lib.editing.counterfactuals import Counterfactual
from prism_lib.editing.inversion import Callback, Inversion
from prism_lib.editing.settings import EditConfig, recommended
from prism_lib.evaluation import metrics, novelty
from prism_lib.evaluation.evaluate import load_judge
from prism_lib.files import image_hash, write_bytes
from prism_lib.language.edits import Edit
from prism_lib.language.labels import PHANTOM, Labels, Vocabulary, label_state, vocabulary
from prism_lib.models.classifier import Classifier
from prism_lib.models.pipeline import check_images, encode_prompts, image_factor, load_pipeline, told_apart
from prism_lib.models.schedule import Schedule
from prism_lib.paths import SHIPPED
from prism_lib.phantom import patients
from prism_lib.reporting.plots import difference, levels, png

logger = logging.getLogger(__name__)

PREVIEW_STEPS = 5
HEARD = 0.15  # see `models.told_apart`; "with" and "without" are 1 apart


class CancelledError(Exception):
    """The run was cancelled between two steps."""


class Fault(ValueError):
    """A sentence for the person at the screen, and the control it belongs to."""

    def __init__(self, control: str, sentence: str) -> None:
        super().__init__(sentence)
        self.control = control


@dataclass(frozen=True)
class Case:
    """An image (1, C, H, W) to edit, what is known of it, and a warning where it is unlike the training images."""

    name: str  # in a `Recipe`
    title: str
    image: Tensor
    labels: Labels  # 1, 0 or missing
    readings: Mapping[str, float]  # the judge's probabilities
    notice: str

    def state(self, label: str) -> bool | None:
        """Whether a label is present: as it is known, else as the judge reads it, else None."""
        known = label_state(label, self.labels.get(label))
        return self.readings[label] >= 0.5 if known is None and label in self.readings else known


@dataclass(frozen=True)
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
        assert isinstance(self.result.settings, EditConfig)
        return self.result.settings


Progress = Callable[[float], None]
Preview = Callable[[Outcome], None]
Done = Callable[[list[Outcome], str], None]  # the outcomes, or none and a sentence


class Session:
    """A model, the image at hand, and every counterfactual made so far; one edit runs at a time, in a thread."""

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        model: str = SHIPPED,
        judge: Classifier | None = None,
        vocab: Vocabulary = PHANTOM,
        reference: novelty.Reference | None = None,
        mode: str = "L",
    ) -> None:
        self.pipe, self.model, self.judge, self.reference, self.mode = pipe, model, judge, reference, mode
        self.vocab, self.size = vocab, image_size(pipe)
        self.case: Case | None = None
        self.history: list[list[Outcome]] = []
        self.running = False
        self._masks: dict[str, Tensor] = {}  # that were uploaded
        self._inversions: dict[tuple[str, str, str, int], Inversion] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread()

    @classmethod
    def load(cls, model: str = SHIPPED, judge: str = "", vocab: str = "phantom", mode: str = "L") -> Session:
        """A session with a named model, with the judge of that name (none if empty), on gray ("L") or "RGB" images."""
        pipe = load_pipeline(model)
        return cls(pipe, model, load_judge(judge), vocabulary(vocab), novelty.load(model), mode)

    def open_phantom(self, seed: int, index: int) -> Case:
        name = f"phantom:{seed}/{index}"
        labels = phantom_patient(name).labels().to_dict("records")[0]
        known = {str(label): float(value) for label, value in labels.items() if label in self.vocab.labels}
        return self._open(name, f"phantom patient {index} of population {seed}", known)

    def open_row(self, folder: Path, file_name: str) -> Case:
        """An image of a prepared folder, with the labels of its table."""
        table, labels = load_table(folder), load_info(folder)["labels"]
        rows = table.loc[table["file_name"] == file_name, labels].to_dict("records")
        if not rows:
            raise Fault("image", f"{folder} has no image {file_name}.")
        known = {str(label): float(value) for label, value in rows[0].items() if value in (0, 1)}
        return self._open(f"file:{Path(folder).resolve() / file_name}", file_name, known)

    def open_file(self, path: str) -> Case:
        return self._open(f"file:{Path(path).expanduser().resolve()}", Path(path).name, {})

    def open_upload(self, name: str, content: bytes) -> Case:
        """An uploaded file. It stays in memory; only `save` and `code` write it, as it was prepared."""
        image = read_upload(name, content, self.size, self.mode)
        return self._open(upload_name(image), name, {}, image)

    def upload_mask(self, name: str, content: bytes) -> str:
        """A mask from a file, white where the edit may show; returns its name in a recipe."""
        image = read_upload(name, content, self.size)
        self._masks[upload_name(image)] = image
        return upload_name(image)

    def _open(self, name: str, title: str, labels: Labels, image: Tensor | None = None) -> Case:
        image = load_image(name, self.size, self.mode) if image is None else image
        check_images(image, image_factor(self.pipe.vae))
        self.case = Case(name, title, image, labels, self._readings(image), self._unlike(image))
        return self.case

    def _unlike(self, image: Tensor) -> str:
        """That an image is unlike those the model was trained on and what to do about it, or nothing."""
        if (known := self.reference) is None or known.shape != tuple(image.shape[1:]):
            return ""
        score = known.scores(image).item()
        if not known.is_new(score):
            return ""
        return (
            f"This image is unlike those that {self.model} was trained on (distance {score:.1f}, {known.share:.0%} of "
            "its own kind stay below 1): do not read anything into the counterfactual. Is it whole, "
            "sharp, upright and not inverted? For images of another kind load a "
            'model trained on them, for example one from 02_finetuning: explore("my-run/pipeline").'
        )

    def _readings(self, image: Tensor) -> dict[str, float]:
        judge = self.judge
        return {} if judge is None else dict(zip(judge.labels, judge.read(image)[0].tolist(), strict=True))

    def edit(self, remove: Sequence[str] = (), add: Sequence[str] = (), text: str = "") -> Edit:
        """The edit of toggled labels, or of words: a sentence, or "source prompt -> target prompt"."""
        with _faults_of("edit"):
            if text.strip() and (remove or add):
                raise ValueError("Give the edit in words or by the buttons, not both.")
            if text.strip():
                case = self.case
                known = {label: case.state(label) for label in self.vocab.phrases} if case else None
                return Edit.read(text, self.vocab, known)
            if not (remove or add):
                raise ValueError("Say what should be different: press a button or write it.")
            return Edit(tuple(remove), tuple(add))

    def recipe(self, edit: Edit, settings: Mapping[str, Any] | None = None, **more: Any) -> Recipe:
        """The recipe of an edit of the image at hand: fields of `EditConfig`, and `more` of `Recipe`."""
        if self.case is None:
            raise Fault("image", "Choose an image first.")
        with _faults_of("edit"):
            pair = edit.prompts(self._labels(self.case, edit), self.vocab)
            encode_prompts(self.pipe, [pair.source, pair.target])
        about = asdict(pair) | {"model": self.model, "mode": self.mode, "settings": dict(settings or {})}
        with _faults_of("settings"):
            recipe = Recipe(self.case.name, **about, **more)
            recommended(self.pipe, pair, **recipe.settings)  # do they go with what the model recommends?
            Schedule.from_config(self.pipe.scheduler.config, recipe.steps)
            if not isinstance(recipe.mask, str):
                recipe.own_mask(self.case.image)
        return recipe

    def _labels(self, case: Case, edit: Edit) -> dict[str, float]:
        """What the source prompt may say: what is known, and what the judge reads of labels that stay as they are."""
        edited = {self.vocab.owners.get(name, name) for name in (*edit.remove, *edit.add)}
        known = {label for label, value in case.labels.items() if label_state(label, value) is not None}
        said = [label for label in self.vocab.phrases if label in known or label not in edited]
        return {label: float(state) for label in said if (state := case.state(label)) is not None}

    def start(self, recipes: Sequence[Recipe], edit: Edit, *, progress: Progress, preview: Preview, done: Done) -> None:
        """Run in the background. `done` gets the outcomes, or none and a sentence; all calls come from the thread."""
        if self.running:
            raise Fault("run", "An edit is running: wait for it or cancel it.")
        self._stop.clear()
        self.running = True

        def work() -> None:
            made, said = [], ""
            try:
                made = self.run(recipes, edit, progress=progress, preview=preview)
            except CancelledError:
                said = "Cancelled."
            except Exception as error:  # whatever it is, the session goes on
                logger.warning("an edit failed", exc_info=True)
                said = sentence(error)
            self.running = False
            done(made, said)

        self._thread = threading.Thread(target=work, name="prism-explorer", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Ask the run to stop; it does so after the step it is in."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the run to end; whether it has."""
        if self.running:
            self._thread.join(seconds)
        return not self.running

    def run(
        self,
        recipes: Sequence[Recipe],
        edit: Edit,
        *,
        progress: Progress = lambda _: None,
        preview: Preview | None = None,
    ) -> list[Outcome]:
        """Run recipes of the image at hand one by one and remember them; a quick look at the first comes before."""
        case = self.case
        assert case is not None, "a recipe has been made, so there is an image"
        first = recipes[0]
        if preview is not None and first.steps >= 2 * PREVIEW_STEPS:
            quick = self._outcome(case, replace(first, steps=PREVIEW_STEPS), edit, self._callback(lambda _: None, 1))
            preview(replace(quick, preview=True))
        callback = self._callback(progress, sum(recipe.steps for recipe in recipes) + first.steps)
        made = [self._outcome(case, recipe, edit, callback) for recipe in recipes]
        self.history.append(made)
        return made

    def _callback(self, progress: Progress, steps: int) -> Callback:
        taken = count(1)

        def after_step(index: int, timestep: int, latents: Tensor) -> None:
            progress(min(1.0, next(taken) / steps))
            if self._stop.is_set():
                raise CancelledError
            if not bool(torch.isfinite(latents).all()):
                raise ValueError(f"The model gave numbers that are not finite at step {index + 1}; lower the strength.")

        return after_step

    def _outcome(self, case: Case, recipe: Recipe, edit: Edit, callback: Callback) -> Outcome:
        key = recipe.image, recipe.source, recipe.method, recipe.steps
        if key not in self._inversions:
            inversion = recipe.invert(self.pipe, case.image, callback)
            self._inversions = {old: kept for old, kept in self._inversions.items() if old[0] == case.name}
            self._inversions[key] = inversion
        uploaded = self._masks.get(str(recipe.mask))
        mask = None if uploaded is None else (uploaded > 0.5).float()
        result = recipe.run(self.pipe, inversion=self._inversions[key], mask=mask, callback=callback)
        notice = " ".join(filter(None, (case.notice, edit.note, self._unheard(edit))))
        return Outcome(case, recipe, edit, result, self._scores(case, edit, result), notice)

    def _unheard(self, edit: Edit) -> str:
        """That the model hardly tells apart two sides or kinds of device of which the edit names one, or nothing."""
        for name in (*edit.remove, *edit.add, *edit.keep):
            for other in self.vocab.details.get(self.vocab.owners.get(name, ""), ()):
                if other != name and told_apart(self.pipe, name, other, self.vocab.subject) < HEARD:
                    return f"To {self.model}, {name} and {other} read almost the same: the image may show either."
        return ""

    def _scores(self, case: Case, edit: Edit, result: Counterfactual) -> dict[str, float]:
        image, factual = result.image[None].cpu(), case.image
        scores = dict(result.scores) | {"ssim": metrics.ssim(image, factual).item()}
        scores |= {f"reads {label}": value for label, value in self._readings(image).items()}
        if case.name.startswith("phantom:") and edit.attributes and patients.SETTABLE.issuperset(edit.attributes):
            truth, changed = patients.counterfactual(phantom_patient(case.name), self.size, **edit.attributes)
            if bool(changed.any()):
                scores["true_error_ratio"] = metrics.true_error_ratio(image, truth, factual, changed).item()
        return scores

    def undo(self) -> list[Outcome]:
        """Forget the latest run and return the outcomes of the one before it."""
        del self.history[-1:]
        return self.history[-1] if self.history else []

    def code(self, outcome: Outcome) -> str:
        """Three lines that give the same image in a fresh kernel; an upload is written where they find it."""
        self._keep_uploads(outcome)
        return outcome.recipe.code()

    def save(self, outcome: Outcome) -> Path:
        """Write image, original, mask, difference and record into a folder below PRISM_RUNS, and return it."""
        self._keep_uploads(outcome)
        result, recipe = outcome.result, outcome.recipe
        digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
        words = re.sub(r"[^A-Za-z0-9]+", "-", f"{recipe.image[-24:]}-{outcome.edit.key}").strip("-")[:80]
        folder = paths.runs() / "explorer" / f"{words}-{digest}"
        for name, image in {"image": result.image, "original": result.factual, "mask": result.mask}.items():
            write_bytes(folder / f"{name}.png", png(levels(image)))
        write_bytes(folder / "difference.png", png(difference(result.image, result.factual)))
        about = {
            "scores": {name: float(f"{value:.6g}") for name, value in outcome.scores.items()},
            "settings": asdict(outcome.used),
            "notice": outcome.notice,
            "image_sha256": image_hash(result.image),
            "commit": records.commit(),
            "versions": records.versions(),
            "device": records.device(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        recipe.save(folder / "record.json", about)  # last: a folder with a record is complete
        return folder

    def _keep_uploads(self, outcome: Outcome) -> None:
        keep_upload(outcome.recipe.image, outcome.result.factual)
        if (mask := self._masks.get(str(outcome.recipe.mask))) is not None:
            keep_upload(str(outcome.recipe.mask), mask[0])


def sentence(error: BaseException) -> str:
    """An exception as one sentence for a person: its first line, without a traceback."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "There is not enough memory for this: close other notebooks or take a smaller model."
    lines = (one_line(error) if hasattr(error, "errors") else str(error).strip()).splitlines()
    said = (lines or [type(error).__name__])[0].strip()
    if said.endswith((".", "!", "?")):
        return said  # it was written as a sentence, and may begin with the name of a file
    return f"{said[:1].upper()}{said[1:]}."


@contextmanager
def _faults_of(control: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise Fault(control, sentence(error)) from None
