"""Prepare a data set once: choose images, split by patient, write captions, and say what was done.

`prepare` turns a source (the phantom, or a folder of real X-rays; see `prism_lib.sources`) into the folder
that `prism_lib.imagefolder` describes. What decides its content is in `PrepareConfig`, what happened is in
its `dataset.json`. Readers need `load_table` and `read_images`, and nothing of how it was made.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from prism_lib import imagefolder, phantom
from prism_lib.imagefolder import SPLITS, Folder, load_info, load_table, read_images
from prism_lib.prompts import Edit, sample_caption, vocabulary
from prism_lib.sources import FITS, Rejection, Source, nih_source, phantom_source, seeded_order

__all__ = [
    "Example",
    "PrepareConfig",
    "edit_examples",
    "editable",
    "load_info",
    "load_table",
    "prepare",
    "read_images",
    "true_counterfactual",
]

logger = logging.getLogger(__name__)

UNCERTAIN_POLICIES = {"ignore": -1.0, "zeros": 0.0, "ones": 1.0}
# Once too many files are unusable, so many more are looked at, for an error that shows more than one of them.
LOOK_AHEAD = 20


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare and how.

    Args:
        dataset: "phantom" or "nih" (NIH ChestX-ray14's table format, below `data_root`).
        output: the prepared folder; an existing one is reused if it was made with the same configuration.
        num_images: how many phantoms; of real images at most as many, drawn by patient.
        split: shares of the patients for train, val and test.
        confounding: how strongly devices follow disease in the phantom, in [0, 1].
        vocabulary: whose labels captions speak of, "chest" or "phantom"; all label columns are kept.
        explicit_share: share of captions in the explicit template, which edits use.
        uncertain: what -1 becomes: "ignore" leaves it (never said, never learnt), "zeros", "ones".
        fit: "letterbox" keeps the whole film and pads, "crop" keeps its centre.
        max_rejected: the greatest share of files that may be unusable.
    """

    dataset: str
    output: Path
    data_root: Path | None = None
    size: int = 256
    num_images: int = 1000
    seed: int = 0
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    confounding: float = 0.0
    vocabulary: str = "chest"
    explicit_share: float = 0.5
    uncertain: str = "ignore"
    fit: str = "letterbox"
    max_rejected: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("dataset", SOURCES), ("uncertain", UNCERTAIN_POLICIES), ("fit", FITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(allowed)}")
        for name in ("confounding", "explicit_share", "max_rejected"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in [0, 1]")
        if len(self.split) != len(SPLITS) or min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split is {self.split}; expected shares of {', '.join(SPLITS)} that sum to 1")
        if self.num_images < 1 or self.size < 32:
            raise ValueError(f"need num_images >= 1 and size >= 32, got {self.num_images} and {self.size}")
        vocabulary(self.vocabulary)


def prepare(config: PrepareConfig) -> Path:
    """Write the prepared folder and return its path; at once if it is already there, whole and the same.

    Raises before any long work if the configuration, the table or the output is at fault; raises, and leaves
    nothing behind, if more than `config.max_rejected` of the files cannot be used.
    """
    output = Path(config.output)
    if _already_prepared(config):
        logger.info("reusing the prepared folder %s", output)
        return output
    with imagefolder.building(output) as folder:
        source = SOURCES[config.dataset](config)
        plan = _plan(source, config)
        written, rejected = _write_images(source, plan, folder, config.max_rejected)
        metadata = _metadata(plan[plan["file_name"].isin(written)], source.labels, config)
        imagefolder.write_tables(folder, metadata)
        info = {
            "source": config.dataset,
            "config": _settings(config),
            "labels": list(source.labels),
            "label_policy": {"source": source.label_policy, "uncertain": config.uncertain},
            "counts": {"before": _counts(plan, source.labels), "after": _counts(metadata, source.labels)},
            "rejected": [{"file": item.file, "reason": item.reason} for item in rejected],
            "content_hash": imagefolder.content_hash(folder, metadata["file_name"]),
        }
        imagefolder.write_info(folder, info)
    return output


def editable(table: pd.DataFrame, edit: Edit) -> pd.DataFrame:
    """The rows that an edit applies to: what it removes is labelled present, what it adds absent."""
    for label in (*edit.remove, *edit.add):
        if label not in table:
            raise ValueError(f"the data set has no label {label!r}; it has {', '.join(map(str, table))}")
    suits = table[list(edit.remove)].eq(1).all(axis=1) & table[list(edit.add)].eq(0).all(axis=1)
    return table[suits].reset_index(drop=True)


def true_counterfactual(folder: Folder, table: pd.DataFrame, edit: Edit) -> tuple[Tensor, Tensor] | None:
    """True counterfactuals (N, 1, H, W) of a table's rows, and masks (bool) of what had to change.

    None for real images: nobody knows how the same patient would have looked.
    """
    info = load_info(folder)
    if info["source"] != "phantom":
        return None
    config = info["config"]
    patients = phantom.sample_patients(table["phantom_index"].tolist(), config["seed"], config["confounding"])
    return phantom.counterfactual(patients, config["size"], **edit.attributes)


@dataclass(frozen=True)
class Example:
    """An edit and an image that it suits: panels (K, C, H, W) with a title each, the factual image first."""

    edit: Edit
    panels: Tensor
    titles: tuple[str, ...]


def edit_examples(folder: Folder, edits: Sequence[Edit]) -> list[Example]:
    """The first image that each edit suits, with true counterfactual and mask where they are known.

    An edit that suits no image of the data set is left out; ValueError if none suits any.
    """
    table, examples = load_table(folder), []
    for edit in edits:
        row = editable(table, edit).head(1)
        if row.empty:
            continue
        panels = [read_images(folder, row)]
        truth = true_counterfactual(folder, row, edit)
        panels += [] if truth is None else [truth[0], truth[1].float()]
        titles = ("factual", f"true counterfactual: {edit.key.replace('_', ' ')}", "what had to change")
        examples.append(Example(edit, torch.cat(panels), titles[: len(panels)]))
    if not examples:
        raise ValueError(f"no image in {folder} suits any of {', '.join(edit.key for edit in edits) or 'no edits'}")
    return examples


SOURCES: dict[str, Callable[[PrepareConfig], Source]] = {
    "phantom": lambda c: phantom_source(c.num_images, c.seed, c.confounding, c.size),
    "nih": lambda c: nih_source(_data_root(c), c.num_images, c.seed, c.size, c.fit),
}


def _data_root(config: PrepareConfig) -> Path:
    if config.data_root is None:
        raise ValueError(f"dataset {config.dataset!r} needs a data_root: the folder with its table and images")
    root = Path(config.data_root)
    if Path(config.output).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"output {config.output} lies inside the data root {root}, where images are searched")
    return root


