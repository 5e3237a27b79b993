"""Known records, and what is written from them alone: tables, drawings as data, and the results sections of pages."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from prism_lib import paths
from prism_lib.files import write_text
from prism_lib.records import load_record

Record = Mapping[str, Any]
Estimates = dict[str, tuple[float, float, float]]  # row -> (mean, low, high)

BASE = "default settings"  # of several studies, measured once
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
SHORT = ("true_error_ratio", "flip_rate", "cpg", "side_effect_rate", "changed_outside_mask")  # those of the README

# The same for the training sets of `classifiers`.
CLASSIFIERS: dict[str, str] = {
    "worst_group_accuracy": "worst-group accuracy ↑",
    "worst_group_gain": "gain over as is ↑",
    "accuracy": "accuracy ↑",
    "equalised_odds_difference": "equalised-odds difference ↓",
    "calibration_error": "calibration error ↓",
}


@dataclass(frozen=True)
class Drawing:
    """A picture as data; ``kind`` is a name in `plots.KINDS`, ``values`` what that function takes."""

    name: str
    record: str
    kind: str
    values: Mapping[str, Any]
    title: str
    xlabel: str
    ylabel: str = ""


Draw = Callable[[Record], list[Drawing]]


def _quality(record: Record) -> list[Drawing]:
    name, title = record["name"], "Edits of test patients"
    return [
        Drawing(f"quality_{metric}", name, "dots", intervals(record, metric), title, label)
        for metric, label in headlines(record).items()
    ]


def _dots(metric: str, title: str, label: str) -> Draw:
    return lambda record: [Drawing(record["name"], record["name"], "dots", intervals(record, metric), title, label)]


def _pareto(record: Record) -> list[Drawing]:
    name, points = record["name"], tradeoff(record["metrics"])
    labels = "Error to the truth against time", "seconds per image", "error to truth"
    return [Drawing(f"{name}_pareto", name, "pareto", points, *labels)] if points else []


def _classifiers(record: Record) -> list[Drawing]:
    labels = "Accuracy in the worst group by training set", "worst-group accuracy", "target and shortcut agree"
    return [Drawing("classifiers", "classifiers", "grouped", by_strength(record["metrics"]), *labels)]


@dataclass(frozen=True)
class Kind:
    """A known record: the notebook or benchmark that writes it, and what it holds."""

    maker: str
    rows: int = 1  # the depth at which a table's rows stand
    draw: Draw | None = None


KINDS: dict[str, Kind] = {
    "quickstart": Kind("00_quickstart"),
    "data": Kind("01_data"),
    "finetuning": Kind("02_finetuning"),
    "counterfactual_quality": Kind("03_counterfactuals", draw=_quality),
    "judge": Kind("03_counterfactuals"),
    "batches": Kind("03_counterfactuals"),
    "axioms": Kind("03_counterfactuals"),
    "inversion_methods": Kind("04_ablations", rows=2, draw=_pareto),
    "ablations": Kind("04_ablations", draw=_pareto),
    "baselines": Kind("05_baselines", rows=2, draw=_pareto),
    "entanglement": Kind(
        "05_baselines", draw=_dots("carried_along", "Devices that go along with cardiomegaly", "share")
    ),
    "hard_cases": Kind("05_baselines", draw=_dots("true_error_ratio", "Edits by kind of image", "error to truth")),
    "corner_text": Kind("05_baselines"),
    "classifiers": Kind("06_classifiers", rows=2, draw=_classifiers),
    "dependence": Kind("07_your_classifier", rows=2),
    "rendering": Kind("benchmarks/rendering.py"),
    "identifiability": Kind("benchmarks/identifiability.py"),
    "editing_speed": Kind("benchmarks/editing.py"),
    "bulk": Kind("benchmarks/bulk.py"),
    "training_speed": Kind("benchmarks/training.py"),
    "resume": Kind("benchmarks/training.py"),
    "preparation": Kind("benchmarks/preparation.py"),
    "explorer": Kind("benchmarks/explorer.py"),
    "film_removal": Kind("benchmarks/films.py"),
    "full_size_films": Kind("benchmarks/full_size_films.py"),
    "real_devices": Kind("benchmarks/real_devices.py"),
    "unusual_inputs": Kind("benchmarks/unusual_inputs.py", rows=2),
    "judges": Kind("benchmarks/judges.py"),
    "mixed_precision": Kind("benchmarks/precision.py"),
    "side_by_side": Kind("benchmarks/classifiers.py"),
    "threads": Kind("benchmarks/threads.py"),
}


def load_all(dataset: str, figures_dir: str | os.PathLike[str] = "") -> dict[str, dict[str, Any]]:
    """All records of a data set, by name; ValueError for one that belongs to another data set."""
    folder = paths.figures(dataset, figures_dir)
    records = {path.stem: load_record(path.stem, dataset, folder) for path in sorted(folder.glob("*.json"))}
    if not records:
        raise FileNotFoundError(f"no record in {folder}: run the notebooks first")
    for name, record in records.items():
        if record["dataset"] != dataset or record["name"] != name:
            raise ValueError(f"{folder / name}.json is the record {record['name']!r} of data set {record['dataset']!r}")
    return records


def absent(records: Mapping[str, Record]) -> dict[str, str]:
    """Known records that are not there, and what writes them."""
    return {name: kind.maker for name, kind in KINDS.items() if name not in records}


def table(metrics: Mapping[str, Mapping[str, float] | pd.Series], columns: Mapping[str, str]) -> pd.DataFrame:
    """Metrics as text, a row per key: `0.12 (0.10 to 0.15)`, empty where missing; ``columns``: metric to heading."""
    rows = {key: [_cell(values, metric) for metric in columns] for key, values in metrics.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(columns.values()))


def _cell(values: Mapping[str, float] | pd.Series, metric: str) -> str:
    if metric not in values:
        return ""
    bounds = [_number(values[name]) for end in ("low", "high") if (name := f"{metric}_{end}") in values]
    return _number(values[metric]) + (f" ({' to '.join(bounds)})" if len(bounds) == 2 else "")


def _number(value: float) -> str:
    return f"{value:.2g}" if 0 < abs(value) < 0.095 else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def markdown(text: pd.DataFrame, corner: str = "") -> str:
    """A table of text as Markdown, a dash in empty cells; ``corner`` heads the row names."""
    lines = [f"| {corner} | " + " | ".join(map(str, text.columns)) + " |", "|---" * (len(text.columns) + 1) + "|"]
    for row, cells in text.iterrows():
        lines.append(f"| {str(row).replace('_', ' ')} | " + " | ".join(cell or "–" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def frame(record: Record) -> pd.DataFrame:
    """A record's metrics as numbers, a row per edit or method; deeper names are joined by " / ", lists are left out."""
    metrics, kind = record["metrics"], KINDS.get(record["name"])
    nested = any(isinstance(value, Mapping) for value in metrics.values())
    depth = 0 if not nested else kind.rows if kind else 1
    rows: dict[str, dict[str, float]] = {}
    for path, value in _leaves(metrics):
        place = min(depth, len(path) - 1)
        rows.setdefault(" / ".join(path[:place]) or "all", {})[" / ".join(path[place:])] = value
    return pd.DataFrame.from_dict(rows, orient="index")


