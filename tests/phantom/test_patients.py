"""The phantom: deterministic, causal, and exact in what an intervention changes."""

import pytest
import torch

from prism_lib.language.labels import DEVICE_KINDS
from prism_lib.phantom import anatomy
from prism_lib.phantom.patients import counterfactual, marker_mask, render, sample_patients

SIZE = 64


@pytest.fixture(scope="module")
def patients():
    return sample_patients(24, seed=3)


def test_a_patient_is_the_same_whoever_else_is_in_the_batch(patients):
    together = render(patients, SIZE)
    alone = render(sample_patients([17], seed=3), SIZE)
    assert torch.equal(together[17:18], alone)
    assert not torch.equal(together[16:17], alone)
    assert not torch.equal(render(sample_patients([17], seed=4), SIZE), alone)


def test_images_are_gray_levels(patients):
    images = render(patients[:4], SIZE)
    assert images.shape == (4, 1, SIZE, SIZE)
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.15
    assert torch.equal((images * 255).round() / 255, images)


@pytest.mark.parametrize("attribute", ["cardiomegaly", "pleural_effusion", "support_devices"])
def test_an_intervention_is_local_and_undone_by_its_opposite(patients, attribute):
    factual = render(patients, SIZE)
    flipped = 1 - patients.attributes[attribute]
    image, mask = counterfactual(patients, SIZE, **{attribute: flipped})
    assert torch.equal(image[~mask], factual[~mask])
    share = mask.float().mean((1, 2, 3))
    assert share.min() > 0.001, "every patient shows the change"
    assert share.max() < 0.25, "and most of the image stays"
    back, _ = counterfactual(patients.intervene(**{attribute: flipped}), SIZE, **{attribute: 1 - flipped})
    assert torch.equal(back, factual)


def test_an_intervention_that_changes_nothing_changes_no_pixel(patients):
    _, mask = counterfactual(patients, SIZE, cardiomegaly=patients.attributes["cardiomegaly"])
    assert not mask.any()


def test_fluid_stays_on_its_side_and_makes_the_lung_whiter(patients):
    dry = patients.intervene(pleural_effusion=0)
    image, mask = counterfactual(dry, 128, pleural_effusion=1)
    sides = patients.intervene(pleural_effusion=1).effusion_sides
    left_only = (~sides[:, 0] & sides[:, 1]).nonzero()[:, 0]
    assert len(left_only)
    assert not mask[left_only, :, :, :40].any(), "the patient's right is the image's left"
    change = image - render(dry, 128)
    assert change[mask].mean() > 0.05


def test_the_heart_is_as_wide_as_its_cardiothoracic_ratio_says(patients):
    width = {}
    for value in (0.0, 1.0):
        scene = patients.intervene(cardiomegaly=value)
        frame = anatomy.Frame.of(scene, 256)
        heart = anatomy.heart_thickness(scene, frame, scene.attributes["cardiomegaly"]) > 0
        columns = heart.any(1).sum(1) * 2 / 256 / patients.noise["pose"][:, 3].mul(0.12).add(0.95)
        width[value] = columns / 2 / anatomy.chest_half_width(scene)
    assert width[0.0].max() < 0.55 < width[1.0].min(), "0.5 is where radiologists start to worry; AP magnifies"
    assert (width[1.0] / width[0.0]).min() > 1.3


def test_devices_are_dense_and_never_none(patients):
    bare = patients.intervene(support_devices=0)
    image, mask = counterfactual(bare, 256, support_devices=1)
    change = image - render(bare, 256)
    assert patients.intervene(support_devices=1).device_kinds.any(1).all()
    assert not bare.device_kinds.any()
    # Metal stops radiation; quantum noise, which scales with intensity, may turn a pixel by a gray level.
    assert change[mask].min() > -0.03
    assert torch.stack([c.max() for c in change]).min() > 0.08


@pytest.mark.parametrize("column", range(len(DEVICE_KINDS)))
def test_one_kind_of_device_comes_and_goes_and_the_others_stay(patients, column):
    name = DEVICE_KINDS[column].replace(" ", "_")
    before = patients.device_kinds
    others = [k for k in range(before.shape[1]) if k != column]
    for value in (0.0, 1.0):
        changed = patients.intervene(**{name: value})
        assert changed.device_kinds[:, column].eq(bool(value)).all()
        assert torch.equal(changed.device_kinds[:, others], before[:, others])
        assert torch.equal(changed.attributes["support_devices"] > 0.5, changed.device_kinds.any(1))
        same = before[:, column] == bool(value)
        assert torch.equal(render(changed, SIZE)[same], render(patients, SIZE)[same])


