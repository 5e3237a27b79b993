"""Sources of images: each gives its rows' images, and a cache makes every image once."""

from functools import partial

import pytest
import torch
from PIL import Image

from prism_lib.data.folder import load_table, read_images
from prism_lib.data.rows import editable, true_counterfactual
from prism_lib.language.edits import Edit
from prism_lib.studies import augmentation
from prism_lib.studies.editors import PromptToPrompt
from tests.tiny import tiny_pipeline

REMOVE = Edit(remove=("Support Devices",))


@pytest.fixture(scope="module")
def rows(phantom_folder):
    return editable(load_table(phantom_folder, "train"), REMOVE).head(3)


def test_the_truth_is_the_phantoms(phantom_folder, rows):
    expected = true_counterfactual(phantom_folder, rows, REMOVE)[0]
    assert torch.equal(augmentation.truth(phantom_folder, rows, REMOVE), expected)


def test_what_is_removed_from_a_donor_is_added_to_another_image(phantom_folder, rows):
    """A bar that lets a quarter of the light through is in the donor; the source removes it."""
    donor = read_images(phantom_folder, rows[:1])
    asked = []

    def source(chosen, edit):
        asked.append((list(chosen["file_name"]), edit.key))
        without = read_images(phantom_folder, chosen)
        without[..., :8] = 1 - (1 - without[..., :8]) * 4
        return without

    moved = partial(augmentation.transplants, source, phantom_folder, rows[:1])
    other = rows[1:]
    images, made = read_images(phantom_folder, other), moved(other, Edit(add=REMOVE.remove))
    assert asked == [([rows["file_name"][0]] * 2, REMOVE.key)]
    light = 1 - donor[..., :8]
    expected = 1 - (1 - images[..., :8]) * (light + 1 / 255) / (4 * light + 1 / 255)
    torch.testing.assert_close(made[..., :8], expected)
    torch.testing.assert_close(made[..., 8:], images[..., 8:])
    assert torch.equal(moved(other, REMOVE), source(other, REMOVE)), "removals are the source's own"


def test_counterfactuals_are_gray_images_of_the_rows(phantom_folder, rows):
    source = partial(
        augmentation.counterfactuals, tiny_pipeline(), phantom_folder, PromptToPrompt(num_inference_steps=2)
    )
    images = source(rows, REMOVE)
    assert images.shape == (3, 1, 32, 32)
    single = source(rows.iloc[1:2], REMOVE)
    torch.testing.assert_close(images[1:2], single, atol=1e-3, rtol=0)


def test_a_sample_depends_on_its_name_and_not_on_its_neighbours(phantom_folder, rows):
    source = partial(augmentation.synthetic, tiny_pipeline(), phantom_folder, num_inference_steps=2)
    images = source(rows, REMOVE)
    assert images.shape == (3, 1, 32, 32)
    torch.testing.assert_close(images[1:2], source(rows.iloc[1:2], REMOVE), atol=1e-6, rtol=0)
    assert not torch.equal(images[0], images[1])


def test_a_cache_makes_every_image_once_and_goes_on(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(augmentation, "CHUNK", 2)
    made = []

    def source(chosen, edit):
        made.append(list(chosen["file_name"]))
        return torch.full((len(chosen), 1, 8, 8), 0.2)

    cached = augmentation.Cached(source, tmp_path, {"steps": 2})
    names = list(rows["file_name"])
    first = cached(rows, REMOVE)
    assert made == [names[:2], names[2:]]
    assert first.unique().item() == pytest.approx(0.2)
    assert torch.equal(cached(rows, REMOVE), first) and len(made) == 2
    sorted(tmp_path.glob("*.png"))[0].unlink()
    cached(rows, REMOVE)
    assert len(made) == 3 and len(made[2]) == 1, "only the image that is gone"
    monkeypatch.setattr(augmentation, "CHUNK", 4)
    other = augmentation.Cached(source, tmp_path, {"steps": 3})
    other(rows, REMOVE)
    assert made[3] == names, "other settings share nothing"
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_files_of_a_bulk_run(rows, tmp_path):
    names = list(rows["file_name"])
    for n, _ in enumerate(names):
        Image.new("L", (8, 8), 51 * n).save(tmp_path / f"{n}.png")
    files = {(name, REMOVE.key): tmp_path / f"{n}.png" for n, name in enumerate(names)}
    assert augmentation.Files(files)(rows, REMOVE).mean((1, 2, 3)).tolist() == pytest.approx([0, 0.2, 0.4])
    other = files | {(names[0], REMOVE.key): tmp_path / "another.png"}
    assert augmentation.Files(files).settings != augmentation.Files(other).settings, "other files are another source"
    del files[names[1], REMOVE.key]
    with pytest.raises(ValueError, match=f"no image of remove_support_devices for 1 rows, the first {names[1]}"):
        augmentation.Files(files)(rows, REMOVE)
