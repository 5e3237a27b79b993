"""Bulk generation: the same files whatever the processes, every output once whatever is killed, bad input first."""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from prism_lib import devices, paths
from prism_lib.apps import bulk, bulk_plan, cli, recipe
from prism_lib.apps.bulk_plan import BulkConfig, Choice, configured, plan
from prism_lib.data.dicom import read as read_film
from prism_lib.data.folder import load_info, load_table, read_images
from prism_lib.data.preparation import PrepareConfig, prepare
from prism_lib.devices import threads
from prism_lib.editing.counterfactuals import edit, sweep
from prism_lib.editing.inversion import invert
from prism_lib.editing.settings import FILE, EditConfig, grid
from prism_lib.evaluation.selection import (
    SIMILARITY,
    Criteria,
    GuideScorer,
    IdentityScorer,
    SimilarityScorer,
    load_guide,
    select,
)
from prism_lib.files import exclusive
from prism_lib.models.classifier import Classifier, ClassifierConfig, build_classifier, save_classifier
from prism_lib.models.image_text import load_image_text_model
from prism_lib.models.pipeline import load_pipeline
from prism_lib.reporting import plots
from tests.formats import dicom
from tests.tiny import clip_model, tiny_pipeline

STEPS = 2
EDITS = """\
file_name,edit,guidance_scale
,remove_support_devices,
all,enlarge the heart,5
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder, safe_serialization=True)
    return str(folder)


@pytest.fixture
def config(phantom_folder, model, tmp_path):
    """Two edits of the test split, some twenty counterfactuals."""
    (tmp_path / "edits.csv").write_text(EDITS)
    return BulkConfig(
        str(phantom_folder),
        str(tmp_path / "edits.csv"),
        str(tmp_path / "out"),
        split="test",
        model=model,
        num_inference_steps=STEPS,
    )


def with_edits(config, tmp_path, content, suffix="json"):
    path = tmp_path / f"other.{suffix}"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return replace(config, edits=str(path))


def outputs(config, tasks, pipe=None):
    return {task.output for task in bulk.named(config, tasks, pipe or tiny_pipeline())}


def manifest(out, name=bulk_plan.MANIFEST):
    with (out / name).open(newline="") as file:
        return list(csv.DictReader(file))


def written(out):
    """Everything below `images` and the manifest, by name."""
    files = [*(out / "images").rglob("*"), out / bulk_plan.MANIFEST, out / bulk_plan.REJECTS]
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.is_file()}


def assert_whole(out, planned):
    """Every output once, each as its row says, and nothing else."""
    rows, files = manifest(out), written(out)
    assert len(rows) == planned == len(files) - 1
    assert {row["file_name"] for row in rows} == files.keys() - {bulk_plan.MANIFEST}
    for row in rows:
        assert hashlib.sha256(files[row["file_name"]]).hexdigest() == row["sha256"]


@pytest.fixture
def done(config, tmp_path):
    """A finished run."""
    assert bulk.generate(config) == len(plan(config))
    return tmp_path / "out"


# --- what is made ---------------------------------------------------------------------------------


def test_every_task_is_an_image_and_a_row(config, done):
    tasks = plan(config)
    assert_whole(done, len(tasks))
    row, task = manifest(done)[0], min(tasks, key=lambda task: (task.file_name, task.edit.key))
    assert row["source_file"] == task.file_name and row["edit"] == task.edit.key
    assert row["file_name"].startswith(f"images/{task.file_name.removesuffix('.png')}__{task.edit.key}__")
    assert (row["source_text"], row["text"]) == (task.pair.source, task.pair.target)
    assert json.loads(row["settings"])["num_inference_steps"] == STEPS
    assert 0 <= float(row["score_mask_area"]) <= 1
    assert not list((done / "parts").iterdir())


def test_what_the_reader_says_of_a_sentence_is_in_the_manifest(config, tmp_path, done):
    assert {row["note"] for row in manifest(done)} == {""}
    tasks = plan(with_edits(config, tmp_path, [{"edit": "remove the large pleural effusion"}]))
    assert {task.about["note"] for task in tasks} == {"'large' has no effect: captions do not say it."}


def test_the_labels_are_those_of_the_counterfactual(config, done):
    table = load_table(config.data, "test").set_index("file_name")
    for row in manifest(done):
        removes = row["edit"] == "remove_support_devices"
        before, label = table.loc[row["source_file"]], "Support Devices" if removes else "Cardiomegaly"
        assert (before[label], float(row[label])) == ((1, 0) if removes else (0, 1))
        assert float(row["Pleural Effusion"]) == before["Pleural Effusion"]
        scale = EditConfig().guidance_scale if removes else 5.0  # a model without recommendations
        assert json.loads(row["settings"])["edit"]["guidance_scale"] == scale


def test_pixels_are_those_of_the_editor_and_the_rest_is_the_input(config, done):
    (batch, *_) = bulk_plan.batches(plan(config), config.batch_size)
    table = load_table(config.data).set_index("file_name").loc[[task.file_name for task in batch]]
    images, pairs = read_images(config.data, table.reset_index()), [task.pair for task in batch]
    with threads(config.threads):
        pipe = load_pipeline(config.model)
        inversion = invert(pipe, images, [pair.source for pair in pairs], num_inference_steps=STEPS)
        results = edit(pipe, inversion, pairs, {**batch[0].settings.edit, "batch_size": len(batch)})
    rows = {(row["source_file"], row["edit"]): row for row in manifest(done)}
    untouched = 0
    for task, result, image in zip(batch, results, images, strict=True):
        with Image.open(done / rows[task.file_name, task.edit.key]["file_name"]) as file:
            assert (file.format, file.mode) == ("PNG", "L")
            pixels = np.asarray(file)
        assert np.array_equal(pixels, (result.image[0].double() * 255).round().numpy())
        outside = (result.mask[0] == 0).numpy()
        assert np.array_equal(pixels[outside], (image[0] * 255).round().numpy()[outside])
        untouched += outside.sum()
    assert untouched > 0


def test_sixteen_bits_are_finer_and_keep_the_input(config, tmp_path):
    fine = replace(config, bits=16, out=str(tmp_path / "fine"))
    bulk.generate(fine)
    bulk.generate(config)
    rows = [{(row["source_file"], row["edit"]): row for row in manifest(tmp_path / name)} for name in ("fine", "out")]
    levels = set()
    for key, row in rows[0].items():
        pixels = np.asarray(Image.open(tmp_path / "fine" / row["file_name"])).astype(int)
        coarse = np.asarray(Image.open(tmp_path / "out" / rows[1][key]["file_name"]))
        assert np.array_equal(np.round(pixels / 257), coarse)
        levels |= set((pixels % 257).ravel().tolist())
    assert len(levels) > 10
    assert {row["file_name"] for row in rows[0].values()}.isdisjoint({row["file_name"] for row in rows[1].values()})


def test_edits_are_put_back_into_the_films_themselves(tmp_path, model, monkeypatch):
    root = tmp_path / "films"
    root.mkdir()
    films = np.random.default_rng(0).integers(0, 255, (6, 60, 80), dtype=np.uint8)
    for number, film in enumerate(films):
        Image.fromarray(film).save(root / f"{number}.png")
    rows = [f"{number}.png,p{number},1" for number in range(len(films))]
    (root / "metadata.csv").write_text("\n".join(["file_name,patient_id,Support Devices", *rows]))
    made = {"dataset": "table", "data_root": root, "mode": "L", "size": 32, "vocabulary": "phantom"}
    folder = prepare(PrepareConfig(output=tmp_path / "prepared", **made))
    (tmp_path / "edits.csv").write_text("edit\nremove_support_devices\n")
    given = {"data": str(folder), "edits": str(tmp_path / "edits.csv"), "out": str(tmp_path / "out"), "model": model}
    config = BulkConfig(**given, num_inference_steps=STEPS, full_size=True, edit={"confine": 0.0})
    assert bulk.generate(config) == len(films) and bulk.generate(config) == 0
    for row in csv.DictReader((tmp_path / "out" / "metadata.csv").open()):
        film = films[int(row["source_file"].rpartition("/")[2].removesuffix(".png"))]
        new = np.asarray(Image.open(tmp_path / "out" / row["full_size"]))
        edited, image = (
            np.asarray(Image.open(tmp_path / "out" / row["file_name"])),
            read_images(folder, load_table(folder).query("file_name == @row['source_file']")),
        )
        same = (edited == plots.levels(image[0])).all()
        assert new.shape == film.shape and (new == film).all() == same
    monkeypatch.setattr(recipe, "put_back_file", lambda film, *_: {}[film.name])
    bulk.generate(replace(config, out=str(tmp_path / "unfit")))
    for row in csv.DictReader((tmp_path / "unfit" / "metadata.csv").open()):
        assert row["full_size"].startswith("not written: ") and (tmp_path / "unfit" / row["file_name"]).is_file()
    with pytest.raises(ValueError, match=r"header: .*\.png is no DICOM, so there is no PatientID to copy"):
        plan(replace(config, out_format="DICOM", header=("PatientID",)))
    (root / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"full_size or header: 3\.png not found below"):
        plan(config)


def test_what_cannot_be_put_back_is_refused(config, tmp_path):
    for given in ({"full_size": True}, {"out_format": "DICOM", "header": ("PatientAge",)}):
        with pytest.raises(ValueError, match=r"full_size and header need the whole films, and .* was not made of"):
            plan(replace(config, **given))


@pytest.mark.parametrize("bits", [8, 16])
def test_png_gives_every_level_of_an_eight_bit_input_back(bits):
    levels = torch.arange(256).view(1, 16, 16)
    content = plots.png(plots.levels(levels.float() / 255, bits))
    with Image.open(io.BytesIO(content)) as file:
        assert np.array_equal(np.asarray(file).astype(int), levels[0].numpy() * (1 if bits == 8 else 257))


def draw(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The data root, with masks of the images' size and others."""
    monkeypatch.setenv("PRISM_DATA", str(tmp_path / "data"))
    left = np.zeros((32, 32), np.uint8)
    left[:, :10] = 255
    draw(tmp_path / "data" / "masks" / "left.png", left)
    draw(tmp_path / "data" / "masks" / "small.png", left[:16])
    draw(tmp_path / "data" / "masks" / "empty.png", 0 * left)
    draw(tmp_path / "outside.png", left)
    (tmp_path / "data" / "masks" / "text.png").write_text("no image")
    return tmp_path / "data"


