"""Training sets D_k, the balanced test set, what is added, and a study that resumes, with numbers worked out alone."""

from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch

from prism_lib import records
from prism_lib.data.folder import load_table
from prism_lib.models.classifier import ClassifierConfig
from prism_lib.phantom.patients import render, sample_patients
from prism_lib.studies import augmentation, shortcut
from prism_lib.studies.shortcut import (
    Readings,
    ShortcutConfig,
    added_images,
    additions,
    balanced_rows,
    groups,
    load_images,
    training_rows,
)

TARGET, SHORTCUT = "Support Devices", "Pleural Effusion"
CLASSIFIER = ClassifierConfig(labels=(TARGET, SHORTCUT), blocks=(2, 2), growth=4, features=8, batch_size=4, steps=2)
CONFIG = ShortcutConfig(TARGET, SHORTCUT, images=8, added=4, size=32, classifier=CLASSIFIER)


def table(per_group=20):
    rows = [(target, shortcut) for target in (0, 1) for shortcut in (0, 1) for _ in range(per_group)]
    columns = pd.DataFrame(rows, columns=[TARGET, SHORTCUT]).astype(float)
    return columns.assign(file_name=[f"{n}.png" for n in range(len(rows))])


def test_groups_count_in_twos_and_unknown_is_none():
    values = pd.DataFrame({TARGET: [0, 0, 1, 1, -1, 1], SHORTCUT: [0, 1, 0, 1, 1, float("nan")]})
    assert groups(values, TARGET, SHORTCUT).tolist() == [0, 1, 2, 3, -1, -1]
    with pytest.raises(ValueError, match="no label 'Fracture'"):
        groups(values, TARGET, "Fracture")


@pytest.mark.parametrize(("strength", "counts"), [(1.0, [4, 0, 0, 4]), (0.75, [3, 1, 1, 3]), (0.5, [2, 2, 2, 2])])
def test_strength_is_the_share_in_which_both_go_together(strength, counts):
    rows = training_rows(table(), CONFIG, strength)
    member = groups(rows, TARGET, SHORTCUT)
    assert [int((member == group).sum()) for group in range(4)] == counts
    assert rows[TARGET].mean() == rows[SHORTCUT].mean() == 0.5, "neither is more common at another strength"


def test_a_weaker_shortcut_keeps_the_rows_it_can():
    names = [set(training_rows(table(), CONFIG, strength)["file_name"]) for strength in (1.0, 0.75)]
    assert len(names[0] & names[1]) == 6


def test_a_film_and_its_twin_with_devices_are_never_both_drawn():
    one = table(8)[lambda rows: rows[SHORTCUT] == 0]
    twins = one.assign(**{SHORTCUT: 1.0}, file_name="d" + one["file_name"], twin=one["file_name"], rendered=True)
    pairs = pd.concat([one.assign(twin="none", rendered=False), twins])
    for strength in (1.0, 0.75, 0.5):
        rows = training_rows(pairs, CONFIG, strength)
        assert rows["file_name"].str.removeprefix("d").is_unique and len(rows) == 8
    with pytest.raises(
        ValueError, match=r"20 images at strength 0\.5 need 5 .* of group 'shortcut_only' .* there are 3"
    ):
        training_rows(pairs, replace(CONFIG, images=20), 0.5)


def test_a_label_may_be_a_value_of_a_column():
    women = "sex=F"
    rows = pd.DataFrame({"sex": ["F", "M", "F", "M", "unknown", "F"], SHORTCUT: [0, 1, 1, 0, 0, -1]})
    rows = rows.assign(file_name=list("abcdef"))
    study = replace(CONFIG, target=women, images=4, classifier=replace(CLASSIFIER, labels=(women, SHORTCUT)))
    with pytest.raises(ValueError, match=r"need 2 .* of group 'neither' .* there are 1"):
        training_rows(rows, study, 1.0)
    drawn = training_rows(pd.concat([rows, rows.assign(file_name=list("ghijkl"))]), study, 1.0)
    for absent in ("age=60", "Fracture"):
        other = replace(study, classifier=replace(CLASSIFIER, labels=(women, SHORTCUT, absent)))
        with pytest.raises(ValueError, match=f"the data set has no label '{absent}'; it has sex"):
            training_rows(rows, other, 1.0)
    assert sorted(drawn["file_name"]) == list("cdij") and drawn[women].tolist() == [0, 0, 1, 1]


