"""Masks: thin lines found, far changes left out, no jumps, and an exact zero outside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from prism_lib.editing import masks
from prism_lib.editing.masks import MaskConfig

SIZE, CELLS, USUAL = 128, 16, MaskConfig()


def scene():
    """A wire of two pixels that fades on its way, with evidence; a blob as strong, without; noise."""
    change = 0.004 * torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    wire = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    for n in range(90):
        wire[..., 20 + n // 2, 10 + n : 12 + n] = True
        change[..., 20 + n // 2, 10 + n : 12 + n] = 0.2 - 0.0015 * n
    change[..., 110:120, 10:20] = 0.2
    evidence = F.adaptive_max_pool2d(wire.float(), CELLS)
    return change, wire, evidence


def test_a_thin_wire_is_found_whole_and_what_is_elsewhere_is_not():
    change, wire, evidence = scene()
    mask = masks.automatic_mask(change, evidence, USUAL)
    assert mask[wire].min() > 0.9
    config = MaskConfig()
    reach = config.dilate + config.feather
    assert not (mask[F.max_pool2d(wire.float(), 2 * reach + 1, 1, reach) == 0]).any()
    assert not mask[..., 105:, :30].any()


def test_weak_pixels_count_only_where_strong_ones_touch_them():
    change, _, evidence = scene()
    config = MaskConfig(dilate=0, feather=0, close=0)
    faint = 0.7 * 2 * config.min_change  # weak, not strong
    change[..., 60, 60:80] = faint
    change[..., 19, 10] = faint
    mask = masks.automatic_mask(change, torch.ones_like(evidence), config)
    assert not mask[..., 60, 75:80].any()
    assert mask[0, 0, 19, 10] == 1


def test_no_change_gives_no_mask():
    nothing = torch.zeros(1, 1, SIZE, SIZE)
    assert not masks.automatic_mask(nothing, torch.ones(1, 1, CELLS, CELLS), USUAL).any()
    assert not masks.evidence(torch.rand(1, 2, CELLS, CELLS), torch.zeros(1, 1, CELLS, CELLS), 0.5).any()


def test_rounding_differences_do_not_move_the_mask():
    change, _, evidence = scene()
    shaken = change + 1e-6 * torch.randn(change.shape, generator=torch.Generator().manual_seed(1))
    config = MaskConfig()
    difference = masks.automatic_mask(change, evidence, config) - masks.automatic_mask(shaken, evidence, config)
    assert difference.abs().max() < 1e-3


def test_each_image_has_its_own_thresholds():
    change, _, evidence = scene()
    both = masks.automatic_mask(torch.cat([change, 0.1 * change]), evidence.repeat(2, 1, 1, 1), USUAL)
    torch.testing.assert_close(both[:1], masks.automatic_mask(change, evidence, USUAL))
    torch.testing.assert_close(both[1:], masks.automatic_mask(0.1 * change, evidence, USUAL))


@pytest.mark.parametrize(("dilate", "feather"), [(0, 0), (1, 0), (1, 1), (2, 1), (2, 3), (3, 2)])
def test_a_softened_mask_ends_exactly_where_it_should(dilate, feather):
    mask = torch.zeros(1, 1, 33, 33)
    mask[..., 16, 16] = 1
    soft = masks.soften(mask, dilate, feather)
    distance = (torch.arange(33) - 16).abs()
    distance = torch.maximum(distance[:, None], distance[None])
    assert soft[0, 0, 16, 16] == 1
    assert torch.equal(soft[0, 0] > 0, distance <= dilate + feather)


def test_growing_equals_thresholded_connectivity_on_binary_images():
    body = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]]).float()[None, None]
    seeds = torch.zeros_like(body)
    seeds[..., 0, 0] = 1
    expected = torch.zeros_like(body)
    expected[..., 0, :2] = 1
    assert torch.equal(masks.grow(seeds, body), expected)


def test_evidence_mixes_attention_and_noise_and_peaks_at_one():
    attention, noise = torch.rand(2, 2, CELLS, CELLS), torch.rand(2, 1, CELLS, CELLS)
    for weight in (0.0, 0.3, 1.0):
        coarse = masks.evidence(attention, 7 * noise, weight)
        torch.testing.assert_close(coarse.amax((1, 2, 3)), torch.ones(2))
    torch.testing.assert_close(masks.evidence(attention, noise, 0.0), noise / noise.amax((1, 2, 3), keepdim=True))
    without_words = masks.evidence(0 * attention, noise, 1.0)
    torch.testing.assert_close(without_words, masks.evidence(attention, noise, 0.0))


def test_local_blend_takes_the_cells_around_where_either_prompt_looks():
    maps = torch.full((1, 2, 9, 9), 0.01)
    maps[0, 0, 2, 2] = maps[0, 1, 6, 6] = 1
    region = masks.attention_region(maps, 0.3)
    expected = torch.zeros(1, 1, 9, 9)
    expected[..., 1:4, 1:4] = expected[..., 5:8, 5:8] = 1
    assert torch.equal(region, expected)


def test_the_evidence_region_is_a_block_its_neighbours_and_soft_corners():
    evidence = torch.zeros(1, 1, 9, 9)
    evidence[..., 3:6, 3:6] = 1
    expected = torch.zeros(1, 1, 9, 9)
    expected[..., 2:7, 2:7] = 1
    # Averaged over 3 x 3 cells the block's corners hold 4/9, on the ramp of 0.5 from 0.35 to 0.65.
    expected[..., [2, 2, 6, 6], [2, 6, 2, 6]] = (4 / 9 - 0.35) / 0.3
    torch.testing.assert_close(masks.evidence_region(evidence, 0.5), expected)
    assert not masks.evidence_region(torch.zeros(1, 1, 9, 9), 0.5).any()


def test_a_composite_is_the_input_where_the_mask_is_zero_and_the_edit_where_it_is_one():
    images, reconstruction = torch.rand(2, 2, 1, 8, 8)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4, :] = 1
    # Far from the reconstruction the edit replaces the input; without an edit the input stays.
    edited = (reconstruction + 0.5) % 1
    result = masks.composite(images, edited, reconstruction, mask, 0.12)
    assert torch.equal(result[..., 4:, :], images[..., 4:, :])
    torch.testing.assert_close(result[..., :4, :], edited[..., :4, :])
    torch.testing.assert_close(masks.composite(images, reconstruction, reconstruction, mask, 0.12), images)


@pytest.mark.parametrize("feather", [0, 2])
def test_kept_pixels_leave_the_mask_and_distant_ones_do_not(feather):
    keep = torch.zeros(1, 1, 33, 33)
    keep[..., 10:20, 10:20] = 1
    mask = masks.without(torch.ones(1, 1, 33, 33), keep, feather)
    assert not mask[keep > 0].any()
    assert (mask[..., 25:, 25:] == 1).all()


def test_a_users_masks_close_the_latent_cells_without_an_open_pixel():
    images, mask, keep = (
        torch.zeros(1, 3, 8, 8),
        torch.zeros(1, 1, 8, 8, dtype=torch.bool),
        torch.zeros(1, 1, 8, 8),
    )
    mask[..., :5, :] = True
    keep[..., :2, :2] = 1
    keep[..., 0, 4] = 1
    areas = masks.Areas.checked(mask, keep, images)
    assert areas.mask.dtype == torch.float32
    expected = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).float()
    assert torch.equal(areas.cells(4, 4)[0, 0], expected)
    assert masks.Areas.checked("auto", None, images).cells(4, 4) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("min_change", 0.0), ("weak", -1.0), ("seed_evidence", 1.5), ("dilate", -1), ("feather", 0.5)],
)
def test_a_setting_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name}\S* is .*: "):
        replace(MaskConfig(), **{name: value})
