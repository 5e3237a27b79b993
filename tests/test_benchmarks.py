"""Benchmarks say what they do before they do it, and the reference for speed makes the same latents as the library."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import (
    bulk,
    drawn_devices,
    editing,
    full_size,
    full_size_cpu,
    identifiability,
    own_judge,
    real_devices,
    sides,
)
from benchmarks.reference import Reference, with_weight_gradients
from prism_lib import paths, records
from prism_lib.apps.bulk_plan import BulkConfig
from prism_lib.apps.profiles import load_profile, plan
from prism_lib.editing.counterfactuals import sweep
from prism_lib.editing.inversion import invert
from prism_lib.editing.methods import InversionConfig
from prism_lib.editing.settings import grid
from prism_lib.language.edits import Edit
from prism_lib.models import classifier
from prism_lib.models.pipeline import decode_latents
from prism_lib.phantom.patients import counterfactual, render, sample_patients
from tests.tiny import REMOVE, SOURCE, tiny_images, tiny_pipeline

STEPS = 4
CONFIG = InversionConfig(guidance_scale=3.0, inner_steps=3)
PUBLISHED = replace(editing.PUBLISHED, guidance_scale=3.0, cross_replace_steps=0.75)


@pytest.fixture(scope="module")
def both():
    """Our null-text inversion and the reference's, of the same image."""
    pipe, image = tiny_pipeline(), tiny_images(1)
    plain = Reference(pipe, STEPS, CONFIG)
    trajectory = plain.invert(image, SOURCE)
    with with_weight_gradients(pipe):
        latents, negatives = plain.null_text(trajectory, SOURCE)
    inversion = invert(pipe, image, [SOURCE], "null_text", STEPS, config=CONFIG)
    return plain, inversion, trajectory, latents, negatives


def test_null_text_of_the_reference_leads_to_the_same_latents(both):
    _, inversion, _, latents, negatives = both
    torch.testing.assert_close(inversion.latents, latents, atol=1e-4, rtol=1e-4)
    # Adam moves a number by its gradient's sign first, and rounding decides the sign of the tiniest gradients: so not
    # number by number. All of them move by 1e-2 a step.
    apart = (inversion.negative_embeds[1:].flip(0) - torch.stack(negatives)).abs()
    assert apart.mean() < 1e-5


def test_the_references_reconstruction_is_its_own_way_down(both):
    plain, _, trajectory, latents, negatives = both
    expected = decode_latents(plain.pipe.vae, latents[0])
    torch.testing.assert_close(plain.reconstruct(trajectory, negatives, SOURCE), expected, atol=1e-4, rtol=0)


def test_a_forked_sweep_equals_the_references_edits_one_after_another(both):
    plain, inversion, trajectory, _, negatives = both
    configs = grid(PUBLISHED, self_replace_steps=(0.0, 0.5, 1.0))
    (swept,) = sweep(plain.pipe, inversion, [REMOVE], configs)
    for ours, config in zip(swept, configs, strict=True):
        latents = plain.edit(trajectory, negatives, REMOVE, config)
        theirs = decode_latents(plain.pipe.vae, latents)[1]
        torch.testing.assert_close(ours.raw, theirs, atol=1e-4, rtol=0)
    assert (swept[0].raw - swept[2].raw).abs().max() > 1e-3


def test_weights_are_frozen_again_and_no_gradient_is_left(both):
    plain, *_ = both
    result = plain.sweep(tiny_images(1), REMOVE, [replace(PUBLISHED, self_replace_steps=0.5)])
    assert result[0].shape == (1, 1, 32, 32)
    assert all(not p.requires_grad and p.grad is None for p in plain.pipe.unet.parameters())


@pytest.mark.parametrize("name", sorted(path.stem for path in (paths.root() / "benchmarks").glob("*.py")))
def test_a_benchmark_prints_its_help_and_does_no_work(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    if not hasattr(module, "main"):
        return  # what benchmarks are made of
    monkeypatch.setattr(records.Timer, "__enter__", lambda _: pytest.fail("the benchmark started"))
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        module.main()
    assert f"benchmarks.{name}" in capsys.readouterr().out


def test_a_model_of_full_size_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["full_size"])
    with pytest.raises(SystemExit, match="2"):
        full_size.main()
    assert "needs a GPU" in capsys.readouterr().err