def test_fluid_is_put_on_the_side_that_is_named(patients):
    dry = patients.intervene(pleural_effusion=0)
    sides = {"right": [True, False], "left": [False, True], "bilateral": [True, True]}
    for side, expected in sides.items():
        wet = dry.intervene(**{f"{side}_pleural_effusion": 1.0})
        assert wet.effusion_sides.tolist() == [expected] * len(patients)
        assert set(wet.labels()["effusion_side"]) == {side}
        drained = wet.intervene(**{f"{side}_pleural_effusion": 0.0})
        assert torch.equal(render(drained, SIZE), render(dry, SIZE))
    both = dry.intervene(left_pleural_effusion=1, right_pleural_effusion=1)
    assert torch.equal(render(both, SIZE), render(dry.intervene(bilateral_pleural_effusion=1), SIZE))
    assert set(both.intervene(left_pleural_effusion=0).labels()["effusion_side"]) == {"right"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_pacemaker_is_put_on_the_side_that_is_named(patients, side):
    bare = patients.intervene(support_devices=0)
    own = (patients.noise["pacemaker"][:, 0] < 0.8) == (side == "left")
    paced = bare.intervene(**{f"{side}_pacemaker": 1})
    brighter = (render(paced, SIZE) - render(bare, SIZE) > 0.15).sum((1, 2))
    left, right = brighter[:, : SIZE // 2].sum(1), brighter[:, SIZE // 2 :].sum(1)  # of the image
    assert ((right > left) == (side == "left")).all()
    assert torch.equal(
        render(paced[own.nonzero()[:, 0].tolist()], SIZE), render(bare.intervene(pacemaker=1), SIZE)[own]
    )
    there = patients.intervene(pacemaker=1)
    gone = there.intervene(**{f"{side}_pacemaker": 0})
    assert torch.equal(gone.device_kinds[:, 0], ~own), "one on the other side stays"
    assert torch.equal(gone.device_kinds[:, 1:], there.device_kinds[:, 1:])


def test_confounding_is_what_ties_devices_to_disease():
    gaps = {}
    for confounding in (0.0, 1.0):
        table = sample_patients(2000, seed=1, confounding=confounding).labels()
        diseased = (table["Cardiomegaly"] == 1) | (table["Pleural Effusion"] == 1)
        rate = table.groupby(diseased)["Support Devices"].mean()
        gaps[confounding] = rate[True] - rate[False]
    assert abs(gaps[0.0]) < 0.08
    assert gaps[1.0] > 0.8


def test_labels_follow_chexpert(patients):
    table = patients.labels()
    diseased = (table["Cardiomegaly"] == 1) | (table["Pleural Effusion"] == 1)
    assert (table["No Finding"] == (~diseased).astype(int)).all(), "devices are no finding"
    assert ((table["devices"] != "") == (table["Support Devices"] == 1)).all()
    assert ((table["effusion_side"] != "") == (table["Pleural Effusion"] == 1)).all()


def test_the_marker_is_burnt_in(patients):
    images, marker = render(patients, 128), marker_mask(patients, 128)
    assert marker.flatten(1).sum(1).min() > 40
    assert images[marker].mean() > images[~marker].mean()
    for attribute in ("cardiomegaly", "pleural_effusion"):
        _, mask = counterfactual(patients, 128, **{attribute: 1 - patients.attributes[attribute]})
        assert not (mask & marker).any()


def test_resolutions_show_the_same_patient(patients):
    small, large = render(patients[:4], 64), render(patients[:4], 192)
    reduced = torch.nn.functional.interpolate(large, size=64, mode="area")
    assert (small - reduced).abs().mean() < 0.03


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.intervene(stent=1), "unknown phantom attribute 'stent'.*pacemaker"),
        (lambda p: p.intervene(pacemaker=2), "pacemaker=2"),
        (lambda p: p.intervene(cardiomegaly=0.5), "cardiomegaly=0.5"),
        (lambda p: p.intervene(age=-3), "age=-3"),
        (lambda p: render(p, 16), "size=16"),
        (lambda p: sample_patients(4, 0, confounding=1.5), "confounding=1.5"),
        (lambda p: sample_patients(0, 0), "at least one patient"),
    ],
)
def test_bad_input_is_named(patients, call, message):
    with pytest.raises(ValueError, match=message):
        call(patients)


def test_tubes_have_the_chord_of_a_cylinder():
    pixels = torch.stack([torch.linspace(2, 60, 400), torch.full((400,), 32.0)], dim=1)[None]
    thickness = anatomy.stamp(pixels, torch.full((1, 400), 5.0), 64)[0]
    for offset in (0, 2, 4):
        assert thickness[32 + offset, 30].item() == pytest.approx(2 * (25 - offset**2) ** 0.5, abs=0.05)
    assert thickness[38, 30] == 0
