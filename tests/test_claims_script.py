"""tiny/claims.py: which rows are measured, curves read at equal values, and tables."""
import argparse
import math

import pytest

import claims


def chosen(quick=False, only=None, skip=()):
    args = argparse.Namespace(quick=quick, only=only, skip=list(skip))
    return [row.title for row in claims.chosen_rows(args)]


def test_rows_are_chosen_by_parts_of_their_titles():
    assert set(chosen(quick=True)) < set(chosen())
    assert all("pair" in title for title in chosen(only=["pair"])) and chosen(only=["pair"])
    assert not any("pair" in title for title in chosen(skip=["pair"]))


def test_two_curves_are_read_in_the_middle_of_what_they_share():
    assert claims.at_equal([(0, 0), (2, 2)], [(1, 5), (3, 7)]) == (1.5, 5.5)
    assert all(math.isnan(y) for y in claims.at_equal([(0, 0), (1, 1)], [(2, 2), (3, 3)]))


@pytest.mark.parametrize("arguments", [["--concepts", "1"], ["--seeds", "0"], ["--only", "no such row"]])
def test_a_wrong_command_is_one_sentence(arguments):
    with pytest.raises(ValueError):
        claims.main(arguments)
