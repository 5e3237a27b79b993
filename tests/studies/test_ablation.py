"""Variants are what their names say, on the same images; the schedule is the one the editor follows."""

import pytest
import torch

from prism_lib.data.rows import prompt_pairs
from prism_lib.editing.attention import Controller
from prism_lib.editing.counterfactuals import edit
from prism_lib.editing.inversion import invert
from prism_lib.editing.settings import EditConfig
from prism_lib.evaluation.evaluate import choose_cases, evaluate_edit
from prism_lib.language.edits import Edit
from prism_lib.reporting import plots
from prism_lib.studies import ablation
from prism_lib.studies.ablation import Variant, measure, summarise, vary
from tests.tiny import REMOVE, tiny_images, tiny_pipeline

BASE = Variant("direct", num_inference_steps=2)
REMOVE_DEVICES, ADD_HEART = Edit(remove=("Support Devices",)), Edit(add=("Cardiomegaly",))


@pytest.fixture(scope="module")
def cases(phantom_folder):
    return {edit: choose_cases(phantom_folder, edit, 2) for edit in (REMOVE_DEVICES, ADD_HEART)}


@pytest.fixture(scope="module")
def measured(phantom_folder, cases):
    variants = vary(BASE, method=["direct", "ddim"]) | {"base": BASE} | vary(BASE, mask=["off"])
    return measure(tiny_pipeline(), phantom_folder, cases, variants)


def test_variants_are_all_combinations_by_name():
    variants = vary(BASE, self_replace_steps=[0.0, 0.5], cross_replace_steps=[0.25], mask=["off"])
    assert list(variants) == [
        "self_replace_steps 0, cross_replace_steps 0.25, mask off",
        "self_replace_steps 0.5, cross_replace_steps 0.25, mask off",
    ]
    second = list(variants.values())[1]
    assert second == Variant("direct", 2, EditConfig(self_replace_steps=0.5, cross_replace_steps=0.25), "off")


def test_an_unknown_setting_or_a_bad_value_is_named():
    with pytest.raises(ValueError, match="unknown setting gidance; known: "):
        vary(BASE, gidance=[1])
    with pytest.raises(ValueError, match="self_replace_steps is 2"):
        vary(BASE, self_replace_steps=[2.0])


def test_a_variant_is_its_own_evaluation(phantom_folder, cases, measured):
    alone = evaluate_edit(
        tiny_pipeline(), phantom_folder, cases[ADD_HEART], ADD_HEART, EditConfig(), method="ddim", num_inference_steps=2
    )
    (_, found) = measured["method ddim"].evaluations
    assert torch.equal(found.edited, alone.edited)
    assert found.table.equals(alone.table)


def test_the_base_is_measured_once(measured):
    assert measured["base"] is measured["method direct"]
    assert measured["base"] is not measured["mask off"]


def test_without_a_mask_the_raw_decode_is_measured(measured):
    off, base = measured["mask off"].evaluations[0], measured["base"].evaluations[0]
    assert torch.equal(off.edited, base.raw)
    assert not torch.equal(off.edited, base.edited)


def test_evaluations_are_counted_by_row(measured):
    # Two steps of inversion, two of source and target, and a negative row in the first 40 % of two: one step.
    assert measured["base"].unet_evaluations == 2 + 2 * 2 + 1
    assert measured["base"].images == 4
    assert measured["base"].seconds_per_image > 0


def test_the_summary_is_the_mean_over_all_images(measured):
    summary = summarise(measured)
    tables = [e.table for e in measured["base"].evaluations]
    expected = sum(table["true_error_ratio"].sum() for table in tables) / 4
    assert summary["base"]["true_error_ratio"] == pytest.approx(expected)
    assert summary["base"]["true_error_ratio_low"] <= expected <= summary["base"]["true_error_ratio_high"]
    assert summary["base"]["images"] == 4 and "cpg" not in summary["base"]


def test_a_sheet_shows_input_truth_and_every_variant(measured):
    images, titles = ablation.first_of_each(measured)
    assert titles == ["original", "true counterfactual", "method direct", "method ddim", "base", "mask off"]
    base = measured["base"].evaluations[0]
    assert torch.equal(images[0], base.factual[0]) and torch.equal(images[1], base.truth[0])
    assert torch.equal(images[4], base.edited[0])


