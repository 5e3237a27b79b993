"""Tables and README sections come from records and from nothing else."""

import pytest

from prism_lib import report, results

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


def test_a_table_has_a_row_per_edit_and_says_where_it_is_from():
    text = report.quality_table(RECORD)
    assert "| remove support devices | 0.12 (0.10 to 0.15) | 1.00 |" in text
    assert "| add cardiomegaly | – | 0.50 |" in text
    assert "commit 0123456789" in text and "8 held-out patients" in text


def test_intervals_fall_back_to_the_mean():
    assert report.intervals(RECORD, "true_error_ratio") == {"remove_support_devices": (0.1234, 0.1, 0.15)}
    assert report.intervals(RECORD, "flip_rate")["add_cardiomegaly"] == (0.5, 0.5, 0.5)
    assert set(report.drawn(RECORD)) == {"true_error_ratio", "flip_rate"}


def test_text_between_markers_is_replaced_and_the_rest_kept(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- results:begin -->\nold \\1\n<!-- results:end -->\nafter\n")
    report.replace_between(path, "results", "new \\g<0>\n")
    assert path.read_text() == "before\n<!-- results:begin -->\nnew \\g<0>\n<!-- results:end -->\nafter\n"
    with pytest.raises(ValueError, match="needs exactly one"):
        report.replace_between(path, "speed", "x")


def test_a_trial_never_reaches_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "replace_between", lambda *_: pytest.fail("the README was written"))
    metrics = {"remove_x": dict.fromkeys(results.RECORDS["counterfactual_quality"], 0.5) | {"images": 2}}
    about = {
        "dataset": "phantom",
        "notebook": "03",
        "parameters": {},
        "seed": 0,
        "model": "m",
        "seconds": 1.0,
    }
    results.record("counterfactual_quality", metrics=metrics, figures_dir=tmp_path, **about)
    results.record("judge", metrics={"auc": {"A": 0.99}}, figures_dir=tmp_path, **about)
    section = report.update_readme("README.md", "phantom", tmp_path)
    assert "| remove x |" in section and "A 0.9900" in section
