"""Do 12 steps edit as well as 25? `python -m benchmarks.few_steps DATA` writes figures/phantom/few_steps.json.

DATA is the prepared folder of 01's profile `phantom`. Validation images are edited with what `phantom-sd` recommends
for either number of steps, in turns: the nine images of 04 and 24 others, three edits each. The error is that to the
true counterfactual, and a U-Net evaluation is of one image.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from diffusers import StableDiffusionPipeline
from torch import Tensor

from benchmarks.editing import Measured
from prism_lib import records
from prism_lib.data import prompt_pairs, read_images
from prism_lib.editing import Counterfactual, edit, invert
from prism_lib.evaluation import choose_cases
from prism_lib.evaluation.evaluate import evaluate_results
from prism_lib.language import Edit, vocabulary
from prism_lib.language.edits import PromptPair
from prism_lib.models import load_pipeline
from prism_lib.paths import SHIPPED

EDITS = ("remove support devices", "remove cardiomegaly", "add pleural effusion")
STEPS, TUNED, OTHERS = (25, 12), 3, 8  # images of each edit


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    folder = parser.parse_args().data
    pipe, rows = load_pipeline(SHIPPED), list[dict[str, object]]()
    measured = {steps: Measured() for steps in STEPS}
    with records.Timer() as timer:
        for sentence in EDITS:
            change = Edit.read(sentence, vocabulary("phantom"))
            table = choose_cases(folder, change, TUNED + OTHERS, "val")
            images, pairs = read_images(folder, table), prompt_pairs(folder, table, change)

            for steps in STEPS:
                results = measured[steps].call(pipe, partial(edited, pipe, images, pairs, steps))
                errors = evaluate_results(folder, table, change, results).table["true_error_ratio"]
                rows += [
                    {"steps": steps, "edit": sentence, "images": "nine of 04" if n < TUNED else "24 others", "error": e}
                    for n, e in enumerate(errors)
                ]
    found, count = pd.DataFrame(rows), (TUNED + OTHERS) * len(EDITS)
    by_steps = {steps: found[found["steps"].eq(steps)] for steps in STEPS}
    metrics: dict[str, Any] = {
        f"{steps} steps": {
            "unet_evaluations": sum(measured[steps].evaluations) / count,
            "seconds": measured[steps].total / count,
        }
        | {f"error, {name}": float(some["error"].mean()) for name, some in rows_of.groupby("images")}
        | {f"error, {name}": float(some["error"].mean()) for name, some in rows_of.groupby("edit")}
        for steps, rows_of in by_steps.items()
    }
    turns = zip(measured[STEPS[0]].seconds, measured[STEPS[1]].seconds, strict=True)
    metrics["speedup"] = statistics.median(many / few for many, few in turns)
    records.record(
        "few_steps",
        dataset="phantom",
        notebook="benchmarks/few_steps.py",
        parameters={"steps": STEPS, "images": count, "split": "val", "edits": EDITS},
        seed=0,
        metrics=metrics,
        model=SHIPPED,
        seconds=timer.seconds,
    )


def edited(
    pipe: StableDiffusionPipeline, images: Tensor, pairs: Sequence[PromptPair], steps: int
) -> list[Counterfactual]:
    """Inverted and edited as the model recommends for so many steps."""
    return edit(pipe, invert(pipe, images, [pair.source for pair in pairs], num_inference_steps=steps), pairs)


if __name__ == "__main__":
    main()
