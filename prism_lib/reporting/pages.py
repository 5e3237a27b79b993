"""The results sections of README.md and docs/results.md, written from records, and the check of everything written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from prism_lib import paths
from prism_lib.files import write_text
from prism_lib.reporting import tables
from prism_lib.reporting.tables import CLASSIFIERS, HEADLINES, Record, headlines, load_all, markdown, table, tradeoff

SHORT = ("true_error_ratio", "flip_rate", "cpg", "side_effect_rate", "changed_outside_mask")  # those of the README


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
    expected = tables.expected_files(records)
    problems = [f"{path} is of no record" for path in tables.strangers(folder, expected)]
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
