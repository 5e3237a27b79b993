"""The explorer without a browser: studies, recipes, views, novelty, and the widgets clicked from Python."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from benchmarks.unusual_inputs import reference_of
from prism_lib import paths
from prism_lib.apps import panels, session
from prism_lib.apps.explorer import Explorer
from prism_lib.apps.recipe import SWEEPS, Recipe, load_image
from prism_lib.apps.session import Fault, Session, sentence
from prism_lib.editing import settings
from prism_lib.editing.methods import InversionConfig
from prism_lib.editing.settings import EditConfig, Recommendation
from prism_lib.evaluation import novelty
from prism_lib.files import image_hash
from prism_lib.models.classifier import Classifier, ClassifierConfig, build_classifier
from prism_lib.models.pipeline import load_pipeline
from prism_lib.phantom import patients
from prism_lib.reporting import plots
from tests import formats
from tests.tiny import tiny_images, tiny_pipeline

DEVICES = "Support Devices"
SHIPPED = paths.weights() / "phantom-sd" / "model_index.json"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PRISM_DATA", str(tmp_path / "data"))
    return tmp_path / "runs"


@pytest.fixture
def study(runs):
    return Session(tiny_pipeline())


@pytest.fixture
def judge():
    config = ClassifierConfig(labels=("Cardiomegaly", DEVICES), blocks=(1,), growth=4, features=4)
    return Classifier(build_classifier(config).eval(), config.labels)


def patient(present):
    """The first patient of population 0 with, or without, devices."""
    return patients.sample_patients(20, 0).attributes["support_devices"].tolist().index(float(present))


def png(levels):
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG")
    return buffer.getvalue()


LEVELS = np.random.default_rng(1).integers(1, 255, (32, 32), dtype=np.uint8)


def removal(study, settings=None, **more):
    """The removal of the devices of the study's present image, and its recipe."""
    edit = study.edit(remove=[DEVICES])
    return edit, study.recipe(edit, settings, **{"steps": 3, **more})


# --- views ----------------------------------------------------------------------------------------


def test_the_difference_has_the_colours_of_the_figures():
    before = torch.full((1, 4, 4), 0.5)
    after = before + torch.tensor([-0.4, -0.1, 0.0, 0.3])
    figure = plots.counterfactual_sheet(before[None], after[None])
    drawn = figure.axes[2].images[0]
    expected = (drawn.to_rgba((after - before)[0].numpy())[..., :3] * 255).round().astype(int)
    plots.plt.close(figure)
    assert abs(plots.difference(after, before).astype(int) - expected).max() <= 1


def test_eight_bits_come_back_exactly():
    image = torch.from_numpy(LEVELS)[None].float() / 255
    np.testing.assert_array_equal(plots.levels(image), LEVELS)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(plots.png(plots.view(image)))))[..., 1], LEVELS)


def test_an_overlay_leaves_the_rest_alone():
    image, mask = tiny_images(1)[0], torch.zeros(1, 32, 32)
    mask[:, 4:8, 4:8] = 1
    tinted = plots.overlay(image, mask) != plots.view(image)
    assert tinted[4:8, 4:8].any() and not tinted[:4].any() and not tinted[8:].any()


# --- recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("b",), ()])  # none where the target only adds to the source
def test_a_recipe_survives_json_and_its_code(words):
    recipe = Recipe(
        "phantom:0/1", "a b", "a c", words, ("c",), steps=7, mask=(1, 2, 3, 4), settings={"guidance_scale": 1.5}
    )
    assert Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe
    lines = recipe.code().splitlines()
    assert len(lines) == 3
    names = {}
    exec("\n".join(lines[:2]), names)
    assert names["recipe"] == recipe


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": "magic"}, "unknown inversion method 'magic'"),
        ({"mask": "everywhere"}, "mask is 'everywhere'"),
        ({"settings": {"guidance_scale": -1.0}}, r"guidance_scale is -1\.0: .*greater than or equal to 0"),
        ({"settings": {"gidance": 1.0}}, "unknown setting 'gidance'"),
        ({"mask": (1, 2, 3)}, "mask"),
        ({"side": "up"}, "side is 'up'"),
    ],
)
def test_a_recipe_refuses(change, reason):
    with pytest.raises(ValueError, match=reason):
        Recipe("phantom:0/1", "a b", "a c", ("b",), ("c",), **change)


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("phantom:0/x", ValueError, "expected 'phantom:SEED/INDEX'"),
        ("film.png", ValueError, "expected 'phantom:SEED/INDEX' or 'file:PATH'"),
        ("file:no/film.png", FileNotFoundError, "there is no file no/film.png"),
    ],
)
def test_an_image_that_is_not_there(runs, name, error, reason):
    with pytest.raises(error, match=reason):
        load_image(name, 32)