def test_too_few_images_of_a_group_are_named():
    short = table()[groups(table(), TARGET, SHORTCUT) != 2]
    training_rows(short, CONFIG, 1.0)
    with pytest.raises(ValueError, match=r"strength 0.5 need 2 .* of group 'target_only' .* there are 0"):
        training_rows(short, CONFIG, 0.5)


def test_additions_part_what_goes_together():
    rows = training_rows(table(), CONFIG, 1.0)
    asked = additions(rows, CONFIG)
    assert [edit.key for _, edit in asked] == [
        "remove_pleural_effusion", "remove_support_devices", "add_pleural_effusion", "add_support_devices",
    ]  # fmt: skip
    assert [len(chosen) for chosen, _ in asked] == [1] * 4
    asked = additions(rows, replace(CONFIG, edit_target=False))
    assert [(edit.key, len(chosen)) for chosen, edit in asked] == [
        ("remove_pleural_effusion", 2), ("add_pleural_effusion", 2),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"40 added images need 10 .* of group 'both' .* there are 4"):
        additions(rows, ShortcutConfig(TARGET, SHORTCUT, images=8, added=40, classifier=CLASSIFIER))


def test_added_images_have_the_edits_labels_and_the_missing_groups(phantom_folder):
    rows = training_rows(load_table(phantom_folder, "train"), CONFIG, 1.0)

    def shade(chosen, edit):
        return torch.full((len(chosen), 1, 64, 64), 0.25 if edit.remove else 0.75)

    added = added_images(rows, shade, CONFIG)
    assert added.images.shape == (4, 1, 32, 32)
    assert added.images.mean((1, 2, 3)).tolist() == pytest.approx([0.25, 0.25, 0.75, 0.75])
    assert added.groups.tolist() == [2, 1, 1, 2], "target only, shortcut only, shortcut only, target only"
    assert added.labels.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    own = load_images(phantom_folder, rows, CONFIG)
    assert len(own.images) == len(own.labels) == len(own.groups) == 8


def test_images_are_those_of_the_rows(phantom_folder):
    rows = load_table(phantom_folder, "train").head(3)
    patients = sample_patients([int(i) for i in rows["phantom_index"]], 0)
    data = load_images(phantom_folder, rows, CONFIG)
    torch.testing.assert_close(data.images, render(patients, 32), atol=1e-6, rtol=0)
    assert data.labels[:, 0].tolist() == rows[TARGET].tolist()


def test_the_test_set_is_balanced_and_held_out(phantom_folder):
    rows = balanced_rows(phantom_folder, CONFIG)
    counts = groups(rows, TARGET, SHORTCUT).value_counts()
    assert counts.nunique() == 1 and sorted(counts.index) == [0, 1, 2, 3]
    assert set(rows["split"]) <= {"val", "test"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shortcut": TARGET}, "target and shortcut are both"),
        ({"target": "Fracture"}, "no label 'Fracture'"),
        ({"strengths": (1.5,)}, "strengths"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"images": 7}, r"images is 7: .*multiple of 2"),
        ({"added": 6}, r"added is 6: .*multiple of 4"),
        ({"classifier": ClassifierConfig(labels=(TARGET, SHORTCUT))}, "optimizer steps"),
    ],
)
def test_a_study_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ShortcutConfig(**{"target": TARGET, "shortcut": SHORTCUT, "classifier": CLASSIFIER} | values)


SMALL = ShortcutConfig(
    TARGET, SHORTCUT, strengths=(1.0, 0.5), images=8, added=4, size=32, seeds=(0, 1), classifier=CLASSIFIER
)


