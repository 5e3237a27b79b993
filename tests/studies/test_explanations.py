"""Regions and films by hand; the schedule is what the editor does; attention maps are each image's own."""

import pytest
import torch
from PIL import Image

from prism_lib.editing.attention import Controller
from prism_lib.editing.counterfactuals import edit
from prism_lib.editing.inversion import invert
from prism_lib.editing.settings import EditConfig
from prism_lib.reporting import plots
from prism_lib.studies.explanations import (
    attention_maps,
    mask_regions,
    region_statistics,
    save_transition,
    schedule,
)
from tests.tiny import REMOVE, tiny_images, tiny_pipeline


def test_region_statistics_by_hand():
    original = torch.full((1, 1, 2, 2), 0.5)
    edited = torch.tensor([[[[0.7, 0.5], [0.4, 0.5]]]])
    left = torch.tensor([[[[True, False], [True, False]]]])
    table = region_statistics(edited, original, {"left": left, "right": ~left}).set_index("region")
    assert table.loc["left", ["pixels", "brighter", "darker"]].tolist() == [2, 0.5, 0.5]
    assert table.loc["left", "mean_change"] == pytest.approx(0.05)
    assert table.loc["left", "mean_absolute_change"] == pytest.approx(0.15)
    assert table["share_of_change"].tolist() == pytest.approx([1, 0])


def test_swapped_images_swap_the_signs():
    a, b = torch.rand(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    everywhere = {"all": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    (there,), (back,) = (region_statistics(*images, everywhere).to_dict("records") for images in ((a, b), (b, a)))
    assert there["mean_change"] == pytest.approx(-back["mean_change"])
    assert (there["brighter"], there["darker"]) == (back["darker"], back["brighter"])


def test_identical_images_have_no_share_of_change():
    image = torch.rand(1, 1, 4, 4)
    table = region_statistics(image, image, {"all": torch.ones(1, 1, 4, 4, dtype=torch.bool)})
    assert table["mean_absolute_change"].item() == 0 and table["share_of_change"].isna().all()


def test_a_transition_goes_there_and_back(tmp_path):
    original, edited = torch.zeros(1, 4, 4), torch.ones(1, 4, 4)
    with Image.open(save_transition(original, edited, tmp_path / "film.gif")) as film:
        assert film.n_frames == 22 and film.info["duration"] == 90 and film.info["loop"] == 0
        grays = [film.seek(n) or film.convert("L").getpixel((0, 0)) for n in range(22)]
    assert grays == [round(255 * min(n, 22 - n) / 11) for n in range(22)]


def test_bad_input_is_named(tmp_path):
    image, region = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="region 'lung' of image 0 is empty"):
        region_statistics(image, image, {"lung": region})
    with pytest.raises(ValueError, match="region 'lung' must be boolean"):
        region_statistics(image, image, {"lung": region.float()})
    with pytest.raises(ValueError, match="edited has shape"):
        region_statistics(image, image[..., :2], {})
    with pytest.raises(ValueError, match="images must be"):
        save_transition(image, image, tmp_path / "x.gif")


def test_attention_maps_are_each_images_own():
    pipe, images = tiny_pipeline(), tiny_images(2)
    inverted = invert(pipe, images, [REMOVE.source] * 2, num_inference_steps=2)
    maps = attention_maps(pipe, inverted, [REMOVE, REMOVE], EditConfig())
    alone = attention_maps(pipe, inverted[1:], [REMOVE], {})  # what the model recommends: the same for this one
    for both, one in zip(maps, alone, strict=True):
        assert both.shape == images.shape
        assert both.amin() >= 0 and both.amax() <= 1 + 1e-6
        assert torch.allclose(both[1:], one, atol=1e-3)
    with pytest.raises(ValueError, match="2 inverted images need as many prompt pairs, got 1"):
        attention_maps(pipe, inverted, [REMOVE], EditConfig())


def test_regions_of_a_mask_that_hold_a_pixel():
    mask = torch.tensor([[[[0.0, 0.3], [1.0, 0.0]]]])
    regions = mask_regions(mask)
    assert [int(region.sum()) for region in regions.values()] == [2, 2]
    assert list(mask_regions(torch.ones(1, 1, 2, 2))) == ["inside the mask"]


@pytest.mark.parametrize(("cross", "own"), [(0.0, 0.0), (0.3, 0.7), (1.0, 0.5), (0.25, 0.1)])
def test_the_schedule_is_what_the_editor_does(monkeypatch, cross, own):
    steps, pipe = 5, tiny_pipeline()
    config = EditConfig(cross_replace_steps=cross, self_replace_steps=own)
    seen = {}
    original = Controller.edits_cross, Controller.injects_self

    def edits_cross(self):
        seen.setdefault(self.step, {})["cross"] = original[0](self)
        return original[0](self)

    def injects_self(self, queries):
        (seen.setdefault(self.step, {})["self"],) = original[1](self, queries)
        return original[1](self, queries)

    monkeypatch.setattr(Controller, "edits_cross", edits_cross)
    monkeypatch.setattr(Controller, "injects_self", injects_self)
    timesteps = []
    inversion = invert(pipe, tiny_images(1), [REMOVE.source], num_inference_steps=steps)
    edit(pipe, inversion, [REMOVE], config, callback=lambda index, timestep, latents: timesteps.append(timestep))
    table = schedule(config, pipe, steps)
    assert table["timestep"].tolist() == timesteps
    for name in ("cross", "self"):
        assert [state == "source" for state in table[name]] == [seen[step][name] for step in range(steps)]


def test_the_schedule_says_when_blending_starts():
    table = schedule(EditConfig(local_blend=True, local_blend_start=0.4), tiny_pipeline(), 5)
    assert table["local_blend"].tolist() == [False, False, True, True, True]
    assert not schedule(EditConfig(), tiny_pipeline(), 5)["local_blend"].any()


def test_a_timeline_has_a_cell_for_each_step():
    (axis,) = plots.timeline({"cross": ["source", "own"], "self": ["own", "own"]}, xlabel="step").axes
    assert len(axis.patches) == 4
    colors = [patch.get_facecolor() for patch in axis.patches]
    assert colors[0] != colors[1] == colors[2] == colors[3]
