"""What an edit leaves alone: letters anywhere on a film, which devices are not, and devices of other kinds."""

from __future__ import annotations

import json

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from prism_lib import paths
from prism_lib.editing import EditConfig, edit, invert, kept, masks, recommended, sweep
from prism_lib.editing.kept import burnt_in_text
from prism_lib.editing.masks import MaskConfig
from prism_lib.language import Edit, vocabulary
from prism_lib.language.edits import PromptPair
from prism_lib.phantom.patients import marker_mask, render, sample_patients
from tests.tiny import REMOVE, tiny_images, tiny_pipeline

FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf"


def film(size: int) -> np.ndarray:
    """A chest without letters or devices: a bright body, darker lungs, ribs and grain, (size, size)."""
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    body = 0.55 - 0.25 * sum(np.exp(-(((x - c) / 0.13) ** 2) - ((y - 0.45) / 0.25) ** 2) for c in (0.3, 0.7))
    ribs = 0.04 * np.sin(2 * np.pi * (9 * y + 2 * (x - 0.5) ** 2))
    return body + ribs + 0.01 * np.random.default_rng(0).standard_normal((size, size))


def drawn(size: int, draw) -> np.ndarray:
    """What `draw(pen, scale)` draws, as opacity (size, size); `scale` is pixels per unit of a 512-pixel film."""
    layer = Image.new("L", (size, size))
    draw(ImageDraw.Draw(layer), size / 512)
    return ndimage.gaussian_filter(np.asarray(layer, float) / 255, 0.4 * size / 512)


def found(picture: np.ndarray) -> np.ndarray:
    return burnt_in_text(torch.from_numpy(picture.clip(0, 1)).float()[None, None], True)[0, 0].numpy()


def words(pen: ImageDraw.ImageDraw, scale: float) -> None:
    """A word over the middle of the chest, an L in a ring and an R, and AP at the edge of the patient."""
    pen.text((200 * scale, 300 * scale), "PORTABLE", 255, ImageFont.truetype(FONT, round(14 * scale)))
    pen.text((455 * scale, 90 * scale), "L", 255, ImageFont.truetype(FONT, round(17 * scale)), anchor="mm")
    pen.ellipse([v * scale for v in (441, 76, 469, 104)], outline=255, width=max(1, round(1.5 * scale)))
    pen.text((50 * scale, 120 * scale), "R", 255, ImageFont.truetype(FONT, round(30 * scale)), anchor="mm")
    pen.text((440 * scale, 470 * scale), "AP", 255, ImageFont.truetype(FONT, round(15 * scale)))


def devices(pen: ImageDraw.ImageDraw, scale: float) -> None:
    """A tube, a clip as a ring with its cable, a button of ECG, a can with a lead and two wires that cross."""

    def line(points: tuple[int, ...], width: int) -> None:
        pen.line([v * scale for v in points], 255, max(1, round(width * scale)), joint="curve")

    line((256, 0, 258, 120, 250, 230), 7)
    pen.ellipse([v * scale for v in (60, 60, 78, 78)], outline=255, width=max(1, round(3 * scale)))
    line((69, 78, 90, 200, 160, 300, 300, 480), 4)
    pen.ellipse([v * scale for v in (430, 180, 446, 196)], fill=255)
    line((438, 190, 470, 300, 511, 380), 3)
    pen.rounded_rectangle([v * scale for v in (380, 90, 430, 140)], 15 * scale, fill=255)
    line((400, 140, 330, 200, 290, 330), 3)
    line((20, 330, 120, 420), 3)
    line((20, 420, 120, 330), 3)


@pytest.mark.parametrize("size", [384, 512, 1024])
def test_letters_over_the_chest_are_found_with_what_surrounds_them(size):
    ink = drawn(size, words)
    marked = found(film(size) * (1 - ink) + ink)
    assert marked[ink > 0.2].all()
    assert marked.mean() < 0.05


@pytest.mark.parametrize("size", [256, 512, 1024])
@pytest.mark.parametrize("gray", [0.75, 1.0])
def test_devices_and_anatomy_are_no_letters(size, gray):
    ink = drawn(size, devices)
    assert not found(film(size) * (1 - ink) + gray * ink).any()
    assert not found(film(size)).any()
    assert not found(np.zeros((size, size))).any()


def test_a_letter_keeps_its_place_in_a_batch_and_a_piece_cut_by_the_border_is_none():
    ink = drawn(512, lambda pen, scale: pen.text((40, 200), "L", 255, ImageFont.truetype(FONT, 24)))
    cut = np.pad(ink, ((0, 0), (0, 43)))[:, 43:]  # through the upright stroke
    assert ink[:, 42].max() > 0.5
    batch = torch.from_numpy(np.stack([film(512) * (1 - one) + one for one in (np.zeros((512, 512)), ink, cut)]))
    marked = burnt_in_text(batch.clip(0, 1).float()[:, None], True)
    assert marked.any((1, 2, 3)).tolist() == [False, True, False]