def test_a_row_says_where_its_edit_may_show(config, tmp_path, root):
    size = load_info(config.data)["config"]["size"]
    assert size == 32
    first, second = (task.file_name for task in plan(config)[:2])
    row = {"edit": "remove_support_devices", "confine": 0.0}
    rows = [
        row | {"mask": "masks/left.png", "file_name": first},
        row | {"mask": [0, 0.5, 1, 1], "file_name": second},  # in the same batch, with another mask
        row | {"keep": "5, 0, 32, 32", "mask": "masks/left.png", "file_name": first},
        row | {"file_name": first},
    ]
    config = with_edits(config, tmp_path, rows)
    assert [len(batch) for batch in bulk_plan.batches(plan(config), 4)] == [2, 1, 1]
    assert bulk.generate(config) == 4 and bulk.generate(config) == 0
    found, columns = {}, np.arange(32)
    for made in manifest(tmp_path / "out"):
        image = read_images(config.data, load_table(config.data).query("file_name == @made['source_file']"))
        edited = np.asarray(Image.open(tmp_path / "out" / made["file_name"]))
        found[made["source_file"], made["mask"], made["keep"]] = edited != plots.levels(image[0])
    changed = found[first, "masks/left.png", ""]
    assert changed[:, :10].any() and not changed[:, 10:].any()
    changed = found[second, "0,0.5,1,1", ""]
    assert changed[16:].any() and not changed[:16].any()
    changed = found[first, "masks/left.png", "5, 0, 32, 32"]
    assert changed[:, :5].any() and not changed[:, columns >= 5].any()
    before = outputs(config, plan(config)[:1])
    draw(root / "masks" / "left.png", np.full((32, 32), 255, np.uint8))
    bulk_plan.region.cache_clear()
    assert before.isdisjoint(outputs(config, plan(config)[:1])), "another mask of the same name"