def test_a_trial_of_full_size_measures_edits_and_training_and_leaves_the_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build, pipes = full_size.build_pipeline, []
    monkeypatch.setattr(full_size, "build_pipeline", lambda *args: pipes.append(build(*args)) or pipes[0])
    monkeypatch.setattr(full_size, "compile_blocks", lambda pipe: pipe)  # a minute, and tested elsewhere
    given = ["--size", "tiny", "--steps", "4", "--edited", "1", "2", "--trained", "2"]
    monkeypatch.setattr(sys, "argv", ["full_size", *given])
    full_size.main()
    metrics = records.load_record("full_size", "phantom", tmp_path / "benchmarks")["metrics"]
    assert set(metrics["editing"]) == set(metrics["editing_compiled"]) == {"batch_1", "batch_2"}
    for made in metrics["editing"].values():
        # Four steps up; four down with source, target and the negative: neutral settings guide all steps.
        assert made["unet_evaluations_per_counterfactual"] == 4 + 4 * 3
        assert made["seconds_per_counterfactual"] > 0
    trained = metrics["training"]["batch_2"]
    expected = trained["images_per_second_cached"] / trained["images_per_second_uncached"]
    assert trained["speedup_cached"] == pytest.approx(expected, rel=1e-3)
    fresh = build(*[full_size.TINY, full_size.SEED]).unet.bfloat16().state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in pipes[0].unet.state_dict().items())


def test_the_model_of_full_size_has_the_sizes_of_stable_diffusion():
    with torch.device("meta"):
        pipe = full_size_cpu.sd_pipeline([SOURCE])
    sizes = {name: part.num_parameters() for name, part in pipe.components.items() if hasattr(part, "num_parameters")}
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert len(pipe.tokenizer) == pipe.text_encoder.config.vocab_size == 49_408
    assert pipe.tokenizer(SOURCE).input_ids.count(pipe.tokenizer.eos_token_id) == 1  # which also stands for the unknown


@pytest.mark.parametrize("size", ["full", "tiny"])
@pytest.mark.parametrize("row", full_size_cpu.ROWS)
def test_a_row_of_full_size_on_a_cpu_is_one_notebook_with_parameters_that_exist(row, size):
    (profile, number), given = full_size_cpu.settings(row, "folder", size)
    (job,) = plan(load_profile(profile), [(name, str(value)) for name, value in given.items()], only=[number])
    assert job.name.startswith(row[:2])
    assert {name: job.parameters[name] for name in given} == given


@pytest.mark.slow
@pytest.mark.notebooks
def test_a_trial_of_full_size_on_a_cpu_measures_notebooks(monkeypatch, tmp_path):
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["full_size_cpu", "--size", "tiny", "--only", "01_data", "02_lora"])
    full_size_cpu.main()
    metrics = records.load_record("full_size_cpu", "phantom", tmp_path / "benchmarks")["metrics"]
    assert list(metrics) == ["01_data", "02_lora"]
    for row in metrics.values():
        assert row["seconds"] > 1 and 0.1 < row["peak_memory_gib"] < 4


def test_two_separate_runs_share_the_edits_of_one(tmp_path):
    edits = tmp_path / "edits.csv"
    names = [f"test/{n}.png" for n in range(5)]
    edits.write_text("file_name,edit\n" + "".join(f"{name},remove_support_devices\n" for name in names))
    halves = bulk._halves(BulkConfig("data", str(edits), str(tmp_path / "all")), tmp_path)
    tables = [pd.read_csv(half.edits) for half in halves]
    assert sorted(len(table) for table in tables) == [2, 3]
    assert sorted(pd.concat(tables)["file_name"]) == names
    assert len({half.out for half in halves}) == 2


