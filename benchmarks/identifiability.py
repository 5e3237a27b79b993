"""What no editor can know: `python -m benchmarks.identifiability` writes figures/phantom/identifiability.json.

For every edit of 03_counterfactuals, how far the true counterfactuals of patients with one and the same image differ
(`evaluation.identifiability`): the error, and the mask's recall, of a fair draw of the answers that an image allows.
`latent_outside_l1_ratio` is what such a draw costs where the patient's own counterfactual changes nothing, decoded as
an edit is and without the pixel composite. `reversibility` asks the same of a finding that is removed in truth and then
added again by a fair draw: the distance to the original in units of the autoencoder's own error, as in `axioms`.
"""

import argparse
from functools import partial

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline

from prism_lib import records
from prism_lib.evaluation import identifiability, metrics
from prism_lib.evaluation.evaluate import interval
from prism_lib.language.edits import Edit
from prism_lib.language.labels import snake_case, vocabulary
from prism_lib.models.pipeline import SHIPPED, decode_latents, encode_images, load_pipeline
from prism_lib.phantom.patients import Patients, counterfactual, sample_patients

SIZE, SEED, POOL = 256, 2030, 400
COLUMNS = [
    "true_error_ratio",
    "blend_error_ratio",
    "mask_recall",
    "mask_area_ratio",
    "latent_outside_l1_ratio",
    "reversibility",
]
EDITS = (
    "remove_support_devices",
    "remove_pleural_effusion",
    "remove_cardiomegaly",
    "add_support_devices",
    "add_pacemaker",
    "add_pleural_effusion",
    "add_left_pleural_effusion",
    "add_cardiomegaly",
)


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=16, help="patients for each edit")
    parser.add_argument("--twins", type=int, default=8, help="twins drawn for each patient")
    options = parser.parse_args()
    pool, vocab = sample_patients(POOL, SEED), vocabulary("phantom")
    known: dict[int, Patients] = {}
    found = {}
    with records.Timer() as timer:
        pipe = load_pipeline(SHIPPED)
        for key in EDITS:
            edit = Edit.from_key(key, vocab)
            patients = suited(pool, edit, options.patients)
            table = identifiability.ambiguity(
                patients, SIZE, options.twins, SEED, known, partial(restored, pipe), **edit.attributes
            )
            if edit.add:
                table["reversibility"] = table["l1"].to_numpy() / own_error(pipe, patients, edit)
            found[key] = summary(table)
    records.record(
        "identifiability",
        dataset="phantom",
        notebook="benchmarks/identifiability.py",
        parameters={"size": SIZE, "patients": options.patients, "twins": options.twins},
        seed=SEED,
        metrics=found,
        model=SHIPPED,
        seconds=timer.seconds,
    )


def suited(pool: Patients, edit: Edit, count: int) -> Patients:
    """The first patients that have what is removed, or lack what is added."""
    owners = vocabulary("phantom").owners
    (name,) = (*edit.remove, *edit.add)
    attribute = snake_case(owners.get(name, name))
    return pool[(pool.attributes[attribute] == len(edit.remove)).nonzero()[:, 0].tolist()[:count]]


@torch.no_grad()
def restored(pipe: StableDiffusionPipeline, images: torch.Tensor) -> torch.Tensor:
    """What the autoencoder makes of images (N, 1, H, W)."""
    decoded = [decode_latents(pipe.vae, encode_images(pipe.vae, some), 1) for some in images.split(8)]
    return torch.cat(decoded).cpu()


def own_error(pipe: StableDiffusionPipeline, patients: Patients, edit: Edit) -> torch.Tensor:
    """The autoencoder's L1 on the counterfactuals of an edit, (N,)."""
    images, _ = counterfactual(patients, SIZE, **edit.attributes)
    return metrics.l1(restored(pipe, images), images)


def summary(table: pd.DataFrame) -> dict[str, float]:
    """Means over patients with intervals."""
    values = {"images": float(len(table))}
    for column in table.columns.intersection(COLUMNS):
        values |= interval(column, table[column], table["patient_id"], SEED)
    return values


if __name__ == "__main__":
    main()
