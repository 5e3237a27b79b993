"""Pacemakers asked for by name: `python -m benchmarks.sides` writes figures/phantom/sides.json.

Validation phantoms without devices get a pacemaker without a side, as the model recommends, and on the right. A device
counts as there where the edit brightens the place of its generator on one side, which the renderer knows for every
patient. Sheets to count by eye are left in PRISM_RUNS/sides/.
"""

import argparse
from itertools import product

import pandas as pd
import torch
from torch import Tensor

from prism_lib import devices, paths, records
from prism_lib.data.folder import load_info, load_vocabulary, read_images
from prism_lib.data.rows import prompt_pairs, true_counterfactual
from prism_lib.editing.counterfactuals import stack, sweep
from prism_lib.editing.inversion import invert
from prism_lib.evaluation import metrics
from prism_lib.evaluation.evaluate import choose_cases, interval
from prism_lib.language.edits import Edit
from prism_lib.language.labels import SIDES
from prism_lib.models.pipeline import load_pipeline
from prism_lib.paths import SHIPPED
from prism_lib.phantom.patients import Patients, render, sample_patients
from prism_lib.reporting import plots

REQUESTS = {"no_side": {"side": ""}, "recommended": {}, "right": {"side": "right"}}  # replaces recommended settings
BRIGHTER = 0.15  # gray levels in [0, 1] by which a generator brightens a pixel
SEEN = 0.5  # share of a generator's pixels from which it counts


def places(patients: Patients) -> tuple[Tensor, Tensor]:
    """Where the generator of each side may lie, bool (N, 2, H, W), and the mean number of its pixels, (N, 2)."""
    plain, anywhere, pixels = render(patients), [], []
    for side in SIDES:
        bright = []
        for across, down in product((0.02, 0.5, 0.98), repeat=2):
            shown = patients.intervene(**{f"{side}_pacemaker": 1})
            shown.noise["pacemaker"][:, 1:4] = torch.tensor([across, down, 0.5])
            bright.append(render(shown) - plain > BRIGHTER)
        anywhere.append(torch.stack(bright).any(0))
        pixels.append(torch.stack(bright).flatten(2).sum(2).float().mean(0))
    left, right = anywhere
    # The lead runs down the midline from either side.
    return torch.cat([left & ~right, right & ~left], 1), torch.stack(pixels, 1)


def main() -> None:
    """Edit, count and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="prepared/phantom", help="folder of 01_data, below PRISM_DATA")
    parser.add_argument("--patients", type=int, default=24)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    data = paths.data() / options.data
    edit = Edit.from_key("add_pacemaker", load_vocabulary(data))
    rows, how = choose_cases(data, edit, options.patients, "val"), load_info(data)["config"]
    images, pairs = read_images(data, rows), prompt_pairs(data, rows, edit)
    patients = sample_patients(rows["phantom_index"].tolist(), how["seed"], how["confounding"])
    truth = true_counterfactual(data, rows, edit)
    assert truth is not None
    where, size = places(patients)
    with records.Timer() as timer:
        pipe = load_pipeline(SHIPPED, mixed_precision=devices.mixed_precision())
        made = []
        for row in range(len(images)):
            inverted = invert(pipe, images[row : row + 1], [pairs[row].source], num_inference_steps=options.steps)
            made += sweep(pipe, inverted, pairs[row : row + 1], list(REQUESTS.values()))
    found = {}
    for number, name in enumerate(REQUESTS):
        edited = stack([results[number] for results in made])
        brighter = ((edited - images > BRIGHTER) & where).flatten(2).sum(2)
        there = brighter > SEEN * size
        error = metrics.true_error_ratio(edited, truth.images, images, truth.changed)
        found[name] = {
            "images": float(len(images)),
            "exactly_one": there.sum(1).eq(1).float().mean().item(),
            "none": there.sum(1).eq(0).float().mean().item(),
            "both_sides": there.all(1).float().mean().item(),
            **{side: there[:, place].float().mean().item() for place, side in enumerate(SIDES)},
            **interval("true_error_ratio", pd.Series(error.tolist()), rows["patient_id"], 0),
        }
        for first in range(0, len(images), 12):
            labels = [f"{first + n}" for n in range(len(edited[first : first + 12]))]
            figure = plots.show_grid(edited[first : first + 12], labels, columns=4)
            plots.save_figure(figure, f"{name}_{first}", paths.runs() / "sides")
    records.record(
        "sides",
        dataset="phantom",
        notebook="benchmarks/sides.py",
        parameters=vars(options) | {"brighter": BRIGHTER, "seen": SEEN},
        seed=0,
        metrics=found,
        model=SHIPPED,
        seconds=timer.seconds,
    )


if __name__ == "__main__":
    main()
