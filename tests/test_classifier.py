"""Classifiers: they learn, they ignore what is unknown, and they come back from disk."""

import pytest
import torch

from prism_lib import classifier
from prism_lib.classifier import ClassifierConfig

SMALL = ClassifierConfig(labels=("Bright", "Left"), blocks=(2, 2), growth=4, features=8, epochs=6, batch_size=8)


@pytest.fixture(scope="module")
def data():
    """Brightness and the side of a square, both plain to see."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (96, 2), generator=generator).float()
    images = 0.2 + 0.1 * torch.rand(96, 1, 32, 32, generator=generator) + 0.4 * labels[:, :1, None, None]
    for image, left in zip(images, labels[:, 1], strict=True):
        image[:, 10:22, slice(2, 14) if left else slice(18, 30)] += 0.3
    return images.clamp(0, 1), labels


@pytest.fixture(scope="module")
def trained(data):
    return classifier.train_classifier(*data, SMALL)


def test_it_learns_what_is_plain_to_see(trained, data):
    areas = classifier.auc(classifier.predict(trained, data[0]), data[1], SMALL.labels)
    assert min(areas.values()) > 0.9


def test_training_is_deterministic(trained, data):
    again = classifier.train_classifier(*data, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), again.parameters(), strict=True))


def test_unknown_labels_do_not_count(data):
    images, labels = data
    for unknown in (float("nan"), -1.0):
        wrong = labels.clone()
        wrong[48:, 0] = unknown
        flipped = labels.clone()
        flipped[48:, 0] = unknown
        one, other = (classifier.train_classifier(images, x, SMALL) for x in (wrong, flipped))
        assert torch.equal(classifier.predict(one, images[:4]), classifier.predict(other, images[:4]))
        assert torch.isfinite(classifier.predict(one, images)).all()


def test_bytes_and_floats_are_the_same_image(trained, data):
    coded = (data[0][:4] * 255).round().byte()
    assert torch.allclose(classifier.predict(trained, coded), classifier.predict(trained, coded.float() / 255))


def test_it_comes_back_from_disk(trained, data, tmp_path):
    folder = classifier.save_classifier(trained, SMALL, tmp_path / "judge")
    loaded, config = classifier.load_classifier(folder)
    assert config == SMALL
    expected = classifier.predict(trained, data[0])
    torch.testing.assert_close(classifier.predict(loaded, data[0]), expected, atol=0.02, rtol=0)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        classifier.load_classifier(tmp_path / "nowhere")


def test_bad_labels_are_named(data):
    images, labels = data
    with pytest.raises(ValueError, match="'Left' has one class"):
        classifier.train_classifier(images, torch.stack([labels[:, 0], torch.ones(96)], 1), SMALL)
    with pytest.raises(ValueError, match="96 images"):
        classifier.train_classifier(images, labels[:10], SMALL)
    with pytest.raises(ValueError, match="'Left' needs both classes"):
        classifier.auc(torch.rand(4, 2), torch.tensor([[0, 1], [1, 1], [0, 1], [1, 1.0]]), SMALL.labels)
