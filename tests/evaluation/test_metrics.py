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
    close(metrics.changed_fraction(images, images, everywhere), [0.0] * 3)
    close(metrics.ssim(images, images), [1.0] * 3)
    assert metrics.psnr(images, images).tolist() == [math.inf] * 3


def test_l1_and_psnr_by_hand():
    close(metrics.l1(HALF, shifted(0.1)), [0.1, 0.1])
    close(metrics.psnr(HALF, shifted(0.1)), [20.0, 20.0])  # -10 log10 0.01
    close(metrics.psnr(HALF, shifted(0.01)), [40.0, 40.0])


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


def test_changed_fraction_counts_single_bits_in_any_channel():
    original = torch.full((1, 3, 4, 4), 0.5)
    edited = original.clone()
    edited[0, 1, 0, 0] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    edited[0, 2, 3, 3] = 0.9
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[0, 0, 3, 3] = True
    close(metrics.changed_fraction(edited, original, torch.ones_like(mask)), [2 / 16])
    close(metrics.changed_fraction_outside(edited, original, mask), [1 / 15])
    composite = torch.where(mask, edited, original)
    close(metrics.changed_fraction_outside(composite, original, mask), [0.0])


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


def test_flip_rate_leaves_out_what_cannot_flip():
    assert metrics.flip_rate(BEFORE, AFTER, target=0) == pytest.approx(2 / 3)
    assert metrics.flip_rate(1 - BEFORE, 1 - AFTER, target=1) == pytest.approx(2 / 3)
    assert metrics.flip_rate(BEFORE, BEFORE, target=0) == 0
    with pytest.raises(ValueError, match="no image can flip"):
        metrics.flip_rate(BEFORE[3:], AFTER[3:], target=0)


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


def test_ms_ssim_of_constant_images_is_the_luminance_term():
    """Contrast and structure are 1 at every scale; the luminance of the last has the exponent 0.1333."""
    a, b, c1 = torch.full((2, 1, 176, 176), 0.5), torch.full((2, 1, 176, 176), 0.8), 0.01**2
    luminance = (2 * 0.5 * 0.8 + c1) / (0.5**2 + 0.8**2 + c1)
    torch.testing.assert_close(metrics.ms_ssim(a, b), torch.full((2,), luminance**0.1333), atol=1e-3, rtol=0)
    torch.testing.assert_close(metrics.ms_ssim(a, a), torch.ones(2), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="161 x 161"):
        metrics.ms_ssim(HALF, HALF)


def test_relative_l1_is_in_units_of_the_autoencoder():
    close(metrics.relative_l1(HALF, HALF, shifted(0.2)), [0.0, 0.0])
    close(metrics.relative_l1(shifted(0.2), HALF, shifted(0.2)), [1.0, 1.0])
    close(metrics.relative_l1(shifted(0.3), HALF, shifted(0.2)), [1.5, 1.5])
    with pytest.raises(ValueError, match="the autoencoder has no error"):
        metrics.relative_l1(HALF, HALF, HALF)


def test_minimality_is_one_for_the_truth_wherever_the_change_is():
    truth = shifted(0.4, LEFT)
    close(metrics.minimality(truth, truth, HALF), [1.0, 1.0])
    close(metrics.minimality(HALF, truth, HALF), [0.0, 0.0])
    close(metrics.minimality(shifted(0.4), truth, HALF), [4.0, 4.0])
    close(metrics.minimality(shifted(0.4, LEFT.flip(-1)), truth, HALF), [1.0, 1.0])


def test_localisation_is_the_share_of_change_inside():
    close(metrics.localisation(shifted(0.4, LEFT), HALF, LEFT), [1.0, 1.0])
    close(metrics.localisation(shifted(0.4), HALF, LEFT), [0.25, 0.25])
    close(metrics.localisation(shifted(0.4, ~LEFT), HALF, LEFT), [0.0, 0.0])
    with pytest.raises(ValueError, match="the edit changed nothing"):
        metrics.localisation(HALF, HALF, LEFT)


