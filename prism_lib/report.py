"""Tables and README sections, written from records alone: nothing here is measured and nothing is typed by hand."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_lib import paths, results

# Metric -> column heading, in the order of the tables; an arrow says which way is better.
HEADLINES: dict[str, str] = {
    "true_error_ratio": "error to truth ↓",
    "flip_rate": "flip rate ↑",
    "cpg": "CPG ↑",
    "side_effect_rate": "side effects ↓",
    "changed_outside_mask": "changed outside mask ↓",
    "mask_recall": "mask recall ↑",
    "mask_area_ratio": "mask area / true ↓",
    "marker_changed": "marker pixels changed ↓",
    "latent_outside_l1_ratio": "latent L1 outside / VAE's ↓",
    "identity_l1": "identity L1 ↓",
}


def quality_table(record: Mapping[str, Any]) -> str:
    """Markdown table of a `counterfactual_quality` record: a row per edit, means with 95 % intervals."""
    rows = record["metrics"]
    frame = results.table(rows, drawn(record))
    lines = ["| edit | " + " | ".join(frame.columns) + " |", "|---" * (len(frame.columns) + 1) + "|"]
    for edit, cells in frame.iterrows():
        lines.append(f"| {str(edit).replace('_', ' ')} | " + " | ".join(cell or "–" for cell in cells) + " |")
    images = sorted({int(values["images"]) for values in rows.values()})
    source = (
        f"{' to '.join(map(str, images))} held-out patients an edit; {record['device']}, commit {record['commit'][:10]}"
    )
    return "\n".join([*lines, "", f"{source}, {record['seconds']:.0f} s in all."]) + "\n"


def drawn(record: Mapping[str, Any]) -> dict[str, str]:
    """The headline metrics that a record has, with their labels."""
    return {name: label for name, label in HEADLINES.items() if intervals(record, name)}


def intervals(record: Mapping[str, Any], metric: str) -> dict[str, tuple[float, float, float]]:
    """Edit -> (mean, low, high) of one metric, for the edits that have it."""
    found = {}
    for edit, values in record["metrics"].items():
        if metric in values:
            mean = values[metric]
            found[edit] = (mean, values.get(f"{metric}_low", mean), values.get(f"{metric}_high", mean))
    return found


def update_readme(path: str | os.PathLike[str], dataset: str, figures_dir: str | os.PathLike[str] = "") -> str:
    """The README's results from the records; returns the section.

    ``path`` is below the checkout, and '' writes nothing. Neither do records of a trial: only those that are
    committed, in ``figures/<dataset>``, reach the README.
    """
    section = quality_table(results.load_record("counterfactual_quality", dataset, figures_dir))
    judge = results.load_record("judge", dataset, figures_dir)["metrics"]["auc"]
    reading = ", ".join(f"{label} {value:.4f}" for label, value in judge.items())
    section += f"\nThe judge's AUC on held-out renders: {reading}.\n"
    if str(path) and paths.figures(dataset, figures_dir) == paths.figures(dataset):
        replace_between(paths.root() / path, "results", section)
    return section


def replace_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->`` in a file, atomically."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{path} needs exactly one {begin} and one {end}")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    results.write_text(path, pattern.sub(lambda _: f"{begin}\n{text}{end}", content))