def test_a_pacemaker_is_counted_on_its_own_side():
    patients = sample_patients(6, 5).intervene(support_devices=0)
    where, pixels = sides.places(patients)
    assert where.shape == (6, 2, 256, 256) and not where.all(1).any() and (pixels > 0).all()
    for row, change in enumerate(({"left_pacemaker": 1}, {"right_pacemaker": 1}, {"ecg_leads": 1}, {})):
        image = counterfactual(patients, 256, **change)[0] if change else render(patients)
        there = ((image - render(patients) > sides.BRIGHTER) & where).flatten(2).sum(2) > sides.SEEN * pixels
        assert there.tolist() == [[row == 0, row == 1]] * 6


def test_identifiability_asks_patients_that_an_edit_suits():
    pool = sample_patients(12, seed=0)
    for key in ("remove_support_devices", "add_pacemaker", "add_left_pleural_effusion"):
        edit = Edit.from_key(key)
        patients = identifiability.suited(pool, edit, 2)
        assert len(patients) == 2
        _, changed = counterfactual(patients, 64, **edit.attributes)
        assert changed.flatten(1).any(1).all()


def test_real_devices_are_read_before_and_after_their_removal(phantom_folder, tmp_path, monkeypatch, capsys):
    """By a judge and a model that have learnt nothing; `summarise` is tested below."""
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    labels = ("Cardiomegaly", real_devices.DEVICES)
    config = classifier.ClassifierConfig(labels, blocks=(1, 1), growth=4, features=8, size=16)
    judge = classifier.save_classifier(classifier.build_classifier(config), config, tmp_path / "judge")
    given = [str(phantom_folder), str(judge)]
    real_devices.main(given)
    found = records.load_record("real_devices", "films")["metrics"]
    assert found["auc_low"] <= found["auc"] <= found["auc_high"]
    assert found["images"] == 18 and "below_half" not in found
    monkeypatch.setattr(real_devices, "load_pipeline", lambda _: tiny_pipeline())
    drawn = [
        drawn_devices.Device(kind, 3.0, np.zeros((4, 2)))
        for kind in ("pacemaker", "ecg leads", "ecg clips", "ecg leads")
    ]
    monkeypatch.setattr(real_devices, "load_devices", lambda films: dict.fromkeys(films, drawn))
    monkeypatch.setattr(real_devices, "residuals", lambda *_: [0.2, 0.9, 0.4, 0.7])
    real_devices.main([*given, "--model", "tiny", "--films", "3", "--steps", "2"])
    found = records.load_record("real_devices", "films")["metrics"]
    assert found["films_edited"] == 3 and 0 <= found["p_after"] <= 1
    assert found["left"] == pytest.approx(0.55) and found["named pacemaker: left"] == pytest.approx(0.2)
    assert found["named pacemaker: others left"] == pytest.approx(0.8), "clips have no name of their own"
    assert found["named_edits"] == 6
    assert (found["named_left"], found["others_left"]) == pytest.approx((0.6, 0.6))
    assert (found["named ecg leads: left"], found["named ecg leads: others left"]) == pytest.approx((0.8, 0.2))
    monkeypatch.setattr(real_devices, "residuals", lambda *_: [np.nan, 0.9, 0.4, 0.7])  # the pacemaker never shows
    real_devices.main([*given, "--model", "tiny", "--films", "3", "--steps", "2"])
    assert "named_edits" not in records.load_record("real_devices", "films")["metrics"]
    monkeypatch.setattr(real_devices, "image_factor", lambda _: 1)
    with pytest.raises(SystemExit):
        real_devices.main([*given, "--model", "tiny"])
    assert "has films of 32 pixels, tiny edits" in capsys.readouterr().err
    patients = phantom_folder / "val"  # not a prepared folder
    with pytest.raises(FileNotFoundError, match="not a prepared data set"):
        real_devices.main([str(patients), str(judge)])
    blind = replace(config, labels=("Cardiomegaly",))
    other = classifier.save_classifier(classifier.build_classifier(blind), blind, tmp_path / "blind")
    with pytest.raises(SystemExit):
        real_devices.main([str(phantom_folder), str(other)])
    assert "must both have the label 'Support Devices'" in capsys.readouterr().err


