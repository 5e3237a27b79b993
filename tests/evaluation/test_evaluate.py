"""Evaluation: the numbers of an edit, on a tiny pipeline and small phantoms."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from prism_lib.data.folder import load_table, read_images
from prism_lib.data.rows import prompt_pairs, sample_captions, true_counterfactual
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
    trusted,
)
from prism_lib.language.edits import Edit, PromptPair
from prism_lib.models.classifier import Classifier
from prism_lib.phantom.patients import marker_mask, sample_patients
from prism_lib.studies.editors import PromptToPrompt
from tests.tiny import tiny_pipeline

REMOVE = Edit(remove=("Support Devices",))
EDITOR = PromptToPrompt(num_inference_steps=2, settings=EditConfig())
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
    judge = Classifier(Oracle(), LABELS)
    return evaluate_edits(tiny_pipeline(), phantom_folder, {REMOVE: chosen}, EDITOR, judge=judge)[0]


def test_results_do_not_depend_on_the_number_of_processes(phantom_folder, evaluated, monkeypatch):
    """Judge and truth read the same pixels, to the bit."""
    cases = {REMOVE: choose_cases(phantom_folder, REMOVE, 3), Edit(): choose_cases(phantom_folder, Edit(), 3)}
    judge = Classifier(Oracle(), LABELS)
    found = []
    for count in (1, 2):
        monkeypatch.setattr(evaluate.devices, "processes_for", lambda asked=0, count=count: count)
        found.append(evaluate_edits(tiny_pipeline(), phantom_folder, cases, EDITOR, judge=judge))
    one, two = found
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
    (large,) = evaluate_edits(tiny_pipeline(), phantom_folder, {REMOVE: cases}, EDITOR)
    assert len(large.table) == 3


def test_a_batch_changes_results_by_rounding_alone(evaluated):
    assert batch_difference(tiny_pipeline(), evaluated, EDITOR) < 1e-3
    other = replace(evaluated, edited=evaluated.edited.flip(0))
    assert batch_difference(tiny_pipeline(), other, EDITOR) > 1e-2


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
    assert evaluated.settings == (EditConfig(),), "one for all images"


def test_the_truth_itself_would_be_perfect(evaluated):
    perfect = Evaluation(**{**vars(evaluated), "edited": evaluated.truth, "mask": evaluated.truth_mask.float()})
    columns = evaluate._of_pixels(perfect, torch.ones_like(perfect.truth_mask))
    assert columns["true_error_ratio"] == [0.0] * 3
    assert columns["mask_recall"] == columns["mask_area_ratio"] == [1.0] * 3
    assert columns["marker_changed"] == [0] * 3


def test_the_truth_is_nearer_to_real_images_than_what_it_was_made_from(phantom_folder, evaluated):
    brightest = torch.nn.Sequential(torch.nn.AdaptiveMaxPool2d(1), torch.nn.Flatten(), torch.nn.Linear(1, 3))
    net = Classifier(brightest.eval(), LABELS)
    perfect, added = replace(evaluated, edited=evaluated.truth), Edit(add=("pacemaker",))
    found = evaluate.realism([perfect, replace(perfect, edit=added)], phantom_folder, net)
    row = found.loc["remove_support_devices"]
    assert row["kid"] < row["kid_unedited"] and row["fid"] < row["fid_unedited"]
    assert row["images"] == 3
    table = load_table(phantom_folder, "test")
    others = table[~table["patient_id"].isin(evaluated.table["patient_id"])]
    assert row["real_images"] == others["Support Devices"].eq(0).sum()
    pacemakers = others["devices"].fillna("").str.contains("pacemaker").sum()
    assert pacemakers > 1 and found["real_images"]["add_pacemaker"] == pacemakers
    assert evaluate.realism([perfect], phantom_folder, None).empty
    assert evaluate.realism([replace(perfect, edit=Edit())], phantom_folder, net).empty, "there is no target state"


def test_a_network_without_features_is_refused_where_it_is_named_and_warned_of_where_it_judges(
    phantom_folder, monkeypatch, caplog
):
    pooled = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    judge = Classifier(pooled.eval(), LABELS, name="no layer")
    monkeypatch.setattr(Classifier, "load", lambda name: judge)
    assert evaluate.load_features("", judge, phantom_folder) is None
    assert "KID and FID are not measured: no layer has no linear layer" in caplog.text
    with pytest.raises(ValueError, match="no layer has no linear layer"):
        evaluate.load_features("named", None, phantom_folder)
    linear = Classifier(torch.nn.Sequential(*pooled, torch.nn.Linear(3, 3)).eval(), LABELS)
    assert evaluate.load_features("", linear, phantom_folder) is linear
    assert evaluate.load_features("", None, phantom_folder) is None


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
    masks = true_counterfactual(phantom_folder, table, Edit(add=("Cardiomegaly",))).marker
    patients = sample_patients([int(i) for i in table["phantom_index"]], 0)
    assert torch.equal(masks, marker_mask(patients, 32))
    assert masks.flatten(1).any(1).all()


def test_no_judge_no_verdict(phantom_folder):
    assert load_judge("") is None
    nothing = judge_auc(None, phantom_folder)
    assert nothing.empty and trusted(None, nothing) is None
    with pytest.raises(FileNotFoundError, match="no classifier"):
        load_judge("nobody")


TRAINING = {"blocks": (1, 1), "growth": 4, "features": 8, "steps": 2, "batch_size": 4, "size": 16}


@pytest.fixture
def own(phantom_folder, tmp_path, monkeypatch):
    """Trains a judge of the phantoms; the rows that it learnt are left in a list, as are those of later calls."""
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path / "runs"))
    rows, real = [], evaluate.gray_bytes
    monkeypatch.setattr(evaluate, "gray_bytes", lambda folder, table: (rows.append(table), real(folder, table))[1])
    monkeypatch.setattr(evaluate, "named_network", lambda _, config: config)  # smaller than any with a name
    return lambda **training: (load_judge("train", phantom_folder, **TRAINING | training), rows)


def test_an_own_judge_learns_the_train_split_alone_and_is_kept_by_content(own, phantom_folder, monkeypatch):
    judge, rows = own()
    held = set(load_table(phantom_folder, "val")["patient_id"]) | set(load_table(phantom_folder, "test")["patient_id"])
    assert set(rows[0]["split"]) == {"train"} and not held & set(rows[0]["patient_id"])
    again, _ = own()
    images = read_images(phantom_folder, load_table(phantom_folder, "test"))
    assert len(rows) == 1 and torch.equal(again.read(images), judge.read(images)), "a second notebook reads it"
    own(seed=1)
    assert len(rows) == 2, "other settings"
    info = evaluate.load_info(phantom_folder) | {"content_hash": "other"}
    monkeypatch.setattr(evaluate, "load_info", lambda _: info)
    own()
    assert len(rows) == 3, "other data"


def test_an_own_judge_learns_labels_of_both_classes_in_rows_that_have_one(own, phantom_folder, monkeypatch):
    table = load_table(phantom_folder)
    train = table["split"] == "train"
    table.loc[train, "Cardiomegaly"] = 0.0
    table.loc[train, "Pleural Effusion"] = float("nan")
    table.loc[table.index[train][:3], "Support Devices"] = -1.0
    picked = lambda _, split: table[table["split"] == split].reset_index(drop=True)  # noqa: E731
    monkeypatch.setattr(evaluate, "load_table", picked)
    table["No Finding"] = 1.0
    judge, rows = own()
    assert judge.labels == ("Support Devices",)
    assert len(rows[0]) == train.sum() - 3
    for labels in ([], ["Lead"]):
        with pytest.raises(ValueError, match=r"a judge of .* needs labels of \[.*Support Devices.* with both classes"):
            own(labels=labels)
    with pytest.raises(ValueError, match="'Cardiomegaly' has one class only"):
        own(labels=["Cardiomegaly"])
    with pytest.raises(ValueError, match="batch_sise"):
        own(batch_sise=3)
    assert len(rows) == 2, "nothing was read for a wrong setting"


class Brightness(torch.nn.Module):
    """Logits of three labels: the first is right, the second is wrong, the third is always the same."""

    def __init__(self, images, truth):
        super().__init__()
        self.known = {image.numpy().tobytes(): float(value) for image, value in zip(images, truth, strict=True)}
        self.zero = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        read = torch.tensor([self.known[image.numpy().tobytes()] for image in images])
        return torch.stack([read, -read, torch.zeros_like(read)], 1) + self.zero


def test_labels_that_the_judge_reads_badly_are_not_judged(phantom_folder):
    table = load_table(phantom_folder, "test")
    images = read_images(phantom_folder, table)
    names = ("Support Devices", "Cardiomegaly", "Lead")
    judge = Classifier(Brightness(images, table["Support Devices"]), names)
    reading = judge_auc(judge, phantom_folder, "test", 0.8)
    assert reading.index.tolist() == list(names)
    assert reading["judged"].tolist() == [True, False, False]
    assert reading.loc["Support Devices", ["auc", "auc_low", "auc_high"]].tolist() == [1, 1, 1]
    wrong = reading.loc["Cardiomegaly"]
    assert wrong["auc_low"] <= wrong["auc"] <= wrong["auc_high"] and wrong["auc_low"] < wrong["auc_high"]
    assert wrong["auc"] < 0.8 and wrong["images"] == len(table)
    assert reading.loc["Lead", "images"] == 0 and reading.loc["Lead"].isna().sum() == 3, "not a label of the folder"
    assert list(reading.dropna().to_dict()["auc"]) == ["Support Devices", "Cardiomegaly"]
    kept = trusted(judge, reading)
    assert kept.labels == ("Support Devices",)
    assert torch.equal(kept.read(images), judge.read(images)[:, :1]) and judge.read(images).shape[1] == 3
    assert trusted(judge, reading.assign(judged=False)) is None
    others = trusted(judge, reading.assign(judged=[False, True, True]))
    assert torch.equal(others.read(images), judge.read(images)[:, 1:])


def test_an_edit_of_a_label_that_is_not_judged_has_no_verdict(evaluated):
    judge = Classifier(Oracle(), LABELS)
    sure = pd.DataFrame({"judged": [True, True, False]}, index=list(LABELS))
    assert set(evaluate._by_judge(evaluated, trusted(judge, sure))) == {"side_effect_rate"}
    assert "flipped" in evaluate._by_judge(evaluated, trusted(judge, sure.assign(judged=[False, False, True])))


@pytest.fixture(scope="module")
def three_cases(phantom_folder):
    return choose_cases(phantom_folder, REMOVE, 3)


def test_a_null_edit_changes_no_pixel_and_its_latent_path_costs_the_autoencoder(phantom_folder, three_cases):
    table = composition(tiny_pipeline(), phantom_folder, three_cases, EDITOR)
    assert table["image"].tolist() == [0.0] * 3
    assert table["raw"].tolist() == pytest.approx([1.0] * 3, abs=1e-4), "the autoencoder's own error"
    summary = summarise_rows(table)
    assert summary["raw"] == pytest.approx(1.0, abs=1e-4) and summary["images"] == 3


def test_an_edit_that_is_undone_comes_back(phantom_folder, three_cases):
    pipe = tiny_pipeline()
    (known,) = evaluate_edits(pipe, phantom_folder, {REMOVE: three_cases}, EDITOR)
    table = reversibility(pipe, known, EDITOR)
    back = [
        PromptPair(pair.target, pair.source, pair.target_words, pair.source_words)
        for pair in prompt_pairs(phantom_folder, three_cases, REMOVE)
    ]
    inversion = invert(pipe, known.edited, [pair.source for pair in back], num_inference_steps=2)
    returned = stack(edit(pipe, inversion, back, EditConfig()))
    expected = metrics.relative_l1(returned, read_images(phantom_folder, three_cases), known.reconstruction)
    assert table["image"].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
