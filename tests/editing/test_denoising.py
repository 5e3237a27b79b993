"""Forking: which edits share a row, counted by hand."""

from prism_lib.editing.denoising import stages


def test_five_windows_fork_one_after_the_other():
    """Methods that end at steps 20, 25, 30, 35 and 40 of 50 need 140 rows, not 250."""
    ends = (20, 25, 30, 35, 40)
    found = stages([0] * 5, 50, lambda edit, step: step < ends[edit])
    assert [len(set(rows)) for rows in found] == [1] * 20 + [2] * 5 + [3] * 5 + [4] * 5 + [5] * 15
    assert found[20] == (0, 1, 1, 1, 1)
    assert found[-1] == (0, 1, 2, 3, 4)


def test_edits_that_parted_never_share_a_row_again():
    found = stages([0, 0], 3, lambda edit, step: edit if step == 1 else 0)
    assert found == [(0, 0), (0, 1), (0, 1)]


def test_edits_of_different_images_never_share_a_row():
    assert stages([0, 0, 1], 2, lambda edit, step: step) == [(0, 0, 1), (0, 0, 1)]
