"""The chest phantom: a structural causal model whose counterfactuals are exact.

A patient is exogenous noise (anatomy, exposure, geometry of devices, severities) plus attributes; an image is a
deterministic function of the two. The true counterfactual keeps the noise, changes one attribute and renders again.

The graph, with one independent uniform U per variable and logistic(x) = 1 / (1 + exp(-x)):

    age                = 20 + 70 U
    sex                = 1[U < 0.5]                                        1 is female
    cardiomegaly       = 1[U < logistic(conf (age - 55) / 20)]
    pleural effusion   = 1[U < logistic(conf ((age - 55) / 20 + 2 cardiomegaly - 1))]
    support devices    = 1[U < (1 - conf) 0.5 + conf (0.95 if any disease else 0.05)]
    view               = AP if U < 0.5 + 0.4 conf (1 if support devices else -1), else PA

with conf the ``confounding``: at 0 every attribute is an independent fair coin; at 1 devices almost always follow
disease, a shortcut that classifiers learn. Sides, kinds of device, geometry and severities are exogenous: an
intervention ``support_devices=1`` shows the devices that *this* patient would have had, ``pacemaker=1`` (one of
`DETAILS`) the patient's pacemaker beside the devices that are there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prism_lib.language.labels import DEVICE_KINDS, PHANTOM_LABELS, snake_case
from prism_lib.phantom import anatomy

ATTRIBUTES = ("age", "female", "ap", "cardiomegaly", "pleural_effusion", "support_devices")

# Which columns of `Patients.effusion_sides` and of `Patients.device_kinds` a detail sets.
_LUNGS = {"left": (False, True), "right": (True, False), "bilateral": (True, True)}
_SIDES = {f"{side}_pleural_effusion": [lung for lung in (0, 1) if both[lung]] for side, both in _LUNGS.items()}
_KINDS = {snake_case(kind): [column] for column, kind in enumerate(DEVICE_KINDS)}
_PACEMAKERS = {"left_pacemaker": 0.4, "right_pacemaker": 0.9}  # by side; values of the noise that puts them there
DETAILS = (*_SIDES, *_KINDS, *_PACEMAKERS)
SETTABLE = frozenset((*ATTRIBUTES, *DETAILS))  # what an intervention may name


@dataclass(frozen=True)
class Patients(anatomy.Scene):
    """A batch of N patients; index, seed and confounding are enough to sample them again."""

    confounding: float

    def intervene(self, **attributes: float | Tensor) -> "Patients":
        """do(attribute = value): the same noise, all other attributes as they were, descendants in the graph included.

        Names are `ATTRIBUTES` and `DETAILS`; values are a number or a tensor (N,).
        """
        changed, details = dict(self.attributes), dict[str, Tensor]()
        for name, value in attributes.items():
            if name not in SETTABLE:
                known = ", ".join((*ATTRIBUTES, *DETAILS))
                raise ValueError(f"unknown phantom attribute {name!r}; the phantom has {known}")
            new = torch.as_tensor(value, dtype=torch.float32).expand(len(self)).clone()
            valid = (new >= 0) & (new <= 120) if name == "age" else (new == 0) | (new == 1)
            if not bool(valid.all()):
                raise ValueError(f"{name}={new[~valid][0].item():g} is outside the range of the phantom")
            (details if name in DETAILS else changed)[name] = new
        patients = replace(self, attributes=changed)
        for name, new in details.items():
            patients = patients._with_detail(name, new > 0.5)
        return patients

    def _with_detail(self, name: str, present: Tensor) -> "Patients":
        """One side of fluid or one kind of device there or not, (N,); the others as they are."""
        if name in _SIDES:
            sides = self.effusion_sides
            sides[:, _SIDES[name]] = present[:, None]
            right, left = sides.float().unbind(1)
            drawn, there, finding = 0.5 + 0.3 * (left - right), sides.any(1), "pleural_effusion"
            noise = {"effusion_side": torch.where(there, drawn, self.noise["effusion_side"])}
        else:
            kinds, place = self.device_kinds, self.noise["pacemaker"].clone()
            if name in _PACEMAKERS:  # a patient has one: that of the other side gives way, or stays
                other = (place[:, 0] < 0.8) != (_PACEMAKERS[name] < 0.8)
                place[present & other, 0] = _PACEMAKERS[name]
                present = present | (other & kinds[:, 0])
            kinds[:, _KINDS.get(name, [0])] = present[:, None]
            likely = torch.tensor(anatomy.KIND_PROBABILITIES)
            drawn, there, finding = torch.where(kinds, likely / 2, (1 + likely) / 2), kinds.any(1), "support_devices"
            old = self.noise["kinds"]
            drawn = torch.where(there[:, None], torch.cat([drawn, old[:, 4:]], dim=1), old)
            noise = {"kinds": drawn, "pacemaker": place}
        return replace(self, noise=self.noise | noise, attributes=self.attributes | {finding: there.float()})

    def labels(self) -> pd.DataFrame:
        """One row a patient: the four label columns (1 or 0), then age, sex, view, devices and side in words."""
        values = {name: value.numpy() for name, value in self.attributes.items()}
        findings = {label: values[snake_case(label)].astype(int) for label in PHANTOM_LABELS[1:]}
        # CheXpert's convention: "No Finding" says nothing of devices.
        none = (findings["Cardiomegaly"] == 0) & (findings["Pleural Effusion"] == 0)
        names = {lungs: side for side, lungs in _LUNGS.items()} | {(False, False): ""}
        columns = {
            "patient_id": [f"phantom-{self.seed}-{i:06d}" for i in self.index],
            "No Finding": none.astype(int),
            **findings,
            "age": values["age"].round().astype(int),
            "sex": np.where(values["female"] > 0.5, "F", "M"),
            "view": np.where(values["ap"] > 0.5, "AP", "PA"),
            "devices": ["|".join(compress(DEVICE_KINDS, row)) for row in self.device_kinds.tolist()],
            "effusion_side": [names[right, left] for right, left in self.effusion_sides.tolist()],
        }
        return pd.DataFrame(columns)


def sample_patients(patients: int | Sequence[int], seed: int, confounding: float = 0.0) -> Patients:
    """Draw patients, a count or the indices wanted, from the graph above; patient i of a seed is always the same."""
    if not 0.0 <= confounding <= 1.0:
        raise ValueError(f"confounding={confounding} is outside [0, 1]")
    index = tuple(range(patients)) if isinstance(patients, int) else tuple(int(i) for i in patients)
    if not index or min(index) < 0:
        raise ValueError(f"need at least one patient, and no negative index; got {patients!r}")
    names = {"age": 1, "sex": 1, "cardiomegaly": 1, "effusion": 1, "devices": 1, "view": 1, "kinds": 5}
    names |= {"effusion_side": 1} | anatomy.NOISE
    width = sum(names.values())
    # Philox is counter based: key (seed, i) makes each patient's stream independent of the batch.
    table = np.stack([np.random.Generator(np.random.Philox(key=[seed, i])).random(width) for i in index])
    columns = torch.from_numpy(table).float().split(list(names.values()), dim=1)
    noise = {name: column.squeeze(1) for name, column in zip(names, columns, strict=True)}
    # The structural equations of the module docstring, in the order of the graph.
    age = 20 + 70 * noise["age"]
    older = (age - 55) / 20
    cardiomegaly = (noise["cardiomegaly"] < torch.sigmoid(confounding * older)).float()
    effusion = (noise["effusion"] < torch.sigmoid(confounding * (older + 2 * cardiomegaly - 1))).float()
    diseased = torch.maximum(cardiomegaly, effusion)
    devices = (noise["devices"] < (1 - confounding) * 0.5 + confounding * (0.05 + 0.9 * diseased)).float()
    ap = (noise["view"] < 0.5 + 0.4 * confounding * (2 * devices - 1)).float()
    female = (noise["sex"] < 0.5).float()
    values = (age, female, ap, cardiomegaly, effusion, devices)
    return Patients(index, seed, noise, dict(zip(ATTRIBUTES, values, strict=True)), confounding)


def render(patients: Patients, size: int = 256) -> Tensor:
    """The radiographs, (N, 1, size, size) in [0, 1] on 8-bit gray levels, white where little radiation arrives."""
    if size < 32:
        raise ValueError(f"size={size} is too small for a chest; use at least 32 pixels")
    # Small chunks keep every map in the processor's cache: three times as fast as one large batch.
    return torch.cat([anatomy.radiograph(patients[first : first + 4], size) for first in range(0, len(patients), 4)])


def counterfactual(patients: Patients, size: int = 256, **attributes: float | Tensor) -> tuple[Tensor, Tensor]:
    """The true counterfactual images (N, 1, size, size) under do(attributes), and the mask of pixels that changed."""
    image = render(patients.intervene(**attributes), size)
    return image, image != render(patients, size)


def marker_mask(patients: Patients, size: int = 256) -> Tensor:
    """Pixels of the burnt-in side marker and view text, bool (N, 1, size, size)."""
    return anatomy.marker(patients, size) > 0
