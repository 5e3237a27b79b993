"""The log of a run: one row per step, continued after a kill."""

import pytest

from prism_lib.training.log import JsonlTracker, curve, curves_by_timestep, read_log, summary


def test_rows_beyond_the_checkpoint_and_a_torn_line_are_written_again(tmp_path):
    path = tmp_path / "log.jsonl"
    tracker = JsonlTracker(path, 0)
    for step in (10, 20, 30):
        tracker.log({"loss": float(step)}, step=step)
    with path.open("a") as stream:
        stream.write('{"step": 40, "lo')
    assert read_log(tmp_path)["step"].tolist() == [10, 20, 30]
    tracker = JsonlTracker(path, 20)
    tracker.log({"loss": 3.0}, step=30)
    tracker.log({"validation_loss": 7.0, "validation_loss_t0_199": 9.0}, step=30)
    log = read_log(tmp_path)
    assert curve(log, "loss") == ([10, 20, 30], [10.0, 20.0, 3.0])
    assert curve(log, "validation_loss") == ([30], [7.0])
    assert curves_by_timestep(log) == {"t = 0 to 199": ([30], [9.0])}
    assert summary(log) == {
        "steps": 30.0, "loss": 3.0, "validation_loss_first": 7.0, "validation_loss": 7.0,
    }  # fmt: skip


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl does not exist"):
        read_log(tmp_path)
