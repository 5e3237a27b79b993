"""Evaluation: the numbers of an edit, on a tiny pipeline and small phantoms."""

from dataclasses import replace

import pytest
import torch

from prism_lib.data.folder import load_table, read_images
from prism_lib.data.rows import marker_masks, prompt_pairs, sample_captions
from prism_lib.editing.counterfactuals import edit, stack
from prism_lib.editing.inversion import invert
from prism_lib.editing.settings import EditConfig
from prism_lib.evaluation import evaluate, metrics
from prism_lib.evaluation.evaluate import (
    Evaluation,
    batch_difference,
    choose_cases,
    composition,
    evaluate_edits,
    judge_auc,
    load_judge,
    reversibility,
    summarise,
    summarise_rows,
)
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.models.classifier import Classifier
from prism_lib.phantom.patients import marker_mask, sample_patients
from tests.tiny import tiny_pipeline

REMOVE = Edit(remove=("Support Devices",))
HOW = {"num_inference_steps": 2}
LABELS = ("Cardiomegaly", "Pleural Effusion", "Support Devices")


class Oracle(torch.nn.Module):
    """Reads a device where the image has a very bright pixel; sees no disease."""

    def __init__(self):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        bright = (images.amax((1, 2, 3)) > 0.5).float() * 10 - 5
        return torch.stack([torch.full_like(bright, -5), torch.full_like(bright, -5), bright], 1) + self.zero


@pytest.fixture(scope="module")
def evaluated(phantom_folder):
    chosen = choose_cases(phantom_folder, REMOVE, 3)
    how = {"num_inference_steps": 2, "judge": Classifier(Oracle(), LABELS)}
    return evaluate_edits(tiny_pipeline(), phantom_folder, {REMOVE: chosen}, EditConfig(), **how)[0]


def test_results_do_not_depend_on_the_number_of_processes(phantom_folder, evaluated):
    """Judge and truth read the same pixels, to the bit."""
    cases = {REMOVE: choose_cases(phantom_folder, REMOVE, 3), Edit(): choose_cases(phantom_folder, Edit(), 3)}
    how = {"judge": Classifier(Oracle(), LABELS), "num_inference_steps": 2}
    one, two = (
        evaluate_edits(tiny_pipeline(), phantom_folder, cases, EditConfig(), processes=count, **how) for count in (1, 2)
    )
    for alone, shared in zip(one, two, strict=True):
        assert alone.edit == shared.edit and alone.table.equals(shared.table)
        for name in ("factual", "edited", "raw", "reconstruction", "mask"):
            assert torch.equal(getattr(alone, name), getattr(shared, name)), name
        assert shared.seconds > 0
    assert one[0].table.equals(evaluated.table), "one edit alone is the same as one of many"


def test_a_large_model_is_not_copied(phantom_folder, monkeypatch):
    """It is edited with all threads of this process, eight images at a time."""
    monkeypatch.setattr(evaluate.devices, "LARGEST_COPY", 1000)
    monkeypatch.setattr(evaluate.devices, "side_by_side", lambda *_: pytest.fail("copied"))
    cases = choose_cases(phantom_folder, REMOVE, 3)
    (large,) = evaluate_edits(tiny_pipeline(), phantom_folder, {REMOVE: cases}, EditConfig(), num_inference_steps=2)
    assert len(large.table) == 3


def test_a_batch_changes_results_by_rounding_alone(evaluated):
    assert batch_difference(tiny_pipeline(), evaluated, EditConfig(), **HOW) < 1e-3
    other = replace(evaluated, edited=evaluated.edited.flip(0))
    assert batch_difference(tiny_pipeline(), other, EditConfig(), **HOW) > 1e-2


def test_cases_are_held_out_suitable_and_one_per_patient(phantom_folder):
    chosen = choose_cases(phantom_folder, REMOVE, 3)
    assert set(chosen["split"]) == {"test"} and set(chosen["Support Devices"]) == {1.0}
    assert chosen["patient_id"].is_unique
    with pytest.raises(ValueError, match=r"remove_support_devices applies to \d+ patients"):
        choose_cases(phantom_folder, REMOVE, 1000)


