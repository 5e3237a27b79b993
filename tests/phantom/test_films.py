"""Devices on films: local, exact, reproducible, and placed by the film's own anatomy. Phantoms serve as films."""

import pytest
import torch

from prism_lib.language.labels import DEVICE_KINDS
from prism_lib.phantom.canvas import Anchors
from prism_lib.phantom.films import KINDS, with_devices
from prism_lib.phantom.patients import render, sample_patients

SIZE = 128


def phantoms(size, count=8):
    return render(sample_patients(count, seed=5).intervene(support_devices=0), size)


@pytest.fixture(scope="module")
def films():
    return phantoms(SIZE)


@pytest.fixture(scope="module")
def rendered(films):
    return with_devices(films, range(len(films)))


def test_the_catalogue_starts_with_the_phantoms_kinds():
    assert KINDS[:4] == DEVICE_KINDS and len(set(KINDS)) == len(KINDS) >= 10


def test_a_film_is_the_same_outside_the_mask_and_brighter_inside(films, rendered):
    assert rendered.images.shape == rendered.mask.shape == films.shape and rendered.mask.dtype == torch.bool
    assert torch.equal(rendered.images[~rendered.mask], films[~rendered.mask])
    assert bool((rendered.images[rendered.mask] > films[rendered.mask]).all())
    assert torch.equal((rendered.images * 255).round() / 255, rendered.images) and rendered.images.max() <= 1
    share = rendered.mask.float().mean((1, 2, 3))
    assert share.min() > 0.001 and share.max() < 0.5
    for kinds in rendered.kinds:
        assert kinds and list(kinds) == sorted(kinds, key=KINDS.index)


def test_the_seed_decides_and_the_batch_does_not(films, rendered):
    alone = with_devices(films[3:4], [3])
    assert torch.equal(alone.images, rendered.images[3:4]) and alone.kinds == rendered.kinds[3:4]
    other = with_devices(films[3:4], [4])
    assert not torch.equal(other.images, alone.images)


def test_without_a_kind_the_others_stay(films):
    seeds, but_one = range(20), [kind for kind in KINDS if kind != "pacemaker"]
    film = films[:1].expand(20, -1, -1, -1)
    every, fewer = with_devices(film, seeds), with_devices(film, seeds, but_one)
    several = [row for row in seeds if "pacemaker" in every.kinds[row] and len(every.kinds[row]) > 1]
    assert several
    for row in seeds:
        assert "pacemaker" not in fewer.kinds[row]
    for row in several:
        assert set(fewer.kinds[row]) == set(every.kinds[row]) - {"pacemaker"}
        assert bool((fewer.images[row] <= every.images[row]).all())
        assert not bool((fewer.mask[row] & ~every.mask[row]).any())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_at_every_size_and_keeps_its_place(kind):
    areas, centres = [], []
    for size in (128, 256, 512):
        result = with_devices(phantoms(size, 2), [11, 12], [kind])
        assert result.kinds == ((kind,), (kind,))
        change = result.mask.float()
        assert change.mean((1, 2, 3)).min() > 0.0005
        areas.append(change.mean())
        rows = change.sum((0, 1, 3)) / change.sum()
        centres.append(float((rows * torch.arange(size)).sum() / size))
    # Thin lines are drawn a pixel wide or more: their share grows in small pictures.
    assert 0.95 * areas[2] < areas[1] < 1.6 * areas[2] and 0.9 * areas[1] < areas[0] < 2.2 * areas[1]
    assert max(centres) - min(centres) < 0.06


def test_contrast_reaches_from_faint_to_dense(films):
    film = films[:1].expand(24, -1, -1, -1)
    result = with_devices(film, range(24), ["ecg leads"])
    strongest = (result.images - film).amax((1, 2, 3))
    typical = torch.stack([(result.images - film)[row][result.mask[row]].median() for row in range(24)])
    assert typical.min() < 0.06 and typical.max() > 1.8 * typical.min() and strongest.max() > 0.3


def test_anchors_follow_the_phantoms_anatomy():
    patients = sample_patients(16, seed=2).intervene(support_devices=0, pleural_effusion=0)
    for film, shift in zip(render(patients, SIZE)[:, 0], (patients.noise["pose"][:, 1] - 0.5) * 0.14, strict=True):
        body = Anchors.of(film)
        assert abs(body.middle / SIZE - (0.5 + float(shift) / 2)) < 0.07
        assert 0.07 < body.left / SIZE < 0.27 and 0.73 < body.right / SIZE < 0.93
        assert 0.04 < body.apex / SIZE < 0.27 and 0.55 < body.base / SIZE < 0.85
        assert 0.7 < body.mm * 400 / SIZE < 1.3


@pytest.mark.parametrize("level", [0.0, 100 / 255, 1.0])
def test_a_film_without_anatomy_gets_the_usual_frame(level):
    body = Anchors.of(torch.full((SIZE, SIZE), level))
    assert body.left < 0.3 * SIZE < 0.7 * SIZE < body.right and body.apex < 0.3 * SIZE < 0.6 * SIZE < body.base
    film = torch.full((1, 1, SIZE, SIZE), level)
    assert bool(with_devices(film, [0]).images.isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"films": torch.zeros(1, 1, 64, 64)}, "128 pixels"),
        ({"films": torch.zeros(1, 1, 128, 130)}, "128 pixels"),
        ({"films": torch.zeros(1, 3, 128, 128)}, "128 pixels"),
        ({"films": torch.full((1, 1, 128, 128), 0.5003)}, "8-bit"),
        ({"films": torch.full((1, 1, 128, 128), float("nan"))}, "8-bit"),
        ({"films": torch.full((1, 1, 128, 128), 2.0)}, r"\[0, 1\]"),
        ({"films": torch.zeros(1, 1, 128, 128, dtype=torch.uint8)}, "floating point"),
        ({"seeds": [1, 2]}, "one seed a film"),
        ({"kinds": []}, "one or more of"),
        ({"kinds": ["hip joint"]}, "hip joint"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        with_devices(**({"films": torch.zeros(1, 1, 128, 128), "seeds": [0], "kinds": KINDS} | change))
