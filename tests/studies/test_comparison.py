"""Variants are what their names say; methods are tuned by one criterion, never on test patients, on the same images."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from prism_lib import devices
from prism_lib.data import folder
from prism_lib.data.folder import load_info
from prism_lib.data.rows import prompt_pairs, true_counterfactual
from prism_lib.editing.settings import EditConfig, recommended
from prism_lib.evaluation.evaluate import Editor, choose_cases, evaluate_edits, evaluate_results
from prism_lib.language.edits import Edit
from prism_lib.reporting import plots
from prism_lib.studies import comparison
from prism_lib.studies.comparison import ComparisonConfig, measure, summarise, vary
from prism_lib.studies.editors import PromptToPrompt, SDEdit, unmasked
from tests.tiny import tiny_pipeline

REMOVE, ADD = Edit(remove=("Support Devices",)), Edit(add=("Cardiomegaly",))
BASE = PromptToPrompt("direct", num_inference_steps=2)


@dataclass(frozen=True)
class Oracle(Editor):
    """Mixes the truth with the input: its error is 1 - share, by construction."""

    truth: Callable
    share: float

    def edit(self, pipe, inverted, pairs, change):
        truth = self.truth(change, len(inverted))
        return unmasked(pipe, inverted, pairs, inverted + self.share * (truth - inverted), self)


@pytest.fixture(scope="module")
def cases(phantom_folder):
    return {edit: choose_cases(phantom_folder, edit, 2, "val") for edit in (REMOVE, ADD)}


@pytest.fixture(scope="module")
def truth(phantom_folder, cases):
    return lambda change, count: true_counterfactual(phantom_folder, cases[change].head(count), change)[0]


def measured_here(phantom_folder, cases, editors, **how):
    return measure(tiny_pipeline(), phantom_folder, cases, editors, **how)


@pytest.fixture(scope="module")
def measured(phantom_folder, cases):
    variants = vary(BASE, method=["direct", "ddim"]) | {"base": BASE} | vary(BASE, mask=["off"])
    return measured_here(phantom_folder, cases, variants)


# --- variants -------------------------------------------------------------------------------------


def test_variants_are_all_combinations_by_name():
    variants = vary(BASE, self_replace_steps=[0.0, 0.5], cross_replace_steps=[0.25], mask=["off"])
    assert list(variants) == [
        "self_replace_steps 0, cross_replace_steps 0.25, mask off",
        "self_replace_steps 0.5, cross_replace_steps 0.25, mask off",
    ]
    second = list(variants.values())[1]
    assert second == PromptToPrompt("direct", 2, {"self_replace_steps": 0.5, "cross_replace_steps": 0.25}, "off")
    assert second.settings == {"self_replace_steps": 0.5, "cross_replace_steps": 0.25}, "overrides, not a whole config"
    (fixed,) = vary(replace(BASE, settings=EditConfig()), guidance_scale=[3.0]).values()
    assert fixed.settings == EditConfig(guidance_scale=3.0)


def test_an_unknown_setting_or_a_bad_value_is_named():
    with pytest.raises(ValueError, match="unknown setting 'gidance'"):
        vary(BASE, gidance=[1])
    with pytest.raises(ValueError, match=r"self_replace_steps is 2\.0: "):
        vary(BASE, self_replace_steps=[2.0])


def test_a_variant_is_its_own_evaluation(phantom_folder, cases, measured):
    editor = PromptToPrompt("ddim", 2)
    (alone,) = evaluate_edits(tiny_pipeline(), phantom_folder, {ADD: cases[ADD]}, editor)
    (_, found) = measured["method ddim"].evaluations
    assert torch.equal(found.edited, alone.edited)
    assert found.table.equals(alone.table)


def test_the_base_is_measured_once(measured):
    base, same, off = (measured[name].evaluations for name in ("base", "method direct", "mask off"))
    assert all(mine is theirs for mine, theirs in zip(base, same, strict=True))
    assert off[0] is not base[0]
    assert torch.equal(off[0].edited, base[0].raw) and not torch.equal(off[0].edited, base[0].edited)


def test_evaluations_are_counted_by_row(measured):
    # Two steps of inversion, two of source and target, and a negative row for each guided step.
    guided = round(2 * recommended(tiny_pipeline(), prompt_of_nothing()).guidance_end)
    assert measured["base"].unet_evaluations == 2 + 2 * 2 + guided
    assert measured["base"].seconds_per_image > 0


def prompt_of_nothing():
    return REMOVE.prompts({"Support Devices": 1.0})


def test_the_summary_is_the_mean_over_all_images(measured):
    summary = summarise(measured, by_edit=True)
    tables = [e.table for e in measured["base"].evaluations]
    expected = sum(table["true_error_ratio"].sum() for table in tables) / 4
    assert summary["base"]["true_error_ratio"] == pytest.approx(expected)
    assert summary["base"]["true_error_ratio_low"] <= expected <= summary["base"]["true_error_ratio_high"]
    assert summary["base"]["images"] == 4 and "cpg" not in summary["base"]
    assert summary["base"][ADD.key]["true_error_ratio"] == pytest.approx(tables[1]["true_error_ratio"].mean())


def test_a_sheet_shows_input_truth_and_every_variant(measured):
    images, titles = comparison.sheet(measured)
    assert titles == ["original", "true counterfactual", "method direct", "method ddim", "base", "mask off"]
    base = measured["base"].evaluations[0]
    assert torch.equal(images[0], base.factual[0]) and torch.equal(images[1], base.truth[0])
    assert torch.equal(images[4], base.edited[0])


def test_nothing_to_measure_is_an_error(phantom_folder, cases):
    with pytest.raises(ValueError, match="got 2 and 0"):
        measured_here(phantom_folder, cases, {})


def test_what_an_edit_has_anyway_or_does_not_use_is_measured_once(phantom_folder, cases):
    (pair, *_) = prompt_pairs(phantom_folder, cases[ADD], ADD)
    factor = recommended(tiny_pipeline(), pair).addition_factor
    variants = {"base": BASE} | vary(BASE, addition_factor=[factor, factor + 1])
    base, same, other = (found.evaluations for found in measured_here(phantom_folder, cases, variants).values())
    assert all(mine is theirs for mine, theirs in zip(base, same, strict=True))
    assert other[0] is base[0], "a removal has no factor"
    assert other[1] is not base[1] and not torch.equal(other[1].raw, base[1].raw)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(phantom_folder, cases, monkeypatch):
    editors = {"ours": PromptToPrompt(num_inference_steps=2), "sdedit": SDEdit(num_inference_steps=4)}
    alone = measured_here(phantom_folder, cases, editors)
    monkeypatch.setattr(devices, "processes_for", lambda asked=0: 2)
    together = measured_here(phantom_folder, cases, editors)
    for name in editors:
        assert alone[name].unet_evaluations == together[name].unet_evaluations
        for mine, theirs in zip(alone[name].evaluations, together[name].evaluations, strict=True):
            assert torch.equal(mine.edited, theirs.edited) and mine.table.equals(theirs.table)


def test_the_front_is_what_nothing_beats():
    points = {"a": (1, 0.9, 0.8, 1), "b": (2, 0.5, 0.4, 0.6), "c": (3, 0.6, 0.5, 0.7), "d": (9, 0.1, 0, 0.2)}
    (axis,) = plots.pareto(points, xlabel="seconds").axes
    assert {text.get_text() for text in axis.texts} == set(points)  # so few that all can be named
    front = max(axis.lines, key=lambda line: len(line.get_xdata()))
    assert list(front.get_xdata()) == [1, 2, 9]


# --- tuning and comparing -------------------------------------------------------------------------


def test_the_least_error_to_the_truth_is_chosen(phantom_folder, cases, truth):
    tried = {"oracle": [Oracle(truth, share) for share in (0.2, 0.9, 0.5)]}
    tuned = comparison.tune(tiny_pipeline(), phantom_folder, cases, tried)["oracle"]
    assert tuned.editor.share == 0.9
    assert [entry["true_error_ratio"] for entry in tuned.tried] == pytest.approx([0.8, 0.1, 0.5], abs=1e-5)
    assert [entry["settings"]["editor"] for entry in tuned.tried] == ["Oracle"] * 3


def test_tuning_inverts_once_and_finds_what_each_setting_gives_alone(phantom_folder, cases, monkeypatch):
    calls, original = [], PromptToPrompt.invert
    monkeypatch.setattr(PromptToPrompt, "invert", lambda *given: calls.append(1) or original(*given))
    pipe, tried = tiny_pipeline(), list(vary(BASE, guidance_scale=[2.0, 5.0]).values())
    tuned = comparison.tune(pipe, phantom_folder, cases, {"ours": tried})["ours"]
    assert len(calls) == len(cases)
    for editor, found in zip(tried, tuned.tried, strict=True):
        (alone,) = comparison.tune(pipe, phantom_folder, cases, {"ours": [editor]})["ours"].tried
        assert alone["true_error_ratio"] == pytest.approx(found["true_error_ratio"], abs=1e-6)


def test_all_methods_see_the_same_images_and_are_counted(phantom_folder, cases, truth):
    editors = {"ours": BASE, "oracle": Oracle(truth, 1.0)}
    measured = measured_here(phantom_folder, cases, editors)
    for mine, known in zip(measured["ours"].evaluations, measured["oracle"].evaluations, strict=True):
        assert torch.equal(mine.factual, known.factual)
    metrics = summarise(measured, by_edit=True)
    assert metrics["oracle"]["true_error_ratio"] == pytest.approx(0, abs=1e-6)
    assert metrics["oracle"]["unet_evaluations"] == 0
    assert metrics["ours"]["images"] == 4 and metrics["ours"][ADD.key]["images"] == 2
    panels, titles = comparison.sheet(measured, edit=1)
    assert titles == ["original", "true counterfactual", "ours", "oracle"]
    assert torch.allclose(panels[1], panels[3], atol=1e-6)


def test_every_method_has_the_same_budget_and_ours_begins_with_the_default():
    candidates = comparison.candidates(50)
    assert {len(editors) for editors in candidates.values()} == {comparison.BUDGET}
    assert {"PRISM (ours)", "DDIM + prompt-to-prompt", "LEDITS++", "SDEdit", "Imagic"} <= candidates.keys()
    assert candidates["PRISM (ours)"][0] == PromptToPrompt()


def test_tuning_on_test_patients_is_refused(phantom_folder, truth):
    test = {REMOVE: choose_cases(phantom_folder, REMOVE, 2, "test")}
    with pytest.raises(ValueError, match="must not see test patients; remove_support_devices has phantom-"):
        comparison.tune(tiny_pipeline(), phantom_folder, test, {"any": [Oracle(truth, 1.0)]})


def test_a_result_for_every_image(phantom_folder, cases):
    with pytest.raises(ValueError, match="2 images of remove_support_devices need as many results, got 0"):
        evaluate_results(phantom_folder, cases[REMOVE], REMOVE, [])


def small(**changes):
    values = {"images": 1, "budget": 1, "steps": 4, "gan_steps": 1, "gan_filters": 4, "guide_steps": 1}
    return ComparisonConfig(("PRISM (ours)", comparison.GAN), guide_images=16, **(values | changes))


def compared(phantom_folder, output, config):
    return comparison.compare_methods(tiny_pipeline(), phantom_folder, [REMOVE], config, output)


def test_a_study_trains_its_gan_once_and_tests_on_test_patients(phantom_folder, tmp_path, monkeypatch):
    tuned, found = compared(phantom_folder, tmp_path, small())
    assert list(found) == ["PRISM (ours)", comparison.GAN] == list(tuned)
    test = choose_cases(phantom_folder, REMOVE, 1, "test")
    for measured in found.values():
        assert measured.evaluations[0].table["file_name"].tolist() == test["file_name"].tolist()
    for work in ("prism_lib.studies.ganterfactual._Training.step", "prism_lib.evaluation.evaluate.train_judge"):
        monkeypatch.setattr(work, lambda *_: pytest.fail("trained again"))
    _, again = compared(phantom_folder, tmp_path, small())
    edited = [measured[comparison.GAN].evaluations[0].edited for measured in (found, again)]
    assert torch.equal(*edited)


def test_real_images_have_no_truth_to_tune_by(phantom_folder, tmp_path, monkeypatch):
    real = load_info(phantom_folder) | {"source": "nih"}
    monkeypatch.setattr(folder, "load_info", lambda _: real)
    with pytest.raises(ValueError, match=r"holds real images, whose truth of .* is unknown"):
        compared(phantom_folder, tmp_path, small())


def test_wrong_settings_of_a_study_are_named():
    with pytest.raises(ValueError, match="unknown method 'Photoshop'; known: PRISM"):
        ComparisonConfig(("Photoshop",))
    with pytest.raises(ValueError, match="budget is 0: "):
        small(budget=0)
    with pytest.raises(ValueError, match="mixed_precision is 'fp16': "):
        small(mixed_precision="fp16")


def test_guide_and_gan_are_trained_in_the_precision_asked_for(phantom_folder, tmp_path):
    compared(phantom_folder, tmp_path, small(mixed_precision="bf16"))
    configs = [json.loads(path.read_text()) for path in tmp_path.rglob("config.json")]
    assert [config["mixed_precision"] for config in configs] == ["bf16", "bf16"]