def test_mask_iou_by_hand():
    half = LEFT.clone()
    half[..., :8] = True  # twice as wide
    close(metrics.mask_iou(LEFT, LEFT), [1.0, 1.0])
    close(metrics.mask_iou(half, LEFT), [0.5, 0.5])
    close(metrics.mask_iou(~LEFT, LEFT), [0.0, 0.0])


def test_effectiveness_counts_every_label_and_skips_what_is_unknown():
    after = torch.tensor([[0.9, 0.2], [0.1, 0.7], [0.8, 0.6]])
    intended = torch.tensor([[1, 0], [1, 1], [1, math.nan]])
    close(metrics.effectiveness(after, intended), [2 / 3, 1.0])
    with pytest.raises(ValueError, match=r"no image has a known value of labels \[1\]"):
        metrics.effectiveness(after, torch.tensor([[1, math.nan]] * 3))


def test_cout_by_hand_and_at_its_limits():
    original, edited = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.8, 0.4], [0.0, 0.0]]]])
    assert metrics.cout(original, edited, lambda x: torch.ones(len(x))).item() == 1
    assert metrics.cout(original, edited, lambda x: torch.zeros(len(x))).item() == -1
    # The larger change goes first: p = 0, 1, 1 over two shares has the area 3/4.
    follows = metrics.cout(original, edited, lambda x: (x.amax((1, 2, 3)) > 0.5).float(), steps=2)
    close(follows, [0.5])
    late = metrics.cout(original, edited, lambda x: (x[:, 0, 0, 1] > 0.3).float(), steps=2)
    close(late, [-0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.effectiveness(BEFORE[None], BEFORE[None, :2]), "intended labels"),
        (lambda: metrics.cout(HALF, HALF, lambda x: x.mean((1, 2, 3)) * math.nan), "score must be probabilities"),
        (lambda: metrics.mask_iou(LEFT, LEFT & ~LEFT), "true mask is empty"),
        (lambda: metrics.l1(HALF, HALF[:1]), "differ in shape"),
        (lambda: metrics.l1(HALF[0], HALF[0]), r"\(N, C, H, W\)"),
        (lambda: metrics.l1(HALF[:0], HALF[:0]), r"\(N, C, H, W\)"),
        (lambda: metrics.l1(HALF, HALF * 2.1), r"others must lie in \[0, 1\].*1\.05"),
        (lambda: metrics.l1(HALF * math.nan, HALF), "images must lie in"),
        (lambda: metrics.l1((HALF * 255).byte(), HALF), "must be floats.*uint8"),
        (lambda: metrics.masked_l1(HALF, HALF, LEFT.float()), "boolean"),
        (lambda: metrics.masked_l1(HALF, HALF, LEFT[..., :8]), "mask of shape"),
        (
            lambda: metrics.masked_l1(HALF, HALF, LEFT & ~LEFT),
            r"inside the mask is empty for images \[0, 1\]",
        ),
        (lambda: metrics.masked_l1(HALF, HALF, LEFT | ~LEFT, outside=True), "outside the mask is empty"),
        (lambda: metrics.mask_recall(LEFT, LEFT & ~LEFT), "true mask is empty"),
        (lambda: metrics.mask_area_ratio(LEFT, LEFT[:1]), "masks differ in shape"),
        (lambda: metrics.ssim(HALF[..., :8], HALF[..., :8]), "11 x 11"),
        (lambda: metrics.flip_rate(BEFORE, AFTER * math.nan, 0), "after must be probabilities"),
        (lambda: metrics.flip_rate(BEFORE + 1, AFTER, 0), "before must be probabilities"),
        (lambda: metrics.side_effect_rate(BEFORE, AFTER), r"\(N, L\)"),
        (lambda: metrics.side_effect_rate(BEFORE[None], AFTER[None, :2]), "differ in shape"),
        (lambda: metrics.bootstrap_ci(BEFORE, ["a"] * 4), "at least 2 patients"),
        (lambda: metrics.bootstrap_ci(BEFORE, ["a"]), "4 values but 1 patients"),
        (lambda: metrics.bootstrap_ci(BEFORE * math.inf), "finite"),
        (lambda: metrics.bootstrap_ci(BEFORE[:, None, None, None]), r"\(N, K, R\)"),
        (lambda: metrics.bootstrap_ci(BEFORE, level=95), "level"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
