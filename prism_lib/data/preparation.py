"""Prepare a data set once: choose images, split by patient, write captions, and say what was done.

`prepare` turns a source (the phantom, or a folder of real images; see `data.sources`) into the folder
that `data.folder` describes. What decides its content is in `PrepareConfig`, what happened is in
its `dataset.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from prism_lib.data.folder import SPLITS, building, content_hash, load_info, load_table, remove_others, write_info, write_tables
from prism_lib.data.images import Rejection
from prism_lib.data.prepare_config import BLANK_POLICIES, PrepareConfig, SOURCES, UNCERTAIN_POLICIES, by_label, settings
from prism_lib.data.sources import Source, seeded_order
from prism_lib.data.writing import Outcome, Written, write_images
from prism_lib.language.captions import sample_caption
from prism_lib.language.labels import vocabulary

logger = logging.getLogger(__name__)

# Once too many files are unusable, so many more are looked at, for an error that shows more than one of them.
LOOK_AHEAD = 20
CAPTION_ROWS = 4096  # rows that are Python objects at once


def prepare(config: PrepareConfig) -> Path:
    """Write the prepared folder and return its path; at once if it is already there, whole and the same.

    Raises before any long work if the configuration, the table or the output is at fault, and later if more than
    `config.max_rejected` of the files cannot be used. What was finished by then, or when the process was killed, is
    kept beside the output, and the same configuration goes on from there. An image in two splits is not counted as
    unusable: it is dropped from one of them and listed.
    """
    output = Path(config.output)
    if _already_prepared(config):
        logger.info("reusing the prepared folder %s", output)
        return output
    with building(output) as folder:
        source = SOURCES[config.dataset](config)
        plan = _plan(source, config)
        work = write_images(source.images, plan, folder, _work_key(plan, config), config.processes)
        with closing(work) as outcomes:
            written, rejected = _collect(outcomes, source, len(plan), config.max_rejected)
        usable = plan[plan["file_name"].isin(written.keys())]
        duplicates, within = _duplicates(usable, written)
        rejected += duplicates if config.duplicates == "reject" else []
        dropped = {item.file for item in duplicates if config.duplicates == "reject"}
        usable = _with_columns(usable[~usable["file_name"].isin(dropped)], written)
        metadata = _metadata(usable, source.labels, config, set(plan["split"]))
        remove_others(folder, metadata["file_name"])
        write_tables(folder, metadata)
        info = {
            "source": config.dataset,
            "config": settings(config),
            "labels": list(source.labels),
            "label_policy": {"source": source.label_policy, "uncertain": config.uncertain, "blank": config.blank},
            "counts": {"before": _counts(plan, source.labels), "after": _counts(metadata, source.labels)},
            "rejected": [{"file": item.file, "reason": item.reason} for item in rejected],
            "duplicates": {"across_splits": len(duplicates), "within_split": within},
            "content_hash": content_hash(
                folder, metadata["file_name"], (written[name].file_hash for name in metadata["file_name"])
            ),
        }
        write_info(folder, info)
    return output


def _plan(source: Source, config: PrepareConfig) -> pd.DataFrame:
    """The source's table with split, file name and caption of every image."""
    labels, vocab = list(source.labels), vocabulary(config.vocabulary)
    if not set(labels) & set(vocab.phrases):
        raise ValueError(f"vocabulary {vocab.name!r} has words for no label of {config.dataset!r}: {', '.join(labels)}")
    for name in ("uncertain", "blank"):
        if unknown := set(by_label(getattr(config, name))) - {*labels, "*"}:
            raise ValueError(f"{name} names {min(unknown)!r}, which is no label of the data set: {', '.join(labels)}")
    table = source.table.reset_index(drop=True)
    table[labels] = table[labels].astype(float)
    given = table["split"] if "split" in table else pd.Series("", index=table.index)
    drawn = table.loc[given == "", "patient_id"]
    shares = split_patients(drawn, config.split, config.seed) if len(drawn) else {}
    table["split"] = table["patient_id"].map(shares).where(given == "", given)
    table["file_name"] = table["split"] + "/" + table["name"] + ".png"
    table["text"] = [
        _caption(row, source, config)
        for start in range(0, len(table), CAPTION_ROWS)
        for row in _resolved(table.iloc[start : start + CAPTION_ROWS], labels, config).to_dict("records")
    ]
    return table


def _caption(row: Mapping[Any, Any], source: Source, config: PrepareConfig) -> str:
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
    """The table with its uncertain and blank labels as the policies want them."""
    uncertain, blank = by_label(config.uncertain), by_label(config.blank)
    columns = {}
    for label in labels:
        values = table[label].fillna(BLANK_POLICIES[blank.get(label, blank["*"])])
        columns[label] = values.mask(values == -1, UNCERTAIN_POLICIES[uncertain.get(label, uncertain["*"])])
    return table.assign(**columns)


