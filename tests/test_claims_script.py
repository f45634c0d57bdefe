"""The arithmetic of the claims, their prompts, and what the script does with a bad command."""
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tiny"))
import claims
import make_examples
import world


def study(**arguments):
    return claims.Study(None, None, None, Path("work"), [make_examples.unseen_concept(k) for k in range(8)],
                        SimpleNamespace(**arguments))


def test_prompts_are_new_to_the_concept_but_not_to_the_base_model():
    for k, (_, individual, specs) in enumerate(study().concepts):
        for text, scene, accessory in study().prompts(k):
            assert scene not in {spec.scene for spec in specs}
            assert (individual.kind, scene) not in world.HELD_OUT_SCENE
            assert (individual.kind, accessory) not in world.HELD_OUT_ACCESSORY
            assert world.scene_words(scene) in text and "{}" in text


def test_every_row_of_every_claim_is_drawn():
    drawn = claims.rows(training_betas=(0.5,))
    titles = [row.title for row in drawn]
    assert len(set(titles)) == len(titles)
    for _, measures, a, b in claims.COMPARISONS:
        assert {a, b} <= set(titles) and set(measures) <= set(claims.MEASURES)
    assert {row.training for row in drawn} <= {None, "beta 0.5", *claims.TRAININGS}


def test_results_of_other_training_lengths_are_kept_apart():
    assert study(steps=5, batch=0).file("no masks", 0) != study(steps=0, batch=0).file("no masks", 0)


def test_the_interval_is_students():
    mean, half = claims.mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert mean == 4.5 and half == pytest.approx(2.365 * math.sqrt(6 / 8), rel=0.02)
    alone, width = claims.mean_and_interval([1.0, math.nan])
    assert alone == 1.0 and math.isnan(width)
    assert claims.written([math.nan]) == "-" and claims.written([0.5, 0.5], 100) == "50 ± 0"


def test_curves_are_compared_at_equal_x():
    a, b = [(0.0, 1.0), (1.0, 0.0)], [(0.5, 0.2), (1.5, 0.0)]
    ya, yb = claims.at_equal(a, b)
    assert ya == pytest.approx(0.25) and yb == pytest.approx(0.15)  # at x = 0.75
    assert all(map(math.isnan, claims.at_equal(a, [(2.0, 0.0), (3.0, 0.0)])))


def test_variety_is_the_mean_over_pairs_within_a_prompt():
    x = torch.zeros(2, 3, 4, 4)
    assert claims.variety(x, claims.root_mean_square) == 0
    x[1, 0] = 1
    assert claims.variety(x, claims.root_mean_square) == pytest.approx(2 / 6)
    assert claims.silhouette_distance(torch.ones(2, 2), torch.tensor([[1.0, 1.0], [0.0, 0.0]])) == 0.5


@pytest.mark.parametrize("arguments", [["--concepts", "1"], ["--seeds", "1"], ["--sampling-steps", "0"],
                                       ["--weights", "missing_folder"]])
def test_a_bad_command_is_refused_in_a_sentence(arguments, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tiny" / "claims.py", "--workdir", tmp_path, *arguments],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " in done.stderr