def _leaves(metrics: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], float]]:
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        elif not isinstance(value, list):
            yield (*path, key), value


def as_tables(record: Record) -> dict[str, str]:
    """A record as CSV (numbers), Markdown and LaTeX (values with their intervals), by file ending."""
    numbers = frame(record)
    bounds = {f"{name}_{end}" for name in numbers.columns for end in ("low", "high")}
    shown = {name: HEADLINES.get(name, name.replace("_", " ")) for name in numbers.columns if name not in bounds}
    text = table({str(row).replace("_", " "): values.dropna() for row, values in numbers.iterrows()}, shown)
    if len(text) == 1:  # one row of many numbers reads better as a column
        text = text.T
    source = f"Record {record['name']}: commit {record['commit'][:10]}, {record['device']}, {record['seconds']:.0f} s."
    latex = text.replace("", "--").to_latex(escape=True).replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$")
    csv = numbers.to_csv(index_label="row", lineterminator="\n")
    return {"csv": csv, "md": f"{markdown(text)}\n{source}\n", "tex": f"% {source}\n{latex}"}


def headlines(record: Record) -> dict[str, str]:
    """The headline metrics that a record has, with their labels."""
    return {name: label for name, label in HEADLINES.items() if intervals(record, name)}


def intervals(record: Record, metric: str) -> Estimates:
    """Row -> (mean, low, high) of one metric, for the rows that have it."""
    return {
        row: (values[metric], values.get(f"{metric}_low", values[metric]), values.get(f"{metric}_high", values[metric]))
        for row, values in record["metrics"].items()
        if metric in values
    }


