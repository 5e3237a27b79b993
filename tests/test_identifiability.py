"""Twins: the same image to the bit, hidden noise of their own, and the error that this leaves to every editor."""

from __future__ import annotations

import pytest
import torch

from benchmarks import identifiability
from prism_lib.language.labels import DEVICE_KINDS
from prism_lib.phantom import patients

SIZE = 48
BARE = {"support_devices": 0.0, "pleural_effusion": 0.0, "cardiomegaly": 0.0}


def generator():
    return torch.Generator().manual_seed(0)


def patient(**attributes):
    return patients.sample_patients([3], seed=5).intervene(**(BARE | attributes))


def test_noise_of_what_is_not_there_is_hidden_and_that_of_what_is_there_is_not():
    hidden = identifiability.hidden_noise(patient(), SIZE, generator())
    for name in ("pacemaker", "catheter", "ecg", "tube", "kinds", "effusion_level", "effusion_side"):
        assert hidden[name].all(), name
    assert not hidden["pose"].any() and not hidden["exposure"].all()
    assert hidden["heart"].tolist()[1]  # by how much a heart would grow
    present = patient(support_devices=1.0)
    kind = DEVICE_KINDS[int(present.device_kinds[0].int().argmax())]
    noise = {"pacemaker": "pacemaker", "central venous catheter": "catheter", "ecg leads": "ecg"}.get(kind, "tube")
    assert not identifiability.hidden_noise(present, SIZE, generator())[noise].all()


def test_twins_have_the_same_image_and_other_counterfactuals():
    one = patient()
    others = identifiability.twins(one, 3, SIZE, generator())
    assert (patients.render(others, SIZE) == patients.render(one, SIZE)).all()
    images, _ = patients.counterfactual(others, SIZE, support_devices=1.0)
    assert not torch.equal(images[0], images[1])
    assert (others.noise["pose"] == one.noise["pose"]).all()


def test_the_image_decides_removals_and_does_not_decide_where_devices_would_be():
    bare, full = patient(), patient(support_devices=1.0)
    added = identifiability.ambiguity(bare, SIZE, 3, support_devices=1.0).iloc[0]
    removed = identifiability.ambiguity(full, SIZE, 3, support_devices=0.0).iloc[0]
    assert removed["true_error_ratio"] < 0.01 and removed["mask_recall"] == 1
    assert added["true_error_ratio"] > 0.3 and added["mask_recall"] < 0.9
    assert added["blend_error_ratio"] < added["true_error_ratio"]
    assert added["l1"] > removed["l1"]
    dimmed = identifiability.ambiguity(bare, SIZE, 3, restore=lambda images: images * 0.99, support_devices=1.0)
    assert dimmed["latent_outside_l1_ratio"].iloc[0] > 1.05  # devices that this patient would not have had
    dimmed = identifiability.ambiguity(full, SIZE, 3, restore=lambda images: images * 0.99, support_devices=0.0)
    assert dimmed["latent_outside_l1_ratio"].iloc[0] == pytest.approx(1, abs=0.01)
    known = {}
    for _ in range(2):  # drawn anew, and known from before
        again = identifiability.ambiguity(bare, SIZE, 3, known=known, support_devices=1.0).iloc[0]
        assert added.equals(again) and list(known) == [3]


def test_a_named_detail_leaves_less_open_than_its_label():
    drawn = {
        name: identifiability.ambiguity(patient(), SIZE, 4, **{name: 1.0}).iloc[0]
        for name in ("pleural_effusion", "left_pleural_effusion")
    }
    assert drawn["left_pleural_effusion"]["mask_recall"] > drawn["pleural_effusion"]["mask_recall"]


def test_an_intervention_that_changes_nothing_and_a_group_are_refused():
    with pytest.raises(ValueError, match="no counterfactual of its own"):
        identifiability.ambiguity(patient(), SIZE, 2, support_devices=0.0)
    with pytest.raises(ValueError, match="patient by patient, got 2"):
        identifiability.hidden_noise(patients.sample_patients(2, seed=0), SIZE, generator())