def _plan(source: Source, config: PrepareConfig) -> pd.DataFrame:
    """The source's table with split, file name and caption of every image."""
    table = source.table.reset_index(drop=True)
    labels = table[list(source.labels)].astype(float)
    table[list(source.labels)] = labels
    table["split"] = table["patient_id"].map(split_patients(table["patient_id"], config.split, config.seed))
    table["file_name"] = table["split"] + "/" + table["name"] + ".png"
    table["text"] = [
        _caption(row, source, config)
        for row in cast(list[dict[str, Any]], _resolved(table, source.labels, config).to_dict("records"))
    ]
    return table


def _caption(row: dict[str, Any], source: Source, config: PrepareConfig) -> str:
    """An image's caption depends on the seed and its name, not on the images around it."""
    rng = random.Random(f"{config.seed}:{row['name']}")
    vocab = vocabulary(config.vocabulary)
    return sample_caption(row, rng, vocab, config.explicit_share, source.details(row))


def split_patients(patients: pd.Series, shares: Sequence[float], seed: int) -> dict[str, str]:
    """Patient -> split. Shares are exact to one patient, and a split that is asked for gets at least one."""
    order = seeded_order(patients, seed)
    if len(order) < sum(share > 0 for share in shares):
        raise ValueError(f"{len(order)} patients are too few for a split of {tuple(shares)}")
    exact = [share * len(order) for share in shares]
    sizes = [max(int(count), int(count > 0)) for count in exact]
    while sum(sizes) != len(order):
        step = 1 if sum(sizes) < len(order) else -1
        movable = [i for i, size in enumerate(sizes) if step > 0 or size > 1]
        sizes[max(movable, key=lambda i: step * (exact[i] - sizes[i]))] += step
    names = [name for name, count in zip(SPLITS, sizes, strict=True) for _ in range(count)]
    return dict(zip(order, names, strict=True))