def test_shares_of_real_devices_are_of_all_films_and_of_those_that_were_read():
    read = pd.DataFrame({"patient_id": list("abcd"), "p_before": [0.9, 0.8, 0.7, 0.2], "p_after": [0.1, 0.6, 0.3, 0.1]})
    drawn = pd.DataFrame({"patient_id": list("aab"), "kind": ["port", "port", "chest drain"], "left": [0.1, -0.5, 1.3]})
    found = real_devices.summarise(read, drawn, pd.DataFrame(), seed=0)
    assert found["left"] == pytest.approx(1.6 / 3) and found["left of port"] == pytest.approx(0.3)
    assert found["drawn_devices"] == 3 and found["left_dark"] == pytest.approx(1 / 3)
    assert (found["films_edited"], found["flip_denominator"]) == (4, 3)
    assert (found["below_half"], found["below_half_as_it_is"]) == (0.75, 0.25)
    assert found["flip_rate"] == pytest.approx(2 / 3)
    assert found["flip_rate_low"] <= found["flip_rate"] <= found["flip_rate_high"]
    without = real_devices.summarise(read.assign(p_before=0.1), drawn.head(0), pd.DataFrame(), seed=0)
    assert "flip_rate" not in without and "left" not in without


@pytest.fixture(scope="module")
def film():
    """A phantom without devices, (512, 512), nowhere black or white."""
    return (render(sample_patients(1, 3).intervene(support_devices=0), 512)[0, 0] * 0.6 + 0.2).numpy()


def cable(rows, first: int, last: int) -> np.ndarray:
    """The attenuation of a cable of rows by column, from its first column to its last one, (512, 512)."""
    columns = np.arange(512)
    away = np.arange(512)[:, None] - np.asarray(rows, float)
    return 0.15 * np.exp(-(away**2) / 4) * ((columns >= first) & (columns <= last))


def drawn_as(path, *lines: str):
    """The devices of the film "film" by rows of a file."""
    path.write_text("\n".join(["file_name,kind,width,points", *lines]) + "\n")
    return lambda film: drawn_devices.load_devices({"film": film}, path)["film"]


def test_a_drawn_curve_is_put_on_its_ridge_and_measured_before_and_after_an_edit(film, tmp_path):
    columns = np.arange(512)
    rows = 200 + 40 * np.sin(columns / 60)
    absorbed = cable(rows, 100, 400)
    shown = 1 - (1 - film) * np.exp(-absorbed)
    points = " ".join(f"{column} {round(rows[column]) + 4}" for column in range(102, 400, 24))
    lines = f"film,ecg leads,5,{points}", "film,other,4,100 450 300 450", "film,other,0,60 60 80 60 80 80 60 80"
    curve, *nothing = devices = drawn_as(tmp_path / "drawn.csv", *lines)(shown)
    assert np.abs(curve.points[10:-10, 0] - rows[curve.points[10:-10, 1].round().astype(int)]).max() < 3.5
    assert [device.kind for device in nothing] == ["other", "other"]
    maps, together = drawn_devices.attenuations(shown, devices)
    inside = (absorbed > 0.02) & (columns > 130) & (columns < 370)
    assert np.abs(maps[0] - absorbed)[inside].mean() < 0.25 * absorbed[inside].mean()
    assert not maps[0][:, 402:].any() and not maps[0][:, :98].any(), "nothing beyond its ends"
    without = 1 - (1 - shown) * np.exp(together)
    assert np.abs(without - film)[inside].mean() < 0.25 * np.abs(shown - film)[inside].mean()
    for edited, left in ((shown, 1), (film, 0), ((shown + film) / 2, 0.5), (1 - (1 - film) * np.exp(absorbed), -1)):
        ours, *others = drawn_devices.residuals(shown, edited, devices)
        assert ours == pytest.approx(left, abs=0.12) and np.isnan(others).all(), "what never showed has no residual"
    maps, together = drawn_devices.attenuations(film, [])
    assert not maps and not together.any() and not drawn_devices.residuals(film, film, [])