def test_an_edit_is_measured_per_image(evaluated):
    expected = {
        "true_error_ratio",
        "mask_recall",
        "mask_area_ratio",
        "latent_outside_l1_ratio",
        "marker_changed",
        "cpg",
    }
    assert expected <= set(evaluated.table.columns)
    assert len(evaluated.table) == 3 and evaluated.table.notna().all(axis=None)
    assert (evaluated.table["changed_outside_mask"] == 0).all()
    assert evaluated.settings == (EditConfig(batch_size=2),), "one for all images"


def test_the_truth_itself_would_be_perfect(evaluated):
    perfect = Evaluation(**{**vars(evaluated), "edited": evaluated.truth, "mask": evaluated.truth_mask.float()})
    columns = evaluate._against_truth(perfect, torch.ones_like(perfect.truth_mask))
    assert columns["true_error_ratio"] == [0.0] * 3
    assert columns["mask_recall"] == columns["mask_area_ratio"] == [1.0] * 3
    assert columns["marker_changed"] == [0] * 3


def test_the_judge_counts_only_what_can_flip(evaluated):
    table = evaluated.table.assign(p_before=[0.9, 0.8, 0.1], flipped=[1.0, 0.0, 1.0])
    summary = summarise(Evaluation(**{**vars(evaluated), "table": table}))
    assert summary["flip_denominator"] == 2
    assert summary["flip_rate"] == 0.5
    assert summary["images"] == 3
    assert summary["identity_l1_low"] <= summary["identity_l1"] <= summary["identity_l1_high"]


def test_a_detail_is_read_as_the_label_that_it_belongs_to(evaluated):
    judge = Classifier(Oracle(), LABELS)
    added = evaluate._by_judge(replace(evaluated, edit=Edit(add=("pacemaker",))), judge)
    assert added["cpg"] == evaluate._by_judge(replace(evaluated, edit=Edit(add=("Support Devices",))), judge)["cpg"]
    removed = evaluate._by_judge(replace(evaluated, edit=Edit(remove=("pacemaker",))), judge)
    assert set(removed) == {"side_effect_rate"}, "there may be other devices"


def test_captions_depend_on_image_and_seed_alone(phantom_folder):
    table = load_table(phantom_folder, "train")
    whole = sample_captions(phantom_folder, table, 0, 3, 0.5)
    assert sample_captions(phantom_folder, table.iloc[5:7], 0, 3, 0.5) == whole[5:7]
    assert sample_captions(phantom_folder, table, 1, 3, 0.5) != whole


def test_markers_are_those_of_the_rows(phantom_folder):
    table = load_table(phantom_folder, "val").iloc[[2, 0]]
    masks = marker_masks(phantom_folder, table)
    patients = sample_patients([int(i) for i in table["phantom_index"]], 0)
    assert torch.equal(masks, marker_mask(patients, 32))
    assert masks.flatten(1).any(1).all()


def test_no_judge_no_verdict(phantom_folder):
    assert load_judge("") is None
    assert judge_auc(None, phantom_folder) == {}
    with pytest.raises(FileNotFoundError, match="no classifier"):
        load_judge("nobody")


@pytest.fixture(scope="module")
def three_cases(phantom_folder):
    return choose_cases(phantom_folder, REMOVE, 3)


def test_a_null_edit_changes_no_pixel_and_its_latent_path_costs_the_autoencoder(phantom_folder, three_cases):
    table = composition(tiny_pipeline(), phantom_folder, three_cases, EditConfig(), **HOW)
    assert table["image"].tolist() == [0.0] * 3
    assert table["raw"].tolist() == pytest.approx([1.0] * 3, abs=1e-4), "the autoencoder's own error"
    summary = summarise_rows(table)
    assert summary["raw"] == pytest.approx(1.0, abs=1e-4) and summary["images"] == 3


def test_an_edit_that_is_undone_comes_back(phantom_folder, three_cases):
    pipe = tiny_pipeline()
    (known,) = evaluate_edits(pipe, phantom_folder, {REMOVE: three_cases}, EditConfig(), **HOW)
    table = reversibility(pipe, known, EditConfig(), **HOW)
    back = [
        PromptPair(pair.target, pair.source, pair.target_words, pair.source_words)
        for pair in prompt_pairs(phantom_folder, three_cases, REMOVE)
    ]
    inversion = invert(pipe, known.edited, [pair.source for pair in back], **HOW)
    returned = stack(edit(pipe, inversion, back, EditConfig()))
    expected = metrics.relative_l1(returned, read_images(phantom_folder, three_cases), known.reconstruction)
    assert table["image"].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
