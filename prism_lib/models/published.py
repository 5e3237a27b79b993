"""Published weights: a classifier in ONNX; a pipeline; a U-Net or an autoencoder in one of these layouts, or as hub id.

- a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``, itself or below ``unet/`` or ``vae/``;
- a bare state dict, ``model.safetensors``, alone or in a folder (PRISM): it must fit the pipeline's own part.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers import StableDiffusionXLPipeline as SDXL
from diffusers.utils import logging as diffusers_bars
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_bars

from prism_lib import paths
from prism_lib.files import file_hash
from prism_lib.models.wavelets import HaarAutoencoder  # diffusers loads classes of imported modules only

logger = logging.getLogger(__name__)

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
_CLASSES = {slot: (kind.__name__,) for slot, kind in PARTS.items()} | {  # in model_index.json
    "_class_name": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", SDXL.__name__),
    "text_encoder": ("CLIPTextModel", "BertModel"),
    "vae": (AutoencoderKL.__name__, HaarAutoencoder.__name__),
}
_SUPPORTED = "supported are Stable Diffusion 1, 2 (UNet2DConditionModel, AutoencoderKL, CLIPTextModel/BertModel), SDXL"
_BESIDE_TEXT = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
_TRAINED = {  # what a U-Net is trained with: a part's field, and its value where early configurations leave it out
    "text encoder": ("text_encoder", "model_type", "clip_text_model"),
    "prediction type": ("scheduler", "prediction_type", "epsilon"),
    "scaling factor": ("vae", "scaling_factor", 0.18215),
}
_CONVERT = "Convert it once, and load FOLDER: StableDiffusionPipeline.from_single_file({!r}).save_pretrained(FOLDER)"


def locate(name: str, marker: str = "model_index.json", kind: str = "diffusers pipeline") -> str:
    """The folder with a ``marker`` that a name stands for, or the name itself where it can be a hub id."""
    shipped = paths.weights() / name
    own = name in (paths.SHIPPED, paths.FILMS)
    places = [shipped] if own else [Path(name).expanduser(), paths.runs() / name, shipped]
    for place in places:
        if (place / marker).is_file():
            return str(place)
    if own:
        raise FileNotFoundError(f"the shipped weights are missing: {shipped} has no {marker}")
    folder = next((place for place in places if place.exists()), Path(name))
    refuse_pickles(folder)
    if alone := [slot for slot in PARTS if (folder / slot).is_dir()]:
        parts = ", ".join(f"{slot}={name!r}" for slot in alone)
        lacks = f"{folder} is no whole pipeline (no {marker}) but has {' and '.join(alone)}"
        raise FileNotFoundError(f"{lacks}: load the pipeline it was made from, with {parts}")
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name} is no {kind}: no {marker}, here or below {paths.runs()}")
    return name


def load_whole(name: str, dtype: torch.dtype, parts: Mapping[str, str | Path]) -> StableDiffusionPipeline:
    """The pipeline of a folder or hub id with published ``parts`` ("unet", "vae"); only a download shows progress bars.

    OSError for what is missing or damaged; ValueError for another family, pickles, and parts that do not go together.
    """

    def load(local: bool) -> StableDiffusionPipeline:
        index = StableDiffusionPipeline.load_config(name, local_files_only=local)
        kinds = {part: kind[1] if isinstance(kind, list) else kind for part, kind in index.items()}
        second = {"text_encoder_2": ("CLIPTextModelWithProjection",)} if kinds["_class_name"] == SDXL.__name__ else {}
        for part, known in (_CLASSES | second).items():
            if (kind := kinds.get(part)) not in known:
                raise ValueError(f"{name} has {part} {kind}; {_SUPPORTED}")
        wanted = {"local_files_only": local, "use_safetensors": True, "safety_checker": None, "feature_extractor": None}
        with without_bars() if local else nullcontext():
            folder = Path(name if Path(name).is_dir() else StableDiffusionPipeline.download(name, **wanted))
            for part in (*PARTS, *(part for part in index if part.startswith("text_encoder"))):
                _check_weights(folder / part, "diffusion_pytorch_model" if part in PARTS else "model")
            if kinds["_class_name"] == SDXL.__name__:
                return SDXL.from_pretrained(folder, dtype=dtype, add_watermarker=False, **wanted)
            return StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, requires_safety_checker=False, **wanted)

    pipeline = load(True) if Path(name).is_dir() else _from_hub(name, load)
    if not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise ValueError(f"{name} has a {type(pipeline.scheduler).__name__}, a schedule without alphas; {_SUPPORTED}")
    _replace_parts(pipeline, name, {slot: source for slot, source in parts.items() if source})
    return pipeline


def _check_weights(folder: Path, stem: str) -> None:
    """OSError for a part of a pipeline without all its weights in safetensors; ValueError for pickles only."""
    refuse_pickles(folder)
    files, index = [folder / f"{stem}.safetensors"], folder / f"{stem}.safetensors.index.json"
    if index.is_file() and not files[0].is_file():
        files = sorted({folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    for file in files:
        if not file.is_file():
            begun = ", ".join(part.name for part in folder.parent.rglob("*.incomplete"))
            way = f"{f'{begun} was begun: ' if begun else ''}download it again"
            for other in folder.glob(f"{stem}.*.safetensors"):
                variant = Path(other.stem).suffix[1:].split("-")[0]
                load = f"StableDiffusionPipeline.from_pretrained({str(folder.parent)!r}, {variant=})"
                way = f"{other.name} is a variant; save it once with {load}.save_pretrained(FOLDER)"
            raise FileNotFoundError(f"{folder} lacks {file.name}: {way}")
        try:
            safe_open(file, "pt")
        except SafetensorError as error:
            raise OSError(f"{file} is not whole ({error}): download it again") from None


def _from_hub(name: str, load: Callable[[bool], Any]) -> Any:
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
    with ExitStack() as after:
        for bars in (diffusers_bars, transformers_bars):
            if bars.is_progress_bar_enabled():
                bars.disable_progress_bar()
                after.callback(bars.enable_progress_bar)
        yield


def weights_hash(name_or_path: str | Path) -> str:
    """SHA-256 over the weight files of a pipeline that `locate` finds on this disk; "" for a hub id."""
    place = Path(locate(str(name_or_path)))
    if not place.is_dir():
        return ""
    digest = hashlib.sha256()
    for path in sorted(place.rglob("*.safetensors")):
        digest.update(path.relative_to(place).as_posix().encode() + bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def _replace_parts(pipeline: StableDiffusionPipeline, name: str, parts: Mapping[str, str | Path]) -> None:
    """Put published parts into a pipeline, and compare what it then is with what its U-Net was trained with."""
    trained = {"scaling factor": pipeline.vae.config.scaling_factor}  # the own U-Net
    for slot, source in parts.items():
        place, current = _place(str(source), slot), getattr(pipeline, slot)
        if (place / "config.json").is_file():
            part = _from_folder(PARTS[slot], place, current.dtype)
        else:
            files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
            if len(files) != 1:
                found = ", ".join(file.name for file in files) or "none"
                raise FileNotFoundError(f"{place} has no config.json and not one .safetensors file (it has: {found})")
            part = _from_state_dict(current, files[0])
        setattr(pipeline, slot, part)
        if slot == "unet":
            trained = _said(place.parent) if place.name == slot else {}
    origin = " and ".join(str(source) for source in parts.values()) or name
    _check_fit(pipeline, origin)
    for what, (of, field, _) in _TRAINED.items():
        has = getattr(getattr(pipeline, of).config, field)
        if (value := trained.get(what, has)) != has:
            raise ValueError(f"{origin} does not fit: its U-Net was trained with {what} {value}, this one is {has}")
    if "unet" in parts:
        level = logging.INFO if len(trained) == len(_TRAINED) else logging.WARNING
        logger.log(level, "%s: of what its U-Net was trained with, the folder says %s", origin, trained or "nothing")


def _said(folder: Path) -> dict[str, Any]:
    """What a pipeline folder says of `_TRAINED`."""
    said = {}
    for what, (part, field, early) in _TRAINED.items():
        for file in (folder / part).glob("*config.json"):
            said[what] = json.loads(file.read_text("utf-8")).get(field, early)
    return said


def refuse_pickles(path: Path) -> None:
    """Raise ValueError for a file, or a folder with weights, in a format that can run code when it is read."""
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    if any(file.suffix == ".safetensors" or file.name == "model_index.json" for file in files):
        return
    for file in (file for file in files if file.suffix in PICKLES):
        way = _CONVERT.format(str(file))
        if file.suffix != ".ckpt":
            saved = f'torch.load("{file}", weights_only=True), "{file.with_suffix(".safetensors")}"'
            way = f"Convert it once: safetensors.torch.save_file({saved})"
        raise ValueError(f"{file} is a pickle, which can run code when it is read, and is never loaded. {way}")


def _place(source: str, slot: str) -> Path:
    """The folder or file of a part, downloaded if it is nowhere yet."""
    path = Path(source).expanduser()
    if not path.exists():
        if source.startswith((".", "/", "~")) or source.count("/") != 1 or path.suffix:
            raise FileNotFoundError(f"{slot}: {source} does not exist")
        wanted: dict[str, Any] = {"allow_patterns": [f"{slot}/*", "*.safetensors", "*config.json"]}
        path = Path(_from_hub(source, lambda local: snapshot_download(source, local_files_only=local, **wanted)))
    if path.is_dir() and (path / slot).is_dir():
        path = path / slot
    refuse_pickles(path)
    return path


def _from_folder(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A component folder; diffusers renames the attention weights of its early versions."""
    _check_weights(folder, "diffusion_pytorch_model")
    # These three make the report complete.
    options = {"output_loading_info": True, "low_cpu_mem_usage": False, "ignore_mismatched_sizes": True}
    part, report = kind.from_pretrained(folder, use_safetensors=True, torch_dtype=dtype, **options)
    misshapen = [key for key, *_ in report["mismatched_keys"]]
    _check_keys(folder, report["missing_keys"], report["unexpected_keys"], misshapen)
    return part


