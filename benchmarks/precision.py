"""The gain of mixed precision on this machine, and its effect on edits: writes the record `mixed_precision`.

Work of notebooks 04 to 06 in float32 and in bfloat16 arithmetic, in turns: a call of the U-Net, and a few optimizer
steps of a classifier and of a GAN (start included). Then the same phantoms are edited in both: the error to the true
counterfactual, and the distance of the two answers.

    python -m benchmarks.precision [--patients 8] [--edit-steps 20] [--train-steps 10] [--rounds 5]
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_lib import devices, records
from prism_lib.data.folder import load_table, read_images
from prism_lib.data.preparation import PrepareConfig, prepare
from prism_lib.evaluation.evaluate import choose_cases
from prism_lib.language.edits import Edit
from prism_lib.language.labels import vocabulary
from prism_lib.models import classifier, encode_prompts, load_pipeline, predict_noise
from prism_lib.models.classifier import Classifier
from prism_lib.paths import SHIPPED
from prism_lib.studies import GanConfig, PromptToPrompt, comparison, train_gan

PRECISIONS: dict[Literal["no", "bf16"], str] = {
    "no": "float32",
    "bf16": "bfloat16",
}  # as accelerate calls them: their dtypes
SEED, ROWS = 30_004, 8  # rows of a U-Net call: four images, each with two predictions
IMAGES, READ_AT = 160, 192  # prepared phantoms, and pixels a side that the classifiers of 06 read
EDITS = ("remove_support_devices", "remove_cardiomegaly", "add_pleural_effusion")


def main() -> None:
    """Measure in turns, because machines are shared, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=8, help="patients for each edit")
    parser.add_argument("--edit-steps", type=int, default=20, help="DDIM steps of the edits")
    parser.add_argument("--train-steps", type=int, default=10, help="steps of classifier and GAN in a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; the median counts")
    given = parser.parse_args()
    with TemporaryDirectory() as place, records.Timer() as timer:
        folder = prepare(PrepareConfig("phantom", Path(place) / "phantom", size=256, num_images=IMAGES, seed=SEED))
        work = {name: tasks(folder, name, given.train_steps) for name in PRECISIONS}
        metrics = {part: timed([work[name][part] for name in PRECISIONS], given.rounds) for part in work["no"]}
        metrics |= edited(folder, given.patients, given.edit_steps)
    records.record(
        "mixed_precision",
        dataset="phantom",
        notebook="benchmarks/precision.py",
        parameters=vars(given) | {"rows": ROWS, "auto": devices.mixed_precision("auto")},
        seed=SEED,
        metrics=metrics,
        model=SHIPPED,
        seconds=timer.seconds,
    )


def tasks(folder: Path, precision: Literal["no", "bf16"], steps: int) -> dict[str, Callable[[], Any]]:
    """What is timed in one precision, by name."""
    pipe, draw = load_pipeline(mixed_precision=precision), torch.Generator().manual_seed(SEED)
    size = pipe.unet.config.sample_size
    latents = torch.randn(ROWS, pipe.unet.config.in_channels, size, size, generator=draw).to(pipe.device)
    states = encode_prompts(pipe, ["chest x-ray"] * ROWS)

    config = classifier.named_network("densenet-tiny", classifier.ClassifierConfig())
    config = replace(config, steps=steps, mixed_precision=precision)
    rows = load_table(folder).head(4 * config.batch_size)
    images = F.interpolate(read_images(folder, rows).mean(1, keepdim=True), READ_AT)
    labels = torch.tensor(rows[list(config.labels)].to_numpy(dtype=float).tolist())
    guide = Classifier(classifier.build_classifier(config).to(pipe.device).eval(), config.labels)
    gan = GanConfig(steps, filters=8, mixed_precision=precision)

    def unet() -> Tensor:
        with torch.no_grad():
            return predict_noise(pipe, latents, 500, states).cpu()

    def train() -> None:
        classifier.train_classifier(images, labels, config, progress=False)

    def train_anew() -> None:
        train_gan(folder, guide.labels[0], guide, Path(mkdtemp(prefix="gan", dir=folder.parent)), gan)

    return {"unet": unet, "classifier": train, "gan": train_anew}


def timed(calls: Sequence[Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds in each precision, in turns after one call of each to warm up, and their ratio."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, seconds in zip(calls, taken, strict=True):
            with records.Timer() as timer:
                call()
            if turn:
                seconds.append(timer.seconds)
    full, mixed = (median(seconds) for seconds in taken)
    return {"seconds_float32": full, "seconds_bfloat16": mixed, "speedup": full / mixed}


def edited(folder: Path, patients: int, steps: int) -> dict[str, dict[str, Any]]:
    """The editor's default on the same phantoms in both precisions, and how far the second's answers are off."""
    editor = PromptToPrompt(num_inference_steps=steps)
    cases = {}
    for key in EDITS:
        change = Edit.from_key(key, vocabulary("phantom"))
        cases[change] = choose_cases(folder, change, patients, "train")
    found: dict[str, comparison.Measurement] = {}
    for name, dtype in PRECISIONS.items():
        found |= comparison.measure(load_pipeline(mixed_precision=name), folder, cases, {f"edits_{dtype}": editor})
    answers = [torch.cat([evaluation.edited for evaluation in made.evaluations]) for made in found.values()]
    summary = comparison.summarise(found, SEED)
    summary["edits_bfloat16"]["l1_to_float32"] = (answers[1] - answers[0]).abs().mean().item()
    return summary


if __name__ == "__main__":
    main()
