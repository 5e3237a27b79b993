"""Tables and sections of pages come from records and from nothing else."""

import pytest

from prism_lib import paths, records
from prism_lib.reporting import tables
from prism_lib.reporting.tables import (
    BASE,
    HEADLINES,
    headlines,
    intervals,
    load_all,
    long_section,
    quality_table,
    tradeoff,
    update_pages,
)

VALUES = {
    "true_error_ratio": 0.1234,
    "true_error_ratio_low": 0.1,
    "true_error_ratio_high": 0.15,
    "images": 8,
    "flip_rate": 1.0,
}
RECORD = {
    "metrics": {"remove_support_devices": VALUES, "add_cardiomegaly": {"images": 8, "flip_rate": 0.5}},
    "device": "cpu",
    "commit": "0123456789abcdef",
    "seconds": 61.0,
}
QUALITY = tuple(name for name in HEADLINES if name != "identity_l1")
PROMISED = {  # metrics that the phantom's records have at some depth
    "quickstart": ("true_error_ratio",),
    "counterfactual_quality": QUALITY,
    "judge": ("auc",),
    "batches": ("largest_difference",),
    "axioms": ("composition",),
    "classifiers": ("worst_group_gain", "gap_closed"),
    "dependence": ("change", "true_change", "effect_ratio", "rank_correlation", "confirmed"),
    "identifiability": ("true_error_ratio", "mask_recall"),
    "editing_speed": ("speedup_direct_sweep_batch1", "speedup_null_text"),
    "bulk": ("speedup_two_processes",),
    "training_speed": ("speedup_cached",),
    "explorer": ("seconds_to_first_counterfactual", "seconds_per_edit"),
    "judges": ("agreement",),
    "side_by_side": ("speedup",),
    "threads": ("share_of_alone_passive",),
}


def test_a_table_has_a_row_per_edit_and_says_where_it_is_from():
    text = quality_table(RECORD)
    assert "| remove support devices | 0.12 (0.10 to 0.15) | 1.00 |" in text
    assert "| add cardiomegaly | – | 0.50 |" in text
    assert "commit 0123456789" in text and "8 held-out patients" in text


def test_what_every_edit_has_in_common_is_said_once():
    rows = {
        "remove_x": {"images": 8, "cpg": 0.9, "flip_rate": 1.0},
        "add_x": {"images": 8, "cpg": 0.8, "flip_rate": 1.0},
    }
    text = quality_table(RECORD | {"metrics": rows})
    assert "| edit | CPG ↑ |" in text and "In every edit: flip rate 1.00. 8 held-out patients" in text


def test_intervals_fall_back_to_the_mean():
    assert intervals(RECORD, "true_error_ratio") == {"remove_support_devices": (0.1234, 0.1, 0.15)}
    assert intervals(RECORD, "flip_rate")["add_cardiomegaly"] == (0.5, 0.5, 0.5)
    assert set(headlines(RECORD)) == {"true_error_ratio", "flip_rate"}


def test_table_shows_intervals_where_there_are_any():
    metrics = {"one": {"cpg": 0.876, "cpg_low": 0.8, "cpg_high": 0.9}, "two": {"cpg": 1, "l1": 0.5}}
    shown = tables.table(metrics, {"cpg": "CPG", "l1": "L1"})
    assert shown.to_dict("index") == {
        "one": {"CPG": "0.88 (0.80 to 0.90)", "L1": ""},
        "two": {"CPG": "1.00", "L1": "0.50"},
    }


def keys(metrics):
    """Names of metrics at any depth."""
    return {
        key for name, value in metrics.items() for key in ({name} | (keys(value) if isinstance(value, dict) else set()))
    }


def test_every_committed_record_is_known_and_whole():
    committed, makers = load_all("phantom"), tables.absent({})
    for name, record in committed.items():
        assert name in makers and keys(record["metrics"]).issuperset(PROMISED.get(name, ())), name
    for maker in set(makers.values()) - {"prism tune"}:
        assert (paths.root() / maker).is_file() or (paths.notebooks() / f"{maker}.ipynb").is_file(), maker


ABOUT = {"dataset": "phantom", "notebook": "03", "parameters": {}, "seed": 0, "model": "m", "seconds": 1.0}


@pytest.fixture
def folder(tmp_path):
    """The two records that the section always has."""
    metrics = {"remove_x": dict.fromkeys(QUALITY, 0.5) | {"images": 2}}
    records.record("counterfactual_quality", metrics=metrics, figures_dir=tmp_path, **ABOUT)
    records.record("judge", metrics={"auc": {"A": 0.99}}, figures_dir=tmp_path, **ABOUT)
    return tmp_path


def test_a_trial_never_reaches_a_page(folder, monkeypatch):
    monkeypatch.setattr(tables, "write_text", lambda *_: pytest.fail("a page was written"))
    sections = update_pages("phantom", folder)
    assert "| remove x |" in sections["README.md"] and "A 0.9900" in sections["docs/results.md"]


def test_pictures_and_the_classifiers_table_come_with_their_records(folder):
    few = long_section(load_all("phantom", folder))
    assert "![" not in few and "training set" not in few
    points = {f"steps {n}": {"seconds_per_image": n, "true_error_ratio": 0.2} for n in (3.0, 4.0)}
    records.record("ablations", metrics=points, figures_dir=folder, **ABOUT)
    sets = {"as_is": {"worst_group_accuracy": 0.25}, "prism": {"worst_group_accuracy": 0.75}}
    study = {"target": "A", "shortcut": "B", "strengths": [1.0], "images": 8, "added": 4, "seeds": [0, 1]}
    metrics = {"strength_100": sets, "worst_group_gain": 0.5, "gap_closed": 0.8}
    records.record("classifiers", metrics=metrics, figures_dir=folder, **(ABOUT | {"parameters": {"study": study}}))
    section = long_section(load_all("phantom", folder))
    assert "(../figures/phantom/plots/ablations_pareto.png)\n\n2 variants" in section
    assert "| prism | 0.75 |" in section and "(../figures/phantom/plots/classifiers.png)" in section
    drawn = {drawing.name for drawing in tables.drawings(load_all("phantom", folder))}
    assert {"ablations_pareto", "classifiers"} <= drawn, "the page links what 08 draws"


def test_edits_that_an_image_leaves_open_are_named(folder):
    names = ("true_error_ratio", "blend_error_ratio", "mask_recall")
    metrics = {"add_x": dict.fromkeys(names, 0.5), "remove_x": dict.fromkeys(names, 0.0)}
    records.record(
        "identifiability", metrics={k: v | {"images": 4} for k, v in metrics.items()}, figures_dir=folder, **ABOUT
    )
    section = long_section(load_all("phantom", folder))
    assert "| add x | 0.50 | 0.50 | 0.50 |" in section
    assert "below 0.005 for: remove x. 4 patients an edit" in section


def test_what_was_measured_once_is_one_point_of_the_tradeoff():
    base = {
        "true_error_ratio": 0.2,
        "true_error_ratio_low": 0.1,
        "true_error_ratio_high": 0.3,
        "seconds_per_image": 2.0,
    }
    other = base | {"seconds_per_image": 3.0}
    points = tradeoff({"method direct": base, "guidance_scale 2": base, "guidance_scale 5": other})
    assert points == {BASE: (2.0, 0.2, 0.1, 0.3), "guidance_scale 5": (3.0, 0.2, 0.1, 0.3)}