def _from_state_dict(current: Any, file: Path) -> Any:
    tensors = load_file(file)
    if any(key.startswith("model.diffusion_model.") for key in tensors):
        raise ValueError(f"{file} is in the original layout of Stable Diffusion. {_CONVERT.format(str(file))}")
    for prefix in ("module.", "unet.", "vae."):  # as trainers wrap it
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    part = type(current).from_config(current.config)
    own = part.state_dict()
    misshapen = [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
    _check_keys(file, own.keys() - tensors.keys(), tensors.keys() - own.keys(), misshapen)
    part.load_state_dict({key: value.to(current.dtype) for key, value in tensors.items()}, assign=True)
    return part


def _check_keys(source: Path, missing: Any, unexpected: Any, misshapen: Any) -> None:
    problems = []
    for name, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            problems.append(f"{len(keys)} {name} ({some})")
    if problems:
        raise ValueError(f"{source} does not fit: of its tensors, {'; '.join(problems)}")


def _check_fit(pipeline: StableDiffusionPipeline, source: str) -> None:
    """ValueError where text encoder, U-Net, autoencoder, tokenizer and scheduler do not go together."""
    unet, text, latent = pipeline.unet.config, pipeline.text_encoder.config, pipeline.vae.config.latent_channels
    takes, gives, read = unet.in_channels, unet.out_channels, unet.cross_attention_dim
    misfit = f"{source} does not fit: the U-Net"
    if (takes, gives) != (latent, latent):
        raise ValueError(f"{misfit} takes {takes} channels and gives {gives}, the autoencoder has {latent}")
    encoders = [(pipeline.tokenizer, text)]
    beside = set(_BESIDE_TEXT)
    if isinstance(pipeline, SDXL):
        encoders.append((pipeline.tokenizer_2, pipeline.text_encoder_2.config))
        beside -= {"addition_embed_type"} if unet.addition_embed_type == "text_time" else set()
    if read != (width := sum(config.hidden_size for _, config in encoders)):
        raise ValueError(f"{misfit} reads text of width {read}, the text encoder gives {width}")
    if more := sorted(name for name in beside if unet.get(name) is not None):
        raise ValueError(f"{misfit} also reads {', '.join(more)}; {_SUPPORTED}")
    for tokenizer, config in encoders:
        if (count := len(tokenizer)) != config.vocab_size:
            raise ValueError(f"{source}: the tokenizer has {count} tokens, its text encoder {config.vocab_size}")
        if (limit := tokenizer.model_max_length) > (longest := config.max_position_embeddings):
            way = f"the text encoder reads {longest}: set the number of the training in tokenizer_config.json"
            raise ValueError(f"{source}: model_max_length of the tokenizer is {limit:g}, but {way}")
    schedule = pipeline.scheduler.config
    if schedule.get("rescale_betas_zero_snr") and schedule.prediction_type == "epsilon":
        raise ValueError(f"{source} predicts epsilon, which says nothing at the zero-terminal SNR of its scheduler")


class OnnxNetwork(nn.Module):
    """The first output of an ONNX file, by onnxruntime on the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        from onnxruntime import InferenceSession  # an extra

        self.session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        given = {self.session.get_inputs()[0].name: images.cpu().numpy()}
        return torch.from_numpy(self.session.run(None, given)[0])
