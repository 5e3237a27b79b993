"""Known records, and what is written from them alone: tables, drawings as data, and the results sections of pages."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, StrictUndefined

from prism_lib import paths
from prism_lib.files import write_text
from prism_lib.records import load_record

Record = Mapping[str, Any]
Estimates = dict[str, tuple[float, float, float]]  # row -> (mean, low, high)

_KNOWN: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("records.yaml").read_text(encoding="utf-8"))
HEADLINES: dict[str, str] = _KNOWN["headlines"]
CLASSIFIERS: dict[str, str] = _KNOWN["classifiers"]
EFFECTS: dict[str, str] = _KNOWN["effects"]
BASE = "default settings"  # of several studies, measured once
_PAGES = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False)


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
    return {name: maker for name, maker in _KNOWN["makers"].items() if name not in records}


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
    metrics = record["metrics"]
    nested = any(isinstance(value, Mapping) for value in metrics.values())
    depth = nested + (nested and record["name"] in _KNOWN["two_levels"])
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
    drawn = []
    for name, plot in _KNOWN["plots"].items():
        if (record := records.get(name)) is None:
            continue
        kind, metrics = plot["kind"], record["metrics"]
        found: list[tuple[str, str, Mapping[str, Any]]]
        if kind == "dots":
            shown = {plot["metric"]: plot["xlabel"]} if "metric" in plot else headlines(record)
            found = [(metric, label, intervals(record, metric)) for metric, label in shown.items()]
        else:
            found = [(name, plot["xlabel"], tradeoff(metrics) if kind == "pareto" else by_strength(metrics))]
        drawn += [
            Drawing(plot["name"].format(own), name, kind, values, plot["title"], label, plot.get("ylabel", ""))
            for own, label, values in found
            if values
        ]
    return drawn


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


def _source(record: Record) -> str:
    return f"{record['device']}, commit {record['commit'][:10]}, {record['seconds']:.0f} s"


def long_section(records: Mapping[str, Record]) -> str:
    """The results section of docs/results.md, `results.md.j2` with the records that are there."""
    quality, judge = records["counterfactual_quality"], records["judge"]
    if quality["commit"] != judge["commit"]:
        found = f"counterfactual_quality: {quality['commit']}, judge: {judge['commit']}"
        raise ValueError(f"records of more than one commit cannot be mixed into one table: {found}")
    reading = ", ".join(f"{label} {value:.4f}" for label, value in judge["metrics"]["auc"].items())
    page = _PAGES.from_string(Path(__file__).with_name("results.md.j2").read_text(encoding="utf-8"))
    functions = {"quality_table": quality_table, "markdown": markdown, "table": table, "tradeoff": tradeoff}
    return page.render(_KNOWN, records=records, reading=reading, source=_source, **functions)


PAGES: dict[str, Callable[[Mapping[str, Record]], str]] = {
    "README.md": lambda records: quality_table(records["counterfactual_quality"], _KNOWN["short"]),
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