def tradeoff(metrics: Mapping[str, Any]) -> dict[str, tuple[float, float, float, float]]:
    """Variant -> (seconds per image, error to the truth, low, high); variants with the very same numbers are `BASE`."""
    errors = intervals({"metrics": metrics}, "true_error_ratio")
    points = {name: (float(metrics[name]["seconds_per_image"]), *error) for name, error in errors.items()}
    times = Counter(points.values())
    return {(name if times[point] == 1 else BASE): point for name, point in points.items()}


def by_strength(metrics: Mapping[str, Any]) -> dict[str, Estimates]:
    """Strength -> training set -> (mean, low, high) of the worst group's accuracy, of a `classifiers` record."""
    return {
        f"{name.removeprefix('strength_')} %": intervals({"metrics": block}, "worst_group_accuracy")
        for name, block in metrics.items()
        if name.startswith("strength_")
    }


def drawings(records: Mapping[str, Record]) -> list[Drawing]:
    """Everything that can be drawn from the records that are there."""
    return [item for name, kind in KINDS.items() if kind.draw and name in records for item in kind.draw(records[name])]


def write_tables(records: Mapping[str, Record], folder: Path) -> None:
    """Write all tables and the data of all drawings; files that follow from no record are removed."""
    expected = expected_files(records)
    for path in strangers(folder, expected):
        path.unlink()
    for path, text in expected.items():
        write_text(folder / path, text)


def expected_files(records: Mapping[str, Record]) -> dict[Path, str]:
    """Path below the figures folder -> text, of all files that follow from the records."""
    files = {}
    for item in drawings(records):
        source = {field: records[item.record][field] for field in ("dataset", "commit", "created")}
        files[Path("plots", f"{item.name}.json")] = json.dumps(asdict(item) | source, indent=1) + "\n"
    for name, record in records.items():
        files |= {Path("tables", f"{name}.{end}"): text for end, text in as_tables(record).items()}
    return files


def strangers(folder: Path, expected: Iterable[Path]) -> list[Path]:
    """Tables and drawings, with their pictures, that no record gives."""
    known = {path.with_suffix("") for path in expected}
    found = (path for part in ("tables", "plots") for path in sorted((folder / part).glob("[!.]*")))
    return [path for path in found if path.relative_to(folder).with_suffix("") not in known]


# --- the results sections of README.md and docs/results.md, and the check of everything written --------------------


def quality_table(record: Record, columns: Iterable[str] = HEADLINES) -> str:
    """Markdown table of a `counterfactual_quality` record: a row per edit; columns with one value stand below it."""
    rows, present = record["metrics"], headlines(record)
    text = table(rows, {name: present[name] for name in columns if name in present})
    same = [name for name in text.columns if len(text) > 1 and text[name].nunique() == 1]
    constant = ", ".join(f"{name.strip(' ↑↓')} {text[name].iloc[0]}" for name in same)
    images = " to ".join(map(str, sorted({int(values["images"]) for values in rows.values()})))
    return (
        f"{markdown(text.drop(columns=same), 'edit')}\n{f'In every edit: {constant}. ' if same else ''}"
        f"{images} held-out patients an edit; {_source(record)}.\n"
    )


def classifiers_table(record: Record) -> str:
    """Markdown table of a `classifiers` record at its greatest strength: a row per training set."""
    metrics, study = record["metrics"], record["parameters"]["study"]
    strength = max(study["strengths"])
    text = table(metrics[f"strength_{round(100 * strength)}"], CLASSIFIERS)
    gap = metrics.get("gap_closed")
    reach = "Of the gain in worst-group accuracy from true counterfactuals, PRISM's counterfactuals reach"
    return (
        f"{markdown(text, 'training set')}\n"
        f"The classifier reads {study['target']}. In {strength:.0%} of the {study['images']} training images, "
        f"{study['shortcut']} has the same label. {study['added']} images are added; {len(study['seeds'])} seeds. "
        f"{_source(record)}.{'' if gap is None else f' {reach} {gap:.0%}.'}\n"
    )


