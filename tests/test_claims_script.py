"""tiny/claims.py: which rows are measured, what their intervals say, and what is written."""
import json
import math
from types import SimpleNamespace

import pytest

import claims


def test_rows_are_chosen_by_parts_of_their_titles():
    pairs, others = claims.chosen_rows(["pair"], []), claims.chosen_rows([], ["pair"])
    assert pairs and all("pair" in row.title for row in pairs)
    assert set(pairs) | set(others) == set(claims.ROWS) and not set(pairs) & set(others)
    with pytest.raises(ValueError, match="no row"):
        claims.main(["--only", "no such row"])


def test_two_curves_are_read_in_the_middle_of_what_they_share():
    assert claims.at_equal([(0, 0), (2, 2)], [(1, 5), (3, 7)]) == (1.5, 5.5)
    assert all(math.isnan(y) for y in claims.at_equal([(0, 0), (1, 1)], [(2, 2), (3, 3)]))


@pytest.mark.parametrize("differences, says", [
    ([0.1, 0.2, 0.1, 0.2], "yes"), ([-0.1, -0.2, -0.1, -0.2], "no"), ([0.1, -0.1, 0.2, -0.2], "at most 29"),
    ([0.1, 0.2], "-")])                             # two concepts are too few for an interval
def test_a_claim_holds_when_its_interval_lies_above_zero(differences, says):
    assert claims.verdict(differences, 100) == says


def test_the_results_hold_a_verdict_of_every_claim_and_the_values_of_every_picture(tmp_path):
    """Of four concepts of two pictures: locked keys keep both things in all of them, trained keys in none."""
    args = SimpleNamespace(concepts=4, seeds=2, sampling_steps=1, records=tmp_path / "kept.json")
    study = claims.Study(SimpleNamespace(fingerprint="of the base"), None, None, tmp_path, args)
    (tmp_path / "records").mkdir()
    for row in claims.ROWS:
        for names in claims.cases(row.who, 4):
            hits = [row.training == "locked keys"] * 2
            alone = dict.fromkeys(claims.MEASURES, [0.3333] * 2)
            record = dict.fromkeys(claims.PAIR_MEASURES, hits) if "pair" in row.title else alone
            study.record_file(row, names).write_text(json.dumps(record))
    claims.write_results(study, claims.ROWS)
    text = (study.folder / "claims.md").read_text(encoding="utf-8")
    assert "| pair: locked keys | pair: trained keys | 100 ± 0 | 0 ± 0 | 100 ± 0 | yes |" in text
    assert "| locked keys, beta 0.7 | tau 0.1 | 33 ± 0 | 33 ± 0 | 0 ± 0 | at most 0 |" in text
    kept = json.loads(study.args.records.read_text())
    assert kept["fingerprint"] == "of the base" and tuple(kept["rows"]) == claims.PUBLISHED
    assert kept["rows"]["pair: trained keys"]["both"] == [[0, 0]] * 4
    assert kept["rows"]["super-category"]["share"] == [[0.333, 0.333]] * 4
    assert (study.folder / "pareto.png").is_file()
    assert "| pair of examples: locked keys | 8 of 8 (100) |" in text      # two pairs, each in both orders
