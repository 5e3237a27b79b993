"""The log of a fine-tuning run, its curves, and text-to-image samples of its result."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate.tracking import GeneralTracker
from torch import Tensor

from prism_lib.data.folder import load_table, read_images
from prism_lib.files import write_text
from prism_lib.models.pipeline import encode_prompts, load_pipeline, sample_images


class JsonlTracker(GeneralTracker):
    """An accelerate tracker that appends one JSON object per call to a file: no network, nothing to install."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, step: int) -> None:
        """Continue ``path`` after ``step``: rows beyond it, of a run that was killed, will be written again."""
        self.tracker = path  # accelerate's name of it
        super().__init__()
        if path.is_file():
            write_text(path, "".join(f"{json.dumps(row)}\n" for row in _rows(path) if row["step"] <= step))

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        with self.tracker.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that was cut off by a kill is left out."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_log(output: str | Path) -> pd.DataFrame:
    """A run's log as one table, a row per step: loss, validation_loss, and validation_loss per bin of timesteps."""
    path = Path(output) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: no run has logged there")
    return pd.DataFrame(_rows(path)).groupby("step", as_index=False).last()


def curve(log: pd.DataFrame, column: str) -> tuple[list[float], list[float]]:
    """Steps and values of one column of a log, for a plot."""
    rows = log.dropna(subset=[column])
    return rows["step"].tolist(), rows[column].tolist()


def curves_by_timestep(log: pd.DataFrame) -> dict[str, tuple[list[float], list[float]]]:
    """The validation loss of each bin of timesteps, named by its range; small timesteps are the fine detail."""
    bins = [str(column) for column in log.filter(like="validation_loss_t")]
    return {f"t = {name.removeprefix('validation_loss_t').replace('_', ' to ')}": curve(log, name) for name in bins}


def summary(log: pd.DataFrame) -> dict[str, float]:
    """First and last losses of a log, the training loss as the mean over its last tenth."""
    loss, validation = log["loss"].dropna(), log["validation_loss"].dropna()
    return {
        "steps": float(log["step"].max()),
        "loss": float(loss.tail(max(1, len(loss) // 10)).mean()),
        "validation_loss_first": float(validation.iloc[0]),
        "validation_loss": float(validation.iloc[-1]),
    }


def text_samples(
    folder: str | Path, dataset: str | Path, count: int = 8, seed: int = 0, num_inference_steps: int = 25
) -> tuple[Tensor, list[str]]:
    """Text-to-image samples (N, C, H, W) for the first ``count`` distinct captions of validation, gray or colour."""
    pipeline = load_pipeline(folder)
    table = load_table(dataset, "val")
    texts = table["text"].drop_duplicates().head(count).tolist()
    embeddings = encode_prompts(pipeline, [*texts, ""])
    channels = read_images(dataset, table.head(1)).shape[1]
    how = {"channels": channels, "num_inference_steps": num_inference_steps, "seed": seed}
    return sample_images(pipeline, embeddings[:-1], embeddings[-1:].expand(len(texts), -1, -1), **how).cpu(), texts
