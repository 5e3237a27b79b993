"""Hard images, small text and entangled findings, on phantoms whose edit is the truth, nothing, or half of it."""

import pytest
import torch

from prism_lib.data import folder
from prism_lib.data.folder import load_info, read_images
from prism_lib.data.rows import prompt_pairs, true_counterfactual
from prism_lib.editing.counterfactuals import Counterfactual, stack
from prism_lib.evaluation.evaluate import choose_cases, evaluate_results
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.studies import hard_cases
from prism_lib.studies.editors import PromptToPrompt
from prism_lib.studies.hard_cases import by_stratum, carried_along, corner_text, strata
from tests.tiny import tiny_images, tiny_pipeline

DEVICES, HEART, OTHER = Edit(remove=("Support Devices",)), Edit(remove=("Cardiomegaly",)), "Support Devices"
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
    marker = true_counterfactual(phantom_folder, cases, Edit(add=("Cardiomegaly",))).marker
    numbers = corner_text(halved, marker)
    assert numbers["composite"]["marker_l1"] == 0
    assert numbers["latent path"]["marker_l1"] == pytest.approx(0.2, abs=1e-6)
    assert numbers["autoencoder"]["marker_l1"] == pytest.approx(0.1, abs=1e-6)


def test_the_study_edits_and_reads(phantom_folder):
    found = hard_cases.study(tiny_pipeline(), phantom_folder, DEVICES, 3, EDITOR)
    assert found["hard_cases"]["all"]["images"] == 3
    assert set(found["corner_text"]) == {"autoencoder", "latent path", "composite"}


def test_images_without_truth_are_not_studied(phantom_folder, monkeypatch):
    real = load_info(phantom_folder) | {"source": "nih"}
    monkeypatch.setattr(folder, "load_info", lambda _: real)
    with pytest.raises(ValueError, match="holds real images"):
        hard_cases.study(tiny_pipeline(), phantom_folder, DEVICES, 3, EDITOR)


# --- entanglement ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(phantom_folder):
    return choose_cases(phantom_folder, HEART, 2, having=OTHER)


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


def test_the_truth_carries_nothing_along(phantom_folder, both):
    images = read_images(phantom_folder, both)
    truth, mask, _ = true_counterfactual(phantom_folder, both, HEART)
    without, *_ = true_counterfactual(phantom_folder, both, DEVICES)
    assert carried_along(truth, images, without, ~mask).tolist() == [0, 0]
    assert carried_along(without, images, without, ~mask).tolist() == pytest.approx([1, 1])


def test_cases_have_both_findings(both):
    assert (both[["Cardiomegaly", OTHER]] == 1).all(axis=None)
    assert both["patient_id"].is_unique


def test_prism_is_silent_about_what_is_absent(phantom_folder, both):
    for pair in hard_cases.prism_pairs(phantom_folder, both, HEART):
        assert "Cardiomegaly" in pair.source and "Cardiomegaly" not in pair.target
        assert "without" not in pair.target and OTHER in pair.target


def test_the_study_has_a_row_for_each_condition(phantom_folder, both):
    numbers = hard_cases.entanglement(tiny_pipeline(), phantom_folder, HEART, OTHER, 2, EDITOR)
    assert list(numbers) == [f"confounding 0, {w}, mask {m}" for w in ("negated", "prism") for m in ("auto", "off")]
    images, pairs = read_images(phantom_folder, both), prompt_pairs(phantom_folder, both, HEART)
    edited = stack(EDITOR(tiny_pipeline(), images, pairs, HEART))
    _, mask, _ = true_counterfactual(phantom_folder, both, HEART)
    without, *_ = true_counterfactual(phantom_folder, both, DEVICES)
    alone = float(carried_along(edited, images, without, ~mask).mean())
    assert numbers["confounding 0, negated, mask auto"]["carried_along"] == pytest.approx(alone)


def test_bad_input_of_entanglement_is_named(phantom_folder, both):
    image = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="image 0 shows nothing of the other finding"):
        carried_along(image, image, image, image == 0)
    with pytest.raises(ValueError, match="'Cardiomegaly' is no other label"):
        choose_cases(phantom_folder, HEART, 2, having="Cardiomegaly")
    with pytest.raises(ValueError, match=r"with .*; 500 were asked for"):
        choose_cases(phantom_folder, HEART, 500, having=OTHER)


def test_entanglement_needs_the_truth(phantom_folder, monkeypatch):
    real = load_info(phantom_folder) | {"source": "nih"}
    monkeypatch.setattr(folder, "load_info", lambda _: real)
    with pytest.raises(ValueError, match="holds real images"):
        hard_cases.entanglement(tiny_pipeline(), phantom_folder, HEART, OTHER, 1, EDITOR)