def test_nothing_to_measure_is_an_error(phantom_folder, cases):
    with pytest.raises(ValueError, match="got 2 and 0"):
        measure(tiny_pipeline(), phantom_folder, cases, {})


@pytest.mark.parametrize(("cross", "own"), [(0.0, 0.0), (0.3, 0.7), (1.0, 0.5), (0.25, 0.1)])
def test_the_schedule_is_what_the_editor_does(monkeypatch, cross, own):
    steps, pipe = 5, tiny_pipeline()
    config = EditConfig(cross_replace_steps=cross, self_replace_steps=own)
    seen = {}
    original = Controller.edits_cross, Controller.injects_self

    def edits_cross(self):
        seen.setdefault(self.step, {})["cross"] = original[0](self)
        return original[0](self)

    def injects_self(self, queries):
        (seen.setdefault(self.step, {})["self"],) = original[1](self, queries)
        return original[1](self, queries)

    monkeypatch.setattr(Controller, "edits_cross", edits_cross)
    monkeypatch.setattr(Controller, "injects_self", injects_self)
    timesteps = []
    inversion = invert(pipe, tiny_images(1), [REMOVE.source], num_inference_steps=steps)
    edit(pipe, inversion, [REMOVE], config, callback=lambda index, timestep, latents: timesteps.append(timestep))
    table = ablation.schedule(config, pipe, steps)
    assert table["timestep"].tolist() == timesteps
    for name in ("cross", "self"):
        assert [state == "source" for state in table[name]] == [seen[step][name] for step in range(steps)]


def test_the_schedule_says_when_blending_starts():
    table = ablation.schedule(EditConfig(local_blend=True, local_blend_start=0.4), tiny_pipeline(), 5)
    assert table["local_blend"].tolist() == [False, False, True, True, True]
    assert not ablation.schedule(EditConfig(), tiny_pipeline(), 5)["local_blend"].any()


def test_the_schedule_says_when_confining_starts():
    table = ablation.schedule(EditConfig(confine=0.2, confine_start=0.6), tiny_pipeline(), 5)
    assert table["confine"].tolist() == [False, False, False, True, True]
    assert not ablation.schedule(EditConfig(confine=0.0), tiny_pipeline(), 5)["confine"].any()


def test_the_front_is_what_nothing_beats():
    points = {"a": (1, 0.9, 0.8, 1), "b": (2, 0.5, 0.4, 0.6), "c": (3, 0.6, 0.5, 0.7), "d": (9, 0.1, 0, 0.2)}
    (axis,) = plots.pareto(points, xlabel="seconds").axes
    assert {text.get_text() for text in axis.texts} == set(points)  # so few that all can be named
    front = max(axis.lines, key=lambda line: len(line.get_xdata()))
    assert list(front.get_xdata()) == [1, 2, 9]


def test_a_timeline_has_a_cell_for_each_step():
    (axis,) = plots.timeline({"cross": ["source", "own"], "self": ["own", "own"]}, xlabel="step").axes
    assert len(axis.patches) == 4
    colors = [patch.get_facecolor() for patch in axis.patches]
    assert colors[0] != colors[1] == colors[2] == colors[3]


def test_what_an_edit_needs_anyway_or_cannot_use_is_measured_once(phantom_folder, cases):
    (need,) = {
        EditConfig().settled(pair).addition_factor for pair in prompt_pairs(phantom_folder, cases[ADD_HEART], ADD_HEART)
    }
    variants = {"base": BASE} | vary(BASE, addition_factor=[need, need + 1])
    found = measure(tiny_pipeline(), phantom_folder, cases, variants)
    base, same, other = (variant.evaluations for variant in found.values())
    assert all(mine is theirs for mine, theirs in zip(base, same, strict=True))
    assert other[0] is base[0], "a removal has no factor"
    assert other[1] is not base[1] and not torch.equal(other[1].raw, base[1].raw)
    counts = {measurement.unet_evaluations for measurement in found.values()}
    assert counts == {found["base"].unet_evaluations}
    assert found[f"addition_factor {need:g}"].variant != BASE
