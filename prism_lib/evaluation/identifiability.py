"""How far an image decides its counterfactual: what no editor can know, measured on the phantom.

A counterfactual keeps the patient's exogenous noise, and abduction has to read that noise from the image (Pearl, 2009).
Some of it leaves no trace: where a pacemaker *would* sit shows in no image without one. Patients who differ in such
hidden noise alone are *twins*: their images agree bit for bit, their true counterfactuals do not. An editor that knew
everything the image says could still only draw one of them, and misses the truth by as much as twins differ. (One that
always gives the likeliest answer may miss by less, and shows none of the variety.)

Twins show the least of what is undecided: noise that shows a little, in a single pixel even, counts as seen, although
nobody could read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from prism_lib.evaluation import metrics
from prism_lib.phantom.patients import Patients, counterfactual, render

_PROBES = 2  # fresh values tried for every column of noise; `twins` makes sure of all columns together


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