@pytest.mark.parametrize(
    ("areas", "message"),
    [
        ({"mask": "masks/small.png"}, r"row 1: masks/small\.png has 32 x 16 pixels, and the images 32 x 32"),
        ({"mask": "masks/empty.png"}, r"row 1: masks/empty\.png is empty: no pixel is brighter than half"),
        ({"keep": "masks/empty.png"}, r"row 1: masks/empty\.png is empty"),
        ({"mask": "../outside.png"}, r"row 1: \.\./outside\.png is outside of the data root"),
        ({"mask": "masks/none.png"}, r"row 1: .*masks/none\.png is no image: No such file"),
        ({"mask": "masks/text.png"}, r"row 1: .*masks/text\.png is no image: it cannot be decoded"),
        ({"mask": "10,10,10,20"}, "row 1: '10,10,10,20' is no box x0,y0,x1,y1 in an image of 32 x 32"),
        ({"mask": "0,0,33,20"}, "row 1: '0,0,33,20' is no box"),
        ({"mask": "0,0,1"}, "row 1: '0,0,1' is no box"),
        ({"mask": [0, 0, 0.5, "nan"]}, "row 1: '0,0,0.5,nan' is no box"),
        ({"keep": "0,0,1,1"}, "row 1: keep leaves no pixel to edit"),
        ({"mask": "0,0,10,32", "keep": "masks/left.png"}, "row 1: mask and keep leave no pixel to edit"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named_before_the_run(config, tmp_path, root, areas, message):
    bulk_plan.region.cache_clear()
    with pytest.raises(ValueError, match=message):
        plan(with_edits(config, tmp_path, [{"edit": "remove_support_devices"} | areas]))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_dicom_has_the_pixels_of_the_png_and_the_recipe(config, tmp_path, bits):
    config = replace(config, bits=bits, edits=str(with_edits(config, tmp_path, [{"edit": "enlarge the heart"}]).edits))
    export = replace(config, out=str(tmp_path / "dicom"), out_format="DICOM")
    bulk.generate(config)
    bulk.generate(export)
    assert bulk.generate(export) == 0
    assert_whole(tmp_path / "dicom", len(plan(config)))
    pngs = {row["source_file"]: tmp_path / "out" / row["file_name"] for row in manifest(tmp_path / "out")}
    for row in manifest(tmp_path / "dicom"):
        made = pydicom.dcmread(tmp_path / "dicom" / row["file_name"])
        png = np.asarray(Image.open(pngs[row["source_file"]]))
        assert made.pixel_array.dtype == png.dtype == f"uint{bits}" and np.array_equal(made.pixel_array, png)
        told = json.loads(made.get("ImageComments") or made.DerivationDescription.partition(". ")[2])
        assert told["target"] == row["text"] and told["edit"] == json.loads(row["settings"])["edit"]
        assert row["source_file"] not in json.dumps(told) and not made.PatientID
    with pytest.raises(ValueError, match="as DICOM; images are trained on as PNG"):
        bulk.files(tmp_path / "dicom")


def test_what_leaves_in_full_size_names_the_patient_only_where_it_is_asked_for(tmp_path, model):
    root = tmp_path / "films"
    films = np.random.default_rng(0).integers(0, 4096, (6, 60, 80), dtype=np.uint16)
    for number, film in enumerate(films):
        dicom(root / f"{number}.dcm", film, PatientID=f"SECRET-{number}", BurnedInAnnotation="NO")
    rows = [f"{number}.dcm,p{number},1" for number in range(len(films))]
    (root / "metadata.csv").write_text("\n".join(["file_name,patient_id,Support Devices", *rows]))
    made = {"dataset": "dicom", "data_root": root, "mode": "L", "size": 32, "vocabulary": "phantom"}
    folder = prepare(PrepareConfig(output=tmp_path / "prepared", **made))
    (tmp_path / "edits.csv").write_text('edit,mask\nremove_support_devices,"0,0,.5,1"\n')
    given = {"data": str(folder), "edits": str(tmp_path / "edits.csv"), "model": model, "num_inference_steps": STEPS}
    config = BulkConfig(**given, out=str(tmp_path / "out"), full_size=True, out_format="DICOM")
    named = replace(config, out=str(tmp_path / "named"), header=("PatientID",))
    for run in (config, named):
        assert bulk.generate(run) == len(films)
        out = tmp_path / run.out
        for row in manifest(out):
            number = row["source_file"].rpartition("/")[2].removesuffix(".png")
            for file in (out / row["file_name"], out / row["full_size"]):
                exported = pydicom.dcmread(file)
                assert exported.PatientID == (f"SECRET-{number}" if run.header else "")
                assert (b"SECRET" in file.read_bytes()) == bool(run.header) and b"Doe" not in file.read_bytes()
                assert exported.BurnedInAnnotation == "NO" and "StationName" not in exported
            assert exported.pixel_array.shape == (60, 80)
            levels = read_film(root / f"{number}.dcm").levels[:, 45:]
            np.testing.assert_allclose(exported.pixel_array[:, 45:], levels * 257, atol=0.51)
    with pytest.raises(ValueError, match="copied with out_format DICOM only"):
        replace(named, out_format="PNG")
    with pytest.raises(ValueError, match="header field 'PatientNumber' is no keyword"):
        replace(named, header=("PatientNumber",))


# --- chosen among candidates ----------------------------------------------------------------------

SWEEP = {"self_replace_steps": [0.0, 1.0], "guidance_scale": [2.0, 9.0]}


@pytest.fixture
def guide(tmp_path, monkeypatch):
    """An untrained classifier that reads the labels of the phantom."""
    monkeypatch.setenv("PRISM_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    config = ClassifierConfig(blocks=(1,), growth=4, features=4, seed=1)
    save_classifier(build_classifier(config), config, tmp_path / "weights" / "guide")
    return "guide"


def by_hand(config, tasks, scorers, criteria):
    """The same choice by the parts of the library, image by image."""
    table = load_table(config.data).set_index("file_name").loc[[task.file_name for task in tasks]]
    images, pairs = read_images(config.data, table.reset_index()), [task.pair for task in tasks]
    with threads(config.threads):
        pipe = load_pipeline(config.model)
        inversion = invert(pipe, images, [pair.source for pair in pairs], num_inference_steps=STEPS)
        swept = sweep(pipe, inversion, pairs, grid(config.edit, **SWEEP))
        return [select([own], scorers(task.edit), criteria)[0] for own, task in zip(swept, tasks, strict=True)]


def test_the_winner_is_that_of_selection_by_hand(config, tmp_path, guide):
    row = {"edit": "remove_support_devices", "sweep": SWEEP, "guide": guide, "at_most": {"change": 0.9}}
    config = with_edits(config, tmp_path, [row])
    bulk.generate(config)
    rows, tasks = {row["source_file"]: row for row in manifest(tmp_path / "out")}, plan(config)[: config.batch_size]
    assert len(rows) == len(plan(config)) and not (tmp_path / "out" / bulk_plan.REJECTS).exists()
    criteria = Criteria("guide_gain", at_most={"change": 0.9})
    chosen = by_hand(config, tasks, lambda e: [IdentityScorer(), GuideScorer(load_guide(guide), e)], criteria)
    for task, selection in zip(tasks, chosen, strict=True):
        row = rows[task.file_name]
        candidates = json.loads(row["candidates"])
        assert (row["status"], int(row["winner"]), len(candidates)) == ("selected", selection.winner, 4)
        assert [c["settings"] for c in candidates] == [
            {"self_replace_steps": s, "guidance_scale": g}
            for s in SWEEP["self_replace_steps"]
            for g in SWEEP["guidance_scale"]
        ]
        assert candidates[selection.winner]["scores"]["guide_gain"] == max(
            c["scores"]["guide_gain"] for c in candidates
        )
        assert float(row["score_guide_gain"]) == pytest.approx(
            selection.scores[selection.winner]["guide_gain"], abs=1e-6
        )
        pixels = np.asarray(Image.open(tmp_path / "out" / row["file_name"]))
        assert np.array_equal(pixels, (selection.best.image[0] * 255).round().numpy())


def test_an_image_text_model_may_choose(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path / "runs"))
    clip_model().save_pretrained(tmp_path / "runs" / "model" / "clip")
    tiny_pipeline().tokenizer.save_pretrained(tmp_path / "runs" / "model" / "tokenizer")
    row = {"edit": "remove_support_devices", "sweep": SWEEP, "similarity": "model/clip", "at_most": {"directional": 2}}
    config = with_edits(config, tmp_path, [row])
    bulk.generate(config)
    rows, tasks = {row["source_file"]: row for row in manifest(tmp_path / "out")}, plan(config)[: config.batch_size]
    scorers = [IdentityScorer(), SimilarityScorer(load_image_text_model("model/clip"))]
    chosen = by_hand(config, tasks, lambda _: scorers, Criteria("directional"))
    for task, selection in zip(tasks, chosen, strict=True):
        assert int(rows[task.file_name]["winner"]) == selection.winner
        for name in SIMILARITY:
            score = selection.scores[selection.winner][name]
            assert float(rows[task.file_name][f"score_{name}"]) == pytest.approx(score, abs=1e-5)
    before = outputs(config, tasks)
    clip_model(seed=1).save_pretrained(tmp_path / "runs" / "model" / "clip")
    assert before.isdisjoint(outputs(config, tasks))


def test_that_no_candidate_passed_is_an_outcome_and_not_tried_again(config, tmp_path):
    name = plan(with_edits(config, tmp_path, [{"edit": "remove_support_devices"}]))[0].file_name
    never = {"edit": "remove_support_devices", "sweep": SWEEP, "best": "ssim", "at_least": {"ssim": 2}}
    rows = [never | {"file_name": name}, {"edit": "remove_support_devices", "file_name": name}]
    config, out = with_edits(config, tmp_path, rows), tmp_path / "out"
    assert bulk.generate(config) == 2
    (made,), (rejected,) = manifest(out), manifest(out, bulk_plan.REJECTS)
    assert (made["status"], rejected["status"]) == ("made", "no candidate passed")
    assert not (out / rejected["file_name"]).exists() and rejected["winner"] == rejected["sha256"] == ""
    for candidate in json.loads(rejected["candidates"]):
        assert candidate["failures"] == [f"ssim {candidate['scores']['ssim']:.4g} < 2"]
    before = written(out)
    assert bulk.generate(config) == 0 and written(out) == before
    assert list(bulk.files(out).values()) == [out / made["file_name"]]


@pytest.mark.slow
def test_two_processes_choose_as_one(config, tmp_path, guide):
    name = plan(config)[0].file_name
    row = {"edit": "remove_support_devices", "sweep": {"guidance_scale": [2.0, 9.0]}}
    rows = [row | {"guide": guide}, row | {"best": "ssim", "at_least": {"ssim": 2}, "file_name": name}]
    rows.append({"edit": "remove_support_devices", "method": "edit_friendly", "seed": 3})
    one = with_edits(config, tmp_path, rows)
    two = replace(one, out=str(tmp_path / "two"))
    bulk.generate(one)
    cli.launch(two, 2)
    assert written(tmp_path / "two") == written(tmp_path / "out")
    assert {row["status"] for row in manifest(tmp_path / "two")} == {"made", "selected"}


def test_a_seed_decides_the_noise_whatever_the_batch(config, tmp_path):
    rows = [{"edit": "remove_support_devices", "method": "edit_friendly", "seed": seed} for seed in (0, 1)]
    config = with_edits(config, tmp_path, rows)
    bulk.generate(config)
    bulk.generate(replace(config, batch_size=1, out=str(tmp_path / "alone")))
    pixels = {}
    for out in ("out", "alone"):
        for row in manifest(tmp_path / out):
            key = out, row["source_file"], json.loads(row["settings"])["seed"]
            pixels[key] = np.asarray(Image.open(tmp_path / out / row["file_name"])).astype(int)
    for out, name, seed in pixels:
        assert abs(pixels[out, name, seed] - pixels["alone", name, seed]).mean() < 0.5
    assert any((image != pixels[out, name, 1 - seed]).any() for (out, name, seed), image in pixels.items())


def test_a_guide_that_is_missing_or_blind_stops_the_run_before_it_starts(config, tmp_path, guide):
    row = {"edit": "remove_support_devices", "sweep": SWEEP, "guide": "none"}
    with pytest.raises(FileNotFoundError, match=r"no classifier at .*none"):
        bulk.generate(with_edits(config, tmp_path, [row]))
    blind = ClassifierConfig(labels=("Cardiomegaly",), blocks=(1,), growth=4, features=4)
    save_classifier(build_classifier(blind), blind, tmp_path / "weights" / "blind")
    with pytest.raises(ValueError, match="does not read Support Devices"):
        bulk.generate(with_edits(config, tmp_path, [row | {"guide": "blind"}]))
    assert not (tmp_path / "out" / "images").exists()


def own_guide():
    config = ClassifierConfig(labels=("Support Devices",), blocks=(1,), growth=4, features=4)
    return Classifier(build_classifier(config).eval(), config.labels)


def test_a_guide_may_be_a_factory_or_lie_below_the_runs(config, tmp_path, guide, monkeypatch):
    monkeypatch.setenv("PRISM_RUNS", str(tmp_path / "runs"))
    shutil.move(tmp_path / "weights" / guide, tmp_path / "runs" / guide)
    row = {"edit": "remove_support_devices", "sweep": SWEEP}
    rows = [row | {"guide": guide}, row | {"guide": f"{__name__}:own_guide"}]
    config = with_edits(config, tmp_path, rows)
    assert bulk.generate(config) == len(plan(config))
    assert len({row["file_name"] for row in manifest(tmp_path / "out")}) == len(plan(config))


def test_another_guide_of_the_same_name_makes_other_files(config, tmp_path, guide):
    config = with_edits(config, tmp_path, [{"edit": "remove_support_devices", "sweep": SWEEP, "guide": guide}])
    tasks = plan(config)
    before = outputs(config, tasks)
    other = ClassifierConfig(blocks=(1,), growth=4, features=4, seed=2)
    save_classifier(build_classifier(other), other, tmp_path / "weights" / guide)
    assert before.isdisjoint(outputs(config, tasks))


# --- again, and in parts --------------------------------------------------------------------------


def test_a_finished_run_makes_nothing_again(config, done):
    before = {path: path.stat().st_mtime_ns for path in (done / "images").rglob("*.png")}
    assert bulk.generate(config) == 0
    assert {path: path.stat().st_mtime_ns for path in (done / "images").rglob("*.png")} == before


def test_what_is_lost_or_damaged_is_made_again_the_same(config, done):
    before = written(done)
    lost, damaged, truncated = sorted((done / "images").rglob("*.png"))[:3]
    lost.unlink()
    damaged.write_bytes(b"no image")
    truncated.write_bytes(truncated.read_bytes()[:40])
    assert 3 <= bulk.generate(config) <= 3 * config.batch_size
    assert written(done) == before


def test_a_row_cut_short_and_a_half_written_file_do_not_count(config, done):
    before = written(done)
    rows = [json.dumps(row | {"score_mask_area": float(row["score_mask_area"])}) for row in manifest(done)]
    (done / bulk_plan.MANIFEST).unlink()
    (done / "parts" / "000001-0000.jsonl").write_text("\n".join([*rows[:-1], rows[-1][:30]]))
    (done / "images" / ".partial-123-half.png").write_bytes(b"half")
    assert 1 <= bulk.generate(config) <= config.batch_size
    assert_whole(done, len(before) - 1)


def test_more_edits_join_the_same_manifest(config, done, tmp_path):
    before = written(done)
    more = with_edits(config, tmp_path, [{"edit": "remove_pleural_effusion"}])
    bulk.generate(more)
    assert_whole(done, len(before) - 1 + len(plan(more)))
    assert before.items() - written(done).items() == {(bulk_plan.MANIFEST, before[bulk_plan.MANIFEST])}


def test_other_settings_model_or_bits_never_share_a_name(config):
    (task, *_) = plan(config)
    changes = [
        {},
        {"bits": 16},
        {"num_inference_steps": 3},
        {"method": "direct"},
        {"edit": {"cross_replace_steps": 0.5}},
        {"edit": {"mask": {"feather": 2}}},
    ]
    configs = [replace(config, **change) for change in changes]
    names = [
        *(outputs(c, plan(c)[:1]).pop() for c in configs),
        outputs(config, [task], tiny_pipeline("v_prediction")).pop(),
    ]
    assert len(set(names)) == len(names)
    assert outputs(replace(config, batch_size=2), [task]) == {names[0]}


def test_the_files_feed_a_training_set(config, done):
    found = bulk.files(done)
    assert found.keys() == {(task.file_name, task.edit.key) for task in plan(config)}
    assert all(path.is_file() for path in found.values())
    bulk.generate(replace(config, num_inference_steps=3))
    with pytest.raises(ValueError, match="with more than one setting"):
        bulk.files(done)


def test_batches_depend_on_the_plan_alone_and_hold_one_setting(config):
    tasks = plan(config)
    cut = bulk_plan.batches(tasks, 4)
    assert sorted(map(id, tasks)) == sorted(id(task) for batch in cut for task in batch)
    assert all(len({task.settings for task in batch}) == 1 and len(batch) <= 4 for batch in cut)


def test_a_batch_without_room_is_halved_with_equal_results(config, tmp_path, monkeypatch):
    bulk.generate(config)
    seen, original = [], bulk._edit_batch

    def small(pipe, config, batch, rows):
        seen.append(len(batch[rows]))
        if seen[-1] > 1:
            raise torch.OutOfMemoryError("no room")
        return original(pipe, config, batch, rows)

    monkeypatch.setattr(bulk, "_edit_batch", small)
    bulk.generate(replace(config, out=str(tmp_path / "small")))
    assert seen[:6] == [4, 2, 1, 1, 1, 1]
    for path in (tmp_path / "out" / "images").rglob("*.png"):
        other = tmp_path / "small" / path.relative_to(tmp_path / "out")
        difference = np.asarray(Image.open(path)).astype(int) - np.asarray(Image.open(other))
        assert abs(difference).max() <= 1  # rounding of floats that differ by 1e-6
    monkeypatch.setattr(bulk, "_edit_batch", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        bulk.generate(replace(config, out=str(tmp_path / "none")))


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(config, done, tmp_path):
    two = replace(config, out=str(tmp_path / "two"))
    cli.launch(two, 2)
    assert_whole(tmp_path / "two", len(plan(config)))
    assert written(tmp_path / "two") == written(done)


def test_the_device_decides_how_many_processes_start(config, monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(devices, "processes_for", lambda: 3)
    monkeypatch.setattr(torch.multiprocessing, "start_processes", lambda *_, nprocs, **__: started.append(nprocs))
    monkeypatch.setattr(bulk, "generate", lambda _: started.append(1))
    monkeypatch.setattr(bulk, "load_pipeline", lambda *_, **__: None)
    for device in ("cuda", "cuda:1", "cpu"):
        monkeypatch.setenv("PRISM_DEVICE", device)
        cli.launch(config, 0)
    assert started == [4, 1, 3]


WHO = """
import json, os, pathlib, signal, sys
from prism_lib.apps import bulk, bulk_plan, cli

def work(config, pipe, chooser, own, part, show):
    if sys.argv[3] == "kill" and not show:
        os.kill(os.getpid(), signal.SIGKILL)
    (pathlib.Path(config.out) / f"{part.stem}{show}").touch()

bulk._work = work
if __name__ == "__main__":
    bulk.PartialState()  # as in a notebook that has generated before
    config = bulk_plan.BulkConfig(**json.loads(pathlib.Path(sys.argv[1]).read_text()))
    cli.launch(config, int(sys.argv[2]))
"""


def run_who(config, tmp_path, processes, what):
    """The launcher in a process of its own, whose processes note who they are, or are killed."""
    (tmp_path / "who.py").write_text(WHO)
    (tmp_path / "run.json").write_text(json.dumps(asdict(config)))
    command = [sys.executable, "who.py", "run.json", str(processes), what]
    environment = os.environ | {"PYTHONPATH": str(paths.root())}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2], ids=["forked", "spawned"])
def test_as_many_processes_work_as_were_asked_for(config, tmp_path, threads):
    assert run_who(replace(config, threads=threads), tmp_path, 3, "note").returncode == 0
    found = {path.name for path in (tmp_path / "out").glob("000001-*")}
    assert found == {"000001-0000True", "000001-0001False", "000001-0002False"}


@pytest.mark.slow
def test_processes_of_a_launcher_start_no_others(config, tmp_path):
    """As with accelerate or torchrun on several nodes."""
    (tmp_path / "who.py").write_text(
        WHO.replace("    bulk.PartialState()  # as in a notebook that has generated before\n", "")
    )
    (tmp_path / "run.json").write_text(json.dumps(asdict(config)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "who.py",
        "run.json",
        "0",
        "note",
    ]
    environment = os.environ | {"PYTHONPATH": str(paths.root())}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert {path.name for path in (tmp_path / "out").glob("000001-*")} == {"000001-0000True", "000001-0001False"}


@pytest.mark.slow
def test_a_process_that_is_killed_is_reported(config, tmp_path):
    error = run_who(config, tmp_path, 2, "kill").stderr.splitlines()[-1]
    assert "a process of the run failed" in error and "SIGKILL" in error and "goes on where it stopped" in error


@pytest.mark.slow
def test_a_process_that_fails_is_reported_by_its_message(config, tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / bulk_plan.MANIFEST).write_text("a,b\n1,2\n")
    with pytest.raises(RuntimeError, match=r"failed: ValueError: .*is no manifest of a bulk run"):
        cli.launch(config, 2)


@pytest.mark.slow
def test_killed_at_random_moments_and_started_again(config, done, tmp_path):
    """kill -9 in the middle of things, as often as not between a file and its row."""
    killed, rng = replace(config, out=str(tmp_path / "killed"), batch_size=1), random.Random(0)
    whole = replace(config, out=str(tmp_path / "whole"), batch_size=1)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["prism_lib.apps.bulk"])
    kills = 0
    for _ in range(5):
        process = server.Process(target=bulk.generate, args=(killed,))
        process.start()
        images = tmp_path / "killed" / "images"
        goal = len(list(images.rglob("*__*.png"))) + rng.randint(1, 3)
        while process.is_alive() and len(list(images.rglob("*__*.png"))) < goal:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert kills >= 3
    bulk.generate(killed)
    bulk.generate(whole)
    assert_whole(tmp_path / "killed", len(plan(config)))
    assert written(tmp_path / "killed") == written(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one process", "its own processes", "processes of SLURM"])
def test_a_signal_ends_the_run_after_a_batch_and_the_next_one_goes_on(config, tmp_path, how):
    words = ["generate", "--data", config.data, "--edits", config.edits]
    # Batches of one image leave a process enough of them when the signal comes.
    more = {"split": "test", "model": config.model, "num_inference_steps": STEPS, "batch_size": 1}
    words += [word for name, value in more.items() for word in ("-p", name, str(value))]
    assert cli.main([*words, "--out", str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-m", "prism_lib.apps.cli", *words, "--out", str(tmp_path / "stopped")]
    command += ["--processes", "2" if how == "its own processes" else "1"]
    environment = os.environ | {"PYTHONPATH": str(paths.root()), "OMP_NUM_THREADS": "1"}

    def run():
        with socket.create_server(("127.0.0.1", 0)) as free:
            place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank, **place} for rank in "01"] if how == "processes of SLURM" else [{}]
        return [subprocess.Popen(command, env=environment | rank, stderr=subprocess.PIPE, text=True) for rank in ranks]

    images, running = tmp_path / "stopped" / "images", run()
    while running[0].poll() is None and not list(images.rglob("*__*.png")):
        time.sleep(0.002)
    for process in running:
        process.send_signal(signal.SIGUSR1 if how == "its own processes" else signal.SIGTERM)
    for process in running:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0 and "stopped by a signal; the same command goes on" in error, error
    made = len(manifest(tmp_path / "stopped"))
    assert 0 < made < len(plan(config)) and made == len(list(images.rglob("*.png")))
    assert not list((tmp_path / "stopped" / "parts").iterdir()) and not list(images.rglob(".partial-*"))
    for process in run():
        assert process.communicate(timeout=300) and process.returncode == 0
    assert written(tmp_path / "stopped") == written(tmp_path / "whole")


def test_a_folder_in_use_is_refused(config, tmp_path):
    with exclusive(tmp_path / "out"), pytest.raises(RuntimeError, match="is in use by process"):
        bulk.generate(config)


# --- the file of edits ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "yaml", "csv"])
def test_the_formats_say_the_same(config, tmp_path, suffix):
    name = load_table(config.data, "test")["file_name"][0]
    rows = [
        {"file_name": name, "source": "with tubes", "target": "with leads", "words": "tubes|leads", "word_weight": 2},
        {"file_name": name, "edit": "unchanged", "method": "ddim"},
    ]
    texts = {
        "json": json.dumps(rows),
        "yaml": json.dumps(rows, indent=1),
        "csv": f"file_name,edit,source,target,words,word_weight,method\n{name},,with tubes,with leads,tubes|leads,2,\n"
        f"{name},unchanged,,,,,ddim\n",
    }
    first, second = plan(with_edits(config, tmp_path, texts[suffix], suffix))
    assert (first.pair.source_words, first.pair.target_words) == (("tubes",), ("leads",))
    assert first.settings.edit == {"word_weight": 2.0} and first.settings.method == "edit_friendly"
    assert second.edit.key == "unchanged" and second.settings.method == "ddim"


def test_a_choice_is_the_same_from_a_table_and_from_the_run(config, tmp_path):
    cell = '"{""guidance_scale"": [2, 5]}"'
    (csv_task, *_) = plan(with_edits(config, tmp_path, f"edit,sweep,best\nunchanged,{cell},ssim\n", "csv"))
    run = configured(config, [("sweep", '{"guidance_scale": [2, 5]}'), ("best", "ssim")])
    (run_task, *_) = plan(with_edits(run, tmp_path, [{"edit": "unchanged"}]))
    expected = Choice(sweep={"guidance_scale": [2.0, 5.0]}, best="ssim")
    assert csv_task.settings.choice == run_task.settings.choice == expected


def test_a_task_asked_for_twice_is_made_once(config, tmp_path):
    once = plan(with_edits(config, tmp_path, [{"edit": "remove_support_devices"}]))
    rows = [{"edit": "remove_support_devices"}, {"edit": "remove the devices", "file_name": once[0].file_name}]
    assert plan(with_edits(config, tmp_path, rows)) == once


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"edit": "remove_zeppelin"}], "row 1: unknown label 'zeppelin'"),
        ([{"edit": "unchanged"}, {"edit": "remove the zeppelin"}], "row 2: .*'zeppelin' is not understood"),
        ([{"edit": "unchanged", "file_name": "test/none.png"}], "row 1: file_name 'test/none.png' is not in"),
        ([{"edit": "unchanged", "gidance": 3}], "row 1: unknown column 'gidance'; known: file_name, edit"),
        ([{"edit": "unchanged", "guidance_scale": "much"}], "row 1: guidance_scale takes float"),
        ([{"edit": "unchanged", "protect_text": "nowhere"}], "row 1: protect_text.* is 'nowhere': input should"),
        ([{"edit": "unchanged", "guidance_scale": -1}], "row 1: guidance_scale is -1.0: input should be greater"),
        (
            [{"edit": "unchanged", "cross_replace_steps": 1.5}],
            "row 1: cross_replace_steps is 1.5: input should",
        ),
        ([{"edit": "unchanged", "guidance_start": 0.6, "guidance_end": 0.4}], "row 1: guidance_start is 0.6, after"),
        ([{"edit": "unchanged", "method": "magic"}], "row 1: unknown inversion method 'magic'"),
        ([{"edit": "unchanged", "num_inference_steps": 0}], "row 1: num_inference_steps is 0: input should"),
        ([{"edit": "unchanged", "batch_size": 2}], "row 1: unknown column 'batch_size'"),
        ([{"edit": "unchanged", "seed": 2, "method": "direct"}], "row 1: seed is for .*, and direct draws none"),
        ([{"edit": "unchanged", "seed": "x", "method": "edit_friendly"}], "row 1: seed takes int"),
        ([{"edit": "unchanged", "sweep": [0.2]}], "row 1: sweep takes dict"),
        ([{"edit": "unchanged", "sweep": {"gidance": [2]}, "best": "ssim"}], "sweep: unknown setting 'gidance'"),
        ([{"edit": "unchanged", "sweep": {"guidance_scale": 2}, "best": "ssim"}], "guidance_scale is 2: .* list"),
        (
            [{"edit": "unchanged", "sweep": {"guidance_scale": []}, "best": "ssim"}],
            "guidance_scale is .*at least 1",
        ),
        ([{"edit": "unchanged", "sweep": {"guidance_scale": ["x"]}, "best": "ssim"}], "guidance_scale takes float"),
        (
            [{"edit": "unchanged", "sweep": {"guidance_scale": [-1]}, "best": "ssim"}],
            "row 1: guidance_scale is -1.0: input should be greater",
        ),
        ([{"edit": "unchanged", "sweep": {"guidance_scale": [2] * 300}, "best": "ssim"}], "sweep has 300 candidates"),
        (
            [{"edit": "unchanged", "sweep": {"guidance_scale": [2]}}],
            "row 1: a sweep needs a guide or a similarity to choose by, or best",
        ),
        (
            [{"edit": "unchanged", "sweep": {"guidance_scale": [2]}, "best": "guide"}],
            "'guide' .it takes a guide.; known",
        ),
        (
            [{"edit": "unchanged", "sweep": {"guidance_scale": [2]}, "best": "directional"}],
            "'directional' .it takes a similarity.; known",
        ),
        ([{"edit": "unchanged", "sweep": {"guidance_scale": [2]}, "guide": "g"}], "edit unchanged names none"),
        ([{"edit": "unchanged", "best": "ssim"}], "row 1: best is given, but no sweep"),
        (
            [{"edit": "unchanged", "sweep": {"guidance_scale": [2]}, "best": "ssim", "at_least": {"ssim": "x"}}],
            "row 1: at_least.ssim is 'x': input should be a valid number",
        ),
        ([{"edit": "unchanged", "source": "a"}], "not both: source is given too"),
        ([{"source": "a"}], "row 1: a text edit needs both prompts"),
        ([{"source": "a", "target": "b", "words": "c"}], "row 1: 'c' is in neither prompt"),
        ([{"source": "a", "target": "b", "words": 5}], "row 1: '5' is in neither prompt"),
        ([], "must hold rows of edits"),
        ({"edit": "unchanged"}, "must hold rows of edits"),
        ("[", "cannot be read as json"),
    ],
)
def test_a_bad_row_is_named(config, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        plan(with_edits(config, tmp_path, content))


def test_a_choice_of_the_run_without_candidates_is_named(config, tmp_path):
    with pytest.raises(ValueError, match="guide is given, but no sweep"):
        plan(replace(config, guide="g"))
    rows = [{"edit": "remove_support_devices", "sweep": {"guidance_scale": [2.0]}}, {"edit": "enlarge the heart"}]
    assert plan(replace(with_edits(config, tmp_path, rows), guide="g")), "it is of the rows that sweep"


def test_an_edit_that_contradicts_its_image_is_named(config, tmp_path):
    table = load_table(config.data, "test")
    name = table.loc[table["Support Devices"] == 0, "file_name"].iloc[0]
    with pytest.raises(ValueError, match="row 1: contradictory edit remove_support_devices: 'Support Devices' is"):
        plan(with_edits(config, tmp_path, [{"edit": "remove_support_devices", "file_name": name}]))


def test_commas_without_quotes_are_found(config, tmp_path):
    with pytest.raises(ValueError, match="row 1 has more cells than the heading"):
        plan(with_edits(config, tmp_path, "edit\nremove the pacemaker, keep the effusion\n", "csv"))
    with pytest.raises(ValueError, match=r"two columns are 'edit'"):
        plan(with_edits(config, tmp_path, "edit,edit\nremove_support_devices,unchanged\n", "csv"))


@pytest.mark.parametrize("separator", [";", "\t"])
def test_what_a_spreadsheet_writes_is_read(tmp_path, separator):
    path = tmp_path / "edits.csv"
    lines = ["file_name,edit", "all,remove the pacemaker| keep the effusion"]
    path.write_text("\r\n".join(line.replace(",", separator).replace("|", ",") for line in lines), encoding="utf-8-sig")
    assert bulk_plan.read_rows(path) == [{"file_name": "all", "edit": "remove the pacemaker, keep the effusion"}]


def test_files_that_are_missing_are_named(config, tmp_path, phantom_folder):
    with pytest.raises(FileNotFoundError, match=r"no file of edits .*none\.csv"):
        plan(replace(config, edits=str(tmp_path / "none.csv")))
    with pytest.raises(ValueError, match=r"expected one of \.csv, \.json"):
        plan(with_edits(config, tmp_path, "x", "txt"))
    copy = tmp_path / "copy"
    shutil.copytree(phantom_folder, copy)
    name = plan(config)[0].file_name
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}"):
        plan(replace(config, data=str(copy)))


