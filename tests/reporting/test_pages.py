"""Tables and drawings follow from records, and what does not follow is found."""

import csv
import io
import json

import pytest

from prism_lib import paths
from prism_lib import records as results
from prism_lib.apps import cli
from prism_lib.records import record
from prism_lib.reporting import plots, tables

ABOUT = {"notebook": "03", "parameters": {}, "seed": 0, "model": "m", "seconds": 1.0}
QUALITY = {
    "remove_x": {"images": 8, "cpg": 0.9, "cpg_low": 0.8, "cpg_high": 0.95},
    "add_x": {"images": 8, "true_error_ratio": 0.4},
}
SETS = {
    name: {"worst_group_accuracy": value, "worst_group_accuracy_low": value - 0.1, "worst_group_accuracy_high": value,
           "auc": {"A": 0.9}, "worst_group_accuracy_by_seed": [value, value]}
    for name, value in {"as_is": 0.1, "prism": 0.7}.items()
}  # fmt: skip
STUDY = {"target": "A", "shortcut": "B", "strengths": [1.0], "images": 8, "added": 4, "seeds": [0, 1]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """figures/phantom of a checkout of its own, with three records, and its pages."""
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    monkeypatch.setattr(results, "commit", lambda: "c0ffee")
    record("counterfactual_quality", "phantom", metrics=QUALITY, **ABOUT)
    record("judge", "phantom", metrics={"auc": {"A": 0.99}}, **ABOUT)
    classifiers = ABOUT | {"parameters": {"study": STUDY}}
    record("classifiers", "phantom", metrics={"strength_100": SETS, "worst_group_gain": 0.6}, **classifiers)
    (tmp_path / "docs").mkdir()
    for page in tables.PAGES:
        (tmp_path / page).write_text("# P\n<!-- results:begin -->\n<!-- results:end -->\nafter \\1\n")
    return tmp_path / "figures" / "phantom"


def draw_all(folder):
    """What 08 does."""
    records = tables.load_all("phantom")
    tables.write_tables(records, folder)
    for drawing in tables.drawings(records):
        figure = plots.draw(drawing.kind, drawing.values, drawing.title, drawing.xlabel, drawing.ylabel)
        plots.save_figure(figure, drawing.name, folder / "plots", pdf=True)
        plots.plt.close(figure)
    tables.update_pages("phantom")


def test_a_table_in_three_forms(folder):
    made = tables.as_tables(tables.load_all("phantom")["counterfactual_quality"])
    rows = {row["row"]: row for row in csv.DictReader(io.StringIO(made["csv"]))}
    assert rows["remove_x"]["cpg_low"] == "0.8" and rows["add_x"]["cpg"] == ""
    assert "| remove x | 8.00 | 0.90 (0.80 to 0.95) | – |" in made["md"]
    assert "commit c0ffee" in made["md"]
    assert r"CPG $\uparrow$" in made["tex"] and r"\toprule" in made["tex"]


def test_rows_stand_where_the_record_has_them(folder):
    records = tables.load_all("phantom")
    frame = tables.frame(records["classifiers"])
    assert list(frame.index) == ["strength_100 / as_is", "strength_100 / prism", "all"]
    assert frame.loc["strength_100 / prism", "auc / A"] == 0.9
    assert frame.loc["all", "worst_group_gain"] == 0.6
    assert not [column for column in frame if "by_seed" in column]


def test_what_07_writes_passes_the_check(folder, tmp_path):
    draw_all(folder)
    assert tables.check_figures("phantom", pages=True) == []
    drawn = json.loads((folder / "plots" / "classifiers.json").read_text())
    assert drawn["record"] == "classifiers" and drawn["commit"] == "c0ffee"
    assert drawn["values"]["100 %"]["prism"] == pytest.approx([0.7, 0.6, 0.7])
    assert (folder / "plots" / "classifiers.pdf").is_file()
    long = (tmp_path / "docs" / "results.md").read_text()
    assert "| prism | 0.70 (0.60 to 0.70) |" in long and long.endswith("<!-- results:end -->\nafter \\1\n")
    assert "| remove x |" in (tmp_path / "README.md").read_text()
    assert cli.main(["figures", "--check"]) == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda f: replace_text(f / "judge.json", "0.99", "0.98"), "judge.md does not follow"),
        (lambda f: replace_text(f / "judge.json", "0.99", "0.98"), "results.md does not follow"),
        (lambda f: replace_text(f / "counterfactual_quality.json", "0.95", "0.96"), "quality_cpg.json does not follow"),
        (lambda f: replace_text(f / "tables" / "classifiers.tex", "0.70", "0.90"), "classifiers.tex does not follow"),
        (lambda f: replace_text(f / "plots" / "classifiers.json", "0.7", "0.9"), "classifiers.json does not follow"),
        (lambda f: replace_text(f.parents[1] / "README.md", "0.90", "0.99"), "README.md does not follow"),
        (lambda f: (f.parents[1] / "README.md").write_text("# P"), "needs exactly one"),
        (lambda f: (f / "plots" / "quality_cpg.png").unlink(), "quality_cpg.png is missing"),
        (lambda f: (f / "tables" / "judge.csv").unlink(), "judge.csv is missing"),
        (lambda f: (f / "tables" / "old.md").write_text("1"), "old.md is of no record"),
    ],
)
def test_what_no_longer_follows_is_named(folder, change, problem, capsys):
    draw_all(folder)
    change(folder)
    assert cli.main(["figures", "--check", "phantom"]) == 1
    assert problem in capsys.readouterr().out


