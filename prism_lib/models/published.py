"""Weights that others published: a whole pipeline, or a U-Net or an autoencoder in one of these layouts.

- a component folder: ``config.json`` beside ``diffusion_pytorch_model.safetensors``;
- a folder with such components as ``unet/`` or ``vae/``, a whole pipeline or not (RoentGen, RadEdit);
- a bare state dict, ``model.safetensors``, alone or in a folder (PRISM): it must fit the pipeline's own part;
- a Hugging Face hub id of any of these.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
_UNREACHABLE = "{name} is no folder here, is not cached, and cannot be downloaded: {error}"


def locate(name: str) -> str:
    """The folder that a name stands for, or the name itself where it can be a hub id (one word, or owner/name)."""
    if name == paths.SHIPPED:
        folder = paths.weights() / name
    else:
        folder = next((path for path in (Path(name).expanduser(), paths.runs() / name) if path.exists()), Path(name))
    if (folder / "model_index.json").is_file():
        return str(folder)
    if name == paths.SHIPPED:
        raise FileNotFoundError(f"the shipped weights are missing: {folder} has no model_index.json")
    refuse_pickles(folder)
    alone = [slot for slot in PARTS if (folder / slot).is_dir()]
    if alone:
        raise FileNotFoundError(
            f"{folder} is no whole pipeline (no model_index.json) but has {' and '.join(alone)}: load the pipeline it "
            f"was made from, with {', '.join(f'{slot}={name!r}' for slot in alone)}"
        )
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(
            f"{name} is no diffusers pipeline folder, here or below {paths.runs()}: no model_index.json"
        )
    return name


def load_whole(name: str, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The pipeline of a folder or hub id as it is; only a download shows progress bars."""
    wanted = {"dtype": dtype, "use_safetensors": True}
    wanted |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        with without_bars():
            return StableDiffusionPipeline.from_pretrained(name, local_files_only=True, **wanted)
    except OSError as absent:
        if Path(name).is_dir():
            raise
        logger.info("%s is not cached whole (%s): downloading", name, absent)
    try:
        return StableDiffusionPipeline.from_pretrained(name, **wanted)
    except OSError as error:
        raise FileNotFoundError(_UNREACHABLE.format(name=name, error=error)) from None


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
    digest = hashlib.sha256()
    for path in sorted(place.rglob("*.safetensors")) if place.is_dir() else []:
        digest.update(path.relative_to(place).as_posix().encode() + bytes.fromhex(file_hash(path)))
    return digest.hexdigest() if place.is_dir() else ""


def replace_part(pipeline: StableDiffusionPipeline, slot: str, source: str | Path) -> None:
    """Put the "unet" or "vae" that ``source`` names into the pipeline.

    Raises FileNotFoundError when nothing is there, ValueError for a pickle, for missing, unexpected or misshapen
    tensors (all counted, the first few named), and for a part that does not fit the others of the pipeline.
    """
    place = _place(str(source), slot)
    current = getattr(pipeline, slot)
    if (place / "config.json").is_file():
        part = _from_folder(PARTS[slot], place)
    else:
        part = _from_state_dict(current, place if place.is_file() else _only_file(place))
    setattr(pipeline, slot, part.to(current.device, current.dtype))
    _check_fit(pipeline, source)


def refuse_pickles(path: Path) -> None:
    """Raise ValueError for a file, or a folder with weights, in a format that can run code when it is read."""
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    if any(file.suffix == ".safetensors" or file.name == "model_index.json" for file in files):
        return
    for file in files:
        if file.suffix in PICKLES:
            raise ValueError(
                f"{file} is a pickle, which can run code when it is read, and is never loaded. Convert it once: "
                + _conversion(file)
            )


def _conversion(file: Path) -> str:
    if file.suffix == ".ckpt":
        return _SCRIPT.format(options=f"--checkpoint_path {file}")
    target = file.with_suffix(".safetensors")
    loaded = f'torch.load("{file}", weights_only=True)'
    return f'import torch, safetensors.torch; safetensors.torch.save_file({loaded}, "{target}")'


def _place(source: str, slot: str) -> Path:
    """The component folder, plain folder or file that a source means, downloaded if it is nowhere yet."""
    path = Path(source).expanduser()
    if not path.exists():
        if source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix:
            raise FileNotFoundError(f"{slot}: {source} does not exist")
        path = Path(hub_folder(source, [f"{slot}/*", "*.safetensors", "config.json"]))
    if path.is_dir() and (path / slot).is_dir():
        path = path / slot
    refuse_pickles(path)
    return path


def hub_folder(name: str, patterns: list[str]) -> str:
    """The files of a hub id that match: from the cache where they are, else downloaded."""
    try:
        return str(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except OSError:
        pass
    try:
        return str(snapshot_download(name, allow_patterns=patterns))
    except OSError as error:
        raise FileNotFoundError(_UNREACHABLE.format(name=name, error=error)) from None


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise FileNotFoundError(f"{folder} has no config.json and not one .safetensors file (it has: {found})")
    return files[0]


def _from_folder(kind: Any, folder: Path) -> Any:
    """A component folder; diffusers renames the attention weights of its early versions."""
    part, report = kind.from_pretrained(
        folder,
        use_safetensors=True,
        output_loading_info=True,
        low_cpu_mem_usage=False,  # with `ignore_mismatched_sizes` it makes the report complete
        ignore_mismatched_sizes=True,
    )
    misshapen = [key for key, *_ in report["mismatched_keys"]]
    _check_keys(folder, report["missing_keys"], report["unexpected_keys"], misshapen)
    return part


def _from_state_dict(current: Any, file: Path) -> Any:
    """A bare state dict in a copy of the pipeline's own part."""
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
    """The parts of a pipeline must agree on latent channels and on the width of the text."""
    unet, latent = pipeline.unet.config, pipeline.vae.config.latent_channels
    width = pipeline.text_encoder.config.hidden_size
    if unet.in_channels != latent or unet.out_channels != latent:
        raise ValueError(
            f"{source} does not fit: the U-Net takes {unet.in_channels} channels and gives {unet.out_channels}, "
            f"the autoencoder has {latent}"
        )
    if unet.cross_attention_dim != width:
        raise ValueError(
            f"{source} does not fit: the U-Net reads text of width {unet.cross_attention_dim}, "
            f"the text encoder gives {width}"
        )
