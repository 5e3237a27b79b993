"""Classifiers: they learn, they ignore what is unknown, and they come back from disk."""

import json
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch

from prism_lib.evaluation import metrics
from prism_lib.models import classifier
from prism_lib.models.classifier import ClassifierConfig

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
    read = torch.stack([classifier.predict(trained, data[0]), data[1]], 1)
    assert min(metrics.auc(read[..., label]) for label in range(2)) > 0.9


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


def test_larger_images_are_reduced_before_they_are_read(data, tmp_path):
    """In training and in prediction, also of a classifier that comes from disk, and for who calls the network."""
    images, labels = data
    large = torch.nn.functional.interpolate(images, scale_factor=2)
    config = replace(SMALL, size=16, steps=3)
    model = classifier.train_classifier(large, labels, config)
    expected = torch.nn.functional.interpolate(large, (16, 16), mode="bilinear", antialias=True)
    read = classifier.predict(model, large)
    assert torch.allclose(read, classifier.predict(model, expected), atol=1e-5)
    assert torch.equal(read, model(large).sigmoid())
    whole = classifier.build_classifier(replace(config, size=0)).eval()
    whole.load_state_dict(model.state_dict())
    assert not torch.allclose(read, classifier.predict(whole, large), atol=1e-3)
    loaded, _ = classifier.load_classifier(classifier.save_classifier(model, config, tmp_path / "small"))
    torch.testing.assert_close(classifier.predict(loaded, large), read, atol=0.02, rtol=0)
    small = replace(config, size=100)
    untouched = classifier.train_classifier(images, labels, small)
    same = classifier.train_classifier(images, labels, replace(config, size=0))
    assert all(torch.equal(a, b) for a, b in zip(untouched.parameters(), same.parameters(), strict=True))


def test_a_classifier_of_an_older_version_loads(trained, tmp_path):
    folder = classifier.save_classifier(trained, SMALL, tmp_path / "old")
    older = json.loads((folder / "config.json").read_text())
    del older["size"]
    (folder / "config.json").write_text(json.dumps(older))
    assert classifier.load_classifier(folder)[1] == SMALL


def test_bad_labels_are_named(data):
    images, labels = data
    with pytest.raises(ValueError, match="'Square' has one class"):
        classifier.train_classifier(images, torch.stack([labels[:, 0], torch.ones(96)], 1), SMALL)
    with pytest.raises(ValueError, match="96 images"):
        classifier.train_classifier(images, labels[:10], SMALL)


def test_steps_are_counted_whatever_the_size_of_the_set(data, monkeypatch):
    seen = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *args, **kw: (seen.append(1), real(self, *args, **kw)))
    for count in (16, 96):
        classifier.train_classifier(data[0][:count], data[1][:count], replace(SMALL, steps=7))
    assert len(seen) == 14


def test_groups_are_drawn_equally_often():
    groups = torch.tensor([5] * 90 + [2] * 10)
    config = replace(SMALL, objective="reweighted", batch_size=10)
    drawn = torch.cat(list(islice(classifier._batches(100, config, groups, torch.Generator().manual_seed(0)), 200)))
    assert (groups[drawn] == 2).float().mean().item() == pytest.approx(0.5, abs=0.03)
    plain = torch.cat(list(islice(classifier._batches(100, SMALL, groups, torch.Generator().manual_seed(0)), 10)))
    assert len(plain.unique()) == len(plain) == 80, "an epoch shows an image once"


def test_group_dro_moves_its_weight_to_the_worst_group():
    worst = classifier._WorstGroup(torch.tensor([0, 0, 1, 1]), step=0.5)
    losses = torch.tensor([0.0, 0.0, 2.0, 4.0])
    objective = worst(losses, torch.arange(4))
    # group losses 0 and 3: q = (1, e^1.5) / (1 + e^1.5)
    share = math.exp(1.5) / (1 + math.exp(1.5))
    assert worst.q.tolist() == pytest.approx([1 - share, share])
    assert objective.item() == pytest.approx(3 * share)


def test_an_objective_of_groups_needs_groups(data):
    for objective in ("reweighted", "group_dro"):
        with pytest.raises(ValueError, match="needs the group of each of the 96 images"):
            classifier.train_classifier(*data, replace(SMALL, objective=objective))
        model = classifier.train_classifier(
            *data, replace(SMALL, objective=objective, steps=3), groups=data[1][:, 0].long()
        )
        assert torch.isfinite(classifier.predict(model, data[0][:4])).all()
    with pytest.raises(ValueError, match=r"(?s)objective.*'sgd'"):
        replace(SMALL, objective="sgd")


@pytest.mark.parametrize("name", ["efficientnet-b0", "resnet18"])
def test_a_second_architecture_trains_and_comes_back(data, tmp_path, name):
    config = classifier.named_network(name, replace(SMALL, steps=2))
    model = classifier.train_classifier(*data, config)
    loaded, back = classifier.load_classifier(classifier.save_classifier(model, config, tmp_path / "second"))
    assert back == config and back.network == name
    torch.testing.assert_close(
        classifier.predict(loaded, data[0][:4]), classifier.predict(model, data[0][:4]), atol=0.02, rtol=0
    )
    with pytest.raises(ValueError, match="unknown network 'resnet'"):
        classifier.named_network("resnet", SMALL)


def test_densenet_121_is_densenet_121():
    model = classifier.build_classifier(classifier.named_network("densenet121", ClassifierConfig()))
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == 121
