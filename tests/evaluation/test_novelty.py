"""The distance from which an image is unlike those that a model was trained on."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks import unusual_inputs
from prism_lib.evaluation import novelty
from prism_lib.phantom import patients


@pytest.fixture(scope="module")
def known():
    return patients.render(patients.sample_patients(60, 1), 64)


@pytest.fixture(scope="module")
def held_out():
    return patients.render(patients.sample_patients(60, 2), 64)


@pytest.fixture(scope="module")
def reference(known, held_out):
    return unusual_inputs.reference_of(known, held_out, 0.9)


def test_the_layout_part_is_the_distance_of_a_gaussian(known, held_out, reference):
    """Against a covariance written out: components with their variances, and one variance beside them."""
    rows = novelty.layout(known).numpy()
    centred = rows - rows.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred / (len(rows) - 1))
    beside = len(variances) - unusual_inputs.COMPONENTS
    variances[:beside] = variances[:beside].sum() / beside
    inverse = axes @ np.diag(1 / variances) @ axes.T
    other = novelty.layout(held_out).numpy() - rows.mean(0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", other, inverse, other))
    np.testing.assert_allclose(reference.parts(held_out)[:, 0].numpy(), expected, rtol=1e-6)


def test_the_limits_keep_the_share_of_held_out_images(reference, held_out):
    parts = reference.parts(held_out)
    below = (parts <= torch.tensor(reference.limits, dtype=torch.float64)).double().mean(0)
    torch.testing.assert_close(below, torch.full((2,), 0.95, dtype=torch.float64), atol=0.02, rtol=0)
    assert (reference.scores(held_out) <= 1).double().mean() >= 0.9
    assert (reference.scores(held_out) > 1).any()


def test_exposure_does_not_matter_and_a_blank_image_has_no_layout(known):
    layout = novelty.layout(known)
    torch.testing.assert_close(novelty.layout(known * 0.5 + 0.2), layout, atol=1e-4, rtol=0)
    torch.testing.assert_close(novelty.layout(1 - known), -layout, atol=1e-4, rtol=0)
    assert novelty.layout(torch.full((1, 1, 64, 64), 0.3)).isnan().all()


def test_an_enlarged_image_lacks_sharpness():
    film = torch.from_numpy(np.random.default_rng(0).random((1, 1, 256, 256))).float()
    enlarged = unusual_inputs.enlarged(film[0, 0], np.random.default_rng(0))[None, None]
    assert novelty.sharpness(enlarged).item() < novelty.sharpness(film).item() - 0.5


def test_bad_inputs_are_flagged_and_good_ones_are_not(reference):
    films = patients.render(patients.sample_patients(20, 3), 64)
    found = unusual_inputs.measured(reference, films, {"held_out": films, "none": films[:0]}, others=1 - films)
    assert found["false_alarms"].keys() == {"held_out"} and found["false_alarms"]["held_out"]["flagged"] <= 0.3
    kinds = "upside_down", "inverted", "turned_by_90_degrees", "half_of_the_chest", "ct_slice", "noise", "blank"
    assert {kind: found["bad"][kind]["flagged"] for kind in (*kinds, "others")} == dict.fromkeys((*kinds, "others"), 1)


def test_bad_inputs_are_images_and_the_same_every_time(known):
    first, second = (dict(unusual_inputs.bad_inputs(known[:2])) for _ in range(2))
    for kind, images in first.items():
        assert images.shape[1:] == (1, 64, 64) and images.min() >= 0 and images.max() <= 1, kind
        assert torch.equal(images, second[kind]), kind
    film = known[0, 0]
    assert torch.equal(first["upside_down"][0, 0], film.flip(0).flip(1))
    kept = [torch.equal(first["half_of_the_chest"][0, 0, :, 16:48], half) for half in (film[:, :32], film[:, 32:])]
    assert sum(kept) == 1 and not first["half_of_the_chest"][0, 0, :, :16].any()


def test_a_reference_is_read_back(tmp_path, monkeypatch, reference, held_out):
    monkeypatch.setenv("PRISM_WEIGHTS", str(tmp_path))
    path = unusual_inputs.save(reference, tmp_path / "tiny")
    torch.testing.assert_close(novelty.load("tiny").scores(held_out), reference.scores(held_out), rtol=1e-3, atol=0)
    assert novelty.load("other") is None
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no reference"):
        novelty.load("tiny")


def test_what_cannot_be_measured_is_refused(known, reference):
    with pytest.raises(ValueError, match="19 images are too few"):
        unusual_inputs.reference_of(known, known[:19], 0.9)
    with pytest.raises(ValueError, match="share is 1"):
        unusual_inputs.reference_of(known, known, 1.0)
    with pytest.raises(ValueError, match="blank"):
        unusual_inputs.reference_of(torch.cat([known, torch.zeros(1, 1, 64, 64)]), known, 0.9)
    with pytest.raises(ValueError, match="images are"):
        reference.scores(known[..., :32])
    assert dataclasses.replace(reference, limits=(9e9, 9e9)).is_new(float("nan"))
