"""What is carried along, by hand and on phantoms whose every counterfactual is known."""

import pytest
import torch

from prism_lib.data import folder
from prism_lib.data.folder import load_info, read_images
from prism_lib.data.rows import true_counterfactual
from prism_lib.language.edits import Edit
from prism_lib.studies import entanglement
from prism_lib.studies.editors import PromptToPrompt
from prism_lib.studies.entanglement import carried_along
from tests.tiny import tiny_images, tiny_pipeline

HEART, DEVICES = Edit(remove=("Cardiomegaly",)), "Support Devices"
EDITOR = PromptToPrompt(num_inference_steps=2)


@pytest.fixture(scope="module")
def cases(phantom_folder):
    return entanglement.cases_with_both(phantom_folder, HEART, DEVICES, 2)


def test_nothing_half_and_all_of_it():
    factual = tiny_images(2)
    without = factual.clone()
    without[..., :8] = 0
    region = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    for share in (0.0, 0.5, 1.0):
        edited = factual + share * (without - factual)
        assert carried_along(edited, factual, without, region).tolist() == pytest.approx([share, share])


def test_what_lies_outside_the_region_does_not_count():
    factual, without = torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, 1, 4, 4)
    region = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    region[..., 0] = True
    edited = factual.clone()
    edited[..., 1:] = 0
    assert carried_along(edited, factual, without, region).item() == 0


def test_the_truth_carries_nothing_along(phantom_folder, cases):
    images = read_images(phantom_folder, cases)
    truth, mask, _ = true_counterfactual(phantom_folder, cases, HEART)
    without, *_ = true_counterfactual(phantom_folder, cases, Edit(remove=(DEVICES,)))
    assert carried_along(truth, images, without, ~mask).tolist() == [0, 0]
    assert carried_along(without, images, without, ~mask).tolist() == pytest.approx([1, 1])


def test_cases_have_both_findings(cases):
    assert (cases[["Cardiomegaly", DEVICES]] == 1).all(axis=None)
    assert cases["patient_id"].is_unique


def test_prism_is_silent_about_what_is_absent(phantom_folder, cases):
    for pair in entanglement.prism_pairs(phantom_folder, cases, HEART):
        assert "Cardiomegaly" in pair.source and "Cardiomegaly" not in pair.target
        assert "without" not in pair.target and DEVICES in pair.target


def test_the_study_has_a_row_for_each_condition(phantom_folder, cases):
    numbers = entanglement.study(tiny_pipeline(), phantom_folder, HEART, DEVICES, 2, EDITOR)
    assert list(numbers) == [f"confounding 0, {w}, mask {m}" for w in ("negated", "prism") for m in ("auto", "off")]
    alone = entanglement.measure(tiny_pipeline(), phantom_folder, cases, HEART, DEVICES, EDITOR)
    assert numbers["confounding 0, negated, mask auto"]["carried_along"] == pytest.approx(alone["carried_along"].mean())


def test_bad_input_is_named(phantom_folder, cases):
    image = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="image 0 shows nothing of the other finding"):
        carried_along(image, image, image, image == 0)
    with pytest.raises(ValueError, match="shapes differ"):
        carried_along(image, image, image[..., :2], image == 0)
    with pytest.raises(ValueError, match="'Cardiomegaly' is no other label"):
        entanglement.cases_with_both(phantom_folder, HEART, "Cardiomegaly", 2)
    with pytest.raises(ValueError, match="500 are needed"):
        entanglement.cases_with_both(phantom_folder, HEART, DEVICES, 500)
    with pytest.raises(ValueError, match="unknown wording 'loud'"):
        entanglement.measure(tiny_pipeline(), phantom_folder, cases, HEART, DEVICES, EDITOR, "loud")


def test_real_images_are_not_studied(phantom_folder, monkeypatch):
    real = load_info(phantom_folder) | {"source": "nih"}
    monkeypatch.setattr(folder, "load_info", lambda _: real)
    with pytest.raises(ValueError, match="holds real images"):
        entanglement.study(tiny_pipeline(), phantom_folder, HEART, DEVICES, 1, EDITOR)
