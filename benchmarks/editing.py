"""How fast counterfactuals are: `python -m benchmarks.editing` writes figures/phantom/editing_speed.json.

One image inverted and edited at five lengths of the self-attention window (`editing.sweep`), by direct inversion in the
steps of the reference and by edit-friendly inversion in few, against null-text inversion and prompt-to-prompt in the
published order of work (`reference.py`): the same weights, images, prompts and machine, autoencoder included on both
sides. `few_steps` (`benchmarks.few_steps`) measures that few steps are enough. Null-text inversion is also compared by
itself, ours against the published loop on the same four trajectories, one by one and (ours) all in one batch: seconds,
and the largest difference of the latents; an image whose loss meets the threshold within rounding may take another
number of inner steps in one of them, and is told apart as `parted`. The reference stops its inner loops early, as
published, so `unet_evaluations_reference` counts the forward evaluations that it made.

`--steps 3` is a trial; anything but the defaults is recorded under `runs/`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from benchmarks import reference
from prism_lib import paths, records
from prism_lib.editing.counterfactuals import Counterfactual, sweep
from prism_lib.editing.inversion import Inversion, invert
from prism_lib.editing.methods import InversionConfig, Source, optimise_null_text
from prism_lib.editing.settings import EditConfig, grid
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.models.pipeline import encode_prompts, image_factor, load_pipeline, predict_noise
from prism_lib.paths import SHIPPED
from prism_lib.phantom.patients import counterfactual, render, sample_patients
from prism_lib.studies.editors import PLAIN

STEPS, IMAGES, BATCH, SEED = 50, 1, 8, 0
NULL_TEXTS, FEW_STEPS = 4, 12
WINDOWS = (0.4, 0.5, 0.6, 0.7, 0.8)
EDIT = Edit(remove=("Support Devices",))
PUBLISHED = replace(PLAIN, local_blend=False)


@dataclass
class Cases:
    """Phantoms with devices: images (N, 1, H, W), prompts, the truth without devices and where it differs."""

    images: Tensor
    pairs: list[PromptPair]
    truth: Tensor
    changed: Tensor

    @classmethod
    def draw(cls, count: int, size: int) -> "Cases":
        """The first patients of a seed, every one given devices."""
        patients = sample_patients(count, SEED).intervene(support_devices=1.0)
        labels = patients.labels()[["Cardiomegaly", "Pleural Effusion", "Support Devices"]].to_dict("records")
        pairs = [EDIT.prompts({str(label): value for label, value in row.items()}) for row in labels]
        truth, changed = counterfactual(patients, size, support_devices=0.0)
        return cls(render(patients, size), pairs, truth, changed)

    def error(self, image: int, made: Tensor) -> float:
        """Mean absolute error to the true counterfactual where that differs from the input."""
        return float((made - self.truth[image]).abs()[self.changed[image]].mean())


@dataclass
class Measured:
    """Seconds and U-Net rows of every call of one kind."""

    seconds: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)

    def call(self, pipe: StableDiffusionPipeline, work: Callable[[], Any]) -> Any:
        """Do some work, measured."""
        with counted(pipe) as rows:
            begin = now(pipe)
            made = work()
            self.seconds.append(now(pipe) - begin)
        self.evaluations.append(sum(rows))
        return made

    @property
    def median(self) -> float:
        """Seconds of the median call."""
        return statistics.median(self.seconds)

    @property
    def total(self) -> float:
        """Seconds of all calls together."""
        return sum(self.seconds)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="DDIM steps of both sides")
    parser.add_argument("--images", type=int, default=IMAGES, help="images that both sides edit one by one, up to 8")
    options = parser.parse_args()
    if options.steps < 1 or not 1 <= options.images <= BATCH:
        parser.error(f"--steps must be at least 1 and --images between 1 and {BATCH}")
    with records.Timer() as timer:
        pipe = load_pipeline(SHIPPED)
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        cases = Cases.draw(BATCH, pipe.unet.config.sample_size * image_factor(pipe.vae))
        metrics: dict[str, Any] = direct_against_reference(pipe, cases, options.steps, options.images)
        metrics |= null_text_against_loop(pipe, cases, options.steps)
    trial = (options.steps, options.images) != (STEPS, IMAGES)
    records.record(
        "editing_speed",
        dataset="phantom",
        notebook="benchmarks/editing.py",
        parameters={
            "num_inference_steps": options.steps,
            "images": options.images,
            "batch_size": BATCH,
            "null_text_images": NULL_TEXTS,
            "few_steps": FEW_STEPS,
            "self_replace_steps": WINDOWS,
            "edit": EDIT.key,
            "config": EditConfig(),
            "reference_config": PUBLISHED,
            "null_text": InversionConfig(),
            "threads": torch.get_num_threads(),
        },
        seed=SEED,
        metrics=metrics,
        figures_dir=paths.runs() / "benchmarks" if trial else "",
        model=SHIPPED,
        seconds=timer.seconds,
    )


def direct_against_reference(
    pipe: StableDiffusionPipeline, cases: Cases, steps: int, images: int
) -> dict[str, float | dict[str, float]]:
    """Seconds per image of inversion and sweep: ours at batch 1 and 8, the reference at batch 1; sides alternate."""
    ours, batched, few, few_batched, plain = (Measured() for _ in range(5))
    published = grid(PUBLISHED, self_replace_steps=WINDOWS)
    theirs = reference.Reference(pipe, steps, InversionConfig())
    errors: dict[str, list[float]] = {"input": [], "direct": [], "few_steps": [], "reference": []}
    warm_up(pipe, cases)
    for n in range(images):
        image, pair = cases.images[n : n + 1], cases.pairs[n]
        (made,) = ours.call(pipe, partial(direct, pipe, image, [pair], steps))
        (quick,) = few.call(pipe, partial(few_steps, pipe, image, [pair]))
        edits = plain.call(pipe, partial(theirs.sweep, image, pair, published))
        errors["input"].append(cases.error(n, image[0]))
        errors["direct"].append(min(cases.error(n, result.image) for result in made))
        errors["few_steps"].append(min(cases.error(n, result.image) for result in quick))
        errors["reference"].append(min(cases.error(n, edit[0].cpu()) for edit in edits))
    for _ in range(2):
        batched.call(pipe, lambda: direct(pipe, cases.images, cases.pairs, steps))
        few_batched.call(pipe, lambda: few_steps(pipe, cases.images, cases.pairs))
    per_image, few_per_image = batched.median / BATCH, few_batched.median / BATCH
    return {
        "unet_evaluations_direct_sweep": max(ours.evaluations),
        "unet_evaluations_reference": statistics.mean(plain.evaluations),
        "speedup_direct_sweep_batch1": plain.median / ours.median,
        "speedup_direct_sweep_batch8": plain.median / per_image,
        "unet_evaluations_few_steps_sweep": max(few.evaluations),
        "speedup_few_steps_sweep_batch1": plain.median / few.median,
        "speedup_few_steps_sweep_batch8": plain.median / few_per_image,
        "seconds_few_steps_sweep_batch1": few.median,
        "seconds_few_steps_sweep_batch8": few_per_image,
        "seconds_direct_sweep_batch1": ours.median,
        "seconds_direct_sweep_batch8": per_image,
        "seconds_reference": plain.median,
        "best_error_inside_true_mask": {name: statistics.mean(values) for name, values in errors.items()},
    }


def direct(
    pipe: StableDiffusionPipeline, images: Tensor, pairs: Sequence[PromptPair], steps: int
) -> list[list[Counterfactual]]:
    """Our side of the comparison, at its default settings."""
    inversion = invert(pipe, images, [pair.source for pair in pairs], "direct", steps)
    configs = grid(EditConfig(batch_size=len(images)), self_replace_steps=WINDOWS)
    return sweep(pipe, inversion, pairs, configs)


def few_steps(pipe: StableDiffusionPipeline, images: Tensor, pairs: Sequence[PromptPair]) -> list[list[Counterfactual]]:
    """The same sweep by edit-friendly inversion, with what the model recommends for few steps."""
    inversion = invert(pipe, images, [pair.source for pair in pairs], num_inference_steps=FEW_STEPS)
    return sweep(pipe, inversion, pairs, grid({"batch_size": len(images)}, self_replace_steps=WINDOWS))


def null_text_against_loop(pipe: StableDiffusionPipeline, cases: Cases, steps: int) -> dict[str, float]:
    """Null-text optimisation of the same trajectories: ours, one by one and in a batch, against the published loop."""
    ours, plain, batched = Measured(), Measured(), Measured()
    differences, parted = [0.0], [0.0]
    theirs = reference.Reference(pipe, steps, InversionConfig())
    prompts = [pair.source for pair in cases.pairs[:NULL_TEXTS]]
    inversion = invert(pipe, cases.images[:NULL_TEXTS], prompts, "direct", steps)
    together, _ = batched.call(pipe, partial(null_text, pipe, inversion))
    for n, prompt in enumerate(prompts):
        own = inversion[n : n + 1]
        fast, _ = ours.call(pipe, partial(null_text, pipe, own))
        with reference.with_weight_gradients(pipe):
            slow, _ = plain.call(pipe, partial(theirs.null_text, own.latents, prompt))
        # The loop makes every conditional prediction once more. Else an image that took another number of inner steps
        # has met its threshold within rounding, and from there on the two go ways of their own.
        same = plain.evaluations[-1] - ours.evaluations[-1] == steps
        (differences if same else parted).extend(
            float((made - slow).abs().max()) for made in (fast, together[:, n : n + 1])
        )
    return {
        "speedup_null_text": plain.total / ours.total,
        "speedup_null_text_batch4": plain.total / batched.total,
        "null_text_difference": max(differences),
        "null_text_images_parted": (len(parted) - 1) // 2,
        "null_text_difference_parted": max(parted),
        "seconds_null_text": ours.total / NULL_TEXTS,
        "seconds_null_text_batch4": batched.total / NULL_TEXTS,
        "seconds_null_text_loop": plain.total / NULL_TEXTS,
        "unet_evaluations_null_text": statistics.mean(ours.evaluations),
        "unet_evaluations_null_text_batch4": batched.evaluations[0] / NULL_TEXTS,
        "unet_evaluations_null_text_loop": statistics.mean(plain.evaluations),
    }


@torch.no_grad()
def null_text(pipe: StableDiffusionPipeline, inversion: Inversion) -> tuple[Tensor, Tensor]:
    """Our null-text optimisation of trajectories that are there already."""
    text, empty = encode_prompts(pipe, inversion.prompts), encode_prompts(pipe, [""] * len(inversion))
    schedule, source = inversion.schedule, Source(inversion.images, inversion.latents[0], text, empty)

    def predict(latents: Tensor, level: int, embeds: Tensor) -> Tensor:
        return predict_noise(pipe, latents, schedule.timesteps[level], embeds)

    return optimise_null_text(predict, inversion.latents, source, schedule, inversion.config, lambda *step: None)


def warm_up(pipe: StableDiffusionPipeline, cases: Cases) -> None:
    """One step of either side, so that neither pays for first calls."""
    direct(pipe, cases.images[:1], cases.pairs[:1], 1)
    few_steps(pipe, cases.images[:1], cases.pairs[:1])
    reference.Reference(pipe, 1, InversionConfig()).sweep(cases.images[:1], cases.pairs[0], [PUBLISHED])


@contextmanager
def counted(pipe: StableDiffusionPipeline) -> Iterator[list[int]]:
    """The number of rows of each forward call of the U-Net inside the block."""
    rows: list[int] = []
    handle = pipe.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


def now(pipe: StableDiffusionPipeline) -> float:
    """Seconds, when the device has done what it was given."""
    if pipe.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