def test_a_model_brings_the_words_that_it_was_fine_tuned_with(tmp_path, runs):
    folder = tmp_path / "runs" / "spine"
    tiny_pipeline().save_pretrained(folder, safe_serialization=True)
    assert Session.load("spine").vocab.name == "phantom"
    words = {"name": "spine", "subject": "spine x-ray", "phrases": {"Scoliosis": "scoliosis"}}
    (folder / "vocabulary.yaml").write_text(json.dumps(words))
    study = Session.load("spine")
    assert study.vocab.subject == "spine x-ray" and list(study.references) == ["spine"]
    assert study.edit(text="remove scoliosis").key == "remove_scoliosis"
    assert Session.load("spine", vocab="skin").vocab.name == "skin"


def test_the_three_lines_give_the_same_image_in_a_fresh_kernel(study, runs, tmp_path):
    """Bit for bit, for a phantom and for an upload with a rectangle."""
    folder = tmp_path / "runs" / "tiny"
    study.pipe.save_pretrained(folder, safe_serialization=True)
    study = Session(load_pipeline(folder), "tiny")
    study.open_phantom(0, patient(True))
    edit, recipe = removal(study)
    made = study.run([recipe], edit)
    study.open_upload("film.png", png(LEVELS))
    edit, recipe = removal(study, mask=(0, 0, 16, 32))
    made += study.run([recipe], edit)
    for outcome in made:
        code = outcome.code() + "\nfrom prism_lib.files import image_hash\nprint(image_hash(image))"
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(paths.root())},
            capture_output=True, text=True, cwd=tmp_path, timeout=300,
        )  # fmt: skip
        assert done.stdout.split() == [image_hash(outcome.result.image)], done.stderr


# --- studies --------------------------------------------------------------------------------------


def test_an_edit_changes_only_what_the_mask_opens(study):
    case = study.open_phantom(0, patient(True))
    assert case.state(DEVICES) is True
    edit, recipe = removal(study, mask=(4, 6, 20, 22))
    (outcome,) = study.run([recipe], edit)
    changed = (outcome.result.image != case.image[0])[0]
    assert changed[4:20, 6:22].any()
    assert not changed[:4].any() and not changed[20:].any() and not changed[:, :6].any()
    assert "with support devices" in recipe.source and "without support devices" in recipe.target
    assert {"ssim", "mask_area", "true_error_ratio"} <= set(outcome.scores)


def test_what_the_judge_reads_fills_in_what_is_not_known(runs, judge):
    study = Session(tiny_pipeline(), judge=judge)
    case = study.open_upload("film.png", png(LEVELS))
    assert case.labels == {} and set(case.readings) == set(judge.labels)
    edit, recipe = removal(study)
    assert ("with cardiomegaly" in recipe.source) == (case.readings["Cardiomegaly"] >= 0.5)
    assert "with support devices" in recipe.source  # an edit says itself what it removes, whatever the judge reads
    (outcome,) = study.run([recipe], edit)
    assert {"reads Cardiomegaly", f"reads {DEVICES}"} <= set(outcome.scores)


@pytest.mark.parametrize(
    ("edit", "control", "reason"),
    [
        ({}, "edit", "Say what should be different"),
        ({"remove": [DEVICES], "text": "remove devices"}, "edit", "not both"),
        ({"text": "remove the zebra"}, "edit", "zebra"),
        ({"add": [DEVICES]}, "edit", "already labelled present"),
        ({"text": "a -> "}, "edit", "needs both prompts"),
        ({"text": "x " * 90 + "-> y"}, "edit", "tokens"),
    ],
)
def test_a_faulty_edit_is_a_sentence_beside_it(study, edit, control, reason):
    study.open_phantom(0, patient(True))
    with pytest.raises(Fault, match=reason) as fault:
        study.recipe(study.edit(**edit))
    assert fault.value.control == control
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("settings", "control", "reason"),
    [
        ({"steps": 0}, "settings", "num_inference_steps is 0"),
        ({"settings": {"word_weight": float("nan")}}, "settings", "word_weight is nan: input should be"),
        ({"mask": (5, 5, 5, 9)}, "settings", "is empty"),
        ({"mask": (0, 0, 33, 9)}, "settings", "leaves the image"),
    ],
)
def test_a_faulty_setting_is_a_sentence_beside_it(study, settings, control, reason):
    study.open_phantom(0, patient(True))
    with pytest.raises(Fault, match=f"(?i){reason}") as fault:
        removal(study, **settings)
    assert fault.value.control == control


