"""The settings of a fine-tuning run: checked when made, kept as JSON beside what the run writes."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from prism_lib.configs import Share, checked, read
from prism_lib.data.folder import load_info
from prism_lib.devices import mixed_precision
from prism_lib.files import write_text
from prism_lib.models.published import weights_hash
from prism_lib.paths import SHIPPED

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Precision = Annotated[
    Literal["no", "fp16", "bf16"], BeforeValidator(lambda asked: mixed_precision() if asked == "auto" else asked)
]


@checked()
class FinetuneConfig:
    """One fine-tuning run. Defaults follow the paper (AdamW, lr 1e-5, clip 1), else Stable Diffusion's practice."""

    dataset: str  # a prepared folder
    output: str  # receives checkpoints, log, samples and the final pipeline
    pipeline: str = SHIPPED
    unet: str = ""  # weights in place of the pipeline's own, as in `load_pipeline`
    vae: str = ""
    steps: PositiveInt = 1000
    batch_size: PositiveInt = 8  # per process
    gradient_accumulation: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-5  # of AdamW
    schedule: Schedule = "constant_with_warmup"  # diffusers' names
    warmup: NonNegativeInt = 100
    weight_decay: NonNegativeFloat = 1e-2
    max_grad_norm: PositiveFloat = 1.0
    lora_rank: NonNegativeInt = 0  # of adapters on the attention (Hu et al. 2022); 0 trains the whole U-Net
    caption_dropout: Share = 0.1
    captions_per_image: PositiveInt = 4
    explicit_share: Share = 0.5  # captions in the wording that edits use
    balance: str = ""  # a label whose values are drawn equally often; an epoch is then a draw with replacement
    ema_decay: Share = 0.999
    noisy_share: Annotated[float, Field(ge=0.5, le=1)] = 0.5  # of timesteps in the noisier half, which decides layout
    snr_gamma: NonNegativeFloat = 0.0  # 5 for Min-SNR weighting (Hang et al., ICCV 2023); 0 is off
    mixed_precision: Precision = "no"  # "auto" becomes "bf16" where this machine multiplies in it, else "no"
    gradient_checkpointing: bool = False  # a third more time, far less memory
    compile: bool = False  # torch.compile: a slow first step, faster ones after it
    draw_workers: NonNegativeInt = 4  # threads that draw batches ahead for a GPU; a CPU has none
    validation_every: PositiveInt = 250
    early_stop: NonNegativeInt = 0  # validations in a row without a lower loss that end a run; 0 is off
    sample_every: NonNegativeInt = 500  # steps between samples on the way; 0: none
    checkpoint_every: PositiveInt = 250
    keep_checkpoints: PositiveInt = 2
    trackers: tuple[str, ...] = ()  # of accelerate, such as "tensorboard", beside log.jsonl
    cache: str = ""  # folder of encoded latents and captions, to share between runs; empty: in the output
    seed: int = 0


def load_config(path: str | Path) -> FinetuneConfig:
    """The configuration in a JSON file; ValueError names the file and the first unknown, missing or wrong field."""
    return read(FinetuneConfig, Path(path).read_bytes(), f"{path} is no configuration of a fine-tuning run")


def save_config(config: FinetuneConfig) -> Path:
    """Write ``output/config.json``, which `load_config` reads; ValueError if another run's stands there."""
    path, own = Path(config.output) / "config.json", asdict(config)
    if not path.is_file():
        return write_text(path, json.dumps(own, indent=1))
    found = asdict(load_config(path))
    # A folder may be moved.
    if changed := [f"{name} ({found[name]!r})" for name in own if found[name] != own[name] and name != "output"]:
        raise ValueError(f"{config.output} holds a run with another {', '.join(changed)}; choose another output folder")
    return path


def require_same_origin(config: FinetuneConfig) -> None:
    """ValueError if the weights or data that the run in ``output`` began from (``origin.json``) have changed since."""
    path = Path(config.output) / "origin.json"
    origin: dict[str, str] = {}
    with suppress(FileNotFoundError):  # a finished run may outlive them
        origin["weights"] = weights_hash(config.pipeline)
    with suppress(FileNotFoundError):
        origin["data"] = str(load_info(config.dataset)["content_hash"])
    if not path.is_file():
        write_text(path, json.dumps(origin, indent=1) + "\n")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    if changed := [name for name in origin if found.get(name, origin[name]) != origin[name]]:
        raise ValueError(
            f"{config.output} holds a run that began from other {' and '.join(changed)} than {config.pipeline} and "
            f"{config.dataset} have now; delete it, or choose another output folder"
        )
