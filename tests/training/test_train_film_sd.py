"""How film-sd is trained: its crops, and the pipeline that is saved."""

import json

import numpy as np
import pytest
import torch

from benchmarks import train_film_sd
from prism_lib.models import encode_images, encode_prompts, load_pipeline, predict_noise
from prism_lib.models.wavelets import HaarAutoencoder
from prism_lib.phantom.patients import render, sample_patients
from tests.tiny import SOURCE, TARGET, tiny_pipeline


@pytest.fixture(scope="module")
def films():
    """Phantoms without devices stand for films."""
    images = render(sample_patients(4, 3).intervene(support_devices=0), 256)
    return (images[:, 0] * 255).round().byte().numpy()


@pytest.fixture(scope="module")
def devices(films):
    return train_film_sd.bank(films, 6, seed=1)


def test_a_bank_holds_each_devices_attenuation_and_nothing_beside_them(devices):
    assert devices.shape == (6, 256, 256) and devices.dtype == np.uint8
    assert devices.any((1, 2)).all() and (devices == 0).mean() > 0.5


def test_crops_differ_by_devices_alone_and_devices_are_bright(films, devices):
    pairs = [train_film_sd.crop(films, devices, np.random.default_rng([1, n])) for n in range(40)]
    truths, inputs = (np.stack(images) for images in zip(*pairs, strict=True))
    assert truths.min() >= 0 and inputs.max() <= 1 and truths.shape == (40, 256, 256)
    changed = inputs - truths
    assert (np.abs(changed).max((1, 2)) > 0.02).mean() > 0.8
    assert np.median(np.abs(changed)) < 1e-3
    assert changed.sum() > 0.8 * np.abs(changed).sum()
    again = train_film_sd.crop(films, devices, np.random.default_rng([1, 7]))
    np.testing.assert_array_equal(again[1], pairs[7][1])


def test_letters_come_to_both_and_random_shapes_stay_inside_the_crop(films):
    word = train_film_sd.lettered(np.full((256, 256), 0.4, np.float32), np.random.default_rng(5))
    assert 0 < (np.abs(word - 0.4) > 0.05).mean() < 0.4
    drawn = np.stack([train_film_sd.shapes(np.random.default_rng(n)) for n in range(8)])
    assert drawn.shape == (8, 256, 256) and drawn.min() >= 0 and (drawn.max((1, 2)) > 0.02).sum() >= 6


def test_training_saves_a_pipeline_that_predicts_noise(films, tmp_path, monkeypatch):
    tiny = tiny_pipeline()
    monkeypatch.setattr(train_film_sd, "load_pipeline", lambda *_, **__: tiny)
    monkeypatch.setattr(train_film_sd, "screened", lambda _: None)
    monkeypatch.setattr(train_film_sd, "prompts_of", lambda *_: ([TARGET], [SOURCE]))
    monkeypatch.setattr(train_film_sd, "read_images", lambda *_: torch.from_numpy(films)[:, None] / 255)
    monkeypatch.setattr(train_film_sd, "CHANNELS", (8, 16))
    given = ["data", str(tmp_path / "film"), "--steps", "2", "--batch-size", "2", "--bank", "3"]
    train_film_sd.main(given)
    pipe = load_pipeline(tmp_path / "film", device="cpu")
    assert isinstance(pipe.vae, HaarAutoencoder) and pipe.unet.config.in_channels == 16
    assert pipe.scheduler.config.set_alpha_to_one
    latents = encode_images(pipe.vae, torch.from_numpy(films[:1])[:, None] / 255)
    assert predict_noise(pipe, latents, 1, encode_prompts(pipe, [TARGET])).abs().max() > 0
    log = json.loads((tmp_path / "film" / "training.json").read_text())
    assert log["losses"][-1]["step"] == 2 and log["config"]["bank"] == 3
    inner = "mid_block.resnets.0.conv1.weight"
    assert train_film_sd.wider(tiny.unet).state_dict()[inner].equal(tiny.unet.state_dict()[inner])


def test_another_data_set_is_refused_before_any_work(phantom_folder):
    with pytest.raises(SystemExit, match='does not hold the data set "films"'):
        train_film_sd.screened(phantom_folder)