def test_cables_that_cross_add_up_and_one_drawn_twice_does_not(film, tmp_path):
    level, steep = cable(np.full(512, 250), 100, 400), cable(np.arange(512), 100, 400)
    shown = 1 - (1 - film) * np.exp(-level - steep)
    one, two = "film,ecg leads,5,110 250 390 250", "film,ecg leads,5,110 110 390 390"
    for lines in ((one, two), (one, two, two)):
        _, together = drawn_devices.attenuations(shown, drawn_as(tmp_path / "drawn.csv", *lines)(shown))
        assert together[250, 250] == pytest.approx(0.3, abs=0.08)
        assert together[250, 150] == pytest.approx(0.15, abs=0.04)
        assert together[180, 180] == pytest.approx(0.15, abs=0.04)


def test_curves_at_the_border_of_a_film_stay_on_their_device(film, tmp_path):
    shown = 1 - (1 - film) * np.exp(-cable(np.full(512, 200), 300, 511) - cable(np.full(512, 506), 100, 400))
    right, below = drawn_as(
        tmp_path / "drawn.csv", "film,ecg leads,4,320 203 508 203", "film,ecg leads,4,110 505 390 505"
    )(shown)
    assert np.abs(right.points[3:, 0] - 200).max() < 1.5 and np.abs(below.points[3:-3, 0] - 506).max() < 1.5


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("film,port,0,1 1", "row 2: a curve has two points below 512 or more, an area three"),
        ("film,port,3,1 1 512 3", "row 2: a curve has two points below 512 or more, an area three"),
        ("film,port,3,1 1 here", "row 2: width 3 and points '1 1 here' are no numbers"),
        ("film,port,3,", "row 2: width 3 and points nan are no numbers"),
        ("film,port,wide,1 1 2 2", "row 2: width 'wide' and points '1 1 2 2' are no numbers"),
        ("film,port,-1,1 1 2 2", "row 2: kind 'port' or width -1.0 is unknown"),
        ("film,cable,3,1 1 2 2", "row 2: kind 'cable' or width 3.0 is unknown: pacemaker, "),
    ],
)
def test_a_wrong_row_of_drawn_devices_is_named(film, tmp_path, row, said):
    with pytest.raises(ValueError, match=said):
        drawn_as(tmp_path / "drawn.csv", row)(film)
    (tmp_path / "drawn.csv").write_text("file_name;kind;width;points\n")
    with pytest.raises(ValueError, match=r"drawn\.csv lacks the column 'file_name'"):
        drawn_devices.load_devices({}, tmp_path / "drawn.csv")
    assert not drawn_as(tmp_path / "drawn.csv", row.replace("film", "another"))(film)


def test_a_judge_of_own_data_is_trained_from_nothing_and_gated(phantom_folder, monkeypatch, tmp_path):
    written = []
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path))
    monkeypatch.setattr(records, "record", lambda name, **content: written.append((name, content)))
    small = [str(phantom_folder), "--network", "densenet-tiny", "--size", "32", "--steps", "1"]
    for minimum in ("0", "1.1"):
        own_judge.main([*small, "--labels", "Pleural Effusion", "Cardiomegaly", "--minimum", minimum])
    (name, first), (_, second) = written
    assert name == "own_judge" and first["dataset"] == "phantom" and first["seconds"] > 0
    assert {"images", "judged", "auc", "auc_low", "auc_high"} == first["metrics"]["Cardiomegaly"].keys()
    assert first["metrics"]["Cardiomegaly"]["judged"] and not second["metrics"]["Cardiomegaly"]["judged"]
    assert not list(tmp_path.iterdir()), "nothing that an earlier run kept is used, and nothing is kept"
    monkeypatch.setattr(own_judge, "trusted", lambda judge, _: judge)
    with pytest.raises(SystemExit, match=r"the gate at 1\.1 kept"):
        own_judge.main([*small, "--labels", "Pleural Effusion", "Cardiomegaly", "--minimum", "1.1"])
