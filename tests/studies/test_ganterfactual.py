"""The GAN translates, its classifier pulls, and a stopped run goes on as if nothing had happened."""

from dataclasses import replace

import pytest
import torch

from prism_lib.editing.counterfactuals import stack
from prism_lib.language.edits import Edit
from prism_lib.models.classifier import Classifier, ClassifierConfig, build_classifier
from prism_lib.studies import ganterfactual
from prism_lib.studies.ganterfactual import GanConfig, Ganterfactual, load_generators, train_gan
from tests.tiny import REMOVE, tiny_images, tiny_pipeline

CONFIG = GanConfig(steps=4, filters=4, checkpoint_every=2)
LABELS = ClassifierConfig(blocks=(1, 1), growth=4, features=8)
LABEL = "Support Devices"
CHANGE = Edit(remove=(LABEL,))


@pytest.fixture(scope="module")
def guide():
    return Classifier(build_classifier(LABELS).eval(), LABELS.labels)


@pytest.fixture(scope="module")
def trained(phantom_folder, guide, tmp_path_factory):
    return train_gan(phantom_folder, LABEL, guide, tmp_path_factory.mktemp("gan"), CONFIG)


def test_a_stopped_run_goes_on_bit_for_bit(phantom_folder, guide, trained, tmp_path, monkeypatch):
    original, calls = ganterfactual._Training.step, []

    def interrupted(self, *images):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        original(self, *images)

    monkeypatch.setattr(ganterfactual._Training, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_gan(phantom_folder, LABEL, guide, tmp_path, CONFIG)
    again = train_gan(phantom_folder, LABEL, guide, tmp_path, CONFIG)
    assert len(calls) == 4 + 2  # from the checkpoint after step 2
    for name, network in load_generators(again).items():
        for ours, theirs in zip(network.parameters(), load_generators(trained)[name].parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_a_finished_run_is_not_trained_again(phantom_folder, guide, trained, monkeypatch):
    monkeypatch.setattr(ganterfactual._Training, "step", lambda *_: pytest.fail("trained again"))
    assert train_gan(phantom_folder, LABEL, guide, trained.parent, CONFIG) == trained


def test_the_editor_goes_the_way_that_the_edit_asks_for(trained):
    images, networks = tiny_images(2), load_generators(trained)
    for change, name, back in ((CHANGE, "remove", "add"), (Edit(add=("Support Devices",)), "add", "remove")):
        results = Ganterfactual(trained.parent)(tiny_pipeline(), images, [REMOVE, REMOVE], change)
        with torch.no_grad():
            expected = (networks[name](images * 2 - 1).tanh() + 1) / 2
            returned = (networks[back](expected * 2 - 1).tanh() + 1) / 2
        assert torch.equal(stack(results), expected)
        assert torch.equal(stack(results, "reconstruction"), returned)


@torch.no_grad()
def test_the_generator_loss_is_the_sum_of_its_terms(guide):
    training = ganterfactual._Training(CONFIG, guide, LABEL, 32)
    images = {"remove": tiny_images(2) * 2 - 1, "add": 1 - tiny_images(2) * 2}
    wanted = {"remove": images["add"], "add": images["remove"]}
    total = float(training._generator_loss(images, wanted)[0])
    fake = {name: training.generators[name](images[name]).tanh() for name in images}
    cycle = sum(
        float((training.generators[other](fake[name]).tanh() - images[name]).abs().mean())
        for name, other in (("remove", "add"), ("add", "remove"))
    )
    probability = {name: guide.network((fake[name] + 1) / 2)[:, 2].sigmoid() for name in fake}
    read = float(probability["remove"].square().mean() + (1 - probability["add"]).square().mean())
    same = sum(float((training.generators[name](wanted[name]).tanh() - wanted[name]).abs().mean()) for name in images)
    fooled = sum(float((training.discriminators[name](fake[name])[-1] - 1).square().mean()) for name in images)
    assert total == pytest.approx(fooled + read + 10 * cycle + same, rel=1e-4)


def test_bad_input_is_named(phantom_folder, guide, trained, tmp_path):
    with pytest.raises(ValueError, match="label 'Edema' is not in"):
        train_gan(phantom_folder, "Edema", guide, tmp_path, CONFIG)
    with pytest.raises(ValueError, match="holds a run with other settings"):
        train_gan(phantom_folder, LABEL, guide, trained.parent, replace(CONFIG, seed=1))
    with pytest.raises(FileNotFoundError, match=r"absent.config\.json"):
        load_generators(tmp_path / "absent")
    with pytest.raises(ValueError, match="steps is 0: "):
        replace(CONFIG, steps=0)
    both = Edit(remove=("Support Devices",), add=("Cardiomegaly",))
    with pytest.raises(ValueError, match="changes one label; remove_support_devices_and_add_cardiomegaly asks for 2"):
        Ganterfactual(trained.parent)(tiny_pipeline(), tiny_images(1), [REMOVE], both)
    with pytest.raises(ValueError, match="not a multiple of 16"):
        ganterfactual._Training(CONFIG, guide, LABEL, 40)