def test_without_an_image_there_is_nothing_to_edit(study):
    with pytest.raises(Fault, match="Choose an image first"):
        removal(study)


def test_words_say_the_same_as_buttons(study):
    study.open_phantom(0, patient(True))
    _, pressed = removal(study)
    assert study.recipe(study.edit(text="please remove the support devices"), steps=3) == pressed


def wait():
    """Until the run in the background has ended."""
    for thread in threading.enumerate():
        if thread.name == "prism-explorer":
            thread.join(120)
            assert not thread.is_alive()


def test_a_run_stops_within_a_step_and_the_study_goes_on(study, monkeypatch):
    study.open_phantom(0, patient(True))
    edit, recipe = removal(study, steps=40)
    at_work, go_on, seen, ended = threading.Event(), threading.Event(), [], []

    def progress(share):
        seen.append(share)
        if len(seen) == 3:
            at_work.set()
            assert go_on.wait(30)

    study.start([recipe], edit, progress=progress, preview=lambda _: None, done=lambda *all: ended.append(all))
    assert at_work.wait(60)
    with pytest.raises(Fault, match="An edit is running"):
        study.start([recipe], edit, progress=progress, preview=lambda _: None, done=lambda *all: None)
    study.cancel()
    go_on.set()
    wait()
    assert ended == [([], "Cancelled.")]
    assert len(seen) == 3  # not one step more
    assert study.history == []
    study._stop.clear()
    assert study.run(*([[removal(study)[1]], edit]))[0].result.image.isfinite().all()


@pytest.mark.parametrize(
    ("method", "skip", "steps"), [("edit_friendly", 0.0, 8), ("edit_friendly", 0.75, 2), ("direct", 0.0, 16)]
)
def test_the_progress_is_that_of_the_steps_taken(study, monkeypatch, method, skip, steps):
    """It ends at 1, also where edits leave steps out, with the inversion's steps the first time only."""
    advice = Recommendation(inversion=InversionConfig(skip=skip))
    monkeypatch.setattr(settings, "_recommendation", lambda _: advice)
    study.open_phantom(0, patient(True))
    edit, recipe = removal(study, method=method, steps=8)
    for expected in (steps, min(steps, 8)):
        seen = []
        study.run([recipe], edit, progress=seen.append)
        assert seen == [(step + 1) / expected for step in range(expected)]