def _resolved(table: pd.DataFrame, labels: Sequence[str], config: PrepareConfig) -> pd.DataFrame:
    """The table with its uncertain labels as the policy wants them."""
    values = table[list(labels)]
    return table.assign(**values.mask(values == -1, UNCERTAIN_POLICIES[config.uncertain]))


def _write_images(
    source: Source, plan: pd.DataFrame, folder: Path, max_rejected: float
) -> tuple[list[str], list[Rejection]]:
    """Write every usable image; returns the file names written and the rejected files."""
    written, rejected = [], list(source.rejected)
    total = len(plan) + len(rejected)
    _check_rejected(rejected, total, max_rejected)
    rows = zip(plan["file_name"], source.images(plan), strict=True)
    for file_name, image in tqdm(rows, total=len(plan), desc="prepare", unit="image"):
        if isinstance(image, Rejection):
            logger.warning("rejected %s: %s", image.file, image.reason)
            rejected.append(image)
            if len(rejected) > max_rejected * total + LOOK_AHEAD:
                break
        else:
            Image.fromarray(image).save(folder / file_name)
            written.append(file_name)
    _check_rejected(rejected, total, max_rejected)
    return written, rejected


def _check_rejected(rejected: Sequence[Rejection], total: int, max_rejected: float) -> None:
    if len(rejected) > max_rejected * total:
        first = "; ".join(f"{item.file}: {item.reason}" for item in rejected[:5])
        raise ValueError(
            f"{len(rejected)} of {total} files cannot be used, which max_rejected={max_rejected:g} forbids. "
            f"The first are {first}"
        )


def _metadata(table: pd.DataFrame, labels: Sequence[str], config: PrepareConfig) -> pd.DataFrame:
    """The rows as they are stored.

    Labels and ages stay floats and no text is empty, so that a column has one type in all splits, whatever is
    missing there: `load_dataset` refuses a folder whose splits differ.
    """
    asked = {name for name, share in zip(SPLITS, config.split, strict=True) if share > 0}
    if empty := asked - set(table["split"]):
        raise ValueError(f"no usable image is left for {', '.join(sorted(empty))}: prepare more images")
    first = ["file_name", "patient_id", "split", "text", *labels]
    others = [column for column in table if column not in (*first, "name", "path")]
    metadata = _resolved(table, labels, config)[first + others]
    words = [column for column in metadata if pd.api.types.is_string_dtype(metadata[column])]
    return metadata.assign(**metadata[words].replace("", "unknown").fillna("unknown"))


def _counts(table: pd.DataFrame, labels: Sequence[str]) -> dict[str, Any]:
    """Per split: images, patients, and how often each label is present, absent, uncertain, not mentioned."""
    return {
        str(split): {
            "images": len(rows),
            "patients": int(rows["patient_id"].nunique()),
            "labels": {label: _label_counts(rows[label]) for label in labels},
        }
        for split, rows in table.groupby("split")
    }


def _label_counts(values: pd.Series) -> dict[str, int]:
    states = {"present": values == 1, "absent": values == 0, "uncertain": values == -1}
    states["not mentioned"] = values.isna()
    return {name: int(state.sum()) for name, state in states.items()}


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What the content depends on, as JSON: all but where it is written."""
    settings = asdict(config)
    del settings["output"]
    root = config.data_root
    return settings | {
        "split": list(config.split),
        "data_root": None if root is None or config.dataset == "phantom" else str(Path(root).resolve()),
    }


def _already_prepared(config: PrepareConfig) -> bool:
    """Whether the output is there, whole, and of this configuration; raises if something else is there."""
    output = Path(config.output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / "dataset.json").is_file():
        raise FileExistsError(f"output {output} exists and is not a prepared data set: choose another place")
    there, asked = load_info(output)["config"], _settings(config)
    if differing := [name for name in asked if there.get(name) != asked[name]]:
        changes = ", ".join(f"{name} is {there.get(name)!r} and not {asked[name]!r}" for name in differing)
        raise FileExistsError(f"output {output} was prepared otherwise: {changes}. Delete it or choose another")
    if gone := [name for name in load_table(output)["file_name"] if not (output / name).is_file()]:
        raise FileNotFoundError(f"prepared data set {output} is incomplete: {gone[0]} is missing. Delete it")
    return True