def test_film_sd_protects_letters_anywhere_and_phantom_sd_those_in_the_corners():
    for model, protected, network in (("film-sd", "anywhere", "film-kinds"), ("phantom-sd", True, "")):
        found = recommended(paths.weights() / model, REMOVE)
        assert (found.protect_text, found.kinds_network) == (protected, network)
    with pytest.raises(ValueError, match="protect_text"):
        recommended(paths.weights() / "film-sd", REMOVE, protect_text="everywhere")


def test_letters_stay_where_they_are_protected_and_other_masks_are_the_same_to_the_bit(monkeypatch):
    pipe, images = tiny_pipeline(), tiny_images(2)
    text = torch.zeros_like(images[:, :1], dtype=torch.bool)
    text[..., 8:16, 4:20] = True
    corner = text.roll(-8, -2)
    monkeypatch.setattr(kept, "burnt_in_text", lambda films, anywhere: corner | text if anywhere else corner)
    wide = MaskConfig(weak=0.1, strong=0.1, seed_evidence=0, grow_evidence=0)
    configs = [EditConfig(protect_text=value, mask=wide) for value in (True, "anywhere")]
    inverted = invert(pipe, images, [REMOVE.source] * 2, num_inference_steps=4)
    for factual, (before, after) in zip(images, sweep(pipe, inverted, [REMOVE] * 2, configs), strict=True):
        assert before.mask[text[0]].any() and not before.mask[corner[0]].any()
        expected = masks.without(before.mask[None], text[:1] | corner[:1], wide.feather)[0]
        assert torch.equal(after.mask, expected)
        assert torch.equal(after.image[:, text[0, 0]], factual[:, text[0, 0]])


def test_letters_in_the_corners_are_found_and_devices_are_not():
    patients = sample_patients(12, seed=5).intervene(support_devices=1)
    images, marker = render(patients), marker_mask(patients)
    text = burnt_in_text(images)
    assert (text & marker).sum() / marker.sum() > 0.99
    corners = torch.zeros_like(text)
    corners[..., :64, :56] = corners[..., :64, -56:] = True
    assert not (text & ~corners).any()
    assert not burnt_in_text(torch.rand(1, 1, 64, 64) * 0.2).any()


@pytest.mark.parametrize("size", [384, 512, 1024])
def test_in_the_corners_of_real_films_crisp_ink_is_a_letter_and_bones_and_clips_are_none(size):
    """The corner of a film: dark, with an arm bone that fades, a clip in front of tissue, and a word in small print."""
    y, x = np.mgrid[0 : 512 : size * 1j, 0 : 512 : size * 1j]
    bone = 0.45 * np.exp(-(((x - 480 - 0.1 * y) / 7) ** 2) - ((y - 85) / 35) ** 2)
    tissue = 0.5 * np.exp(-(((x - 30) / 22) ** 2) - ((y - 420) / 22) ** 2)
    clip = drawn(size, lambda pen, scale: pen.ellipse([v * scale for v in (23, 413, 37, 427)], fill=255))
    font = ImageFont.truetype(FONT, round(16 * size / 512))
    ink = drawn(size, lambda pen, scale: pen.text((20 * scale, 60 * scale), "KV7", 255, font))
    picture = 0.05 + bone + tissue * (1 - clip) + 0.75 * clip + 0.9 * ink
    in_corners = burnt_in_text(torch.from_numpy(picture.clip(0, 1)).float()[None, None])[0, 0].numpy()
    anywhere = found(picture)
    for shown, in_a_corner, in_real_film in (
        (bone > 0.4, True, False),
        (clip > 0.5, True, False),
        (ink > 0.5, True, True),
    ):
        assert in_corners[shown].any() == in_a_corner
        assert anywhere[shown].any() == in_real_film


def test_the_shipped_network_takes_a_can_for_a_pacemaker():
    films = torch.from_numpy(film(512)).float().clamp(0, 1)[None, None].repeat(3, 1, 1, 1)
    removed = torch.zeros_like(films)
    removed[:, :, 100:160, 360:420] = 0.3
    named = ("pacemaker", "Nasogastric tube", "nasogastric tube and pacemaker")
    pairs = [PromptPair(f"x-ray with {words}", f"x-ray without {words}", (), ()) for words in named]
    # An image of three channels is read as its mean.
    others = kept.other_devices((films + removed).repeat(1, 3, 1, 1), removed.repeat(1, 3, 1, 1), pairs, "film-kinds")
    assert others[:, 0, 100:160, 360:420].float().mean((1, 2)).tolist() == [0, 1, 0]
    assert others[:, 0, :, :300].all(), "where nothing was removed"


