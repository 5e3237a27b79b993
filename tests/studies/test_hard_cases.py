"""What makes a case hard, on phantoms whose edit is the truth, nothing, or half of it; and the corner's text."""

from dataclasses import replace

import pytest
import torch

from prism_lib.data import folder
from prism_lib.data.folder import load_info, read_images
from prism_lib.data.rows import marker_masks, true_counterfactual
from prism_lib.editing.counterfactuals import Counterfactual
from prism_lib.evaluation.evaluate import choose_cases, evaluate_results
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.studies import hard_cases
from prism_lib.studies.editors import PromptToPrompt
from prism_lib.studies.hard_cases import by_stratum, corner_text, strata
from tests.tiny import tiny_pipeline

DEVICES = Edit(remove=("Support Devices",))
LABELS = ("Cardiomegaly", "Pleural Effusion", "Support Devices")
COUNT = 6
PAIR = PromptPair("a", "b", (), ())
EDITOR = PromptToPrompt(num_inference_steps=2)


def off(image, by):
    """Every pixel wrong by as much, and still within [0, 1]."""
    return image + by * (1 - 2 * (image > 0.5))


@pytest.fixture(scope="module")
def cases(phantom_folder):
    return choose_cases(phantom_folder, DEVICES, COUNT)


@pytest.fixture(scope="module")
def halved(phantom_folder, cases):
    """The edit went all the way for even images and not at all for odd ones; decoded images are off by 0.1, or 0.2."""
    images = read_images(phantom_folder, cases)
    truth, *_ = true_counterfactual(phantom_folder, cases, DEVICES)
    edited = torch.where((torch.arange(COUNT) % 2 == 0)[:, None, None, None], truth, images)
    results = [
        Counterfactual(new, off(old, 0.2), old, off(old, 0.1), torch.ones_like(old), PAIR, {}, None)
        for new, old in zip(edited, images, strict=True)
    ]
    return evaluate_results(phantom_folder, cases, DEVICES, results)


def test_strata_are_what_the_table_says(halved, cases):
    hard = strata(halved, cases, LABELS)
    assert hard["with Cardiomegaly"].tolist() == cases["Cardiomegaly"].eq(1).tolist()
    assert hard["pacemaker"].tolist() == cases["devices"].str.contains("pacemaker").tolist()
    assert "with Support Devices" not in hard and "none" not in hard
    assert (hard["over lung"] != hard["over bone and heart"]).all()
    assert hard["faint"].sum() == COUNT // 2


def test_errors_of_a_stratum_are_those_of_its_images(halved, cases):
    numbers = by_stratum(halved, strata(halved, cases, LABELS).assign(even=[True, False] * 3, odd=[False, True] * 3))
    assert numbers["even"]["true_error_ratio"] == pytest.approx(0)
    assert numbers["odd"]["true_error_ratio"] == pytest.approx(1)
    assert numbers["all"]["true_error_ratio"] == pytest.approx(0.5)
    assert numbers["all"]["images"] == 2 * numbers["odd"]["images"] == COUNT


def test_an_empty_stratum_is_left_out(halved, cases):
    assert "never" not in by_stratum(halved, strata(halved, cases, LABELS).assign(never=False))


def test_text_by_path(halved, cases, phantom_folder):
    marker = marker_masks(phantom_folder, cases)
    numbers = corner_text(halved, marker)
    assert numbers["composite"]["marker_l1"] == 0
    assert numbers["latent path"]["marker_l1"] == pytest.approx(0.2, abs=1e-6)
    assert numbers["autoencoder"]["marker_l1"] == pytest.approx(0.1, abs=1e-6)


def test_what_does_not_belong_together_is_refused(halved, cases, phantom_folder):
    with pytest.raises(ValueError, match="true counterfactual is not known"):
        strata(replace(halved, truth=None, truth_mask=None), cases, LABELS)
    with pytest.raises(ValueError, match="not the images that were evaluated"):
        strata(halved, cases.iloc[::-1], LABELS)
    with pytest.raises(ValueError, match="nothing had to change in"):
        strata(replace(halved, truth_mask=torch.zeros_like(halved.truth_mask)), cases, LABELS)
    with pytest.raises(ValueError, match="pixels in every image"):
        corner_text(halved, torch.zeros_like(halved.mask, dtype=torch.bool))


def test_the_study_edits_and_reads(phantom_folder):
    found = hard_cases.study(tiny_pipeline(), phantom_folder, DEVICES, 3, EDITOR)
    assert found["hard_cases"]["all"]["images"] == 3
    assert set(found["corner_text"]) == {"autoencoder", "latent path", "composite"}


def test_images_without_truth_are_not_studied(phantom_folder, monkeypatch):
    real = load_info(phantom_folder) | {"source": "nih"}
    monkeypatch.setattr(folder, "load_info", lambda _: real)
    with pytest.raises(ValueError, match="holds real images"):
        hard_cases.study(tiny_pipeline(), phantom_folder, DEVICES, 3, EDITOR)
