"""Classifiers: they learn, they ignore what is unknown, and they come back from disk."""

import pytest
import torch

from prism_lib import classifier
from prism_lib.classifier import ClassifierConfig

SMALL = ClassifierConfig(
    labels=("Bright", "Square"), blocks=(2, 2), growth=4, features=8, epochs=10, batch_size=8, learning_rate=1e-2
)


@pytest.fixture(scope="module")
def data():
    """Brightness, and a square or none: both plain to see."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (96, 2), generator=generator).float()
    images = 0.2 + 0.1 * torch.rand(96, 1, 32, 32, generator=generator) + 0.4 * labels[:, :1, None, None]
    images[:, :, 10:22, 10:22] += 0.3 * labels[:, 1:, None, None]
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
    parameters = {}
    for unknown in (float("nan"), -1.0, 0.0):
        given = labels.clone()
        given[48:, 0] = unknown
        model = classifier.train_classifier(images, given, SMALL)
        parameters[str(unknown)] = torch.cat([p.flatten() for p in model.parameters()])
    assert torch.equal(parameters["nan"], parameters["-1.0"]), "uncertain and missing are both unknown"
    assert not torch.equal(parameters["nan"], parameters["0.0"]), "and unknown is not absent"


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
    with pytest.raises(ValueError, match="'Square' has one class"):
        classifier.train_classifier(images, torch.stack([labels[:, 0], torch.ones(96)], 1), SMALL)
    with pytest.raises(ValueError, match="96 images"):
        classifier.train_classifier(images, labels[:10], SMALL)
    with pytest.raises(ValueError, match="'Square' needs both classes"):
        classifier.auc(torch.rand(4, 2), torch.tensor([[0, 1], [1, 1], [0, 1], [1, 1.0]]), SMALL.labels)
