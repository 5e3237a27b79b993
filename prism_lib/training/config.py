"""The settings of a fine-tuning run: checked when made, kept as JSON beside what the run writes."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from diffusers.optimization import SchedulerType

from prism_lib.data.folder import load_info
from prism_lib.devices import PRECISIONS
from prism_lib.files import write_text
from prism_lib.models.pipeline import SHIPPED, weights_hash

OPTIMIZERS = ("adamw", "adamw8bit")


@dataclass(frozen=True)
class FinetuneConfig:
    """One fine-tuning run. Defaults follow the paper where it says (AdamW, lr 1e-5, clip 1) and SD's practice else."""

    dataset: str  # a prepared folder
    output: str  # receives checkpoints, log, samples and the final pipeline
    pipeline: str = SHIPPED
    unet: str = ""  # weights in place of the pipeline's own, as in `models.load_pipeline`
    vae: str = ""
    steps: int = 1000
    batch_size: int = 8  # per process
    gradient_accumulation: int = 1
    learning_rate: float = 1e-5
    schedule: str = "constant_with_warmup"  # any of diffusers' schedules
    warmup: int = 100
    optimizer: str = "adamw"  # or "adamw8bit", with bitsandbytes
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    lora_rank: int = 0  # train adapters of this rank on the attention (Hu et al. 2022); 0 trains the whole U-Net
    caption_dropout: float = 0.1
    captions_per_image: int = 4
    explicit_share: float = 0.5  # captions in the wording that edits use
    balance: str = ""  # a label whose values are drawn equally often; an epoch is then a draw with replacement
    ema_decay: float = 0.999
    noisy_share: float = 0.5  # of timesteps from the noisier half, where layout, sides and kinds are decided; 0.5: even
    snr_gamma: float = 0.0  # 5 for Min-SNR weighting (Hang et al., ICCV 2023); 0 is off
    mixed_precision: str = "no"  # "no", "fp16" or "bf16"
    gradient_checkpointing: bool = False  # a third more time, far less memory
    compile: bool = False  # torch.compile: a slow first step, faster ones after it
    draw_workers: int = 4  # threads that draw batches ahead for a GPU; a CPU has better use for its cores
    validation_every: int = 250
    early_stop: int = 0  # stop after as many validations without a lower loss, and keep the best; 0 is off
    sample_every: int = 500
    checkpoint_every: int = 250
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ()  # of accelerate, such as "tensorboard", beside log.jsonl
    cache: str = ""  # folder of encoded latents and captions, to share between runs; empty: in the output
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "trackers", tuple(self.trackers))  # JSON has lists only
        at_least_one = ("steps", "batch_size", "gradient_accumulation", "captions_per_image", "validation_every")
        for name in (*at_least_one, "sample_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("warmup", "lora_rank", "early_stop", "snr_gamma", "weight_decay", "draw_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("caption_dropout", "explicit_share", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1]")
        if not 0.5 <= self.noisy_share <= 1:
            raise ValueError(f"noisy_share={self.noisy_share} is outside [0.5, 1]")
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        known = {
            "mixed_precision": tuple(PRECISIONS),
            "optimizer": OPTIMIZERS,
            "schedule": tuple(kind.value for kind in SchedulerType),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; known: {', '.join(values)}")


def load_config(path: str | Path) -> FinetuneConfig:
    """The configuration in a JSON file; ValueError names the file and every unknown or missing field."""
    try:
        values = json.loads(Path(path).read_text())
        return FinetuneConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no configuration of a fine-tuning run: {error}") from None


def save_config(config: FinetuneConfig) -> Path:
    """Write ``output/config.json``, what `load_config` and a cluster read; ValueError if another run's stands there."""
    output = Path(config.output)
    path = output / "config.json"
    if path.is_file():
        found = load_config(path)
        changed = [item.name for item in fields(config) if getattr(found, item.name) != getattr(config, item.name)]
        changed = [name for name in changed if name != "output"]  # a folder may be moved
        if changed:
            raise ValueError(f"{output} holds a run with another {', '.join(changed)}; choose another output folder")
        return path
    output.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(asdict(config), indent=1))
    partial.replace(path)
    return path


def require_same_origin(config: FinetuneConfig) -> None:
    """ValueError if the run in ``output`` began from weights or data that have been replaced since, under their names.

    What it began from is kept in ``output/origin.json``; weights that lie on a hub are not looked at.
    """
    output = Path(config.output)
    path = output / "origin.json"
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
            f"{output} holds a run that began from other {' and '.join(changed)} than {config.pipeline} and "
            f"{config.dataset} have now; delete it, or choose another output folder"
        )