def test_an_edit_names_the_kinds_that_its_prompts_lose():
    def named(edit, **labels):
        return kept.named_kinds(edit.prompts({"Support Devices": 1} | labels, vocabulary("films")), "film-kinds")

    kinds = json.loads((kept.kinds_folder("film-kinds") / "kinds.json").read_text())
    for kind in vocabulary("films").owners:
        assert kind.removeprefix("left ").removeprefix("right ") == kinds[named(Edit(remove=(kind,)))[0]]
    assert named(Edit(remove=("port", "chest drain"), keep=("ecg leads",))) == [5, 7]
    assert named(Edit(remove=("endotracheal tube", "chest drain"), keep=("nasogastric tube",))) == [3, 5]
    assert named(Edit(remove=("pacemaker", "Pleural Effusion")), **{"Pleural Effusion": 1}) == [0]
    for source, target in (("with pacemaker", "without pacemaker"), ("with two Pacemakers", "normal")):
        assert named(Edit.text(f"Chest X-ray {source}", f"Chest X-ray {target}")) == [0]
    assert named(Edit(remove=("Support Devices",))) == named(Edit(add=("pacemaker",)), **{"Support Devices": 0}) == []


def test_an_edit_that_removes_a_kind_leaves_devices_of_other_kinds_alone(monkeypatch, tmp_path):
    """By a network that sees ports in the upper half of every film, and pacemakers in the lower one."""
    (tmp_path / "kinds.json").write_text('["port", "pacemaker"]')
    (tmp_path / "model.safetensors").write_bytes(b"")
    upper = torch.tensor([[5.0], [-5.0]])[None, ..., None].expand(1, 2, 1, kept.READS // 2)
    network = torch.cat([upper, -upper], 2).repeat_interleave(kept.READS // 4, 2)
    monkeypatch.setattr(kept, "load_kinds", lambda _: lambda _: network)
    named = ("pacemaker", "Port", "port and pacemaker", "support devices", "it")
    pairs = [PromptPair(f"chest with {words}", f"chest without {words}", (), ()) for words in named]
    pairs.append(PromptPair("x-ray", "x-ray with port", ("port",), ("port",)))
    films, removed = torch.rand(6, 1, 64, 64), torch.full((6, 1, 64, 64), 0.1)
    others = kept.other_devices(films, removed, pairs, str(tmp_path))
    assert others[0, 0, :32].all() and not others[0, 0, 33:].any()
    assert others[1, 0, 32:].all() and not others[1, 0, :31].any()
    assert not others[2:].any(), "all kinds, no kind, and a device that is added"

    pipe, images = tiny_pipeline(), tiny_images(2)
    inversion = invert(pipe, images, [REMOVE.source] * 2, num_inference_steps=2)
    half, seen = torch.arange(32)[:, None].expand(32, 32) < 16, []
    monkeypatch.setattr(kept, "other_devices", lambda *given: seen.append(given) or half[None, None].repeat(2, 1, 1, 1))
    wide = MaskConfig(weak=0.1, strong=0.1, seed_evidence=0, grow_evidence=0)
    settings = {"mask": wide, "kinds_network": str(tmp_path)}
    bounded, free = (edit(pipe, inversion, [REMOVE] * 2, {**settings, **more}) for more in ({}, {"kinds_network": ""}))
    for result, other, image in zip(bounded, free, images, strict=True):
        assert torch.equal(result.image[0, half], image[0, half]) and not torch.equal(result.image, image)
        assert (other.mask[0, half] > 0).any()
    ((factual, removed, pairs, network),) = seen
    assert torch.equal(factual, images) and list(pairs) == [REMOVE] * 2 and network == str(tmp_path)
    assert torch.equal(removed, torch.stack([result.reconstruction - result.raw for result in bounded]))


def test_a_missing_network_of_kinds_is_named_before_the_first_step(monkeypatch, tmp_path):
    monkeypatch.setenv("PRISM_WEIGHTS", str(tmp_path))
    pipe, images = tiny_pipeline(), tiny_images(1)
    inversion = invert(pipe, images, [REMOVE.source], num_inference_steps=2)
    settings = {"kinds_network": "absent"}
    with pytest.raises(FileNotFoundError, match=r"no network of kinds of devices at .*absent: kinds\.json is missing"):
        edit(pipe, inversion, [REMOVE], settings, callback=lambda *_: pytest.fail("a step was made"))
