"""Metrics of groups against values worked out by hand, and at their limits."""

import math

import pytest
import torch

from prism_lib.evaluation import robustness

LABELS = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
ATTRIBUTE = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
GROUPS = 2 * LABELS + ATTRIBUTE
READ = torch.tensor([0.1, 0.2, 0.9, 0.8, 0.1, 0.7, 0.6, 0.3])  # half right where the attribute is 1


def test_group_accuracy_by_hand():
    assert robustness.group_accuracy(READ, LABELS, GROUPS, range(4)) == {0: 1.0, 1: 0.5, 2: 1.0, 3: 0.5}
    assert robustness.worst_group_accuracy(READ, LABELS, GROUPS) == 0.5
    assert robustness.worst_group_accuracy(LABELS.float(), LABELS, GROUPS) == 1.0
    assert robustness.worst_group_accuracy(1 - LABELS.float(), LABELS, GROUPS) == 0.0


def test_a_constant_classifier_has_a_group_that_it_never_gets_right():
    assert robustness.worst_group_accuracy(torch.full((8,), 0.9), LABELS, GROUPS) == 0.0
    assert robustness.equalised_odds_difference(torch.full((8,), 0.9), LABELS, ATTRIBUTE) == 0.0


def test_equalised_odds_by_hand():
    assert robustness.equalised_odds_difference(READ, LABELS, ATTRIBUTE) == 0.5
    assert robustness.equalised_odds_difference(ATTRIBUTE.float(), LABELS, ATTRIBUTE) == 1.0
    assert robustness.equalised_odds_difference(LABELS.float(), LABELS, ATTRIBUTE) == 0.0


def test_calibration_error_by_hand():
    assert robustness.calibration_error(torch.full((4,), 0.75), torch.tensor([1, 1, 1, 0])) == pytest.approx(0)
    assert robustness.calibration_error(torch.full((4,), 0.95), torch.tensor([1, 1, 0, 0])) == pytest.approx(0.45)
    mixed = torch.tensor([0.95, 0.95, 0.05, 0.05])
    assert robustness.calibration_error(mixed, torch.tensor([1, 0, 0, 0])) == pytest.approx((0.45 + 0.05) / 2)


def test_agreement_counts_readings():
    read = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    assert robustness.agreement(read, read) == 1.0
    assert robustness.agreement(read, 1 - read) == 0.0
    assert robustness.agreement(read, torch.tensor([[0.9, 0.1], [0.6, 0.6]])) == 0.75


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robustness.group_accuracy(READ, LABELS, GROUPS * 0, range(4)), r"no image in groups \[1, 2, 3\]"),
        (lambda: robustness.group_accuracy(READ * math.nan, LABELS, GROUPS), "without NaN"),
        (lambda: robustness.group_accuracy(READ, LABELS[:4], GROUPS), "labels of shape"),
        (lambda: robustness.group_accuracy(READ, LABELS - 1, GROUPS), r"labels must be 0 or 1, got \[-1\]"),
        (lambda: robustness.equalised_odds_difference(READ, LABELS, LABELS), "no image has label 0 and attribute 1"),
        (lambda: robustness.calibration_error(READ, LABELS.float() / 2), "labels must be 0 or 1"),
        (lambda: robustness.agreement(READ[None], READ[None, :2]), "differ in shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