def identifiability_table(record: Record) -> str:
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
        "Patients may share one image, bit for bit, and differ in their true counterfactuals. A fair draw is the "
        "counterfactual of one of these patients, drawn at random.\n\n"
        f"{markdown(table(undecided, labels), 'edit')}\n"
        f"The error of a fair draw is below 0.005 for: {', '.join(decided) or 'none'}. "
        f"{images:.0f} patients an edit, commit {record['commit'][:10]}.\n"
    )


def _source(record: Record) -> str:
    return f"{record['device']}, commit {record['commit'][:10]}, {record['seconds']:.0f} s"


def long_section(records: Mapping[str, Record]) -> str:
    """The results section of docs/results.md, from the records that are there."""
    quality, judge = records["counterfactual_quality"], records["judge"]
    if quality["commit"] != judge["commit"]:
        found = f"counterfactual_quality: {quality['commit']}, judge: {judge['commit']}"
        raise ValueError(f"records of more than one commit cannot be mixed into one table: {found}")
    reading = ", ".join(f"{label} {value:.4f}" for label, value in judge["metrics"]["auc"].items())
    parts = [quality_table(quality), f"The judge's AUC on held-out images: {reading or 'no judge'}.\n"]
    if "identifiability" in records:
        parts.append(identifiability_table(records["identifiability"]))
    if "ablations" in records and (points := tradeoff(records["ablations"]["metrics"])):
        parts.append(_picture(records["ablations"], "ablations_pareto", "error to the truth against seconds per image"))
        parts.append(
            f"{len(points)} variants of inversion and editing. The line joins the variants for which no other has both "
            f"a smaller error and a shorter time. {_source(records['ablations'])}.\n"
        )
    if "classifiers" in records:
        parts.append(classifiers_table(records["classifiers"]))
        parts.append(_picture(records["classifiers"], "classifiers", "worst-group accuracy by training set"))
    return "\n".join(parts)


def _picture(record: Record, name: str, what: str) -> str:
    return f"![{what}](../figures/{record['dataset']}/plots/{name}.png)\n"


PAGES: dict[str, Callable[[Mapping[str, Record]], str]] = {
    "README.md": lambda records: quality_table(records["counterfactual_quality"], SHORT),
    "docs/results.md": long_section,
}


def update_pages(dataset: str, figures_dir: str | os.PathLike[str] = "") -> dict[str, str]:
    """Write the results section of every page and return them; records of a trial, elsewhere, are not written."""
    records = load_all(dataset, figures_dir)
    sections = {page: section(records) for page, section in PAGES.items()}
    if paths.figures(dataset, figures_dir) == paths.figures(dataset):
        for page, text in sections.items():
            before, _, after = _around(paths.root() / page)
            write_text(paths.root() / page, before + text + after)
    return sections


def _around(path: Path) -> tuple[str, str, str]:
    """A page before, between and after its markers."""
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    parts = re.split(f"({begin}\n|{end})", path.read_text(encoding="utf-8"))
    if parts[1::2] != [f"{begin}\n", end]:
        raise ValueError(f"{path} needs exactly one {begin} and one {end}")
    return "".join(parts[:2]), parts[2], "".join(parts[3:])


def check_figures(dataset: str, figures_dir: str | os.PathLike[str] = "", *, pages: bool = False) -> list[str]:
    """What in a figures folder, and in the `PAGES`, does not follow from the records; empty if everything does."""
    folder, records = paths.figures(dataset, figures_dir), load_all(dataset, figures_dir)
    expected = expected_files(records)
    problems = [f"{path} is of no record" for path in strangers(folder, expected)]
    for path, text in expected.items():
        file, picture = folder / path, (folder / path).with_suffix(".png")
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif file.read_text(encoding="utf-8") != text:
            problems.append(f"{file} does not follow from its record")
        if path.parent.name == "plots" and not picture.is_file():
            problems.append(f"{picture} is missing")
    for page, section in PAGES.items() if pages else ():
        if _around(paths.root() / page)[1] != section(records):
            problems.append(f"the results section of {paths.root() / page} does not follow from the records")
    return problems
