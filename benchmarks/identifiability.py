"""How far an image decides its counterfactual: `python -m benchmarks.identifiability` writes its record.

A counterfactual keeps the patient's exogenous noise, which abduction reads from the image (Pearl, 2009). Some of that
noise leaves no trace: no image without a pacemaker shows where one would sit. *Twins* are patients who differ in such
hidden noise alone: their images agree bit for bit, their true counterfactuals do not. An editor that used everything in
the image could still only draw one of them, and misses the truth by as much as twins differ. This is a lower bound:
noise that shows in a single pixel counts as seen, although no editor could read it.

For every edit of 03_counterfactuals the record figures/phantom/identifiability.json holds the error and the mask recall
of a fair draw among twins. `latent_outside_l1_ratio` is the cost of such a draw where the patient's own counterfactual
changes nothing, decoded as an edit is and without the pixel composite. `reversibility` is measured on a finding that is
removed in truth and then added by a fair draw: the distance to the original in units of the autoencoder's own error.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from prism_lib import records
from prism_lib.evaluation import metrics
from prism_lib.evaluation.evaluate import interval
from prism_lib.language.edits import Edit
from prism_lib.language.labels import snake_case, vocabulary
from prism_lib.models.pipeline import decode_latents, encode_images, load_pipeline
from prism_lib.paths import SHIPPED
from prism_lib.phantom.patients import Patients, counterfactual, render, sample_patients

SIZE, SEED, POOL = 256, 2030, 400
_PROBES = 2  # fresh values tried for every column of noise; `twins` checks all columns together
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
            table = ambiguity(patients, SIZE, options.twins, SEED, known, partial(restored, pipe), **edit.attributes)
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
def restored(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    """What the autoencoder makes of images (N, 1, H, W)."""
    decoded = [decode_latents(pipe.vae, encode_images(pipe.vae, some), 1) for some in images.split(8)]
    return torch.cat(decoded).cpu()


def own_error(pipe: StableDiffusionPipeline, patients: Patients, edit: Edit) -> Tensor:
    """The autoencoder's L1 on the counterfactuals of an edit, (N,)."""
    images, _ = counterfactual(patients, SIZE, **edit.attributes)
    return metrics.l1(restored(pipe, images), images)


def summary(table: pd.DataFrame) -> dict[str, float]:
    """Means over patients with intervals."""
    values = {"images": float(len(table))}
    for column in table.columns.intersection(COLUMNS):
        values |= interval(column, table[column], table["patient_id"], SEED)
    return values


def hidden_noise(patient: Patients, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Which columns of one patient's noise can be drawn anew without a change of the image: bool, by name."""
    if len(patient) != 1:
        raise ValueError(f"hidden noise is found patient by patient, got {len(patient)}")
    factual = render(patient, size)
    hidden = {}
    for name, values in patient.noise.items():
        flat = values.reshape(1, -1)
        copies = patient[[0] * (_PROBES * flat.shape[1])]
        rows = torch.arange(len(copies))
        probed = copies.noise[name].reshape(len(copies), -1).clone()
        probed[rows, rows % flat.shape[1]] = torch.rand(len(copies), generator=generator)
        images = render(_with_noise(copies, {name: probed}), size)
        same = (images == factual).flatten(1).all(1).unflatten(0, (_PROBES, -1)).all(0)
        hidden[name] = same.reshape(values.shape[1:])
    return hidden


def twins(patient: Patients, count: int, size: int, generator: torch.Generator) -> Patients:
    """``count`` patients with the same image as one patient and hidden noise of their own.

    Name by name, hidden columns are drawn anew, and the draw is kept where the image stays the same to the bit. That is
    a Metropolis step on the noise that the image allows, and starts at the patient's own, which is a fair draw of it.
    """
    factual, hidden = render(patient, size), hidden_noise(patient, size, generator)
    made = patient[[0] * count]
    for name, columns in hidden.items():
        if not bool(columns.any()):
            continue
        values = made.noise[name]
        drawn = torch.where(columns, torch.rand(values.shape, generator=generator), values)
        same = (render(_with_noise(made, {name: drawn}), size) == factual).flatten(1).all(1)
        made = _with_noise(made, {name: torch.where(same.reshape(-1, *[1] * (values.ndim - 1)), drawn, values)})
    return made


def ambiguity(
    patients: Patients,
    size: int,
    count: int = 8,
    seed: int = 0,
    known: dict[int, Patients] | None = None,
    restore: Callable[[Tensor], Tensor] | None = None,
    **attributes: float,
) -> pd.DataFrame:
    """How far the counterfactuals of twins are from a patient's own under do(attributes), a row per patient.

    Columns: `true_error_ratio`, `mask_recall` and `mask_area_ratio` of a twin's counterfactual taken for the patient's,
    and `l1`, their distance over the whole image, the mean over ``count`` twins; `blend_error_ratio`, the error of the
    twins' counterfactuals averaged, which is smaller and looks like no radiograph. With ``restore``, what a model's
    autoencoder makes of images (N, 1, size, size), also `latent_outside_l1_ratio`, that of an editor which draws the
    twin's and decodes it. Twins by patient are kept in ``known``, for other interventions on the same patients.

    Raises ValueError for a patient whose image the intervention does not change.
    """
    rows, known = [], {} if known is None else known
    for n in range(len(patients)):
        patient = patients[[n]]
        (index,) = patient.index
        factual = render(patient, size)
        truth, changed = counterfactual(patient, size, **attributes)
        if not bool(changed.any()):
            raise ValueError(f"patient {index} has no counterfactual of its own: {dict(attributes)}")
        if index not in known:
            known[index] = twins(patient, count, size, torch.Generator().manual_seed(seed * 1_000_003 + index))
        images = counterfactual(known[index], size, **attributes)[0]
        rows.append({"patient_id": patient.labels()["patient_id"][0], **_against(images, truth, factual, changed)})
        if restore is not None:
            factuals, masks = (t.expand(count, -1, -1, -1) for t in (factual, changed))
            ratios = metrics.outside_l1_ratio(restore(images), restore(factual).expand_as(images), factuals, masks)
            rows[-1]["latent_outside_l1_ratio"] = float(ratios.mean())
    return pd.DataFrame(rows)


def _against(images: Tensor, truth: Tensor, factual: Tensor, changed: Tensor) -> Mapping[str, float]:
    count = len(images)
    truths, factuals, masks = (t.expand(count, -1, -1, -1) for t in (truth, factual, changed))
    own = images != factual
    return {
        "true_error_ratio": float(metrics.true_error_ratio(images, truths, factuals, masks).mean()),
        "mask_recall": float(metrics.mask_recall(own, masks).mean()),
        "mask_area_ratio": float(metrics.mask_area_ratio(own, masks).mean()),
        "l1": float(metrics.l1(images, truths).mean()),
        "blend_error_ratio": float(
            metrics.true_error_ratio(images.mean(0, keepdim=True), truth, factual, changed).mean()
        ),
    }


def _with_noise(patients: Patients, noise: Mapping[str, Tensor]) -> Patients:
    shaped = {name: values.reshape(patients.noise[name].shape) for name, values in noise.items()}
    return replace(patients, noise={**patients.noise, **shaped})


if __name__ == "__main__":
    main()
