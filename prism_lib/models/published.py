"""Published weights: a whole pipeline, or a U-Net or an autoencoder in one of these layouts (or a hub id of one).

- a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``, itself or below ``unet/`` or ``vae/``;
- a bare state dict, ``model.safetensors``, alone or in a folder (PRISM): it must fit the pipeline's own part.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_bars
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers.utils import logging as transformers_bars

from prism_lib import paths
from prism_lib.files import file_hash

logger = logging.getLogger(__name__)

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
_SCRIPT = (
    "python convert_original_stable_diffusion_to_diffusers.py (from diffusers' scripts folder) "
    "{options} --to_safetensors --dump_path FOLDER, then load FOLDER"
)
Result = TypeVar("Result")


def locate(name: str, marker: str = "model_index.json", kind: str = "diffusers pipeline") -> str:
    """The folder with a ``marker`` that a name stands for, or the name itself where it can be a hub id."""
    shipped = paths.weights() / name
    places = [shipped] if name == paths.SHIPPED else [Path(name).expanduser(), paths.runs() / name, shipped]
    for place in places:
        if (place / marker).is_file():
            return str(place)
    if name == paths.SHIPPED:
        raise FileNotFoundError(f"the shipped weights are missing: {shipped} has no {marker}")
    folder = next((place for place in places if place.exists()), Path(name))
    refuse_pickles(folder)
    if alone := [slot for slot in PARTS if (folder / slot).is_dir()]:
        raise FileNotFoundError(
            f"{folder} is no whole pipeline (no {marker}) but has {' and '.join(alone)}: load the pipeline it "
            f"was made from, with {', '.join(f'{slot}={name!r}' for slot in alone)}"
        )
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name} is no {kind}: no {marker}, here or below {paths.runs()}")
    return name


def load_whole(name: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The pipeline of a folder or hub id as it is; only a download shows progress bars."""
    wanted = {"dtype": dtype, "use_safetensors": True}
    wanted |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def load(local: bool) -> StableDiffusionPipeline:
        with without_bars() if local else nullcontext():
            return StableDiffusionPipeline.from_pretrained(name, local_files_only=local, **wanted)

    return load(True) if Path(name).is_dir() else _from_hub(name, load)


def _from_hub(name: str, load: Callable[[bool], Result]) -> Result:
    """``load(True)``, of the cache alone, and if something is missing there ``load(False)``, which downloads."""
    try:
        return load(True)
    except OSError as absent:
        logger.info("%s is not cached whole (%s): downloading", name, absent)
    try:
        return load(False)
    except OSError as error:
        raise FileNotFoundError(f"{name} is no folder here, is not cached, and cannot be downloaded: {error}") from None


@contextmanager
def without_bars() -> Iterator[None]:
    """Inside, diffusers and transformers show no progress bars; afterwards they are as before."""
    shown = [bars for bars in (diffusers_bars, transformers_bars) if bars.is_progress_bar_enabled()]
    for bars in shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        for bars in shown:
            bars.enable_progress_bar()


def weights_hash(name_or_path: str | Path) -> str:
    """SHA-256 over the weight files of a pipeline that `locate` finds on this disk; "" for a hub id."""
    place = Path(locate(str(name_or_path)))
    if not place.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(place.rglob("*.safetensors")):
        digest.update(path.relative_to(place).as_posix().encode() + bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def replace_part(pipeline: StableDiffusionPipeline, slot: str, source: str | Path) -> None:
    """Put the "unet" or "vae" that ``source`` names into the pipeline.

    Raises FileNotFoundError when nothing is there, ValueError for a pickle and for tensors or sizes that do not fit.
    """
    place = _place(str(source), slot)
    current = getattr(pipeline, slot)
    if (place / "config.json").is_file():
        part = _from_folder(PARTS[slot], place)
    else:
        files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise FileNotFoundError(f"{place} has no config.json and not one .safetensors file (it has: {found})")
        part = _from_state_dict(current, files[0])
    setattr(pipeline, slot, part.to(current.device, current.dtype))
    _check_fit(pipeline, source)


def refuse_pickles(path: Path) -> None:
    """Raise ValueError for a file, or a folder with weights, in a format that can run code when it is read."""
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    if any(file.suffix == ".safetensors" or file.name == "model_index.json" for file in files):
        return
    for file in (file for file in files if file.suffix in PICKLES):
        way = _SCRIPT.format(options=f"--checkpoint_path {file}")
        if file.suffix != ".ckpt":
            saved = f'torch.load("{file}", weights_only=True), "{file.with_suffix(".safetensors")}"'
            way = f"import torch, safetensors.torch; safetensors.torch.save_file({saved})"
        raise ValueError(
            f"{file} is a pickle, which can run code when it is read, and is never loaded. Convert it once: {way}"
        )


def _place(source: str, slot: str) -> Path:
    """The folder or file of a part, downloaded if it is nowhere yet."""
    path = Path(source).expanduser()
    if not path.exists():
        if source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix:
            raise FileNotFoundError(f"{slot}: {source} does not exist")
        fetch = partial(snapshot_download, source, allow_patterns=[f"{slot}/*", "*.safetensors", "config.json"])
        path = Path(_from_hub(source, lambda local: fetch(local_files_only=local)))
    if path.is_dir() and (path / slot).is_dir():
        path = path / slot
    refuse_pickles(path)
    return path


def _from_folder(kind: Any, folder: Path) -> Any:
    """A component folder; diffusers renames the attention weights of its early versions."""
    # These three make the report complete.
    options = {"output_loading_info": True, "low_cpu_mem_usage": False, "ignore_mismatched_sizes": True}
    part, report = kind.from_pretrained(folder, use_safetensors=True, **options)
    misshapen = [key for key, *_ in report["mismatched_keys"]]
    _check_keys(folder, report["missing_keys"], report["unexpected_keys"], misshapen)
    return part


def _from_state_dict(current: Any, file: Path) -> Any:
    tensors = load_file(file)
    if any(key.startswith("model.diffusion_model.") for key in tensors):
        raise ValueError(
            f"{file} is a checkpoint in the original layout of Stable Diffusion. Convert it once: "
            + _SCRIPT.format(options=f"--from_safetensors --checkpoint_path {file}")
        )
    for prefix in ("module.", "unet.", "vae."):  # as trainers wrap it
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    part = type(current).from_config(current.config)
    own = part.state_dict()
    misshapen = [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
    _check_keys(file, own.keys() - tensors.keys(), tensors.keys() - own.keys(), misshapen)
    part.load_state_dict(tensors)
    return part


def _check_keys(source: Path, missing: Any, unexpected: Any, misshapen: Any) -> None:
    problems = []
    for name, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            problems.append(f"{len(keys)} {name} ({some})")
    if problems:
        raise ValueError(f"{source} does not fit: of its tensors, {'; '.join(problems)}")


def _check_fit(pipeline: StableDiffusionPipeline, source: str | Path) -> None:
    unet, latent = pipeline.unet.config, pipeline.vae.config.latent_channels
    takes, gives, read = unet.in_channels, unet.out_channels, unet.cross_attention_dim
    misfit = f"{source} does not fit: the U-Net"
    if (takes, gives) != (latent, latent):
        raise ValueError(f"{misfit} takes {takes} channels and gives {gives}, the autoencoder has {latent}")
    if read != (width := pipeline.text_encoder.config.hidden_size):
        raise ValueError(f"{misfit} reads text of width {read}, the text encoder gives {width}")
