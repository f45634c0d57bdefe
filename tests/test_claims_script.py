"""tiny/claims.py: which rows are measured, curves read at equal values, and tables."""
import math

import pytest

import claims


def test_rows_are_chosen_by_parts_of_their_titles():
    pairs, others = claims.chosen_rows(["pair"], []), claims.chosen_rows([], ["pair"])
    assert pairs and all("pair" in row.title for row in pairs)
    assert set(pairs) | set(others) == set(claims.ROWS) and not set(pairs) & set(others)


def test_two_curves_are_read_in_the_middle_of_what_they_share():
    assert claims.at_equal([(0, 0), (2, 2)], [(1, 5), (3, 7)]) == (1.5, 5.5)
    assert all(math.isnan(y) for y in claims.at_equal([(0, 0), (1, 1)], [(2, 2), (3, 3)]))


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--only", "no such row"]])
def test_a_wrong_command_is_one_sentence(arguments):
    with pytest.raises(ValueError):
        claims.main(arguments)