def replace_text(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_writing_again_removes_what_no_record_gives(folder):
    draw_all(folder)
    (folder / "classifiers.json").unlink()
    tables.write_tables(tables.load_all("phantom"), folder)
    assert not list(folder.glob("*/classifiers.*"))
    assert tables.absent(tables.load_all("phantom"))["classifiers"] == "06_classifiers"


def test_records_of_another_data_set_or_commit_are_not_mixed(folder, monkeypatch):
    monkeypatch.setattr(results, "commit", lambda: "decaf")
    record("judge", "phantom", metrics={"auc": {"A": 0.99}}, **ABOUT)
    with pytest.raises(ValueError, match=r"more than one commit .* counterfactual_quality: c0ffee, judge: decaf"):
        tables.update_pages("phantom")
    record("judge", "nih", metrics={"auc": {"A": 0.99}}, figures_dir=folder, **ABOUT)
    with pytest.raises(ValueError, match=r"judge.json is the record 'judge' of data set 'nih'"):
        tables.load_all("phantom")
    with pytest.raises(FileNotFoundError, match="no record in"):
        tables.load_all("isic")


def test_baselines_and_entanglement_are_drawn_from_their_records(folder):
    error = {"true_error_ratio": 0.4, "true_error_ratio_low": 0.3, "true_error_ratio_high": 0.5}
    methods = {"ours": error | {"seconds_per_image": 2.0, "remove_x": error}}
    record("baselines", "phantom", metrics=methods, **ABOUT)
    carried = {"confounding 0, prism, mask off": {"carried_along": 0.2, "true_error_ratio": 0.5}}
    record("entanglement", "phantom", metrics=carried, **ABOUT)
    draw_all(folder)
    records = tables.load_all("phantom")
    drawn = {item.name: item.values for item in tables.drawings(records)}
    assert drawn["baselines_pareto"] == {"ours": (2.0, 0.4, 0.3, 0.5)}
    assert drawn["entanglement"] == {"confounding 0, prism, mask off": (0.2, 0.2, 0.2)}
    assert list(tables.frame(records["baselines"]).index) == ["ours", "ours / remove_x"]
    assert not {"baselines", "entanglement"} & tables.absent(records).keys()
    assert tables.check_figures("phantom") == []
