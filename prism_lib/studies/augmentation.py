"""Images that join a training set: counterfactuals of its own, true ones, samples from text, or a folder of them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.data.folder import Folder, load_table, read_images
from prism_lib.data.rows import WITH_DEVICES, known_truth, prompt_pairs
from prism_lib.editing.counterfactuals import stack
from prism_lib.evaluation.evaluate import Editor
from prism_lib.files import atomic, stable_seed
from prism_lib.language.edits import Edit
from prism_lib.models.pipeline import Pipe, encode_prompts, sample_images

CHUNK = 8  # images that a cached source makes at a time
DARK = 1 / 255  # keeps ratios of light finite
# Rows of a prepared table and an edit that suits them -> images (N, 1, H, W) in [0, 1]. The functions below become
# sources when their first arguments are bound: `partial(truth, folder)`.
Source = Callable[[pd.DataFrame, Edit], Tensor]


def counterfactuals(pipe: Pipe, folder: Folder, editor: Editor, rows: pd.DataFrame, change: Edit) -> Tensor:
    """An editor's counterfactuals of the rows' own images."""
    pairs, images = prompt_pairs(folder, rows, change), read_images(folder, rows)
    return stack(editor(pipe, images, pairs, change)).mean(1, keepdim=True)


def synthetic(pipe: Pipe, folder: Folder, rows: pd.DataFrame, change: Edit, *, seed: int = 0, **how: Any) -> Tensor:
    """Samples from the same target prompts, without the image; ``how`` are settings of `sample_images`."""
    embeds = encode_prompts(pipe, [*(pair.target for pair in prompt_pairs(folder, rows, change)), ""])
    # The noise follows from the image's name, so a sample does not depend on the rows beside it.
    seeds = [int.from_bytes(_digest(seed, name, change.key)[:4], "big") for name in rows["file_name"]]
    samples = [
        sample_images(pipe, embed[None], embeds[-1:], seed=own, **how)
        for embed, own in zip(embeds[:-1], seeds, strict=True)
    ]
    return torch.cat(samples).cpu().mean(1, keepdim=True)


def truth(folder: Folder, rows: pd.DataFrame, change: Edit) -> Tensor:
    """The true counterfactuals of phantoms, and the twins of films with and without rendered devices."""
    if change == WITH_DEVICES and "twin" in rows:
        twins = load_table(folder).query("rendered").set_index("twin")["file_name"]
        return read_images(folder, rows.assign(file_name=twins[rows["file_name"]].to_list()))
    return known_truth(folder, rows, change).images


def transplants(source: Source, folder: Folder, donors: pd.DataFrame, rows: pd.DataFrame, change: Edit) -> Tensor:
    """For models that remove what they cannot add: what ``source`` removes from rows of ``donors`` is added to others.

    It goes to the same place, as the share of light that it lets through; images are X-rays, bright where dense.
    """
    if not change.add:
        return source(rows, change)
    donors = donors.iloc[[stable_seed(name) % len(donors) for name in rows["file_name"]]]
    light, before = (1 - read_images(folder, some).mean(1, keepdim=True) for some in (rows, donors))
    passed = (before + DARK) / (1 - source(donors, Edit(remove=change.add)) + DARK)
    return 1 - light * passed.clamp(max=1)


class Files:
    """Images made before, such as a bulk run's (`bulk.files`): (file_name, edit key) -> path, whose name tells all."""

    def __init__(self, images: Mapping[tuple[str, str], Path]) -> None:
        self.images = images
        names = "\0".join(f"{name}\0{key}\0{path.name}" for (name, key), path in sorted(images.items()))
        self.settings = hashlib.sha256(names.encode()).hexdigest()

    def __call__(self, rows: pd.DataFrame, change: Edit) -> Tensor:
        keys = [(str(name), change.key) for name in rows["file_name"]]
        if missing := [name for name, key in keys if (name, key) not in self.images]:
            raise ValueError(f"no image of {change.key} for {len(missing)} rows, the first {missing[0]}")
        return torch.stack([_read(self.images[key]) for key in keys])


class Cached:
    """A source whose images are kept below ``folder`` as PNG of 8 bits; ``settings`` is all that decides them."""

    def __init__(self, source: Source, folder: Path, settings: Mapping[str, Any], label: str = "images") -> None:
        self.source, self.folder, self.label = source, folder, label
        self.settings = json.dumps(settings, sort_keys=True, default=str)

    def __call__(self, rows: pd.DataFrame, change: Edit) -> Tensor:
        digests = (_digest(self.settings, name, change.key) for name in rows["file_name"])
        files = [self.folder / f"{change.key}-{digest.hex()[:16]}.png" for digest in digests]
        missing = [n for n, path in enumerate(files) if not path.is_file()]
        with tqdm(total=len(missing), desc=f"{self.label}: {change.key}", disable=not missing or None) as progress:
            for start in range(0, len(missing), CHUNK):
                part = missing[start : start + CHUNK]
                for n, image in zip(part, self.source(rows.iloc[part], change), strict=True):
                    with atomic(files[n]) as partial:
                        Image.fromarray((image[0] * 255).round().byte().numpy()).save(partial, format="PNG")
                progress.update(len(part))
        return torch.stack([_read(path) for path in files])


def _digest(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def _read(path: Path) -> Tensor:
    with Image.open(path) as file:
        return torch.from_numpy(np.array(file.convert("L"))).float().div(255)[None]
