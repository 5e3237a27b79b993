"""What the explorer does, without what it looks like: images, edits, runs that can be cancelled, history, saved files.

A `Session` belongs to one person in one kernel. It runs in a thread of its own, one edit at a time, so that the kernel
stays free; a flag that the callback of every step reads stops it within one step. What goes wrong is a `Fault`: a
sentence, and the control beside which it should stand.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from prism_lib import paths, records
from prism_lib.apps.gallery import UPLOADS, Case, Fault, Gallery, sentence
from prism_lib.apps.recipe import Recipe, phantom_patient
from prism_lib.editing.counterfactuals import Counterfactual
from prism_lib.editing.inversion import Callback, Inversion
from prism_lib.editing.settings import EditConfig, recommended
from prism_lib.evaluation import metrics, novelty
from prism_lib.evaluation.evaluate import load_judge
from prism_lib.files import atomic, image_hash
from prism_lib.language.edits import Edit
from prism_lib.language.labels import Vocabulary, label_state, vocabulary
from prism_lib.models.classifier import Classifier
from prism_lib.models.pipeline import encode_prompts, load_pipeline, told_apart
from prism_lib.paths import SHIPPED
from prism_lib.phantom import patients
from prism_lib.reporting.pictures import difference, gray_or_colour, png

logger = logging.getLogger(__name__)

PREVIEW_STEPS = 5
HEARD = 0.15  # see `models.told_apart`; "with" and "without" are 1 apart
SWEEPS: Mapping[str, tuple[float, ...]] = {
    "guidance_scale": (1.0, 2.0, 3.5, 5.0),
    "self_replace_steps": (0.0, 0.2, 0.4, 0.6),
}
Progress = Callable[[float], None]


class CancelledError(Exception):
    """The run was cancelled between two steps."""


@dataclass(frozen=True)
class Outcome:
    """A counterfactual, what it was made from and what was measured on it; `notice` is a warning to show with it."""

    recipe: Recipe
    edit: Edit
    result: Counterfactual
    scores: Mapping[str, float]
    notice: str
    preview: bool = False


class Session(Gallery):
    """A model, the image at hand, and every counterfactual made so far."""

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        model: str = SHIPPED,
        judge: Classifier | None = None,
        vocab: Vocabulary | None = None,
        reference: novelty.Reference | None = None,
        mode: str = "L",
    ) -> None:
        super().__init__(pipe, model, judge, vocab, reference, mode)
        self.history: list[list[Outcome]] = []
        self.running = False
        self._inversions: dict[tuple[str, ...], Inversion] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def load(cls, model: str = SHIPPED, judge: str = "", vocab: str = "phantom", mode: str = "L") -> Session:
        """A session with a named model, with the judge of that name (none if empty), on gray ("L") or "RGB" images."""
        pipe = load_pipeline(model)
        return cls(pipe, model, load_judge(judge), vocabulary(vocab), novelty.load(model, pipe), mode)

    # --- edits -------------------------------------------------------------------------------------

    def edit(self, remove: Sequence[str] = (), add: Sequence[str] = (), text: str = "") -> Edit:
        """The edit of toggled labels, or of words: a sentence, or "source prompt -> target prompt"."""
        try:
            if text.strip() and (remove or add):
                raise ValueError("Give the edit in words or by the buttons, not both.")
            if "->" in text:
                source, _, target = text.partition("->")
                return Edit.text(source, target)
            if text.strip():
                return Edit.parse(text, self.vocab)
            if not (remove or add):
                raise ValueError("Say what should be different: press a button or write it.")
            return Edit(tuple(remove), tuple(add))
        except ValueError as error:
            raise Fault("edit", sentence(error)) from None

    def recipe(self, edit: Edit, settings: Mapping[str, Any] | None = None, **more: Any) -> Recipe:
        """The recipe of an edit of the image at hand: fields of `EditConfig`, and `more` of `Recipe`."""
        if self.case is None:
            raise Fault("image", "Choose an image first.")
        try:
            pair = edit.prompts(self._labels(self.case, edit), self.vocab)
            encode_prompts(self.pipe, [pair.source, pair.target])
        except ValueError as error:
            raise Fault("edit", sentence(error)) from None
        try:
            recipe = Recipe(
                image=self.case.name,
                source=pair.source,
                target=pair.target,
                source_words=pair.source_words,
                target_words=pair.target_words,
                model=self.model,
                mode=self.mode,
                settings=dict(settings or {}),
                **more,
            )
            recommended(self.pipe, pair, **recipe.settings)  # do they go with what the model recommends?
            recipe.check_steps(self.pipe)
        except ValueError as error:
            raise Fault("settings", sentence(error)) from None
        try:
            if not isinstance(recipe.mask, str):
                recipe.mask_tensor(self.case.image)
        except ValueError as error:
            raise Fault("mask", sentence(error)) from None
        return recipe

    def _labels(self, case: Case, edit: Edit) -> dict[str, float]:
        """What the source prompt may say: what is known, and what the judge reads of labels that stay as they are."""
        edited = {self.vocab.owners.get(name, name) for name in (*edit.remove, *edit.add)}
        known = {label for label in self.vocab.phrases if label_state(label, case.labels.get(label)) is not None}
        said = [label for label in self.vocab.phrases if label in known or label not in edited]
        return {label: float(state) for label in said if (state := case.state(label)) is not None}

    @staticmethod
    def sweep(recipe: Recipe, over: str) -> list[Recipe]:
        """The candidates of a sweep over one setting; the recipe alone if `over` is empty."""
        if not over:
            return [recipe]
        return [replace(recipe, settings={**recipe.settings, over: value}) for value in SWEEPS[over]]

    # --- runs --------------------------------------------------------------------------------------

    def start(
        self,
        recipes: Sequence[Recipe],
        edit: Edit,
        *,
        progress: Progress,
        preview: Callable[[Outcome], None],
        done: Callable[[list[Outcome], str], None],
    ) -> None:
        """Run in the background. `done` gets the outcomes, or none and a sentence; all calls come from the thread."""
        if self.running:
            raise Fault("run", "An edit is running: wait for it or cancel it.")
        self._stop.clear()
        self.running = True

        def work() -> None:
            made: list[Outcome] = []
            said = ""
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
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.running

    def run(
        self,
        recipes: Sequence[Recipe],
        edit: Edit,
        *,
        progress: Progress | None = None,
        preview: Callable[[Outcome], None] | None = None,
    ) -> list[Outcome]:
        """Run recipes of the image at hand one by one and remember them; a quick look at the first comes before."""
        case = self.case
        assert case is not None, "a recipe has been made, so there is an image"
        first = recipes[0]
        if preview is not None and first.steps >= 2 * PREVIEW_STEPS:
            quick = self._outcome(case, replace(first, steps=PREVIEW_STEPS), edit, self._callback(None, 1))
            preview(replace(quick, preview=True))
        callback = self._callback(progress, sum(recipe.steps for recipe in recipes) + first.steps)
        made = [self._outcome(case, recipe, edit, callback) for recipe in recipes]
        self.history.append(made)
        return made

    def _callback(self, progress: Progress | None, steps: int) -> Callback:
        taken = 0

        def after_step(index: int, timestep: int, latents: Tensor) -> None:
            nonlocal taken
            taken += 1
            if progress is not None:
                progress(min(1.0, taken / steps))
            if self._stop.is_set():
                raise CancelledError
            if not bool(torch.isfinite(latents).all()):
                raise ValueError(f"The model gave numbers that are not finite at step {index + 1}; lower the strength.")

        return after_step

    def _outcome(self, case: Case, recipe: Recipe, edit: Edit, callback: Callback) -> Outcome:
        key = recipe.inversion_key
        if key not in self._inversions:
            inversion = recipe.invert(self.pipe, case.image, callback)
            self._inversions = {old: kept for old, kept in self._inversions.items() if old[1] == case.name}
            self._inversions[key] = inversion
        mask = self.masks.get(recipe.mask) if isinstance(recipe.mask, str) else None
        mask = None if mask is None else (mask > 0.5).float()
        result = recipe.run(self.pipe, inversion=self._inversions[key], mask=mask, callback=callback)
        notice = " ".join(filter(None, (self.notice_of(case), self._unheard(edit))))
        return Outcome(recipe, edit, result, self._scores(case, edit, result), notice)

    def _unheard(self, edit: Edit) -> str:
        """That the model hardly hears a side or a kind of device which the edit names, or nothing."""
        for name in (*edit.remove, *edit.add, *edit.keep):
            for other in self.vocab.details.get(self.vocab.owners.get(name, ""), ()):
                if other != name and told_apart(self.pipe, name, other, self.vocab.subject) < HEARD:
                    return f"To {self.model}, {name} and {other} read almost the same: the image may show either."
        return ""

    def _scores(self, case: Case, edit: Edit, result: Counterfactual) -> dict[str, float]:
        """What is measured on a result: change, likeness, the judge's readings and, on phantoms, the truth."""
        image, factual = result.image[None].cpu(), case.image
        scores = dict(result.scores) | {"ssim": metrics.ssim(image, factual).item()}
        scores |= {f"reads {label}": value for label, value in self.readings(image).items()}
        if case.name.startswith("phantom:") and edit.attributes and patients.SETTABLE.issuperset(edit.attributes):
            truth, changed = patients.counterfactual(phantom_patient(case.name), self.size, **edit.attributes)
            if bool(changed.any()):
                scores["true_error_ratio"] = metrics.true_error_ratio(image, truth, factual, changed).item()
        return scores

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
        pictures = {
            "image": gray_or_colour(result.image),
            "original": gray_or_colour(result.factual),
            "mask": gray_or_colour(result.mask),
            "difference": difference(result.image, result.factual),
        }
        for name, picture in pictures.items():
            _write_png(folder / f"{name}.png", picture)
        about = {
            "scores": {name: float(f"{value:.6g}") for name, value in outcome.scores.items()},
            "settings": asdict(result.settings) if isinstance(result.settings, EditConfig) else None,
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
        """Write what was uploaded and is named in the recipe, once and as it was prepared."""
        images = {**self.masks, outcome.recipe.image: outcome.result.factual[None]}
        for name in {outcome.recipe.image, str(outcome.recipe.mask)} & set(images):
            path = paths.runs() / name.removeprefix("file:")
            if name.startswith(f"file:{UPLOADS}/") and not path.is_file():
                _write_png(path, gray_or_colour(images[name][0]))

    def undo(self) -> list[Outcome]:
        """Forget the latest run and return the outcomes of the one before it."""
        if self.history:
            self.history.pop()
        return self.history[-1] if self.history else []


def _write_png(path: Path, picture: np.ndarray) -> None:
    with atomic(path) as partial:
        partial.write_bytes(png(picture))
