"""Metrics in a feature space against closed forms, and at their limits."""

import math

import pytest
import torch

from prism_lib.evaluation import realism


def gaussian(count, shift=0.0, scale=1.0, seed=0):
    return shift + scale * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_fid_of_equal_features_is_zero_and_of_shifted_ones_the_squared_distance():
    features = gaussian(200)
    assert realism.fid(features, features) == pytest.approx(0, abs=1e-3)
    assert realism.fid(features, features + 0.5) == pytest.approx(4 * 0.25, rel=1e-3)


def test_fid_of_scaled_features_is_the_difference_of_deviations():
    features = gaussian(200) - gaussian(200).mean(0)
    # tr(S + 4 S - 2 sqrt(4 S S)) = tr(S)
    assert realism.fid(features, 2 * features) == pytest.approx(float(features.double().var(0).sum()), rel=1e-3)


def test_kid_is_zero_in_the_mean_for_one_distribution_and_grows_with_distance():
    features = gaussian(400)
    same = realism.kid(features, gaussian(400, seed=1))
    near, far = (realism.kid(features, gaussian(400, shift, seed=1)) for shift in (0.5, 1.0))
    assert 5 * abs(same) < near < far
    assert near == realism.kid(features, gaussian(400, 0.5, seed=1)), "seeded"


def test_kid_of_constants_is_the_kernel_by_hand():
    ones, twos = torch.ones(60, 4), torch.full((60, 4), 2.0)
    # (1 + 1)^3 + (4 + 1)^3 - 2 (2 + 1)^3
    assert realism.kid(ones, twos) == pytest.approx(8 + 125 - 54, rel=1e-4)


def test_directional_similarity_by_hand():
    x, y, z = torch.eye(3)
    before, after = torch.stack([x, x, x, x]), torch.stack([y, z, x, y])
    source, target = torch.stack([x, y, x, y]), torch.stack([y, x, y, x])
    expected = [1.0, -0.5, 0.0, -1.0]
    found = realism.directional_similarity(before, after, source, target)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    scaled = realism.directional_similarity(3 * before, after, source, 7 * target)
    torch.testing.assert_close(scaled, found, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: realism.fid(torch.rand(1, 4), torch.rand(9, 4)), "at least 2 images"),
        (lambda: realism.kid(torch.rand(20, 4), torch.rand(90, 4)), "at least 50 images"),
        (lambda: realism.fid(torch.full((3, 4), math.nan), torch.rand(9, 4)), r"images \[0, 1, 2\] are not finite"),
        (lambda: realism.directional_similarity(*[torch.rand(2, n) for n in (3, 3, 3, 4)]), "differ in shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