def test_a_failure_in_the_background_is_a_sentence(study, monkeypatch):
    study.open_phantom(0, patient(True))
    edit, recipe = removal(study)
    monkeypatch.setattr(Recipe, "run", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA 0x1f")))
    ended = []
    study.start([recipe], edit, progress=lambda _: None, preview=lambda _: None, done=lambda *all: ended.append(all))
    wait()
    assert ended == [([], "There is not enough memory for this: close other notebooks or take a smaller model.")]
    assert not study.running


def test_the_preview_comes_first_and_is_not_kept(study):
    study.open_phantom(0, patient(True))
    edit, recipe = removal(study, steps=12)
    shown = []
    made = study.run([recipe], edit, preview=shown.append)
    assert [outcome.recipe.steps for outcome in shown] == [5] and shown[0].preview
    assert study.history == [made] and not made[0].preview


def test_a_sweep_is_as_many_separate_edits(study):
    study.open_phantom(0, patient(True))
    edit, recipe = removal(study)
    recipes = recipe.sweep("guidance_scale")
    made = study.run(recipes, edit)
    assert [outcome.result.settings.guidance_scale for outcome in made] == list(SWEEPS["guidance_scale"])
    for outcome in made:
        alone = outcome.recipe.run(study.pipe)
        assert torch.equal(outcome.result.image, alone.image)


def test_what_is_saved_reruns(study, runs):
    study.open_upload("film.png", png(LEVELS))
    edit, recipe = removal(study, mask=(0, 0, 16, 32))
    (outcome,) = study.run([recipe], edit)
    folder = outcome.save()
    names = {path.name for path in folder.iterdir()}
    assert names == {"image.png", "image.dcm", "original.png", "mask.png", "difference.png", "record.json"}
    image, original = (np.asarray(Image.open(folder / f"{name}.png")) for name in ("image", "original"))
    np.testing.assert_array_equal(original, LEVELS)
    np.testing.assert_array_equal(image[18:], LEVELS[18:])
    record = json.loads((folder / "record.json").read_text())
    again = Recipe(**record["recipe"]).run(study.pipe)
    assert image_hash(again.image) == record["image_sha256"]
    assert record["settings"]["guidance_scale"] == outcome.result.settings.guidance_scale
    assert str(runs) not in (folder / "record.json").read_text()


def test_a_film_is_saved_at_its_own_size_too(study):
    film = np.random.default_rng(2).integers(1, 255, (80, 60), dtype=np.uint8)
    study.open_upload("film.png", png(film))
    edit, recipe = removal(study, mask=(0, 0, 16, 32))
    (outcome,) = study.run([recipe], edit)
    folder = outcome.save()
    saved = np.asarray(Image.open(folder / "full_size.png"))
    assert saved.shape == film.shape and (saved[:40] != film[:40]).any()
    np.testing.assert_array_equal(saved[40:], film[40:])
    assert json.loads((folder / "record.json").read_text())["full_size"] == "full_size.png"


def test_a_dicom_is_saved_as_a_derived_dicom(study, tmp_path):
    study.open_file(formats.dicom(tmp_path / "film.dcm", np.arange(80 * 60, dtype=np.uint16).reshape(80, 60) % 4000))
    edit, recipe = removal(study, mask=(0, 0, 16, 32))
    folder = study.run([recipe], edit)[0].save()
    made = pydicom.dcmread(folder / "full_size.dcm")
    assert made.pixel_array.shape == (80, 60) and made.ImageType[0] == "DERIVED"


def test_what_cannot_be_put_back_into_its_film_is_saved_all_the_same(study, tmp_path):
    lut, zigzag = pydicom.Dataset(), 15 * np.minimum(np.arange(4096), 4095 - np.arange(4096))
    lut.add_new("LUTDescriptor", "US", [4096, 0, 16])
    lut.add_new("LUTData", "OW", zigzag.astype(np.uint16).tobytes())
    levels = np.arange(80 * 60, dtype=np.uint16).reshape(80, 60) % 4000
    study.open_file(formats.dicom(tmp_path / "film.dcm", levels, VOILUTSequence=[lut]))
    edit, recipe = removal(study, mask=(0, 0, 16, 32))
    folder = study.run([recipe], edit)[0].save()
    said = json.loads((folder / "record.json").read_text())["full_size"]
    assert said.startswith("not written: the VOI LUT does not rise") and not list(folder.glob("full_size.*"))


def test_a_file_that_changed_after_it_was_opened_is_put_back_as_it_was(study, tmp_path):
    film = np.random.default_rng(2).integers(1, 255, (80, 60), dtype=np.uint8)
    (tmp_path / "film.png").write_bytes(png(film))
    study.open_file(tmp_path / "film.png")
    edit, recipe = removal(study, mask=(0, 0, 16, 32))
    (outcome,) = study.run([recipe], edit)
    (tmp_path / "film.png").write_bytes(b"")
    saved = np.asarray(Image.open(outcome.save() / "full_size.png"))
    np.testing.assert_array_equal(saved[40:], film[40:])


def test_a_file_that_changed_before_it_is_opened_again_is_inverted_again(study, tmp_path):
    for level in (40, 90):
        (tmp_path / "film.png").write_bytes(png(np.clip(LEVELS.astype(int) // 2 + level, 0, 255).astype(np.uint8)))
        study.open_file(tmp_path / "film.png")
        edit, recipe = removal(study, mask=(0, 0, 16, 32))
        (outcome,) = study.run([recipe], edit)
        assert torch.equal(outcome.result.factual.cpu(), study.case.image[0])


@pytest.mark.parametrize(("left", "said"), [(60, "cannot be used"), (0, r"is empty \(0 bytes\)")])
def test_a_file_that_is_cut_short_while_it_is_read_is_refused(study, tmp_path, monkeypatch, left, said):
    content = png(LEVELS)
    (tmp_path / "film.png").write_bytes(content)
    before = study.open_upload("before.png", png(LEVELS))
    monkeypatch.setattr(Path, "read_bytes", lambda _: content[:left])  # after its length was looked up
    with pytest.raises(ValueError, match=rf"film\.png {said}"):
        study.open_file(tmp_path / "film.png")
    assert study.case is before


def test_two_explorers_save_the_same_result_in_one_folder(study):
    edits = []
    for session_ in (study, Session(study.pipe)):
        session_.open_upload("film.png", png(LEVELS))
        edit, recipe = removal(session_, mask=(0, 0, 16, 32))
        edits += session_.run([recipe], edit)
    with ThreadPoolExecutor(2) as both:
        folders = set(both.map(lambda outcome: outcome.save(), edits))
    (folder,) = folders
    assert Recipe(**json.loads((folder / "record.json").read_text())["recipe"]) == edits[0].recipe
    for name in ("image", "original", "mask", "difference"):
        Image.open(folder / f"{name}.png").load()
    assert not list(folder.glob(".*"))


def test_a_folder_of_images_is_listed(study, tmp_path):
    for name in ("b.PNG", "below/a.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(LEVELS))
    assert session.list_images(tmp_path) == ["b.PNG", "below/a.png"]
    assert study.open_row(tmp_path, "below/a.png").labels == {}
    (tmp_path / "empty").mkdir()
    with pytest.raises(Fault, match="has no images"):
        session.list_images(tmp_path / "empty")
    with pytest.raises(Fault, match=r"There is no file .*none\.png"):
        study.open_row(tmp_path, "none.png")


def test_a_prepared_folder_is_opened_with_its_labels(study, phantom_folder):
    case = study.open_row(phantom_folder, "test/" + next((phantom_folder / "test").glob("*.png")).name)
    assert set(case.labels) >= {"Cardiomegaly", DEVICES}
    with pytest.raises(Fault, match=r"has no image test/none\.png"):
        study.open_row(phantom_folder, "test/none.png")


def test_a_sentence_is_one_line_with_a_full_stop():
    assert sentence(ValueError("steps is 0\nmore")) == "Steps is 0."
    assert sentence(ValueError("film.png is empty.")) == "film.png is empty."
    assert sentence(KeyError()) == "KeyError."


# --- novelty --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual():
    known, held_out = (patients.render(patients.sample_patients(60, seed), 32) for seed in (1, 2))
    return reference_of(known, held_out, 0.9)


def test_what_is_beyond_the_limits_is_said_to_be_unlike(runs, usual):
    pipe = tiny_pipeline()
    film = patients.render(patients.sample_patients(1, 3), 32)[0]
    for image, unlike in ((film, False), (1 - film, True), (film.flip(1), True)):
        study = Session(pipe, references={"phantom-sd": usual})
        study.open_upload("film.png", png(plots.levels(image)))
        assert ("unlike those that phantom-sd was trained on" in study.case.notice) == unlike
        assert ("explore(" in study.case.notice) == unlike
    study.open_upload("upside_down.png", png(plots.levels(film.flip(1))))
    edit, recipe = removal(study)
    assert study.run([recipe], edit)[0].notice == study.case.notice != ""


@pytest.fixture
def two_models(runs, usual):
    """The model of upright phantoms, and one of phantoms that are upside down."""
    known, held_out = (patients.render(patients.sample_patients(60, seed), 32).flip(2) for seed in (1, 2))
    study = Session(tiny_pipeline(), references={"phantom-sd": usual, "upside": reference_of(known, held_out, 0.9)})
    study.pipes["upside"] = tiny_pipeline()
    return study


def test_the_model_is_that_whose_training_images_an_image_resembles(two_models):
    film = patients.render(patients.sample_patients(1, 3), 32)[0]
    two_models.chosen = ""
    for image, model in ((film, "phantom-sd"), (film.flip(1), "upside"), (film, "phantom-sd")):
        case = two_models.open_upload("film.png", png(plots.levels(image)))
        assert two_models.model == model and case.distances[model] == min(case.distances.values())
        assert removal(two_models)[1].model == model


def test_the_panels_follow_the_model(two_models, tmp_path):
    film = patients.render(patients.sample_patients(1, 3), 32)[0]
    for number, image in enumerate((film, film.flip(1))):
        (tmp_path / f"{number}.png").write_bytes(png(plots.levels(image)))
    two_models.chosen = ""
    explorer = Explorer(two_models, seed=0, data=str(tmp_path))
    assert explorer.source.row.options == ("0.png", "1.png")
    for row, model in (("1.png", "upside"), ("0.png", "phantom-sd")):
        explorer.source.row.value = row
        assert f"Edited by {model}." in explorer.source.resembles.value and explorer.source.line.value == ""
    explorer.source.model.value = "upside"
    assert "resembles those of phantom-sd more" in explorer.result.warning.value


def test_a_chosen_model_stays_and_the_closer_one_is_said(two_models):
    film = patients.render(patients.sample_patients(1, 3), 32)[0]
    case = two_models.open_upload("film.png", png(plots.levels(film.flip(1))))
    assert two_models.model == "phantom-sd" and "resembles those of upside more" in case.notice
    assert two_models.choose("upside").notice == ""
    assert two_models.choose("phantom-sd").notice == case.notice


def test_a_blank_image_resembles_no_model_more_than_another(two_models):
    (levels := np.zeros((32, 32), np.uint8))[5, 5] = 1
    for model in ("upside", "phantom-sd"):
        two_models.choose(model)
        case = two_models.open_upload("almost_black.png", png(levels))
        assert "unlike those" in case.notice and "resembles" not in case.notice
        assert set(case.distances.values()) == {np.inf}


def test_an_image_that_the_chosen_model_cannot_take_leaves_all_as_it_was(two_models, monkeypatch):
    case = two_models.open_upload("film.png", png(LEVELS))
    monkeypatch.setattr(session, "image_size", lambda _: 64)
    with pytest.raises(ValueError, match="smaller than 64x64"):
        two_models.choose("upside")
    assert two_models.model == two_models.chosen == "phantom-sd" and two_models.case is case


def test_the_list_keeps_the_model_where_another_cannot_be_used(two_models, monkeypatch, tmp_path):
    (tmp_path / "film.png").write_bytes(png(LEVELS))
    explorer = Explorer(two_models, seed=0, data=str(tmp_path))
    monkeypatch.setattr(session, "image_size", lambda _: 64)
    explorer.source.model.value = "upside"
    assert "smaller than 64x64" in explorer.source.line.value and explorer.source.model.value == "phantom-sd"
    monkeypatch.undo()
    explorer.source.model.value = "upside"
    assert explorer.source.line.value == "" and two_models.model == two_models.chosen == "upside"


@pytest.mark.parametrize("model", ["film-sd", "/weights/film-sd"])
def test_edits_outside_what_a_model_was_measured_for_are_said(runs, judge, model):
    study = Session(tiny_pipeline(), model, dataclasses.replace(judge, name="phantom-judge"))
    assert set(study.open_upload("film.png", png(LEVELS)).readings) == {DEVICES}, "read by film-judge"
    measured = [study.edit(remove=[name]) for name in (DEVICES, "pacemaker")]
    others = [study.edit(add=[name]) for name in ("Cardiomegaly", "pacemaker")] + [study.edit(remove=["Cardiomegaly"])]
    for edit, said in [(edit, False) for edit in measured] + [(edit, True) for edit in others]:
        (outcome,) = study.run([study.recipe(edit, steps=2)], edit)
        assert ("outside what it was trained for" in outcome.notice) == said


def test_a_reference_of_other_images_says_nothing(runs, usual):
    study = Session(tiny_pipeline(), references={"phantom-sd": dataclasses.replace(usual, shape=(3, 32, 32))})
    study.open_upload("noise.png", png(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)))
    assert study.case.notice == ""


def test_a_detail_that_the_model_hardly_hears_is_said_with_the_result(runs, monkeypatch):
    study = Session(tiny_pipeline())
    study.open_phantom(0, patient(True))
    for heard, expected in ((0.1, "pacemaker and central venous catheter read almost the same"), (0.5, "")):
        monkeypatch.setattr(session, "told_apart", lambda *_, heard=heard: heard)
        edit = study.edit(text="remove the pacemaker")
        (outcome,) = study.run([study.recipe(edit, steps=3)], edit)
        assert expected in outcome.notice and bool(outcome.notice) == bool(expected)


# --- widgets --------------------------------------------------------------------------------------


@pytest.fixture
def explorer(study):
    explorer = Explorer(study, seed=0)
    explorer.source.patient.value = patient(True)
    explorer.settings.steps.value = 10
    return explorer


def test_sliders_follow_the_number_of_steps_until_they_are_moved(explorer, monkeypatch):
    usual = {"guidance_scale": 3.0, "self_replace_steps": 0.1, "cross_replace_steps": 0.2}
    few = usual | {"self_replace_steps": 0.6, "cross_replace_steps": 0.5}
    monkeypatch.setattr(panels, "recommended", lambda _, pair, steps: EditConfig(**(usual if steps > 15 else few)))
    panel = explorer.settings
    panel.steps.value = 20
    assert {name: panel.sliders[name].value for name in usual} == usual and not panel.values()["settings"]
    panel.sliders["cross_replace_steps"].value = 0.9
    panel.steps.value = 12
    assert panel.sliders["self_replace_steps"].value == 0.6
    assert panel.values()["settings"] == {"cross_replace_steps": 0.9}


def test_click_remove_and_run(explorer):
    original = explorer.viewer.before
    assert explorer.viewer.after == b"" and explorer.viewer.place == [0, 0]
    explorer.edit.buttons["remove", DEVICES].value = True
    explorer.settings.mask.value = "off"  # untrained weights change too little for the automatic mask
    explorer.run.click()
    wait()
    assert "Done in" in explorer.status.value
    assert explorer.progress.value == 1
    assert explorer.viewer.before == original != explorer.viewer.after != b""
    shown = [np.asarray(Image.open(io.BytesIO(made)))[..., 0] for made in (original, explorer.viewer.after)]
    np.testing.assert_array_equal(shown[0], plots.levels(explorer.session.case.image[0]))
    np.testing.assert_array_equal(shown[1], plots.levels(explorer.outcome.result.image))
    assert explorer.viewer.place == [1, 1] and "support devices" in explorer.viewer.title
    explorer.save.click()
    assert (paths.runs() / "explorer").is_dir() and "Saved in" in explorer.files.value
    explorer.show_code.click()
    assert "recipe.run().image" in explorer.files.value


def step(explorer, by):
    """As the viewer's arrows do."""
    explorer.viewer._handle_custom_msg({"step": by}, [])


def test_the_arrows_go_through_the_results_of_the_image(explorer):
    explorer.edit.buttons["remove", DEVICES].value = True
    for strength in (2.0, 3.0, 5.0):
        explorer.settings.sliders["guidance_scale"].value = strength
        explorer.run.click()
        wait()
    for by, strength, number in ((1, 5.0, 3), (-1, 3.0, 2), (-1, 2.0, 1), (-1, 2.0, 1), (1, 3.0, 2)):
        step(explorer, by)
        assert explorer.outcome.used.guidance_scale == strength and explorer.viewer.place == [number, 3]
        assert f"strength {strength:g}" in explorer.viewer.title and not explorer.save.disabled
    explorer.source.patient.value = patient(False)
    step(explorer, -1)
    assert explorer.outcome is None and explorer.viewer.place == [0, 0]
    explorer.source.patient.value = patient(True)
    assert explorer.outcome is None and explorer.viewer.place == [0, 3]
    step(explorer, -1)
    assert explorer.viewer.place == [3, 3]


def test_a_rectangle_on_the_picture_is_the_mask(explorer):
    explorer.viewer.box = [4, 6, 20, 22]
    assert explorer.settings.values()["mask"] == (4, 6, 20, 22) and explorer.settings.mask.value == "rectangle"
    assert explorer.viewer.box == [4, 6, 20, 22]
    explorer.settings.columns.value = (2, 22)
    assert explorer.viewer.box == [4, 2, 20, 22]
    explorer.viewer.box = [0, 0, 16, 16]
    explorer.edit.buttons["remove", DEVICES].value = True
    explorer.run.click()
    wait()
    result = explorer.outcome.result
    assert (result.image != result.factual)[:, 16:].sum() == 0 < (result.image != result.factual)[:, :16].sum()
    explorer.settings.mask.value = "automatic"
    assert explorer.viewer.box == []


def test_a_panel_shows_that_it_is_at_work(explorer, monkeypatch):
    seen = []
    monkeypatch.setattr(explorer.session, "open_phantom", lambda *_: seen.append(explorer.source._dom_classes))
    explorer.source.patient.value = 5
    assert "prism-works" in seen[0] and "prism-works" not in explorer.source._dom_classes
    monkeypatch.setattr(explorer.session, "open_phantom", lambda *_: [][0])
    explorer.source.patient.value = 6
    assert "prism-works" not in explorer.source._dom_classes and "index out of range" in explorer.source.line.value


def test_candidates_are_chosen_by_a_click(explorer):
    explorer.edit.text.value = "remove support devices"
    explorer.settings.steps.value = 3
    explorer.settings.sweep.value = "guidance_scale"
    explorer.run.click()
    wait()
    thumbnails = explorer.result.candidates.children
    assert len(thumbnails) == len(SWEEPS["guidance_scale"])
    thumbnails[2].children[1].click()
    assert explorer.outcome.result.settings.guidance_scale == SWEEPS["guidance_scale"][2]


def test_an_image_opened_during_a_run_stays_on_the_screen(explorer, monkeypatch):
    done, finish = explorer._done, threading.Event()
    monkeypatch.setattr(explorer, "_done", lambda *all: (finish.wait(60), done(*all)))
    explorer.edit.buttons["remove", DEVICES].value = True
    explorer.run.click()
    explorer.source.patient.value = patient(False)
    finish.set()
    wait()
    assert explorer.outcome is None and explorer.save.disabled and not explorer.run.disabled
    assert "not edited yet" in explorer.result.caption.value
    assert ("add", DEVICES) in explorer.edit.buttons


def test_complaints_stand_beside_their_control(explorer):
    explorer.run.click()
    assert "Say what should be different" in explorer.edit.line.value
    explorer.edit.buttons["remove", DEVICES].value = True
    explorer.settings.mask.value = "rectangle"
    explorer.settings.rows.value = (4, 4)
    explorer.run.click()
    assert "is empty" in explorer.settings.line.value and explorer.edit.line.value == ""
    explorer.source.folder.value = "nowhere"
    explorer.source.kind.value = "folder"
    assert "not a prepared data set" in explorer.source.line.value


def test_the_strength_is_that_of_the_settings_used(explorer, monkeypatch):
    assert "twice" not in explorer.settings.sliders["guidance_scale"].tooltip
    explorer.source.patient.value = patient(False)
    explorer.edit.buttons["add", DEVICES].value = True
    monkeypatch.setattr(settings, "_recommendation", lambda _: Recommendation({"addition_factor": 1.75}))
    explorer.settings.sliders["guidance_scale"].value = 2.0
    explorer.run.click()
    wait()
    assert "strength 3.5)" in explorer.result.caption.value


def test_a_slider_that_was_not_moved_is_left_to_the_model(explorer):
    assert explorer.settings.values()["settings"] == {}
    explorer.settings.sliders["self_replace_steps"].value = 0.95
    assert explorer.settings.values()["settings"] == {"self_replace_steps": 0.95}


def test_a_broken_upload_leaves_the_session_as_it_was(explorer):
    before = explorer.session.case
    file = {
        "name": "film.png",
        "type": "",
        "size": 4,
        "content": memoryview(b"oops"),
        "last_modified": datetime.now(UTC),
    }
    explorer.source.upload.set_trait("value", (file,))
    assert "film.png cannot be used: not an image" in explorer.source.line.value
    assert explorer.session.case is before
    explorer.source.upload.set_trait("value", ({**file, "content": memoryview(png(LEVELS))},))
    assert explorer.source.line.value == "" and explorer.session.case.title == "film.png"
    assert ("remove", DEVICES) in explorer.edit.buttons and ("add", DEVICES) in explorer.edit.buttons


def test_a_label_is_not_removed_and_added_at_once(explorer):
    explorer.session.open_upload("film.png", png(LEVELS))
    explorer.edit.show(explorer.session.case)
    explorer.edit.buttons["remove", DEVICES].value = True
    explorer.edit.buttons["add", DEVICES].value = True
    assert explorer.edit.pressed("remove") == [] and explorer.edit.pressed("add") == [DEVICES]


def test_every_control_says_what_it_does(explorer):
    controls = [*vars(explorer.settings).values(), *vars(explorer.source).values(), *vars(explorer).values()]
    silent = [
        control.description
        for control in controls
        if getattr(control, "description", "") and hasattr(control, "tooltip") and not control.tooltip
    ]
    assert silent == []


def test_without_a_front_end_there_is_a_picture(explorer):
    bundle = explorer._repr_mimebundle_()
    assert bundle["image/png"] and "application/vnd.jupyter.widget-view+json" in bundle
    assert Image.open(io.BytesIO(explorer.picture())).size == (32, 32)
    explorer.edit.buttons["remove", DEVICES].value = True
    explorer.run.click()
    wait()
    assert Image.open(io.BytesIO(explorer.picture())).size[0] > 300


def test_the_shipped_reference_is_of_phantoms():
    reference = novelty.load("phantom-sd")
    if reference is None:
        pytest.skip("no reference is shipped: python -m benchmarks.unusual_inputs phantom phantom-sd --save writes it")
    phantom = patients.render(patients.sample_patients(4, 5), 256)
    assert not any(map(reference.is_new, reference.scores(phantom).tolist())), "stale: it is of other phantoms"
    assert all(map(reference.is_new, reference.scores(phantom.flip(2)).tolist()))
