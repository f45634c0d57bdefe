"""tiny/claims.py: which rows are measured, curves read at equal values, and tables."""
import argparse
import math
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tiny")]
import claims


def chosen(quick=False, only=None, skip=()):
    return [row.title for row in claims.chosen_rows(argparse.Namespace(quick=quick, only=only, skip=list(skip)))]


def test_rows_are_chosen_by_parts_of_their_titles():
    assert set(chosen(quick=True)) < set(chosen())
    assert all("pair" in title for title in chosen(only=["pair"])) and chosen(only=["pair"])
    assert not any("pair" in title for title in chosen(skip=["pair"]))


def test_two_curves_are_read_in_the_middle_of_what_they_share():
    assert claims.at_equal([(0, 0), (2, 2)], [(1, 5), (3, 7)]) == (1.5, 5.5)
    assert all(math.isnan(y) for y in claims.at_equal([(0, 0), (1, 1)], [(2, 2), (3, 3)]))


def test_a_table_of_cells_becomes_markdown():
    assert claims.markdown(["a", "b"], [["1", "2"]]).splitlines()[-1] == "| 1 | 2 |"


def test_an_interval_over_concepts_is_written_with_its_mean():
    assert claims.written([0.5, 0.6, 0.7, 0.8], 100).startswith("65 ±")
    assert "±" not in claims.written([0.5])


@pytest.mark.parametrize("arguments", [["--concepts", "1"], ["--seeds", "0"], ["--only", "no such row"]])
def test_a_wrong_command_is_one_sentence(arguments):
    with pytest.raises(ValueError):
        claims.main(arguments)