# --- before the work ------------------------------------------------------------------------------


def test_a_prompt_that_would_be_cut_stops_the_run_before_it_starts(config, tmp_path):
    long = with_edits(config, tmp_path, [{"source": "a heart", "target": "a " * 90}])
    with pytest.raises(ValueError, match=r"test/.*png: prompt has 92 tokens, the model reads 77"):
        bulk.generate(long)
    assert not (tmp_path / "out" / "images").exists()


def test_a_full_disk_or_an_unwritable_place_is_found_first(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/out cannot be written"):
        bulk.generate(replace(config, out=str(tmp_path / "file" / "out")))
    usage = bulk.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(bulk.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"0\.00 GB free; \d+ images may take"):
        bulk.generate(config)


def test_a_foreign_manifest_is_not_overwritten(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / bulk_plan.MANIFEST).write_text("file_name,label\na.png,1\n")
    with pytest.raises(ValueError, match="no manifest of a bulk run"):
        bulk.generate(config)
    assert (tmp_path / "out" / bulk_plan.MANIFEST).read_text() == "file_name,label\na.png,1\n"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [bulk_plan.MANIFEST]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 12}, "bits is 12: input should be 8 or 16"),
        ({"precision": "half"}, "precision is 'half': input should be"),
        ({"batch_size": 0}, "batch_size is 0: input should be greater"),
        ({"method": "magic"}, "unknown inversion method"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0: input"),
        ({"edit": {"guidance_scale": -1}}, "guidance_scale is -1"),
        ({"edit": {"mask": {"fether": 1}}}, "unknown setting 'mask.fether'"),
    ],
)
def test_bad_settings_are_named(config, change, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        replace(config, **change)
    assert message in str(error.value)


# --- the command ----------------------------------------------------------------------------------


def command(config, *more):
    words = ["generate", "--data", config.data, "--edits", config.edits, "--out", config.out, "--processes", "1"]
    return cli.main([*words, "-p", "model", config.model, "-p", "num_inference_steps", "2", *more])


def test_the_command_makes_checks_and_goes_on(config, tmp_path, capsys):
    assert command(config, "-p", "split", "test", "--check") == 0
    assert f"counterfactuals by {config.model} into" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert command(config, "-p", "split", "test") == 0
    assert_whole(tmp_path / "out", len(plan(config)))
    assert bulk.generate(config) == 0  # -p says what the configuration says


def test_the_command_says_what_film_sd_was_not_measured_for(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PRISM_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "film-sd").symlink_to(config.model)
    for key, said in (("remove_support_devices", False), ("remove_cardiomegaly", True), ("unchanged", False)):
        (tmp_path / "edits.csv").write_text(f"edit\n{key}\n")
        assert command(replace(config, model="film-sd"), "--check") == 0
        assert ("was measured for edits that remove support devices" in capsys.readouterr().out) == said


@pytest.mark.parametrize("source", ["phantom", "films"])
def test_the_command_says_that_the_shipped_model_knows_phantoms_and_how_a_sentence_was_read(
    config, tmp_path, monkeypatch, capsys, source
):
    monkeypatch.setenv("PRISM_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "phantom-sd").symlink_to(config.model)
    monkeypatch.setattr(
        "prism_lib.data.folder.load_info", lambda folder, load=load_info: {**load(folder), "source": source}
    )
    (tmp_path / "edits.csv").write_text("edit\nremove the mild cardiomegaly\n")
    assert command(replace(config, model="phantom-sd"), "--check") == 0
    said = capsys.readouterr().out
    assert ("was trained on phantoms alone" in said) == (source != "phantom") and "mild" in said


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-p", "gidance", "3"], "unknown setting 'gidance'"),
        (["-p", "model", "./nope", "--check"], "nope is no diffusers pipeline"),
        (["-p", "similarity", "./nope", "-p", "sweep", "{guidance_scale: [1, 2]}", "--check"], "nope"),
        (["-p", "kinds_network", "absent", "--check"], "row 1: no network of kinds of devices at"),
        (["-p", "bits", "9"], "bits is 9: input should be 8 or 16"),
        (["--processes", "-1"], "processes is -1: expected 0 or more"),
        (["-p", "split", "holdout"], "unknown split 'holdout'"),
    ],
)
def test_a_wrong_command_is_one_line_and_starts_nothing(config, tmp_path, capsys, more, message):
    assert command(config, *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_told_before_processes_start(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "launch", lambda *_: pytest.fail("processes had started"))
    (tmp_path / "out").write_text("thesis")
    assert command(config, "--processes", "2") == 2
    assert "out cannot be written: " in capsys.readouterr().err


def test_settings_are_text_in_the_type_of_their_default(config):
    changed = configured(config, [("bits", "16"), ("guidance_scale", "7"), ("batch_size", "2")])
    assert (changed.bits, changed.edit, changed.batch_size) == (16, {"guidance_scale": 7.0}, 2)
    for given, value in (("anywhere", "anywhere"), ("false", False), (True, True)):
        assert configured(config, [("protect_text", given)]).edit == {"protect_text": value}


def test_a_launcher_plans_without_the_libraries_of_models():
    code = "import sys, prism_lib.apps.bulk_plan; assert not {'transformers', 'monai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what the model recommends --------------------------------------------------------------------


def test_rows_set_what_the_model_leaves_and_the_manifest_has_all_that_was_used(config, model, tmp_path):
    folder = tmp_path / "tuned"
    shutil.copytree(model, folder)
    rules = [{"when": "add", "settings": {"addition_factor": 1.5}}]
    (folder / FILE).write_text(json.dumps({"defaults": {"guidance_scale": 3.0, "guidance_end": 0.4}, "rules": rules}))
    tuned = replace(config, model=str(folder), edit={"self_replace_steps": 0.2})
    assert outputs(tuned, plan(tuned), load_pipeline(folder)).isdisjoint(outputs(config, plan(config)))
    bulk.generate(tuned)
    for row in manifest(tmp_path / "out"):
        used = json.loads(row["settings"])
        removes = row["edit"] == "remove_support_devices"
        assert used["method"] == "edit_friendly" and used["seed"] == 0
        assert used["edit"].keys() == {item.name for item in fields(EditConfig)} - {"batch_size"}
        assert used["edit"]["guidance_scale"] == (3.0 if removes else 5.0)
        assert used["edit"]["addition_factor"] == (1.0 if removes else 1.5)
        assert (used["edit"]["guidance_end"], used["edit"]["self_replace_steps"]) == (0.4, 0.2)
    late = with_edits(tuned, tmp_path, [{"edit": "unchanged"}, {"edit": "unchanged", "guidance_start": 0.6}])
    with pytest.raises(ValueError, match=r"row 2: guidance_start is 0\.6, after guidance_end, 0\.4"):
        bulk.generate(late)