def never(rows, edit):
    raise AssertionError("nothing had to be made")


def test_a_study_trains_each_classifier_once(phantom_folder, tmp_path):
    sources = {"true": partial(augmentation.truth, phantom_folder)}
    readings = shortcut.run(phantom_folder, SMALL, sources, tmp_path)
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
    again = shortcut.run(phantom_folder, SMALL, {"true": partial(augmentation.truth, phantom_folder)}, tmp_path)
    assert all(torch.equal(again.probabilities[key], value) for key, value in readings.probabilities.items())
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert {path for path in files if files[path] != kept[path]} == {gone}, "only what was missing is trained"
    assert shortcut.run(phantom_folder, SMALL, {"true": never}, tmp_path).table.equals(readings.table)
    metrics = shortcut.summarise(readings, SMALL)
    assert {"strength_100", "strength_50"} <= set(metrics)
    records.record(
        "classifiers", "phantom", "06_classifiers", {"study": SMALL}, 0, metrics, tmp_path, model="m", seconds=1
    )


def test_too_few_images_stop_before_anything_is_trained(phantom_folder, tmp_path):
    much = ShortcutConfig(TARGET, SHORTCUT, images=400, classifier=CLASSIFIER)
    with pytest.raises(ValueError, match="400 images at strength 1 need 200"):
        shortcut.run(phantom_folder, much, {}, tmp_path)
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


ONE = ShortcutConfig(TARGET, SHORTCUT, strengths=(1.0,), images=8, added=4, classifier=CLASSIFIER)


def test_the_summary_by_hand():
    shares = {"as_is": [1.0, 0.1, 0.2, 1.0], "prism": [1.0, 0.7, 0.8, 1.0], "true": [1.0, 0.9, 0.9, 1.0]}
    summary = shortcut.summarise(readings_of(**shares), ONE)
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
    steady = shortcut.summarise(readings_of(**shares), ONE)
    assert steady["worst_group_gain_low"] == steady["worst_group_gain"] == 1
    readings = readings_of(**shares)
    failed = readings.probabilities[1.0, "as_is", CONFIG.seeds[0]]
    uneven = readings._replace(probabilities={**readings.probabilities, (1.0, "prism", CONFIG.seeds[0]): failed})
    summary = shortcut.summarise(uneven, ONE)
    assert summary["worst_group_gain"] == pytest.approx(0.8), "one training of five did not learn"
    assert summary["worst_group_gain_low"] == pytest.approx(0.4), "in one draw of twenty it comes three times or more"


def test_no_gap_is_no_share_of_a_gap():
    shares = {"as_is": [1.0, 0.9, 0.9, 1.0], "prism": [1.0, 0.9, 0.9, 1.0], "true": [1.0, 0.9, 0.9, 1.0]}
    summary = shortcut.summarise(readings_of(**shares), ONE)
    assert summary["worst_group_gain"] == 0
    assert "gap_closed" not in summary
    without_truth = shortcut.summarise(readings_of(as_is=[1, 0.1, 0.1, 1], prism=[1, 0.5, 0.5, 1]), ONE)
    assert without_truth["worst_group_gain"] == pytest.approx(0.4) and "gap_closed" not in without_truth


def test_classifiers_side_by_side_are_those_of_one_process(phantom_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shortcut, "OBJECTIVES", {"as_is": "erm"})
    few = replace(SMALL, strengths=(1.0,), seeds=(0, 1))
    made = []

    class Kept:
        settings = "true"

        def __call__(self, rows, edit):
            made.append(edit.key)
            return augmentation.truth(phantom_folder, rows, edit)

    alone, together = (
        shortcut.run(phantom_folder, few, {"true": Kept()}, tmp_path / str(n), processes=n) for n in (1, 2)
    )
    assert made == made[:4] * 4, "images are made before anything is trained, and then only read"
    for key, value in alone.probabilities.items():
        assert torch.equal(together.probabilities[key], value)
