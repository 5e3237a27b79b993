"""What an edit changed and where its words looked: statistics by region, attention maps, and a film of the change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib.editing.denoising import EditTask, denoise
from prism_lib.editing.inversion import Inversion
from prism_lib.editing.masks import Areas
from prism_lib.editing.settings import EditConfig, Settings, resolved
from prism_lib.files import atomic
from prism_lib.language.edits import PromptPair
from prism_lib.models.schedule import Schedule


def region_statistics(edited: Tensor, original: Tensor, regions: Mapping[str, Tensor]) -> pd.DataFrame:
    """A row per image and region: how much of the change lies there, and of which sign.

    Images are (N, C, H, W), regions boolean (N, 1, H, W). `brighter` and `darker` are shares of the region's pixels,
    `share_of_change` is that of the image's absolute change (NaN where nothing changed).
    """
    if edited.shape != original.shape:
        raise ValueError(f"edited has shape {tuple(edited.shape)}, original {tuple(original.shape)}")
    difference = (edited - original).mean(1, keepdim=True)
    total = difference.abs().sum((1, 2, 3))
    tables = []
    for name, region in regions.items():
        if region.shape != difference.shape or region.dtype != torch.bool:
            raise ValueError(f"region {name!r} must be boolean {tuple(difference.shape)}, got {tuple(region.shape)}")
        if empty := (~region.flatten(1).any(1)).nonzero().flatten().tolist():
            raise ValueError(f"region {name!r} of image {empty[0]} is empty")
        inside, pixels = difference * region, region.sum((1, 2, 3))
        size = inside.abs()
        means = {"brighter": inside > 0, "darker": inside < 0, "mean_change": inside, "mean_absolute_change": size}
        columns = {key: values.sum((1, 2, 3)) / pixels for key, values in means.items()}
        columns = {"pixels": pixels, **columns, "share_of_change": size.sum((1, 2, 3)) / total}
        values = {key: column.tolist() for key, column in columns.items()}
        tables.append(pd.DataFrame({"image": range(len(pixels)), "region": name, **values}))
    return pd.concat(tables, ignore_index=True)


def mask_regions(mask: Tensor) -> dict[str, Tensor]:
    """Regions for `region_statistics` from a soft mask (1, 1, H, W): where it is open, and elsewhere, if any."""
    regions = {"inside the mask": mask > 0, "outside": mask == 0}
    return {name: region for name, region in regions.items() if bool(region.any())}


@torch.no_grad()
def attention_maps(
    pipe: StableDiffusionPipeline, inversion: Inversion, pairs: Sequence[PromptPair], settings: Settings
) -> tuple[Tensor, Tensor]:
    """Where the words of each edit looked, in source and in target: two times (N, 1, H, W), each map's maximum 1.

    Cross-attention to the edit's words, averaged over heads, coarse layers and the steps of `editing.edit`
    (Hertz et al., 2023). A prompt without such words has a map of zeros.
    """
    if len(pairs) != len(inversion):
        raise ValueError(f"{len(inversion)} inverted images need as many prompt pairs, got {len(pairs)}")
    tasks = [EditTask(n, pair, resolved(pipe, pair, settings)) for n, pair in enumerate(pairs)]
    with tqdm(total=inversion.start * len(tasks), desc="attention", leave=False) as progress:
        outcome = denoise(pipe, inversion, tasks, Areas(), progress)
    maps = outcome.word_maps[list(outcome.row_of)].float().cpu()
    maps = F.interpolate(maps, size=inversion.images.shape[-2:], mode="bilinear", align_corners=False)
    source, target = (maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-12)).split(1, dim=1)
    return source, target


def schedule(config: EditConfig, pipe: StableDiffusionPipeline, num_inference_steps: int) -> pd.DataFrame:
    """Whose attention the edited image uses, a row per step in the order they run (the noisiest first).

    Columns: `timestep`; `cross` (which word each place looks at) and `self` (which places belong together), each
    "source" or "own"; `local_blend`, whether latents far from the edit's words return to the source.
    """
    levels, count = Schedule.from_config(pipe.scheduler.config, num_inference_steps), num_inference_steps
    columns: dict[str, list[object]] = {"timestep": [levels.timesteps[count - step] for step in range(count)]}
    for name, share in {"cross": config.cross_replace_steps, "self": config.self_replace_steps}.items():
        columns[name] = ["source" if step < round(share * count) else "own" for step in range(count)]
    starts = config.local_blend_start
    columns["local_blend"] = [config.local_blend and step / count >= starts for step in range(count)]
    return pd.DataFrame(columns, index=pd.RangeIndex(1, count + 1, name="step"))


def save_transition(original: Tensor, edited: Tensor, path: Path) -> Path:
    """From original to edited and back, (1 or 3, H, W) in [0, 1], as a GIF of linear mixtures, repeated; 2 seconds."""
    if original.shape != edited.shape or original.ndim != 3 or original.shape[0] not in (1, 3):
        raise ValueError(f"images must be (1 or 3, H, W), got {tuple(original.shape)} and {tuple(edited.shape)}")
    there = torch.linspace(0, 1, 12)
    shares = torch.cat([there, there.flip(0)[1:-1]])[:, None, None, None]
    mixtures = (original + shares * (edited - original)).clamp(0, 1)
    pixels = (mixtures * 255).round().byte().permute(0, 2, 3, 1).squeeze(-1).cpu().numpy()
    first, *rest = [Image.fromarray(frame) for frame in pixels]
    more = {"save_all": True, "append_images": rest, "duration": round(2000 / len(pixels)), "loop": 0}
    with atomic(path) as partial:
        first.save(partial, format="GIF", **more)
    return path