def _work_key(plan: pd.DataFrame, config: PrepareConfig) -> str:
    """Changes with whatever decides the bytes of an image file, its name, or whose image it is."""
    files = plan[[column for column in plan if column in ("file_name", "path", "phantom_index")]]
    rows = pd.util.hash_pandas_object(files, index=False).to_numpy().tobytes()
    decisive = ("dataset", "size", "seed", "confounding", "fit", "mode", "max_upscale", "columns")
    chosen = {name: value for name, value in settings(config).items() if name in decisive}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode() + rows).hexdigest()


def _collect(
    outcomes: Iterable[list[Outcome]], source: Source, total: int, max_rejected: float
) -> tuple[dict[str, Written], list[Rejection]]:
    """What was written, by file name, and the rejected files; raises once too many are rejected."""
    written: dict[str, Written] = {}
    rejected = list(source.rejected)
    total += len(rejected)
    _check_rejected(rejected, total, max_rejected)
    with tqdm(total=total - len(rejected), desc="prepare", unit="image") as progress:
        for outcome in outcomes:
            progress.update(len(outcome))
            for item in outcome:
                if isinstance(item, Rejection):
                    logger.warning("rejected %s: %s", item.file, item.reason)
                    rejected.append(item)
                else:
                    written[item.file_name] = item
            if len(rejected) > max_rejected * total + LOOK_AHEAD:
                break
    _check_rejected(rejected, total, max_rejected)
    return written, rejected


def _duplicates(usable: pd.DataFrame, written: Mapping[str, Written]) -> tuple[list[Rejection], int]:
    """Images whose pixels are also in a more held-out split (test, then val), and how many repeat within a split.

    Patients are not merged: who shares an image by mistake of an archive need not be one person.
    """
    hashes = usable["file_name"].map(lambda name: written[name].pixel_hash)
    repeated = usable[["file_name", "patient_id", "split"]].assign(pixels=hashes)[hashes.duplicated(keep=False)]
    order = repeated.assign(rank=repeated["split"].map(SPLITS.index)).sort_values(
        "rank", ascending=False, kind="stable"
    )
    kept = {row["pixels"]: row for row in order.drop_duplicates("pixels").to_dict("records")}
    rejected = []
    for row in order.to_dict("records"):
        other = kept[row["pixels"]]
        if row["split"] != other["split"]:
            reason = f"same pixels as {other['file_name']} of patient {other['patient_id']}, which is held out"
            rejected.append(Rejection(row["file_name"], reason))
    return rejected, len(order) - len(kept) - len(rejected)


def _with_columns(usable: pd.DataFrame, written: Mapping[str, Written]) -> pd.DataFrame:
    """The table with what only the image files knew, such as their pixel spacing."""
    names = next((list(item.columns) for item in written.values()), [])
    return usable.assign(**{name: [written[file].columns[name] for file in usable["file_name"]] for name in names})


def _check_rejected(rejected: Sequence[Rejection], total: int, max_rejected: float) -> None:
    if len(rejected) > max_rejected * total:
        first = "; ".join(f"{item.file}: {item.reason}" for item in rejected[:5])
        raise ValueError(
            f"{len(rejected)} of {total} files cannot be used, which max_rejected={max_rejected:g} forbids. "
            f"The first are {first}"
        )


def _metadata(table: pd.DataFrame, labels: Sequence[str], config: PrepareConfig, planned: set[str]) -> pd.DataFrame:
    """The rows as they are stored.

    Labels and ages stay floats and no text is empty, so that a column has one type in all splits, whatever is
    missing there: `load_dataset` refuses a folder whose splits differ.
    """
    if empty := planned - set(table["split"]):
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


def _already_prepared(config: PrepareConfig) -> bool:
    """Whether the output is there, whole, and of this configuration; raises if something else is there."""
    output = Path(config.output)
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / "dataset.json").is_file():
        raise FileExistsError(f"output {output} exists and is not a prepared data set: choose another place")
    asked = settings(config)
    there = settings(PrepareConfig("phantom", output)) | load_info(output)["config"]  # older ones lack what is new
    if differing := [name for name in asked if there[name] != asked[name]]:
        changes = ", ".join(f"{name} is {there[name]!r} and not {asked[name]!r}" for name in differing)
        raise FileExistsError(f"output {output} was prepared otherwise: {changes}. Delete it or choose another")
    if gone := [name for name in load_table(output)["file_name"] if not (output / name).is_file()]:
        raise FileNotFoundError(f"prepared data set {output} is incomplete: {gone[0]} is missing. Delete it")
    return True
