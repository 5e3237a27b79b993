"""How long a person waits, and what counts as an unlike image: `python -m benchmarks.explorer`.

Writes figures/phantom/explorer.json, and novelty.json beside the weights of the model. To be run whenever these weights
change. `--others FOLDER` adds the images of a folder to those that should be told apart; `--reference-only` measures
what counts as unlike and no times.
"""

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from skimage import data, transform

from prism_lib import paths, records
from prism_lib.apps import Session, recipe
from prism_lib.data.uploads import UploadError, read_upload
from prism_lib.evaluation import novelty
from prism_lib.models.pipeline import load_pipeline
from prism_lib.paths import SHIPPED
from prism_lib.phantom import patients

IMAGES, OTHERS, ROUNDS = 256, 64, 5
HELD_OUT_SEED, TEST_SEED = 9001, 9002  # populations that no training and no evaluation draws from
SAMPLES = ("camera", "coins", "moon", "page", "text", "brick", "grass", "gravel")

# What `00_quickstart` does until its first counterfactual, in a fresh interpreter.
FIRST = """
from prism_lib.apps import explore
panel = explore({model!r}, {judge!r})
edit = panel.session.edit(remove=["Support Devices"])
panel.session.run([panel.session.recipe(edit, steps=20)], edit)
"""


def main() -> None:
    """Measure, then write the reference and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED)
    parser.add_argument("--judge", default="phantom-judge")
    parser.add_argument("--others", type=Path, help="a folder of images that are unlike the phantom")
    parser.add_argument("--reference-only", action="store_true")
    options = parser.parse_args()
    with records.Timer() as timer:
        pipe = load_pipeline(options.model)
        reference = novelty.measure(pipe, patients.render(patients.sample_patients(IMAGES, HELD_OUT_SEED), _size(pipe)))
        folder = paths.weights() / options.model
        novelty.save(reference, folder if folder.is_dir() else Path(options.model))
        metrics: dict[str, Any] = {"novelty": _told_apart(pipe, reference, options.others)}
        if not options.reference_only:
            metrics |= _waiting(options.model, options.judge)
    if options.reference_only:
        sys.stdout.write(f"{metrics}\n")
        return
    records.record(
        "explorer",
        dataset="phantom",
        notebook="benchmarks/explorer.py",
        parameters={"images": IMAGES, "rounds": ROUNDS, "steps": 20, "judge": options.judge},
        seed=HELD_OUT_SEED,
        metrics=metrics,
        model=options.model,
        seconds=timer.seconds,
    )


def _told_apart(pipe: StableDiffusionPipeline, reference: novelty.Reference, folder: Path | None) -> dict[str, Any]:
    """The share of images of each kind that is called unlike, and the median score."""
    size = _size(pipe)
    phantoms = patients.render(patients.sample_patients(OTHERS, TEST_SEED), size)
    noise = torch.rand(8, 1, size, size, generator=torch.Generator().manual_seed(0))
    kinds = {
        "phantoms": phantoms,
        "phantoms_upside_down": phantoms.flip(2),
        "phantoms_inverted": 1 - phantoms,
        "photographs_and_textures": torch.cat([_sample(name, size) for name in SAMPLES]),
        "noise": noise,
    }
    if folder is not None and (films := _films(folder, size)):
        kinds["others"] = torch.cat(films)
    measured: dict[str, Any] = {"threshold": reference.threshold, "share": reference.share}
    for kind, images in kinds.items():
        scores = reference.scores(novelty.log_errors(pipe, images))
        called = sum(reference.is_new(score) for score in scores.tolist()) / len(scores)
        measured[kind] = {"called_unlike": called, "median_score": scores.median().item(), "images": len(scores)}
    return measured


def _sample(name: str, size: int) -> torch.Tensor:
    levels = transform.resize(getattr(data, name)() / 255, (size, size), anti_aliasing=True)
    return torch.from_numpy(np.clip(levels, 0, 1)).float()[None, None]


def _films(folder: Path, size: int) -> list[torch.Tensor]:
    films = []
    for path in sorted(folder.rglob("*.*")):
        try:
            films.append(read_upload(path.name, path.read_bytes(), size))
        except UploadError:
            continue
        if len(films) == OTHERS:
            break
    return films


def _waiting(model: str, judge: str) -> dict[str, float]:
    """Seconds to the first counterfactual in a fresh interpreter, per edit, to its preview, and to stop."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST.format(model=model, judge=judge)],
        check=True, env=os.environ | {"TQDM_DISABLE": "1"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    first = time.perf_counter() - start
    session = Session.load(model, judge)
    edits: list[float] = []
    previews: list[float] = []
    for index in range(ROUNDS):
        case = session.open_phantom(4001, index)
        present = ["Support Devices"] if case.state("Support Devices") else []
        edit = session.edit(remove=present, add=[] if present else ["Support Devices"])
        planned = session.recipe(edit, steps=20)
        start = time.perf_counter()
        session.run([planned], edit, preview=_stopwatch(previews, start))
        edits.append(time.perf_counter() - start)
    return {
        "seconds_to_first_counterfactual": first,
        "seconds_per_edit": statistics.median(edits),
        "seconds_to_preview": statistics.median(previews),
        "seconds_to_cancel": _cancelling(session),
    }


def _stopwatch(times: list[float], start: float) -> Callable[[object], None]:
    """What notes the seconds since the start whenever it is called."""
    return lambda _: times.append(time.perf_counter() - start)


def _cancelling(session: Session) -> float:
    """Seconds from a cancel in mid-run until the session is free."""
    case = session.open_phantom(4001, 0)
    edit = session.edit(text="add cardiomegaly" if not case.state("Cardiomegaly") else "remove cardiomegaly")
    under_way = threading.Event()
    session.start(
        [session.recipe(edit, steps=20)], edit,
        progress=lambda share: under_way.set(), preview=lambda _: None, done=lambda *_: None,
    )  # fmt: skip
    under_way.wait()
    start = time.perf_counter()
    session.cancel()
    session.wait()
    return time.perf_counter() - start


def _size(pipe: StableDiffusionPipeline) -> int:
    return recipe.image_size(pipe)


if __name__ == "__main__":
    main()
