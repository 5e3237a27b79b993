"""Metrics against values worked out by hand, and at their limits; bad input is named, never repaired."""

import math

import pytest
import torch

from prism_lib.evaluation import metrics

HALF = torch.full((2, 1, 16, 16), 0.5)
LEFT = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
LEFT[..., :4] = True  # a quarter of each image


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def shifted(by, where=None):
    """Half-grey images, ``by`` brighter inside ``where``."""
    return HALF + by * (torch.ones_like(HALF) if where is None else where)


def close(value, expected):
    torch.testing.assert_close(torch.as_tensor(value), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_identical_images_are_at_every_limit(images):
    everywhere = torch.ones(3, 1, 16, 16, dtype=torch.bool)
    close(metrics.l1(images, images), [0.0] * 3)
    close(metrics.masked_l1(images, images, everywhere), [0.0] * 3)
    close(metrics.ssim(images, images), [1.0] * 3)


def test_l1_by_hand():
    close(metrics.l1(HALF, shifted(0.1)), [0.1, 0.1])


def test_masked_l1_splits_the_image_by_area():
    edited = shifted(0.4, LEFT)
    close(metrics.masked_l1(edited, HALF, LEFT), [0.4, 0.4])
    close(metrics.masked_l1(edited, HALF, LEFT, outside=True), [0.0, 0.0])
    close(metrics.l1(edited, HALF), [0.1, 0.1])  # 0.4 on a quarter


def test_masked_l1_averages_channels(images):
    everywhere = torch.ones(3, 1, 16, 16, dtype=torch.bool)
    close(metrics.masked_l1(images, 1 - images, everywhere), metrics.l1(images, 1 - images).tolist())


def test_ssim_of_constant_images_is_the_luminance_term():
    a, b, c1 = 0.5, 0.8, 0.01**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    close(metrics.ssim(HALF, shifted(0.3)), [expected] * 2)


def test_true_error_ratio_at_truth_no_edit_and_half_way():
    truth = shifted(0.4, LEFT)
    close(metrics.true_error_ratio(truth, truth, HALF, LEFT), [0.0, 0.0])
    close(metrics.true_error_ratio(HALF, truth, HALF, LEFT), [1.0, 1.0])
    close(metrics.true_error_ratio(shifted(0.3, LEFT), truth, HALF, LEFT), [0.25, 0.25])
    with pytest.raises(ValueError, match=r"already equals the true counterfactual.*\[0, 1\]"):
        metrics.true_error_ratio(truth, HALF, HALF, LEFT)


def test_outside_l1_ratio_is_in_units_of_the_reconstruction():
    close(metrics.outside_l1_ratio(shifted(0.3), shifted(0.2), HALF, LEFT), [1.5, 1.5])
    close(metrics.outside_l1_ratio(shifted(0.3), HALF, HALF, LEFT), [0.3 * 1020] * 2)  # a lossless autoencoder


def test_changed_fraction_counts_single_bits_in_any_channel():
    original = torch.full((1, 3, 4, 4), 0.5)
    edited = original.clone()
    edited[0, 1, 0, 0] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    edited[0, 2, 3, 3] = 0.9
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 3, 3] = True
    close(metrics.changed_fraction_outside(edited, original, mask), [1 / 15])
    composite = torch.where(mask, edited, original)
    close(metrics.changed_fraction_outside(composite, original, mask), [0.0])
    close(metrics.changed_fraction_outside(edited, original, mask | ~mask), [0.0])  # no pixel lies outside


def test_mask_recall_and_area_by_hand():
    wide, narrow = LEFT.clone(), LEFT.clone()
    wide[..., :8] = True
    narrow[..., 1:] = False
    close(metrics.mask_recall(wide, LEFT), [1.0, 1.0])
    close(metrics.mask_area_ratio(wide, LEFT), [2.0, 2.0])
    close(metrics.mask_recall(narrow, LEFT), [0.25, 0.25])
    close(metrics.mask_recall(~LEFT, LEFT), [0.0, 0.0])


