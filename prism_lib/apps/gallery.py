"""The image at hand: where it comes from, what is known and read of it, and whether it is unlike the training images.

A `Gallery` opens phantoms, prepared folders, files and uploads for one model. What goes wrong is a `Fault`: a sentence,
and the control beside which it should stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from prism_lib.apps.profiles import one_line
from prism_lib.apps.recipe import image_size, load_image, phantom_patient
from prism_lib.data.folder import load_info, load_table
from prism_lib.data.uploads import read_upload
from prism_lib.evaluation.novelty import Reference, log_errors
from prism_lib.files import image_hash
from prism_lib.language.labels import Labels, Vocabulary, label_state, vocabulary
from prism_lib.models.classifier import Classifier
from prism_lib.models.pipeline import check_images, image_factor

UPLOADS = "explorer/uploads"  # below PRISM_RUNS


class Fault(ValueError):
    """A sentence for the person at the screen, and the control it belongs to."""

    def __init__(self, control: str, sentence: str) -> None:
        super().__init__(sentence)
        self.control = control


@dataclass(frozen=True)
class Case:
    """An image (1, 1, H, W) to edit: its name in a `Recipe`, what is known of it, and how unusual it is.

    `labels` are 1, 0 or missing; `readings` the judge's probabilities; `novelty` the score of `evaluation.novelty`.
    """

    name: str
    title: str
    image: Tensor
    labels: Labels
    readings: Mapping[str, float]
    novelty: float | None

    def state(self, label: str) -> bool | None:
        """Whether a label is present: as it is known, else as the judge reads it, else None."""
        known = label_state(label, self.labels.get(label))
        if known is None and label in self.readings:
            return self.readings[label] >= 0.5
        return known


class Gallery:
    """Opens images for one model, and keeps the one at hand and the masks that were uploaded for it."""

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        model: str,
        judge: Classifier | None,
        vocab: Vocabulary | None,
        reference: Reference | None,
        mode: str,
    ) -> None:
        self.pipe, self.model, self.judge, self.reference, self.mode = pipe, model, judge, reference, mode
        self.vocab = vocab or vocabulary("phantom")
        self.size = image_size(pipe)
        self.case: Case | None = None
        self.masks: dict[str, Tensor] = {}

    def open_phantom(self, seed: int, index: int) -> Case:
        """A phantom patient, whose labels are known."""
        name = f"phantom:{seed}/{index}"
        labels = phantom_patient(name).labels().to_dict("records")[0]
        known = {str(label): float(value) for label, value in labels.items() if label in self.vocab.labels}
        return self._open(
            name, f"phantom patient {index} of population {seed}", load_image(name, self.size, self.mode), known
        )

    def open_row(self, folder: Path, file_name: str) -> Case:
        """An image of a prepared folder, with the labels of its table."""
        table, info = load_table(folder), load_info(folder)
        rows = table[table["file_name"] == file_name]
        if rows.empty:
            raise Fault("image", f"{folder} has no image {file_name}.")
        name = f"file:{Path(folder).resolve() / file_name}"
        return self._open(
            name, file_name, load_image(name, self.size, self.mode), _known(rows.to_dict("records")[0], info["labels"])
        )

    def open_file(self, path: str) -> Case:
        """An image file of this machine, without labels."""
        name = f"file:{Path(path).expanduser().resolve()}"
        return self._open(name, Path(path).name, load_image(name, self.size, self.mode), {})

    def open_upload(self, name: str, content: bytes) -> Case:
        """An uploaded file. It stays in memory; only `save` and `code` write it, as it was prepared."""
        image = read_upload(name, content, self.size, self.mode)
        return self._open(_upload(image), name, image, {})

    def upload_mask(self, name: str, content: bytes) -> str:
        """A mask from a file, white where the edit may show; returns its name in a recipe."""
        image = read_upload(name, content, self.size)
        self.masks[_upload(image)] = image
        return _upload(image)

    def _open(self, name: str, title: str, image: Tensor, labels: Labels) -> Case:
        check_images(image, image_factor(self.pipe.vae))
        score = None
        if self.reference is not None:
            score = self.reference.scores(log_errors(self.pipe, image)).item()
        self.case = Case(name, title, image, labels, self.readings(image), score)
        return self.case

    @property
    def notice(self) -> str:
        """What should be said of the image at hand, see `notice_of`."""
        return "" if self.case is None else self.notice_of(self.case)

    def notice_of(self, case: Case) -> str:
        """That an image is unlike those the model was trained on and what to do about it, or nothing."""
        reference = self.reference
        if reference is None or case.novelty is None or not reference.is_new(case.novelty):
            return ""
        return (
            f"This image is unlike those that {self.model} was trained on (distance {case.novelty:.0f}, "
            f"{reference.share:.0%} of its own kind stay below {reference.threshold:.1f}): do not read anything into "
            f"the counterfactual. Load a model trained on such images, for example one from 02_finetuning: "
            f'explore("my-run/pipeline").'
        )

    def readings(self, image: Tensor) -> dict[str, float]:
        """The judge's probability of each of its labels on an image (1, C, H, W); {} without a judge."""
        if self.judge is None:
            return {}
        probabilities = self.judge.read(image)[0].tolist()
        return dict(zip(self.judge.labels, probabilities, strict=True))


def sentence(error: BaseException) -> str:
    """An exception as one sentence for a person: its first line, without a traceback."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "There is not enough memory for this: close other notebooks or take a smaller model."
    lines = (one_line(error) if hasattr(error, "errors") else str(error).strip()).splitlines()
    said = (lines or [type(error).__name__])[0].strip()
    if said.endswith((".", "!", "?")):
        return said  # it was written as a sentence, and may begin with the name of a file
    return f"{said[:1].upper()}{said[1:]}."


def _upload(image: Tensor) -> str:
    """The name of an uploaded image in a recipe: a file below PRISM_RUNS that its pixels decide."""
    return f"file:{UPLOADS}/{image_hash(image)[:16]}.png"


def _known(row: Mapping[Any, Any], labels: Sequence[str]) -> dict[str, float]:
    """The labels of a table's row that are known: 1 or 0."""
    return {label: float(row[label]) for label in labels if row[label] in (0, 1)}
