"""Parts that do not fit are halved, in order and without loss."""

import pytest
import torch

from prism_lib.editing.counterfactuals import in_parts


def limited(room, seen):
    def work(rows):
        seen.append((rows.start, rows.stop))
        if rows.stop - rows.start > room:
            raise torch.OutOfMemoryError("no room")
        return list(range(rows.start, rows.stop))

    return work


def test_parts_that_fit_are_done_as_they_are():
    seen = []
    assert in_parts(6, 4, limited(4, seen)) == list(range(6))
    assert seen == [(0, 4), (4, 6)]
    assert in_parts(0, 4, limited(4, [])) == []


def test_a_part_that_does_not_fit_is_halved_and_so_are_later_ones_before_they_fail(caplog):
    seen = []
    assert in_parts(14, 7, limited(2, seen)) == list(range(14))
    assert seen == [(0, 7), (0, 3), *((n, n + 1) for n in range(14))]
    assert [record.args for record in caplog.records] == [(3,), (1,)]


def test_one_row_that_does_not_fit_and_any_other_error_are_raised():
    with pytest.raises(torch.OutOfMemoryError):
        in_parts(4, 4, limited(0, []))
    with pytest.raises(ZeroDivisionError):
        in_parts(4, 4, lambda rows: [1 // 0])