BEFORE = torch.tensor([0.9, 0.8, 0.6, 0.2])  # of a label to remove; the last already reads as absent
AFTER = torch.tensor([0.1, 0.7, 0.4, 0.1])


def test_counterfactual_prediction_gain_is_signed():
    close(metrics.counterfactual_prediction_gain(BEFORE, AFTER, target=0), [0.8, 0.1, 0.2, 0.1])
    close(metrics.counterfactual_prediction_gain(BEFORE, AFTER, target=1), [-0.8, -0.1, -0.2, -0.1])
    with pytest.raises(ValueError, match="target must be 0 or 1"):
        metrics.counterfactual_prediction_gain(BEFORE, AFTER, target=-1)


def test_side_effect_rate_counts_labels_that_cross():
    before = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    after = torch.tensor([[0.6, 0.4], [0.6, 0.7]])
    close(metrics.side_effect_rate(before, after), [0.0, 0.5])


def test_bootstrap_of_a_constant_is_a_point_and_seeded():
    assert metrics.bootstrap_ci(torch.full((5,), 0.3)) == pytest.approx((0.3, 0.3, 0.3))
    values = torch.rand(40, generator=torch.Generator().manual_seed(1))
    first = metrics.bootstrap_ci(values, seed=4)
    assert first == metrics.bootstrap_ci(values, seed=4) != metrics.bootstrap_ci(values, seed=5)
    assert first.low < first.estimate < first.high
    assert first.estimate == pytest.approx(values.mean().item(), rel=1e-6)


def test_bootstrap_matches_the_normal_interval_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval = metrics.bootstrap_ci(values)
    half = 1.96 * values.std().item() / 20
    assert interval.high - interval.estimate == pytest.approx(half, rel=0.1)
    assert interval.estimate - interval.low == pytest.approx(half, rel=0.1)


