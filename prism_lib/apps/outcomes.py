"""An outcome of the explorer, and what is kept of it: pictures, a record that reruns it, and what was uploaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from torch import Tensor

from prism_lib import paths, records
from prism_lib.apps.recipe import Recipe
from prism_lib.editing.counterfactuals import Counterfactual
from prism_lib.files import image_hash
from prism_lib.language.edits import Edit
from prism_lib.reporting.pictures import difference, gray_or_colour, png

FOLDER = "explorer"  # below PRISM_RUNS
UPLOADS = f"{FOLDER}/uploads"


@dataclass(frozen=True)
class Outcome:
    """A counterfactual, what it was made from and what was measured on it; `notice` is a warning to show with it."""

    recipe: Recipe
    edit: Edit
    result: Counterfactual
    scores: Mapping[str, float]
    notice: str
    preview: bool = False


def save(outcome: Outcome) -> Path:
    """Write image, original, mask, difference and record into a folder below PRISM_RUNS, and return it."""
    result, recipe = outcome.result, outcome.recipe
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{recipe.image[-24:]}-{outcome.edit.key}").strip("-")[:80]
    folder = paths.runs() / FOLDER / f"{words}-{digest}"
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
        "notice": outcome.notice,
        "image_sha256": image_hash(result.image),
        "commit": records.commit(),
        "versions": records.versions(),
        "device": records.device(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    recipe.save(folder / "record.json", about)  # last: a folder with a record is complete
    return folder


def keep_uploads(outcome: Outcome, masks: Mapping[str, Tensor]) -> None:
    """Write what was uploaded and is named in the recipe, once and as it was prepared."""
    images = {outcome.recipe.image: outcome.result.factual[None], **masks}
    for name in {outcome.recipe.image, str(outcome.recipe.mask)} & set(images):
        path = paths.runs() / name.removeprefix("file:")
        if name.startswith(f"file:{UPLOADS}/") and not path.is_file():
            _write_png(path, gray_or_colour(images[name][0]))


def upload_path(image: Tensor) -> str:
    """Where an uploaded image is kept, below PRISM_RUNS: a name that its pixels decide."""
    return f"{UPLOADS}/{image_hash(image)[:16]}.png"


def _write_png(path: Path, picture: np.ndarray) -> None:
    """By way of a temporary name, so that no half file is ever found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(png(picture))
    temporary.replace(path)
