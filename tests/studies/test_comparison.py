"""Methods are tuned by one criterion within one budget, never on test patients, and measured on the same images."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from prism_lib.data import folder
from prism_lib.data.folder import load_info
from prism_lib.data.rows import true_counterfactual
from prism_lib.evaluation.evaluate import choose_cases, evaluate_results
from prism_lib.language.edits import Edit
from prism_lib.studies import comparison
from prism_lib.studies.editors import PromptToPrompt, unmasked
from tests.tiny import tiny_pipeline

REMOVE, ADD = Edit(remove=("Support Devices",)), Edit(add=("Cardiomegaly",))


@dataclass(frozen=True)
class Oracle:
    """Knows the truth and mixes it with the input: its error is 1 - share, by construction."""

    truth: Callable
    share: float

    def __call__(self, pipe, images, pairs, change):
        truth = self.truth(change)
        return unmasked(pipe, images, pairs, images + self.share * (truth - images), self)


@pytest.fixture(scope="module")
def cases(phantom_folder):
    return {edit: choose_cases(phantom_folder, edit, 2, "val") for edit in (REMOVE, ADD)}


@pytest.fixture(scope="module")
def truth(phantom_folder, cases):
    return lambda change: true_counterfactual(phantom_folder, cases[change], change)[0]


def test_the_least_error_to_the_truth_is_chosen(phantom_folder, cases, truth):
    tried = {"oracle": [Oracle(truth, share) for share in (0.2, 0.9, 0.5)]}
    tuned = comparison.tune(tiny_pipeline(), phantom_folder, cases, tried)["oracle"]
    assert tuned.editor.share == 0.9
    assert tuned.errors == pytest.approx((0.8, 0.1, 0.5), abs=1e-5)
    assert [entry["true_error_ratio"] for entry in tuned.as_record()["tried"]] == list(tuned.errors)
    assert tuned.as_record()["chosen"]["editor"] == "Oracle"


def test_all_methods_see_the_same_images_and_are_counted(phantom_folder, cases, truth):
    editors = {"ours": PromptToPrompt("direct", num_inference_steps=2), "oracle": Oracle(truth, 1.0)}
    measured = comparison.compare(tiny_pipeline(), phantom_folder, cases, editors)
    for mine, known in zip(measured["ours"].evaluations, measured["oracle"].evaluations, strict=True):
        assert torch.equal(mine.factual, known.factual)
    metrics = comparison.record(measured, {})["methods"]
    assert metrics["oracle"]["true_error_ratio"] == pytest.approx(0, abs=1e-6)
    assert metrics["ours"]["unet_evaluations"] == 2 + 2 * 2 + 1 and metrics["oracle"]["unet_evaluations"] == 0
    assert metrics["ours"]["images"] == 4 and metrics["ours"][ADD.key]["images"] == 2
    panels, titles = comparison.sheet(measured, edit=1)
    assert titles == ["original", "true counterfactual", "ours", "oracle"]
    assert torch.allclose(panels[1], panels[3], atol=1e-6)


def test_every_method_has_the_same_budget():
    sizes = {name: len(editors) for name, editors in comparison.candidates(10).items()}
    assert set(sizes.values()) == {comparison.BUDGET}
    assert {"PRISM (ours)", "DDIM + prompt-to-prompt", "LEDITS++", "SDEdit", "Imagic"} <= sizes.keys()


@pytest.mark.parametrize("count", [0, 3])
def test_a_method_outside_the_budget_is_named(phantom_folder, cases, truth, count):
    editors = {"greedy": [Oracle(truth, 1.0)] * count}
    with pytest.raises(ValueError, match=f"greedy has {count} settings to try; the budget of every method is 2"):
        comparison.tune(tiny_pipeline(), phantom_folder, cases, editors, budget=2)


def test_tuning_on_test_patients_is_refused(phantom_folder, truth):
    test = {REMOVE: choose_cases(phantom_folder, REMOVE, 2, "test")}
    with pytest.raises(ValueError, match="must not see test patients; remove_support_devices has phantom-"):
        comparison.tune(tiny_pipeline(), phantom_folder, test, {"any": [Oracle(truth, 1.0)]})


def test_nothing_to_compare_is_an_error(phantom_folder, cases):
    with pytest.raises(ValueError, match="got 0 and 2"):
        comparison.compare(tiny_pipeline(), phantom_folder, cases, {})


def test_a_result_for_every_image(phantom_folder, cases):
    with pytest.raises(ValueError, match="2 images of remove_support_devices need as many results, got 0"):
        evaluate_results(phantom_folder, cases[REMOVE], REMOVE, [])


def small(**changes):
    values = {"images": 1, "budget": 1, "steps": 4, "gan_steps": 1, "gan_filters": 4, "guide_steps": 1}
    return comparison.StudyConfig(("PRISM (ours)", comparison.GAN), guide_images=16, **(values | changes))


def test_a_study_trains_its_gan_once_and_tests_on_test_patients(phantom_folder, tmp_path, monkeypatch):
    found = comparison.run(tiny_pipeline(), phantom_folder, [REMOVE], small(), tmp_path)
    assert list(found.measured) == ["PRISM (ours)", comparison.GAN] == list(found.tuned)
    test = choose_cases(phantom_folder, REMOVE, 1, "test")
    for measured in found.measured.values():
        assert measured.evaluations[0].table["file_name"].tolist() == test["file_name"].tolist()
    for work in ("prism_lib.studies.ganterfactual._Training.step", "prism_lib.studies.ganterfactual.train_judge"):
        monkeypatch.setattr(work, lambda *_: pytest.fail("trained again"))
    again = comparison.run(tiny_pipeline(), phantom_folder, [REMOVE], small(), tmp_path)
    edited = [study.measured[comparison.GAN].evaluations[0].edited for study in (found, again)]
    assert torch.equal(*edited)


def test_real_images_have_no_truth_to_tune_by(phantom_folder, tmp_path, monkeypatch):
    real = load_info(phantom_folder) | {"source": "nih"}
    monkeypatch.setattr(folder, "load_info", lambda _: real)
    with pytest.raises(ValueError, match="holds real images, whose true counterfactuals are unknown"):
        comparison.run(tiny_pipeline(), phantom_folder, [REMOVE], small(), tmp_path)


def test_wrong_settings_of_a_study_are_named():
    with pytest.raises(ValueError, match="unknown method 'Photoshop'; known: PRISM"):
        comparison.StudyConfig(("Photoshop",))
    with pytest.raises(ValueError, match="budget is 0"):
        small(budget=0)
    with pytest.raises(ValueError, match="images is 0"):
        small(images=0)
    with pytest.raises(ValueError, match="mixed_precision is 'fp16'; expected one of no, bf16"):
        small(mixed_precision="fp16")


def test_guide_and_gan_are_trained_in_the_precision_asked_for(phantom_folder, tmp_path):
    comparison.run(tiny_pipeline(), phantom_folder, [REMOVE], small(mixed_precision="bf16"), tmp_path)
    configs = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("config.json")}
    assert {name: config["mixed_precision"] for name, config in configs.items()} == {
        "guide": "bf16",
        "support_devices": "bf16",
    }


def test_the_default_is_the_first_of_our_settings():
    assert comparison.candidates(50)["PRISM (ours)"][0] == PromptToPrompt()
