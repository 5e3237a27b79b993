"""What `07_figures` writes from records alone: tables, and drawings as plain data, which `plotting.draw` draws.

Beside every picture lies a JSON with the numbers drawn and the record they are from, so that `check` can tell, without
looking at a pixel, whether tables, drawings and README still follow from the records.

    figures/<dataset>/<record>.json                   what was measured
    figures/<dataset>/tables/<record>.csv .md .tex    every record as a table
    figures/<dataset>/plots/<name>.json .png .pdf     every drawing
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from prism_lib import paths
from prism_lib.files import write_text
from prism_lib.records import load_record, markdown, table
from prism_lib.reporting.tables import HEADLINES, between, by_strength, drawn, intervals, section, tradeoff

# Which notebook or benchmark leaves a record.
MAKERS: dict[str, str] = {
    "quickstart": "00_quickstart",
    "data": "01_data",
    "finetuning": "02_finetuning",
    "counterfactual_quality": "03_counterfactuals",
    "judge": "03_counterfactuals",
    "batches": "03_counterfactuals",
    "axioms": "03_counterfactuals",
    "inversion_methods": "04_ablations",
    "ablations": "04_ablations",
    "baselines": "05_baselines",
    "entanglement": "05_baselines",
    "hard_cases": "05_baselines",
    "corner_text": "05_baselines",
    "classifiers": "06_classifiers",
    "rendering": "benchmarks/rendering.py",
    "identifiability": "benchmarks/identifiability.py",
    "editing_speed": "benchmarks/editing.py",
    "bulk": "benchmarks/bulk.py",
    "training_speed": "benchmarks/training.py",
    "resume": "benchmarks/training.py",
    "preparation": "benchmarks/preparation.py",
    "explorer": "benchmarks/explorer.py",
    "judges": "benchmarks/judges.py",
}
# At which depth of the metrics a table's rows stand, where it is not 1 (an edit, a method).
ROW_DEPTH = {"classifiers": 2, "baselines": 2, "inversion_methods": 2}

Records = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Drawing:
    """A picture as data; ``kind`` is one of `plotting.KINDS`, ``values`` what it takes."""

    name: str
    record: str
    kind: str
    values: Mapping[str, Any]
    xlabel: str
    ylabel: str = ""

    def to_json(self, record: Mapping[str, Any]) -> str:
        """The numbers drawn and where they are from."""
        source = {field: record[field] for field in ("dataset", "commit", "created")}
        return json.dumps(asdict(self) | source, indent=1) + "\n"


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


def absent(records: Records) -> dict[str, str]:
    """Known records that are not there, and what makes them."""
    return {name: maker for name, maker in MAKERS.items() if name not in records}


def frame(record: Mapping[str, Any]) -> pd.DataFrame:
    """A record's metrics as numbers: a row per edit, method or training set, columns as they are named there.

    What lies deeper than the row becomes columns joined by " / "; lists, which are curves, are left out.
    """
    metrics = record["metrics"]
    nested = any(isinstance(value, Mapping) for value in metrics.values())
    depth = ROW_DEPTH.get(record["name"], 1 if nested else 0)
    rows: dict[str, dict[str, float]] = {}
    for path, value in _leaves(metrics):
        row = " / ".join(path[: min(depth, len(path) - 1)]) or "all"
        rows.setdefault(row, {})[" / ".join(path[min(depth, len(path) - 1) :])] = value
    return pd.DataFrame.from_dict(rows, orient="index")


def tables(record: Mapping[str, Any]) -> dict[str, str]:
    """A record as CSV (numbers), Markdown and LaTeX (values with their intervals), by file ending."""
    numbers = frame(record)
    bounds = {f"{name}_{end}" for name in numbers.columns for end in ("low", "high")}
    shown = {name: HEADLINES.get(name, name.replace("_", " ")) for name in numbers.columns if name not in bounds}
    rows = {
        str(row): {str(name): float(value) for name, value in values.dropna().items()}
        for row, values in numbers.iterrows()
    }
    text = table(rows, shown)
    text.index = [row.replace("_", " ") for row in text.index]
    if len(text) == 1:  # one row of many numbers reads better as a column
        text = text.T
    source = f"Record {record['name']}: commit {record['commit'][:10]}, {record['device']}, {record['seconds']:.0f} s."
    buffer = io.StringIO()
    numbers.to_csv(buffer, index_label="row", lineterminator="\n")
    return {"csv": buffer.getvalue(), "md": f"{markdown(text)}\n{source}\n", "tex": _latex(text, source)}


def drawings(records: Records) -> list[Drawing]:
    """Everything that can be drawn from the records that are there."""
    return [drawing for name, draw in DRAWN.items() if name in records for drawing in draw(records[name])]


def write(records: Records, folder: Path) -> list[Path]:
    """Write all tables and the data of all drawings; what no record gives any more is removed."""
    expected = _expected(records)
    for path in _strangers(folder, expected):
        path.unlink()
    return [write_text(folder / path, text) for path, text in expected.items()]


def check(dataset: str, figures_dir: str | os.PathLike[str] = "", readme: Path | None = None) -> list[str]:
    """What in a figures folder, and in the README if given, no longer follows from the records; empty if all does."""
    folder = paths.figures(dataset, figures_dir)
    expected = _expected(load_all(dataset, figures_dir))
    problems = [f"{path} is of no record" for path in _strangers(folder, expected)]
    for path, text in expected.items():
        if not (folder / path).is_file():
            problems.append(f"{folder / path} is missing")
        elif (folder / path).read_text(encoding="utf-8") != text:
            problems.append(f"{folder / path} does not follow from its record")
        if path.parent.name == "plots" and not (folder / path).with_suffix(".png").is_file():
            problems.append(f"{(folder / path).with_suffix('.png')} is missing")
    if readme is not None and between(readme, "results") != section(dataset, figures_dir):
        problems.append(f"the results section of {readme} does not follow from the records")
    return problems


def _expected(records: Records) -> dict[Path, str]:
    """Path below the figures folder -> text, of everything that follows from the records."""
    texts = {Path("tables", f"{name}.{kind}"): text for name in records for kind, text in tables(records[name]).items()}
    return texts | {
        Path("plots", f"{item.name}.json"): item.to_json(records[item.record]) for item in drawings(records)
    }


def _strangers(folder: Path, expected: Iterable[Path]) -> list[Path]:
    """Tables and drawings, with their pictures, that no record gives."""
    known = {path.with_suffix("") for path in expected}
    found = (path for part in ("tables", "plots") for path in sorted((folder / part).glob("[!.]*")))
    return [path for path in found if path.relative_to(folder).with_suffix("") not in known]


def _quality(record: Mapping[str, Any]) -> list[Drawing]:
    return [
        Drawing(f"quality_{metric}", record["name"], "dots", intervals(record, metric), label)
        for metric, label in drawn(record).items()
    ]


def _classifiers(record: Mapping[str, Any]) -> list[Drawing]:
    values = by_strength(record["metrics"])
    return [
        Drawing("classifiers", record["name"], "grouped", values, "worst-group accuracy", "target and shortcut agree")
    ]


def _pareto(record: Mapping[str, Any]) -> list[Drawing]:
    points = tradeoff(record["metrics"])
    labels = ("seconds per image", "error to truth")
    return [Drawing(f"{record['name']}_pareto", record["name"], "pareto", points, *labels)] if points else []


def _entanglement(record: Mapping[str, Any]) -> list[Drawing]:
    shares = intervals(record, "carried_along")
    return [Drawing("entanglement", record["name"], "dots", shares, "share carried along")]


def _hard_cases(record: Mapping[str, Any]) -> list[Drawing]:
    errors = intervals(record, "true_error_ratio")
    return [Drawing("hard_cases", record["name"], "dots", errors, "error to truth")]


DRAWN: dict[str, Callable[[Mapping[str, Any]], list[Drawing]]] = {
    "counterfactual_quality": _quality,
    "classifiers": _classifiers,
    "inversion_methods": _pareto,
    "ablations": _pareto,
    "baselines": _pareto,
    "entanglement": _entanglement,
    "hard_cases": _hard_cases,
}


def _leaves(metrics: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], float]]:
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        elif not isinstance(value, list):
            yield (*path, key), value


def _latex(text: pd.DataFrame, source: str) -> str:
    """booktabs; arrows become LaTeX's."""
    body = text.replace("", "--").to_latex(escape=True)
    return f"% {source}\n" + body.replace("↑", r"$\uparrow$").replace("↓", r"$\downarrow$")