def test_bootstrap_draws_patients_not_images():
    values = torch.tensor([0.0, 0.0, 1.0, 1.0])
    patients = metrics.bootstrap_ci(values, ["a", "a", "b", "b"])
    assert (patients.low, patients.estimate, patients.high) == (0.0, 0.5, 1.0)
    repeated = metrics.bootstrap_ci(values.repeat_interleave(50), [index // 50 for index in range(200)])
    assert repeated == metrics.bootstrap_ci(values)


def test_bootstrap_keeps_columns_together():
    rows = torch.stack([torch.arange(1.0, 9.0), 2 * torch.arange(1.0, 9.0)], 1)
    interval = metrics.bootstrap_ci(rows, statistic=lambda drawn: drawn[:, 0].mean() / drawn[:, 1].mean())
    assert interval == pytest.approx((0.5, 0.5, 0.5))
    assert metrics.Interval(0.5, 0.4, 0.6).named("cpg") == {"cpg": 0.5, "cpg_low": 0.4, "cpg_high": 0.6}


def test_bootstrap_draws_runs_beside_patients():
    patients = torch.rand(30, 2, generator=torch.Generator().manual_seed(2))

    def first(drawn):
        return drawn[:, 0].mean()

    alone = metrics.bootstrap_ci(patients, statistic=first)
    assert metrics.bootstrap_ci(patients[..., None], statistic=first) == alone, "one run is no run"
    assert metrics.bootstrap_ci(patients[..., None].expand(-1, -1, 5), statistic=first) == pytest.approx(alone)
    # Every patient alike: what is left is the spread of the runs.
    runs = torch.randn(1, 1, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    interval = metrics.bootstrap_ci(runs.expand(30, 2, -1), statistic=first)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * runs.std().item() / 200**0.5, rel=0.1)


def test_relative_l1_is_in_units_of_the_autoencoder():
    close(metrics.relative_l1(HALF, HALF, shifted(0.2)), [0.0, 0.0])
    close(metrics.relative_l1(shifted(0.2), HALF, shifted(0.2)), [1.0, 1.0])
    close(metrics.relative_l1(shifted(0.3), HALF, shifted(0.2)), [1.5, 1.5])
    close(metrics.relative_l1(shifted(0.3), HALF, HALF), [0.3 * 1020] * 2)  # a lossless autoencoder


def test_directional_similarity_by_hand():
    x, y, z = torch.eye(3)
    before, after = torch.stack([x, x, x, x]), torch.stack([y, z, x, y])
    source, target = torch.stack([x, y, x, y]), torch.stack([y, x, y, x])
    expected = [1.0, -0.5, 0.0, -1.0]
    found = metrics.directional_similarity(before, after, source, target)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    scaled = metrics.directional_similarity(3 * before, after, source, 7 * target)
    torch.testing.assert_close(scaled, found, atol=1e-6, rtol=0)


LABELS = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
ATTRIBUTE = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
GROUPS = 2 * LABELS + ATTRIBUTE
READ = torch.tensor([0.1, 0.2, 0.9, 0.8, 0.1, 0.7, 0.6, 0.3])  # half right where the attribute is 1


def test_group_accuracy_by_hand():
    assert metrics.group_accuracy(READ, LABELS, GROUPS, range(4)) == {0: 1.0, 1: 0.5, 2: 1.0, 3: 0.5}
    assert min(metrics.group_accuracy(READ, LABELS, GROUPS).values()) == 0.5
    assert min(metrics.group_accuracy(LABELS.float(), LABELS, GROUPS).values()) == 1.0
    assert min(metrics.group_accuracy(1 - LABELS.float(), LABELS, GROUPS).values()) == 0.0


def test_a_constant_classifier_has_a_group_that_it_never_gets_right():
    assert min(metrics.group_accuracy(torch.full((8,), 0.9), LABELS, GROUPS).values()) == 0.0
    assert metrics.equalised_odds_difference(torch.full((8,), 0.9), LABELS, ATTRIBUTE) == 0.0


def test_equalised_odds_by_hand():
    assert metrics.equalised_odds_difference(READ, LABELS, ATTRIBUTE) == 0.5
    assert metrics.equalised_odds_difference(ATTRIBUTE.float(), LABELS, ATTRIBUTE) == 1.0
    assert metrics.equalised_odds_difference(LABELS.float(), LABELS, ATTRIBUTE) == 0.0


def test_calibration_error_by_hand():
    assert metrics.calibration_error(torch.full((4,), 0.75), torch.tensor([1, 1, 1, 0])) == pytest.approx(0)
    assert metrics.calibration_error(torch.full((4,), 0.95), torch.tensor([1, 1, 0, 0])) == pytest.approx(0.45)
    mixed = torch.tensor([0.95, 0.95, 0.05, 0.05])
    assert metrics.calibration_error(mixed, torch.tensor([1, 0, 0, 0])) == pytest.approx((0.45 + 0.05) / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.l1(HALF, HALF[:1]), "differ in shape"),
        (lambda: metrics.l1(HALF[0], HALF[0]), r"\(N, 1 or 3, H, W\)"),
        (lambda: metrics.l1(HALF[:0], HALF[:0]), r"\(N, 1 or 3, H, W\)"),
        (lambda: metrics.l1(HALF, HALF * 2.1), r"others must lie in \[0, 1\].*1\.05"),
        (lambda: metrics.l1(HALF * math.nan, HALF), r"images \[0, 1\] of the batch have NaN"),
        (lambda: metrics.l1((HALF * 255).byte(), HALF), "must be floating point.*uint8"),
        (lambda: metrics.masked_l1(HALF, HALF, LEFT.float()), "boolean"),
        (lambda: metrics.masked_l1(HALF, HALF, LEFT[..., :8]), "mask of shape"),
        (
            lambda: metrics.masked_l1(HALF, HALF, LEFT & ~LEFT),
            r"inside the mask is empty for images \[0, 1\]",
        ),
        (lambda: metrics.masked_l1(HALF, HALF, LEFT | ~LEFT, outside=True), "outside the mask is empty"),
        (lambda: metrics.mask_recall(LEFT, LEFT & ~LEFT), "inside the mask is empty"),
        (lambda: metrics.mask_area_ratio(LEFT, LEFT[:1]), "mask of shape"),
        (lambda: metrics.ssim(HALF[..., :8], HALF[..., :8]), "11 x 11"),
        (lambda: metrics.counterfactual_prediction_gain(BEFORE, AFTER * math.nan, 0), "after must be probabilities"),
        (lambda: metrics.counterfactual_prediction_gain(BEFORE + 1, AFTER, 0), "before must be probabilities"),
        (lambda: metrics.side_effect_rate(BEFORE, AFTER), r"\(N, L\)"),
        (lambda: metrics.side_effect_rate(BEFORE[None], AFTER[None, :2]), "differ in shape"),
        (lambda: metrics.bootstrap_ci(BEFORE, ["a"] * 4), "at least 2 patients"),
        (lambda: metrics.bootstrap_ci(BEFORE, ["a"]), "4 values but 1 patients"),
        (lambda: metrics.bootstrap_ci(BEFORE * math.inf), "finite"),
        (lambda: metrics.bootstrap_ci(BEFORE[:, None, None, None]), r"\(N, K, R\)"),
        (lambda: metrics.group_accuracy(READ, LABELS, GROUPS * 0, range(4)), r"no image in groups \[1, 2, 3\]"),
        (lambda: metrics.group_accuracy(READ * math.nan, LABELS, GROUPS), "without NaN"),
        (lambda: metrics.group_accuracy(READ, LABELS[:4], GROUPS), "labels of shape"),
        (lambda: metrics.group_accuracy(READ, LABELS - 1, GROUPS), r"labels must be 0 or 1, got \[-1\]"),
        (lambda: metrics.equalised_odds_difference(READ, LABELS, LABELS), r"no image in groups \[1, 2\]"),
        (lambda: metrics.calibration_error(READ, LABELS.float() / 2), "labels must be 0 or 1"),
        (lambda: metrics.kid(HALF[:1].flatten(1), HALF.flatten(1)), "two images or more"),
        (lambda: metrics.fid(BEFORE[:, None], BEFORE[:, None].expand(-1, 2)), r"\(N, D\) and \(M, D\)"),
        (lambda: metrics.directional_similarity(*[torch.full((1, 2), math.nan)] * 4), r"images \[0\] are not finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_kid_and_fid_are_those_of_torchmetrics():
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    generator = torch.Generator().manual_seed(0)
    features, others = torch.randn(60, 5, generator=generator), 0.3 + 1.5 * torch.randn(60, 5, generator=generator)
    x, y = features.double(), others.double()
    assert metrics.kid(features, others) == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)
    expected = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert metrics.fid(features, others) == pytest.approx(float(expected), rel=1e-6)
    assert metrics.fid(features, features) == pytest.approx(0, abs=1e-9)
    few = metrics.fid(features[:3], features[:3])
    assert few == pytest.approx(0, abs=1e-9), "fewer images than features"


def test_auc_is_the_share_of_pairs_in_order():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (60,), generator=generator).float()
    tied = (torch.rand(60, generator=generator) + 0.3 * labels).mul(5).round() / 7
    assert metrics.auc(torch.stack([tied, labels], 1)) == pytest.approx(roc_auc_score(labels, tied), abs=1e-12)
    unknown = torch.tensor([[0.9, -1.0], [0.1, math.nan], [0.2, 0.0], [0.8, 1.0]])
    assert metrics.auc(unknown) == 1
    for value in (0.0, 1.0):
        assert math.isnan(metrics.auc(torch.tensor([[0.3, value], [0.4, value]])))


def test_draws_without_the_statistic_are_left_out_of_the_interval():
    rows = torch.tensor([[0.9, 1.0], [0.2, 0.0], [0.4, 0.0]])  # a third of the draws has one class
    interval = metrics.bootstrap_ci(rows, statistic=metrics.auc)
    assert interval == pytest.approx((1, 1, 1))
