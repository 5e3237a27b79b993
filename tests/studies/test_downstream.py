"""The study resumes, and its summary is what one works out by hand."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from prism_lib import records
from prism_lib.studies import augmentation, downstream, shortcut
from prism_lib.studies.downstream import Readings
from tests.studies.test_shortcut import CLASSIFIER, CONFIG, SHORTCUT, TARGET

SMALL = shortcut.StudyConfig(
    TARGET, SHORTCUT, strengths=(1.0, 0.5), images=8, added=4, size=32, seeds=(0, 1), classifier=CLASSIFIER
)


def never(rows, edit):
    raise AssertionError("nothing had to be made")


def test_a_study_trains_each_classifier_once(phantom_folder, tmp_path):
    sources = {"true": augmentation.truth(phantom_folder)}
    readings = downstream.run(phantom_folder, SMALL, sources, tmp_path)
    assert set(readings.probabilities) == {
        (strength, name, seed)
        for strength in (1.0, 0.5)
        for name in ("as_is", "reweighted", "group_dro", "true")
        for seed in (0, 1)
    }
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 16
    gone = next(iter(files))
    gone.unlink()
    again = downstream.run(phantom_folder, SMALL, {"true": augmentation.truth(phantom_folder)}, tmp_path)
    assert all(torch.equal(again.probabilities[key], value) for key, value in readings.probabilities.items())
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path for path in files if files[path] != kept[path]} == {gone}, "only what was missing is trained"
    assert downstream.run(phantom_folder, SMALL, {"true": never}, tmp_path).table.equals(readings.table)
    metrics = downstream.summarise(readings, SMALL)
    assert {"strength_100", "strength_50"} <= set(metrics)
    records.record(
        "classifiers", "phantom", "06_classifiers", {"study": SMALL}, 0, metrics, tmp_path, model="m", seconds=1
    )


def test_too_few_images_stop_before_anything_is_trained(phantom_folder, tmp_path):
    much = shortcut.StudyConfig(TARGET, SHORTCUT, images=400, classifier=CLASSIFIER)
    with pytest.raises(ValueError, match="400 images at strength 1 need 200"):
        downstream.run(phantom_folder, much, {}, tmp_path)
    assert not list(tmp_path.iterdir())


def readings_of(**right):
    """Forty images, ten a group; a set's classifiers are right on the given share of each group."""
    groups = torch.arange(4).repeat_interleave(10)
    labels = torch.stack([groups // 2, groups % 2], 1).double()
    rank = torch.arange(40) % 10
    read = {}
    for name, shares in right.items():
        correct = rank < torch.tensor(shares)[groups] * 10
        target = torch.where(correct, labels[:, 0], 1 - labels[:, 0]) * 0.8 + 0.1
        for seed in CONFIG.seeds:
            read[1.0, name, seed] = torch.stack([target, labels[:, 1] * 0.8 + 0.1], 1)
    return Readings(pd.DataFrame({"patient_id": range(40)}), labels, groups, read)


ONE = shortcut.StudyConfig(TARGET, SHORTCUT, strengths=(1.0,), images=8, added=4, classifier=CLASSIFIER)


def test_the_summary_by_hand():
    shares = {"as_is": [1.0, 0.1, 0.2, 1.0], "prism": [1.0, 0.7, 0.8, 1.0], "true": [1.0, 0.9, 0.9, 1.0]}
    summary = downstream.summarise(readings_of(**shares), ONE)
    as_is = summary["strength_100"]["as_is"]
    assert as_is["worst_group_accuracy"] == pytest.approx(0.1)
    assert as_is["worst_group_accuracy_by_seed"] == pytest.approx([0.1] * 5)
    assert as_is["accuracy"] == pytest.approx(2.3 / 4)
    # of those with the target: all with the shortcut, 0.2 without; of those without it: 0.9 and none
    assert as_is["equalised_odds_difference"] == pytest.approx(0.9)
    assert as_is["group_accuracy"] == pytest.approx({"neither": 1, "shortcut_only": 0.1, "target_only": 0.2, "both": 1})
    assert as_is["auc"][SHORTCUT] == 1.0
    assert summary["worst_group_gain"] == pytest.approx(0.6)
    assert summary["worst_group_gain_low"] > 0.2
    assert summary["gap_closed"] == pytest.approx(0.6 / 0.8)


def test_intervals_hold_what_another_training_would_change():
    shares = {"as_is": [1.0, 0.0, 0.0, 1.0], "prism": [1.0, 1.0, 1.0, 1.0]}
    steady = downstream.summarise(readings_of(**shares), ONE)
    assert steady["worst_group_gain_low"] == steady["worst_group_gain"] == 1
    readings = readings_of(**shares)
    failed = readings.probabilities[1.0, "as_is", CONFIG.seeds[0]]
    uneven = replace(readings, probabilities={**readings.probabilities, (1.0, "prism", CONFIG.seeds[0]): failed})
    summary = downstream.summarise(uneven, ONE)
    assert summary["worst_group_gain"] == pytest.approx(0.8), "one training of five did not learn"
    assert summary["worst_group_gain_low"] == pytest.approx(0.4), "in one draw of twenty it comes three times or more"


def test_no_gap_is_no_share_of_a_gap():
    shares = {"as_is": [1.0, 0.9, 0.9, 1.0], "prism": [1.0, 0.9, 0.9, 1.0], "true": [1.0, 0.9, 0.9, 1.0]}
    summary = downstream.summarise(readings_of(**shares), ONE)
    assert summary["worst_group_gain"] == 0
    assert "gap_closed" not in summary
    without_truth = downstream.summarise(readings_of(as_is=[1, 0.1, 0.1, 1], prism=[1, 0.5, 0.5, 1]), ONE)
    assert without_truth["worst_group_gain"] == pytest.approx(0.4) and "gap_closed" not in without_truth


def test_classifiers_side_by_side_are_those_of_one_process(phantom_folder, tmp_path):
    few = replace(SMALL, strengths=(1.0,), seeds=(0, 1))
    made = []

    class Kept:
        settings = "true"

        def __call__(self, rows, edit):
            made.append(edit.key)
            return augmentation.truth(phantom_folder)(rows, edit)

    alone, together = (
        downstream.run(phantom_folder, few, {"true": Kept()}, tmp_path / str(n), ("as_is",), processes=n)
        for n in (1, 2)
    )
    assert made == made[:4] * 3, "with two processes the images are made before anything is trained"
    for key, value in alone.probabilities.items():
        torch.testing.assert_close(together.probabilities[key], value, atol=1e-4, rtol=0)
