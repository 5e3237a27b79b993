"""Tables and README sections, written from records alone: nothing here is measured and nothing is typed by hand."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_lib import paths
from prism_lib import records as results
from prism_lib.files import write_text
from prism_lib.records import load_record, markdown

BASE = "default settings"

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

# The same for the training sets of `classifiers`.
CLASSIFIERS: dict[str, str] = {
    "worst_group_accuracy": "worst-group accuracy ↑",
    "worst_group_gain": "gain over as is ↑",
    "accuracy": "accuracy ↑",
    "equalised_odds_difference": "equalised-odds difference ↓",
    "calibration_error": "calibration error ↓",
}


def quality_table(record: Mapping[str, Any]) -> str:
    """Markdown table of a `counterfactual_quality` record: a row per edit, means with 95 % intervals.

    What is the same for every edit is said once, below.
    """
    rows = record["metrics"]
    table = results.table(rows, drawn(record))
    same = [name for name in table.columns if len(table) > 1 and table[name].nunique() == 1]
    constant = "".join(f"{name.strip(' ↑↓')} {table[name].iloc[0]}, " for name in same)
    images = sorted({int(values["images"]) for values in rows.values()})
    source = (
        f"{' to '.join(map(str, images))} held-out patients an edit; {record['device']}, commit {record['commit'][:10]}"
    )
    return (
        f"{markdown(table.drop(columns=same), 'edit')}\n{f'In every edit: {constant[:-2]}. ' if same else ''}"
        f"{source}, {record['seconds']:.0f} s in all.\n"
    )


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


def tradeoff(metrics: Mapping[str, Any]) -> dict[str, tuple[float, float, float, float]]:
    """Variant -> (seconds per image, error to the truth, low, high), of the variants that have both.

    A variant that came up several times was measured once: it is the base of all studies, and named so.
    """
    errors = intervals({"metrics": metrics}, "true_error_ratio")
    points = {name: (float(metrics[name]["seconds_per_image"]), *error) for name, error in errors.items()}
    times = Counter(points.values())
    return {(name if times[point] == 1 else BASE): point for name, point in points.items()}


def by_strength(metrics: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Strength -> training set -> (mean, low, high) of the worst group's accuracy, of a `classifiers` record."""
    blocks = {name: block for name, block in metrics.items() if name.startswith("strength_")}
    return {
        name.replace("strength_", "") + " %": intervals({"metrics": block}, "worst_group_accuracy")
        for name, block in blocks.items()
    }


def classifiers_table(record: Mapping[str, Any]) -> str:
    """Markdown table of a `classifiers` record at its greatest strength: a row per training set."""
    metrics, study = record["metrics"], record["parameters"]["study"]
    strength = max(study["strengths"])
    rows = results.table(metrics[f"strength_{round(100 * strength)}"], CLASSIFIERS)
    source = (
        f"{study['target']} where {study['shortcut']} goes with it in {strength:.0%} of {study['images']} training "
        f"images; {study['added']} images added; {len(study['seeds'])} seeds. "
        f"{record['device']}, commit {record['commit'][:10]}, {record['seconds']:.0f} s."
    )
    if "gap_closed" in metrics:
        source += f" PRISM closes {metrics['gap_closed']:.0%} of the gap to true counterfactuals."
    return f"{markdown(rows, 'training set')}\n{source}\n"


def require_one_source(records: Sequence[Mapping[str, Any]], fields: Sequence[str] = ("dataset", "commit")) -> None:
    """Raise ValueError, by name, if records that are to stand in one table differ in data set or commit."""
    for field in fields:
        if len({record[field] for record in records}) > 1:
            found = ", ".join(f"{record['name']}: {record[field]}" for record in records)
            raise ValueError(f"records of more than one {field} cannot be mixed into one table: {found}")


def section(dataset: str, figures_dir: str | os.PathLike[str] = "") -> str:
    """The README's results from the records that are there; each table says which commit it is from."""
    quality = load_record("counterfactual_quality", dataset, figures_dir)
    judge = load_record("judge", dataset, figures_dir)
    require_one_source([quality, judge])
    reading = ", ".join(f"{label} {value:.4f}" for label, value in judge["metrics"]["auc"].items())
    text = quality_table(quality) + f"\nThe judge's AUC on held-out images: {reading or 'no judge'}.\n"
    folder = paths.figures(dataset, figures_dir)
    if (folder / "identifiability.json").is_file():
        text += "\n" + identifiability_table(load_record("identifiability", dataset, figures_dir))
    if (folder / "ablations.json").is_file():
        ablations = load_record("ablations", dataset, figures_dir)
        if points := tradeoff(ablations["metrics"]):
            text += f"\n{_picture(dataset, 'ablations_pareto', 'error to the truth against seconds per image')}\n"
            text += (
                f"{len(points)} variants of inversion and editing; the line joins those that no other beats in both. "
                f"{ablations['device']}, commit {ablations['commit'][:10]}.\n"
            )
    if (folder / "classifiers.json").is_file():
        text += "\n" + classifiers_table(load_record("classifiers", dataset, figures_dir))
        text += f"\n{_picture(dataset, 'classifiers', 'worst-group accuracy by training set')}\n"
    return text


def identifiability_table(record: Mapping[str, Any]) -> str:
    """Markdown table of an `identifiability` record: a row per edit whose outcome the image does not decide."""
    undecided = {edit: values for edit, values in record["metrics"].items() if values["true_error_ratio"] >= 0.005}
    decided = [edit.replace("_", " ") for edit in record["metrics"] if edit not in undecided]
    labels = {
        "true_error_ratio": "error of a fair draw",
        "blend_error_ratio": "of the blend of all draws",
        "mask_recall": "mask recall of a fair draw",
        "latent_outside_l1_ratio": "latent L1 outside / VAE's",
        "reversibility": "removed, and added by a fair draw: L1 / VAE's",
    }
    images = next(iter(record["metrics"].values()))["images"]
    return (
        "What no editor can know: patients may share one image, bit for bit, and differ in their true counterfactuals. "
        "An editor that reads all there is in an image draws one of them; the likeliest may miss by less.\n\n"
        f"{markdown(results.table(undecided, labels), 'edit')}\n"
        f"Decided by the image, with less than 0.005 of error: {', '.join(decided) or 'none'}. "
        f"{images:.0f} patients an edit, commit {record['commit'][:10]}.\n"
    )


def _picture(dataset: str, name: str, what: str) -> str:
    """A plot that `07_figures` draws, as the README at the root of the checkout links it."""
    return f"![{what}](figures/{dataset}/plots/{name}.png)"


def update_readme(path: str | os.PathLike[str], dataset: str, figures_dir: str | os.PathLike[str] = "") -> str:
    """The README's results from the records; returns the section.

    ``path`` is below the checkout, and '' writes nothing. Neither do records of a trial: only those that are
    committed, in ``figures/<dataset>``, reach the README.
    """
    text = section(dataset, figures_dir)
    if str(path) and paths.figures(dataset, figures_dir) == paths.figures(dataset):
        replace_between(paths.root() / path, "results", text)
    return text


def between(path: Path, name: str) -> str:
    """What stands between the markers ``<!-- name:begin -->`` and ``<!-- name:end -->`` of a file."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{path} needs exactly one {begin.strip()} and one {end}")
    return content.split(begin)[1].split(end)[0]


def replace_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->`` in a file, atomically."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{path} needs exactly one {begin} and one {end}")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    write_text(path, pattern.sub(lambda _: f"{begin}\n{text}{end}", content))
