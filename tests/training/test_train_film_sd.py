"""How film-sd and its judge are trained: the crops, and what is saved."""

import argparse
import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import drawn_devices, train_film_judge, train_film_kinds, train_film_sd
from prism_lib.data.chest import DEVICES
from prism_lib.data.folder import load_table, read_images
from prism_lib.data.preparation import PrepareConfig, prepare
from prism_lib.editing import kept
from prism_lib.language import Edit, vocabulary
from prism_lib.models import encode_images, encode_prompts, load_pipeline, predict_noise
from prism_lib.models.classifier import Classifier
from prism_lib.models.wavelets import HaarAutoencoder
from prism_lib.phantom.films import KINDS
from prism_lib.phantom.patients import render, sample_patients
from tests.formats import nih_films
from tests.tiny import TARGET, tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def films():
    """Phantoms without devices stand for films."""
    images = render(sample_patients(4, 3).intervene(support_devices=0), 256)
    return train_film_sd.Films((images[:, 0] * 255).round().byte().numpy(), np.ones((4, 8, 8), bool))


@pytest.fixture(scope="module")
def devices(films):
    return [train_film_sd.bank(films.images, 40, seed=1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared data set "films", all screened as clean, whose vocabulary names kinds of devices."""
    home = tmp_path_factory.mktemp("data")
    root, screened = nih_films(home / "nih", 256), home / "screened.csv"
    names = pd.read_csv(root / "Data_Entry_2017_v2020.csv")["Image Index"]
    pd.DataFrame({"file_name": names, "Support Devices": 0}).to_csv(screened, index=False)
    return prepare(PrepareConfig("films", home / "films", root, size=256, vocabulary="films", screened=screened))


def test_a_bank_holds_each_devices_attenuation_and_nothing_beside_them(devices):
    ((maps, kinds),) = devices
    assert maps.shape == (40, 256, 256) and maps.dtype == np.uint8
    assert maps.any((1, 2)).mean() > 0.9 and (maps == 0).mean() > 0.5
    assert set(kinds) <= {*range(len(KINDS))} and len(set(kinds)) > 5


def test_crops_differ_by_devices_alone_and_devices_are_bright(films, devices):
    made = [train_film_sd.crop(films, devices, np.random.default_rng([1, n])) for n in range(40)]
    truths, inputs, known = (np.stack(images) for images in zip(*made, strict=True))
    assert known.all()
    assert truths.min() >= 0 and inputs.max() <= 1 and truths.shape == (40, 256, 256)
    changed = inputs - truths
    assert (np.abs(changed).max((1, 2)) > 0.02).mean() > 0.8
    assert np.median(np.abs(changed)) < 1e-3
    assert (changed.sum((1, 2)) >= 0).all(), "sharpening draws dark edges, and does not change the mean"
    again = train_film_sd.crop(films, devices, np.random.default_rng([1, 7]))
    np.testing.assert_array_equal(again[1], made[7][1])


def test_crops_that_are_told_of_devices_stay_as_they_are(films, devices):
    options = argparse.Namespace(seed=0, batch_size=24, share=0.0, cut_outs=0.0, stays=0.5)
    crops = train_film_sd.batch([films], devices, options, 0)
    told = torch.tensor(["with support" in train_film_sd.KNOWN[place][1] for place in crops.prompts])
    assert 4 < told.sum() < 20 and torch.equal(crops.inputs[told], crops.truths[told])
    assert ((crops.inputs - crops.truths)[~told].abs().amax((1, 2, 3)) > 0.02).float().mean() > 0.7


def test_film_sd_reads_every_prompt_about_devices_as_one_of_two():
    pipe = load_pipeline("film-sd", device="cpu")
    assert pipe.text_encoder.config.known_prompts == [list(pair) for pair in train_film_sd.KNOWN]
    without, shown, other = encode_prompts(pipe, [*(prompt for _, prompt in train_film_sd.KNOWN), "chest x-ray"])
    both, kept_leads = Edit(remove=("port", "ecg leads")), Edit(remove=("port",), keep=("ecg leads",))
    for labels in ({DEVICES: 1}, {DEVICES: 1, "Cardiomegaly": 1, "Pleural Effusion": 0}):
        for edit in (both, kept_leads, Edit(remove=(DEVICES,))):
            pair = edit.prompts(labels, vocabulary("films"))
            source, target = encode_prompts(pipe, [pair.source, pair.target])
            assert torch.equal(source, shown) and torch.equal(target, without)
    assert not torch.equal(without, shown) and not torch.equal(other, shown)
    assert torch.equal(encode_prompts(pipe, ["Chest X-ray With Pacemaker"])[0], shown)
    one, film = encode_prompts(pipe, ["chest x-ray without support device", "chest x-ray with portable bed"])
    assert torch.equal(one, without) and not torch.equal(film, shown)
    texts = ["chest x-ray with ecg leads", "chest x-ray with pacemaker"]
    words = encode_prompts(load_pipeline("phantom-sd", device="cpu"), texts)
    assert not torch.equal(*words), "a model without known prompts reads what is written"


def test_bedside_films_count_in_free_cells_and_where_devices_were_drawn(films, devices, folder, tmp_path, monkeypatch):
    table = load_table(folder).query("not rendered")
    row = table[table["split"] == "train"].head(1)
    stem = row["file_name"].iloc[0].split("/")[1].removesuffix(".png")
    other = table[table["split"] == "test"]["file_name"].iloc[0].split("/")[1].removesuffix(".png")
    monkeypatch.setattr(train_film_sd, "CELLS", tmp_path / "cells.csv")
    monkeypatch.setattr(drawn_devices, "DRAWN", tmp_path / "drawn.csv")
    line = {"kind": "ecg leads", "width": 6, "points": "200 300 300 300"}
    pd.DataFrame([{"file_name": stem} | line, {"file_name": other} | line]).to_csv(drawn_devices.DRAWN, index=False)
    pd.DataFrame({"file_name": [stem], "free": ["A1 A2 B1 H8"]}).to_csv(train_film_sd.CELLS, index=False)
    film = 0.6 * read_images(folder, row)[:, 0].numpy()
    clean = film.copy()
    film[0, 149:152, 90:160] += 0.2  # a cable
    monkeypatch.setattr(train_film_sd, "read_images", lambda *_: torch.from_numpy(film)[:, None])
    beside, real = train_film_sd.bedside(folder, folder)
    assert beside.images.shape == (1, 256, 256) and beside.free.sum() == 4 and beside.free[0, 7, 7]
    assert real.maps.shape == (1, 256, 256) and real.kinds.tolist() == [KINDS.index("ecg leads")]
    np.testing.assert_allclose(real.maps, beside.drawn, rtol=1e-3, atol=1e-3)
    left = np.abs(beside.images[0] / 255 - clean[0])
    assert left[149:152, 105:145].mean() < 0.04 and left[:140].max() < 0.01, "the cable is gone, and nothing else"
    _, _, known = train_film_sd.crop(beside, [*devices, real], np.random.default_rng(0), real=1.0)
    shown = (beside.drawn[0] > 0) & ~beside.free[0].repeat(32, 0).repeat(32, 1)
    assert known.sum() == 4 * 32 * 32 + shown.sum()
    pd.DataFrame({"file_name": [other], "free": ["A1"]}).to_csv(train_film_sd.CELLS, index=False)
    with pytest.raises(ValueError, match=f"{other}, a film of a patient in val or test"):
        train_film_sd.bedside(folder, folder)
    pd.DataFrame({"file_name": ["no_film"], "free": ["A1"]}).to_csv(train_film_sd.CELLS, index=False)
    with pytest.raises(ValueError, match="lacks no_film, a film of "):
        train_film_sd.bedside(folder, folder)


def test_letters_come_to_both_and_random_shapes_stay_inside_the_crop(films):
    word = train_film_sd.lettered(np.full((256, 256), 0.4, np.float32), np.random.default_rng(5))
    assert 0 < (np.abs(word - 0.4) > 0.05).mean() < 0.4
    drawn = np.stack([train_film_sd.shapes(np.random.default_rng(n)) for n in range(8)])
    assert drawn.shape == (8, 256, 256) and drawn.min() >= 0 and (drawn.max((1, 2)) > 0.02).sum() >= 6


def stop_after(keep):
    """The method `keep`, after which the run is stopped."""

    def kept(self, *given):
        keep(self, *given)
        raise KeyboardInterrupt

    return kept


def test_training_saves_a_pipeline_that_predicts_noise(films, tmp_path, monkeypatch):
    tiny = tiny_pipeline()
    monkeypatch.setattr(train_film_sd, "load_pipeline", lambda *_, **__: tiny)
    monkeypatch.setattr(train_film_sd, "screened", lambda _: None)
    monkeypatch.setattr(train_film_sd, "read_images", lambda *_: torch.from_numpy(films.images)[:, None] / 255)
    monkeypatch.setattr(train_film_sd, "CHANNELS", (8, 16))
    monkeypatch.setattr(train_film_sd, "LAYERS", (2, 1))
    given = ["data", str(tmp_path / "film"), "--steps", "4", "--batch-size", "2", "--bank", "40", "--save-every", "2"]
    with monkeypatch.context() as stopped:
        stopped.setattr(train_film_sd.State, "keep", stop_after(train_film_sd.State.keep))
        with pytest.raises(KeyboardInterrupt):
            train_film_sd.main(given)
    train_film_sd.main(given)
    train_film_sd.main([given[0], str(tmp_path / "whole"), *given[2:]])
    resumed, whole = (load_file(tmp_path / name / "unet" / WEIGHTS) for name in ("film", "whole"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items()), "stopped after two steps of four"
    with pytest.raises(SystemExit, match="--cut-outs are taken from the films of --bedside"):
        train_film_sd.main([*given, "--cut-outs", "0.4"])
    with pytest.raises(SystemExit, match=r"state.pt is of a run with another weight \(1.5\)"):
        train_film_sd.main([*given, "--weight", "2"])
    with monkeypatch.context() as other:
        other.setattr(train_film_sd, "LAYERS", (1, 1))
        with pytest.raises(SystemExit, match=r"another layers \(\[2, 1\]\)"):
            train_film_sd.main(given)
    pipe = load_pipeline(tmp_path / "film", device="cpu")
    assert isinstance(pipe.vae, HaarAutoencoder) and pipe.unet.config.in_channels == 16
    assert pipe.scheduler.config.set_alpha_to_one and pipe.text_encoder.config.known_prompts
    latents = encode_images(pipe.vae, torch.from_numpy(films.images[:1])[:, None] / 255)
    assert predict_noise(pipe, latents, 1, encode_prompts(pipe, [TARGET])).abs().max() > 0
    log = json.loads((tmp_path / "film" / "training.json").read_text())
    assert log["losses"][-1]["step"] == 4 and log["config"]["bank"] == 40
    inner = "mid_block.resnets.0.conv1.weight"
    assert train_film_sd.wider(tiny.unet).state_dict()[inner].equal(tiny.unet.state_dict()[inner])


def test_a_step_of_the_optimizer_moves_all_weights():
    unet = tiny_pipeline().unet.requires_grad_(True)
    optimizer, before = train_film_sd.Optimizer(unet, 1e-2, 10), copy.deepcopy(unet.state_dict())
    unet(torch.randn(1, 4, 16, 16), 1, torch.randn(1, 5, unet.config.cross_attention_dim)).sample.sum().backward()
    optimizer.step()  # the first has the rate 0
    optimizer.step()
    used = [name for name, values in unet.named_parameters() if values.grad.any()]
    assert len(used) > 0.8 * len(before) and not [n for n in used if unet.state_dict()[n].equal(before[n])]


def test_a_unet_with_more_layers_predicts_what_it_did(monkeypatch):
    monkeypatch.setattr(train_film_sd, "CHANNELS", (8, 16))
    monkeypatch.setattr(train_film_sd, "LAYERS", (1, 1))
    before = train_film_sd.wider(tiny_pipeline().unet)
    torch.nn.init.normal_(before.conv_out.weight, std=0.1)
    monkeypatch.setattr(train_film_sd, "LAYERS", (3, 2))
    after = train_film_sd.wider(before)
    assert [len(block.resnets) for block in after.up_blocks] == [3, 4]
    monkeypatch.setattr(train_film_sd, "LAYERS", (1, 1))
    with pytest.raises(ValueError, match=r"a block of the U-Net has [23] layers; it cannot get -[12]"):
        train_film_sd.wider(after)
    torch.manual_seed(0)
    latents, texts = torch.randn(2, 16, 16, 16), torch.randn(2, 5, before.config.cross_attention_dim)
    with torch.no_grad():
        expected, found = (unet.eval()(latents, 1, encoder_hidden_states=texts).sample for unet in (before, after))
    assert expected.std() > 0.01 and torch.allclose(found, expected, atol=1e-5)


def test_crops_cover_the_corners_of_a_film():
    whole, random, covered = np.ones((512, 512), bool), np.random.default_rng(0), np.zeros((512, 512))
    for _ in range(200):
        y, x = train_film_sd.fullest(whole, random)
        covered[y : y + train_film_sd.CROP, x : x + train_film_sd.CROP] += 1
    assert covered.min() > 4


def test_the_judges_cells_are_those_with_devices_and_its_logit_is_calibrated(films, devices, folder, tmp_path):
    options = argparse.Namespace(seed=0, pairs=4, share=0.0, cut_outs=0.0)
    crops, shown, known = train_film_judge.batch([films], devices, options, 0)
    assert crops.shape == (8, 1, 256, 256) and shown.shape == known.shape == (8, 8, 8)
    assert shown[:4].any() and not shown[4:].any() and known[4:].all()
    changed = (crops[:4] - crops[4:]).abs() > train_film_judge.SHOWS
    assert torch.equal(changed.unflatten(2, (8, 32)).unflatten(4, (8, 32)).sum((1, 3, 5)) >= 6, shown[:4])
    out = tmp_path / "judge"
    train_film_judge.main([str(folder), str(out), "--steps", "2", "--pairs", "2", "--bank", "40"])
    again = [str(folder), str(tmp_path / "again"), "--steps", "2", "--pairs", "2", "--bank", "40", "--start"]
    train_film_judge.main([*again, str(out)])
    assert Classifier.load(tmp_path / "again").labels == (DEVICES,)
    with pytest.raises(SystemExit, match="--start phantom-judge has another architecture"):
        train_film_judge.main([*again, "phantom-judge"])
    judge = Classifier.load(out)
    table = load_table(folder, "train").query("rendered")
    both = torch.cat([read_images(folder, table.assign(file_name=table[name])) for name in ("file_name", "twin")])
    with torch.no_grad():
        judge.network.class_layers.out.bias += 3
    before = judge.logits(both)
    train_film_judge.calibrate(judge.network, folder)
    after = judge.logits(both)
    assert before.sigmoid().mean() > 0.8 and after.sigmoid().mean() == pytest.approx(0.5, abs=0.01), "as frequent"
    assert torch.cat([before, after], 1).T.corrcoef()[0, 1].abs() == pytest.approx(1, abs=1e-4), "by scale and bias"


def test_the_network_of_kinds_learns_at_devices_alone_and_is_saved_whole(films, devices, folder, tmp_path):
    options = argparse.Namespace(seed=0, batch_size=3, share=0.0, cut_outs=0.0)
    small = [bank._replace(maps=train_film_kinds.reduced(bank.maps)) for bank in devices]
    read, absorbed = train_film_kinds.batch([films], small, options, 0)
    assert read.shape == (3, 10, 128, 128) and absorbed.shape == (3, len(KINDS), 128, 128)
    assert ((absorbed.amax((2, 3)) > train_film_kinds.SHOWS).sum(1) >= 1).all()
    removed, shown = read[:, 4:8].amax(1), absorbed.sum(1)
    found = [torch.stack([a.flatten(), b.flatten()]).corrcoef()[0, 1] for a, b in zip(removed, shown, strict=True)]
    assert min(found) > 0.3, "an edit finds devices where they are, in part"
    right = 20 * torch.nn.functional.one_hot(absorbed.argmax(1), len(KINDS)).movedim(-1, 1).float()
    elsewhere = torch.where(absorbed.amax(1, keepdim=True) > train_film_kinds.SHOWS, right, right.roll(1, 1))
    loss, share = train_film_kinds.loss_of(elsewhere, absorbed)
    assert loss < 1e-3 and share == 1, "what it says beside devices does not count"
    assert train_film_kinds.loss_of(right.roll(1, 1), absorbed)[1] == 0
    out = tmp_path / "kinds"
    train_film_kinds.main([str(folder), str(out), "--steps", "2", "--batch-size", "2", "--bank", "40"])
    assert json.loads((out / "kinds.json").read_text()) == [*KINDS]
    assert kept.load_kinds(out)(read[:1]).shape == (1, len(KINDS), 128, 128)
    few = [bank._replace(maps=bank.maps[bank.kinds < 2], kinds=bank.kinds[bank.kinds < 2]) for bank in small]
    _, absorbed = train_film_kinds.batch([films], few, options, 0)
    assert absorbed[:, :2].any() and not absorbed[:, 2:].any(), "a bank may lack kinds"


@pytest.mark.parametrize("program", [train_film_sd, train_film_judge, train_film_kinds])
def test_wrong_arguments_are_named_before_any_work(program, tmp_path, capsys):
    for option, value in (("--steps", "0"), ("--bank", "0"), ("--share", "2"), ("--cut-outs", "-1")):
        with pytest.raises(SystemExit):
            program.main(["nowhere", str(tmp_path / "out"), option, value])
        assert f"argument {option}: {value} is not" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("of another work")
    with pytest.raises(SystemExit, match=r"exists and has no .*: choose another folder"):
        program.main(["nowhere", str(tmp_path)])
    assert (tmp_path / "notes.txt").is_file()


def test_another_data_set_is_refused_before_any_work(phantom_folder):
    with pytest.raises(SystemExit, match='does not hold the data set "films"'):
        train_film_sd.screened(phantom_folder)
