"""The training sets D_k, the balanced test set, and what is added to fill the missing combinations."""

import pandas as pd
import pytest
import torch

from prism_lib.data.folder import load_table
from prism_lib.models.classifier import ClassifierConfig
from prism_lib.phantom.patients import render, sample_patients
from prism_lib.studies.shortcut import (
    StudyConfig,
    added_images,
    additions,
    balanced_rows,
    groups,
    load_images,
    training_rows,
)

TARGET, SHORTCUT = "Support Devices", "Pleural Effusion"
CLASSIFIER = ClassifierConfig(labels=(TARGET, SHORTCUT), blocks=(2, 2), growth=4, features=8, batch_size=4, steps=2)
CONFIG = StudyConfig(TARGET, SHORTCUT, images=8, added=4, size=32, classifier=CLASSIFIER)


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


def test_too_few_images_of_a_group_are_named():
    short = table()[groups(table(), TARGET, SHORTCUT) != 2]
    training_rows(short, CONFIG, 1.0)
    with pytest.raises(ValueError, match=r"0 images of group 'target_only' .* strength 0.5 need 2"):
        training_rows(short, CONFIG, 0.5)


def test_additions_part_what_goes_together():
    rows = training_rows(table(), CONFIG, 1.0)
    asked = additions(rows, CONFIG)
    assert [edit.key for _, edit in asked] == [
        "remove_pleural_effusion", "remove_support_devices", "add_pleural_effusion", "add_support_devices",
    ]  # fmt: skip
    assert [len(chosen) for chosen, _ in asked] == [1] * 4
    with pytest.raises(ValueError, match="need 10 training images of group 'both', there are 4"):
        additions(rows, StudyConfig(TARGET, SHORTCUT, images=8, added=40, classifier=CLASSIFIER))


def test_added_images_have_the_edits_labels_and_the_missing_groups(phantom_folder):
    rows = training_rows(load_table(phantom_folder, "train"), CONFIG, 1.0)

    def shade(chosen, edit):
        return torch.full((len(chosen), 1, 64, 64), 0.25 if edit.remove else 0.75)

    added = added_images(rows, shade, CONFIG)
    assert added.images.shape == (4, 1, 32, 32)
    assert added.images.mean((1, 2, 3)).tolist() == pytest.approx([0.25, 0.25, 0.75, 0.75])
    assert added.groups.tolist() == [2, 1, 1, 2], "target only, shortcut only, shortcut only, target only"
    assert added.labels.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    whole = load_images(phantom_folder, rows, CONFIG) + added
    assert len(whole.images) == len(whole.labels) == len(whole.groups) == 12


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
        ({"images": 7}, "images must be even"),
        ({"added": 6}, "multiple of 4"),
        ({"classifier": ClassifierConfig(labels=(TARGET, SHORTCUT))}, "optimizer steps"),
    ],
)
def test_a_study_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StudyConfig(**{"target": TARGET, "shortcut": SHORTCUT, "classifier": CLASSIFIER} | values)
